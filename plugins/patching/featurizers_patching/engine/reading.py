"""Reads activations at sites, and logits, of prompts that run whole and without edits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from featurizers import Anatomy, Site
from featurizers.errors import ShapeError
from featurizers.models import eager, hook, unedited, without_cache
from torch import Tensor, nn

from featurizers_patching.engine.clean import Prompts
from featurizers_patching.engine.ending import narrowed
from featurizers_patching.engine.scope import active, entered
from featurizers_patching.engine.spots import own_columns


class Read:
    """Activations and logits of prompts.

    Args:
        model: a decoder with its head.
        prompts: to run, once.
        sites: where to read; heads of one module share one tensor.

    Attributes:
        logits: at the tokens that are read, ``(prompts, n, vocabulary)``.
    """

    def __init__(self, model: nn.Module, prompts: Prompts, sites: Sequence[Site]) -> None:
        anatomy = Anatomy(model)
        self._places = [anatomy.place(site) for site in sites]
        self._sites, self._shape = sites, (len(prompts), prompts.width)
        self._found: dict[tuple[int, str, bool], Tensor] = {}
        device = next(model.parameters()).device
        at = torch.as_tensor(prompts.at, device=device)
        with torch.no_grad(), unedited(), eager(), ExitStack() as stack:
            stack.enter_context(entered(model, self))
            by_key = {self._key(number): place for number, place in enumerate(self._places)}
            # sums last: their hooks check what the next module reads, if no other hook comes after them
            for key, place in sorted(by_key.items(), key=lambda each: not each[0][2]):
                keep = functools.partial(self._keep, key)
                stack.callback(hook(replace(place, columns=None, groups=1), keep, only_reads=True).remove)
            stack.enter_context(narrowed(model, self, at))
            self.logits: Tensor = model(**prompts.inputs(device), **without_cache(model)).logits[:, : at.shape[1]]

    def _key(self, number: int) -> tuple[int, str, bool]:
        place = self._places[number]
        return id(place.module), place.side, place.stream is None

    def _keep(self, key: tuple[int, str, bool], hidden: Tensor) -> Tensor:
        if active() is self:
            self._found[key] = hidden.reshape(-1, hidden.shape[-1]).clone()
        return hidden

    def rows(self, site: int, row: Tensor) -> Tensor:
        """Return activations of a site, given by its number, ``(rows, width)``.

        Args:
            site: number of the site.
            row: prompt times the width of the prompts, plus the token.

        Raises:
            ShapeError: the site has no activations of its own for each token.
        """
        found = self._found.get(self._key(site))
        if found is None or len(found) != self._shape[0] * self._shape[1]:
            raise ShapeError(f"{self._sites[site]}: it has no activations for each token, so that none can be patched")
        rows = found.index_select(0, row.to(found.device))
        return own_columns(self._places[site], rows)

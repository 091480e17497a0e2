"""Gradients of numbers that are computed from logits, at sites of prompts that run whole."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from featurizers import Anatomy, Site
from featurizers.errors import UsageError
from featurizers.models import eager, hook, unedited, without_cache, without_parameter_gradients
from torch import Tensor, nn

from featurizers_patching.engine.clean import Prompts
from featurizers_patching.engine.ending import narrowed
from featurizers_patching.engine.scope import active, entered
from featurizers_patching.engine.spots import own_columns


class Gradients:
    """A run of prompts whose graph is kept from some sites on.

    Args:
        model: a decoder with its head.
        prompts: to run together.
        sites: where gradients are taken.
        freeze: "attn.out", "mlp.out": no gradient goes into these modules by what they read.
        embedded: what to put in place of the token embeddings, ``(prompts, tokens, d)``; None for nothing.

    Attributes:
        logits: at the tokens that are read, ``(prompts, n, vocabulary)``, with their graph.

    Raises:
        UsageError: there is no gradient at a site.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        sites: Sequence[Site],
        freeze: Sequence[str] = (),
        embedded: Tensor | None = None,
    ) -> None:
        self._anatomy = anatomy = Anatomy(model)
        self._sites, self._shape = sites, (len(prompts), prompts.width)
        self._places = [anatomy.place(site) for site in sites]
        if routers := [str(site) for site in sites if site.kind == "mlp.router"]:
            raise UsageError(f"{routers[0]}: experts are chosen, so that there is no gradient; take method='exact'")
        self._kept: dict[tuple[int, str, bool], tuple[Tensor, int]] = {}
        device = next(model.parameters()).device
        at = torch.as_tensor(prompts.at, device=device)
        with _recording(model), ExitStack() as stack:
            stack.enter_context(entered(model, self))
            start = functools.partial(self._start, embedded)
            stack.callback(hook(anatomy.place("embed"), start, first=True).remove)
            for path in self._parts(freeze):
                module = model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(self._cut, with_kwargs=True).remove)
            by_key = {self._key(number): place for number, place in enumerate(self._places)}
            # sums last: their hooks check what the next module reads, if no other hook comes after them
            for key, place in sorted(by_key.items(), key=lambda each: not each[0][2]):
                keep, is_sum = functools.partial(self._keep, key), place.stream is not None
                whole = replace(place, columns=None, groups=1)
                stack.callback(hook(whole, keep, only_reads=is_sum).remove)
            stack.enter_context(narrowed(model, self, at))
            self.logits: Tensor = model(**prompts.inputs(device), **without_cache(model)).logits[:, : at.shape[1]]
        self._check()

    def _parts(self, freeze: Sequence[str]) -> list[str]:
        parts = [
            (number, self._anatomy.parts(number).attention if kind == "attn.out" else self._anatomy.parts(number).mlp)
            for kind in freeze
            for number in range(self._anatomy.n_layers)
        ]
        return [f"{self._anatomy.blocks.layers}.{number}.{part}" for number, part in parts if part is not None]

    def _key(self, number: int) -> tuple[int, str, bool]:
        place = self._places[number]
        return id(place.module), place.side, place.stream is None

    def _start(self, embedded: Tensor | None, hidden: Tensor) -> Tensor:
        if active() is not self:
            return hidden
        new = hidden.detach() if embedded is None else embedded.to(hidden).view(hidden.shape).clone()
        return new.requires_grad_().clone()  # a clone: some models scale it in place

    def _cut(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if active() is not self:
            return None
        return tuple(map(_detached, args)), {name: _detached(value) for name, value in kwargs.items()}

    def _keep(self, key: tuple[int, str, bool], hidden: Tensor) -> Tensor:
        if active() is not self:
            return hidden
        hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        self._kept[key] = hidden, hidden._version
        return hidden

    def _check(self) -> None:
        """Raise UsageError unless each site has activations for each token, which the model did not change later."""
        for number, site in enumerate(self._sites):
            kept, version = self._kept.get(self._key(number), (None, 0))
            if kept is None or kept.numel() != kept.shape[-1] * self._shape[0] * self._shape[1]:
                raise UsageError(f"{site}: it has no activations for each token, so that none can be patched")
            if kept._version != version:
                raise UsageError(f"{site}: the model changes it in place; take method='exact' or another site")

    def of(self, numbers: Tensor) -> list[Tensor]:
        """Return the gradients of the sum of some numbers, for each site ``(prompts * tokens, width)``.

        Raises:
            UsageError: the numbers do not depend on the logits by a gradient.
        """
        keys = list(self._kept)
        if not numbers.requires_grad:
            raise UsageError("the metric has no gradient, so that effects cannot be estimated; take method='exact'")
        tensors = [self._kept[key][0] for key in keys]
        found = dict(
            zip(keys, torch.autograd.grad(numbers.sum(), tensors, retain_graph=True, allow_unused=True), strict=True)
        )
        gradients = []
        for number, (site, place) in enumerate(zip(self._sites, self._places, strict=True)):
            gradient = found[self._key(number)]
            if gradient is None:
                raise UsageError(f"{site}: the metric has no gradient there; take method='exact'")
            gradients.append(own_columns(place, gradient.reshape(-1, gradient.shape[-1])))
        return gradients

    def activations(self, site: int) -> Tensor:
        """Return the activations of a site, given by its number, ``(prompts * tokens, width)``."""
        kept = self._kept[self._key(site)][0].detach()
        return own_columns(self._places[site], kept.reshape(-1, kept.shape[-1]))


@contextmanager
def _recording(model: nn.Module) -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad(), unedited(), eager(), without_parameter_gradients(model):
        yield


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value

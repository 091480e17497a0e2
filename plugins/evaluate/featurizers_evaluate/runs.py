"""`Runs`: runs of a model with and without other activations at some sites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import featurizers
import torch
from featurizers import Anatomy, Featurizer, Site, SiteMap
from featurizers.errors import UsageError
from featurizers.models import (
    NativeBackend,
    SourcedOperation,
    first_tensor,
    given,
    last_clean_block,
    restarted,
    without_cache,
    wrap_like,
)
from torch import Tensor

from featurizers_evaluate.documents import Batch

CHUNK: Final = 2**25
"""Logits of which the losses are computed at once."""


@dataclass(frozen=True, eq=False)
class Put(SourcedOperation):
    """Operation that puts given activations in the place of those that a model computes."""

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return the given activations in the dtype of the model's."""
        return given(source).to(base.device, base.dtype).expand_as(base)


@dataclass
class Clean:
    """What a run without edits gives.

    Attributes:
        activations: by site, ``(rows, width, d)``.
        logits: ``(rows, width, vocabulary)``; None if the run ended after the last site.
        block: output of the block from which runs with edits begin; None if they run everything.
        reconstructions: by site, those of the subject that is being measured.
    """

    activations: dict[Site, Tensor]
    logits: Tensor | None
    block: Any = None
    reconstructions: dict[Site, Tensor] = field(default_factory=dict)


class Runs:
    """Runs of one model.

    A run with edits begins after the last block that no edit reaches, with that block's output of the clean run. The
    first such run is compared with a run of the whole model, and if it differs all runs are whole.

    Args:
        model: a decoder with its head, as in `featurizers.intervene`.
        sites: all that are read or edited.
    """

    def __init__(self, model: object, sites: Sequence[Site]) -> None:
        self.model = model
        self.anatomy = Anatomy(model)
        self._sites = list(sites)
        self._identity: Featurizer[Any] = featurizers.create("identity")
        starts = [last_clean_block(self.anatomy, site) for site in sites]
        self._start = min(starts) if isinstance(self.anatomy.backend, NativeBackend) and starts else -1
        self._is_compared = False
        for site in sites:
            self.anatomy.place(site)

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        parameter = next(self.anatomy.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def clean(self, batch: Batch, *, logits: bool) -> Clean:
        """Run the model without edits; without logits it stops after the last site."""
        if not logits:
            return Clean(featurizers.collect(self.model, batch.inputs(), self._sites), None)
        kept: list[Any] = []
        with ExitStack() as stack:
            if self._start >= 0:
                block = self.anatomy.layers[self._start]  # type: ignore[index]  # a ModuleList
                handle = block.register_forward_hook(lambda *call: kept.append(call[-1]))
                stack.callback(handle.remove)
            operations = {site: featurizers.Collect(self._identity) for site in self._sites}
            found = stack.enter_context(featurizers.intervene(self.model, operations))
            result = self._logits(batch)
        return Clean({site: found[site] for site in self._sites}, result, kept[-1] if kept else None)

    def edited(self, batch: Batch, clean: Clean, activations: Mapping[Site, Tensor]) -> Tensor:
        """Return the logits with these activations in the place of the model's."""
        operations = {site: Put(self._identity, source=value) for site, value in activations.items()}
        return self._from_the_middle(batch, clean, lambda: featurizers.intervene(self.model, operations))

    def replaced(self, batch: Batch, clean: Clean, site_map: SiteMap[Any], excluded: Iterable[int]) -> Tensor:
        """Return the logits of the replacement model of a map, which is encoded from its own activations.

        Raises:
            UsageError: the map cannot take the place of the model's activations.
        """
        own = copy.copy(site_map)
        own.special_tokens = tuple({*site_map.special_tokens, *excluded})
        return self._from_the_middle(batch, clean, lambda: featurizers.replaced(self.model, own))

    def _from_the_middle(self, batch: Batch, clean: Clean, edit: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        if self._start < 0 or clean.block is None:
            with edit():
                return self._logits(batch)
        hidden = first_tensor(clean.block)
        wrap = wrap_like(clean.block)
        with restarted(self.anatomy.layers, self._start, hidden, wrap), edit():  # type: ignore[arg-type]
            logits = self._logits(batch)
        if self._is_compared:
            return logits
        self._is_compared = True
        with edit():
            whole = self._logits(batch)
        scale = float(whole.abs().max())
        if not torch.allclose(logits, whole, rtol=0.0, atol=1e-4 * max(scale, 1e-30), equal_nan=True):
            self._start = -1
        return whole

    @torch.no_grad()
    def _logits(self, batch: Batch) -> Tensor:
        inputs = {**without_cache(self.anatomy.model), **self.anatomy.arguments(batch.inputs())}
        output = self.anatomy.model(**inputs)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise UsageError(
                f"{type(self.anatomy.model).__name__} returns no logits, which the effect on the model needs: give a "
                "model with its language-model head, or metrics=['reconstruction', 'sparsity']"
            )
        return logits


def losses(logits: Tensor, clean: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the loss of the next token and the KL divergence from clean logits, each ``(rows, width)``.

    Args:
        logits: ``(rows, width, vocabulary)``.
        clean: logits to compare with; None for the loss alone.
        batch: whose next tokens the loss is of; at a token that none follows it has no meaning, see `has_next`.

    Returns:
        In nats. The divergence is KL(clean ‖ logits).
    """
    targets = batch.ids.roll(-1, dims=1).to(logits.device)
    loss = torch.zeros(logits.shape[:2], device=logits.device)
    divergence = None if clean is None else torch.zeros_like(loss)
    step = max(1, CHUNK // logits.shape[-1] // max(len(logits), 1))
    for start in range(0, logits.shape[1], step):
        part = slice(start, start + step)
        log_q = logits[:, part].float().log_softmax(dim=-1)
        loss[:, part] = -log_q.gather(-1, targets[:, part, None]).squeeze(-1)
        if clean is not None and divergence is not None:
            log_p = clean[:, part].float().log_softmax(dim=-1)
            p = log_p.exp()
            divergence[:, part] = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)
    return loss, divergence


def has_next(batch: Batch) -> Tensor:
    """Return ``(rows, width)``: True for measured tokens that another token follows."""
    following = torch.zeros_like(batch.is_token)
    following[:, :-1] = batch.is_token[:, 1:]
    return batch.is_measured & following

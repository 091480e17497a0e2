"""`Runs`: runs of a model with and without other activations at some sites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import featurizers
import torch
from featurizers import Anatomy, FeatureSpace, Featurizer, Site, SiteMap
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

from featurizers_evaluate.documents import Batch, Reading, batches
from featurizers_evaluate.subjects import StoredFeatures

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
        stored: features of harvests, by featurizer, which need not be computed.
    """

    activations: dict[Site, Tensor]
    logits: Tensor | None
    block: Any = None
    reconstructions: dict[Site, Tensor] = field(default_factory=dict)
    stored: Mapping[FeatureSpace[Any], StoredFeatures] = field(default_factory=dict)


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

    def read(
        self,
        tokens: Any,
        reading: Reading,
        batch_size: int,
        *,
        logits: bool,
        has: Callable[[int], bool] = lambda _: True,
    ) -> Iterator[tuple[Batch, Clean | None]]:
        """Yield the documents in batches, each with a run without edits; see `batches` and `clean`.

        The run is None of a batch that another process has; ``has`` tells by its number whether this one has it.
        """
        for number, batch in enumerate(batches(tokens, reading, batch_size, self.device)):
            yield batch, self.clean(batch, logits=logits) if has(number) else None

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

        def edit(rows: slice) -> AbstractContextManager[Any]:
            operations = {site: Put(self._identity, source=value[rows]) for site, value in activations.items()}
            return featurizers.intervene(self.model, operations)

        return self._from_the_middle(batch, clean, edit)

    def replaced(self, batch: Batch, clean: Clean, site_map: SiteMap[Any], excluded: Iterable[int]) -> Tensor:
        """Return the logits of the replacement model of a map, which is encoded from its own activations.

        Raises:
            UsageError: the map cannot take the place of the model's activations.
        """
        own = copy.copy(site_map)
        own.special_tokens = tuple({*site_map.special_tokens, *excluded})
        return self._from_the_middle(batch, clean, lambda _: featurizers.replaced(self.model, own))

    def _from_the_middle(
        self, batch: Batch, clean: Clean, edit: Callable[[slice], AbstractContextManager[Any]]
    ) -> Tensor:
        """Return the logits of an edit of some rows; the first row is compared with a run of the whole model once."""
        if self._start >= 0 and clean.block is not None and not self._is_compared:
            self._is_compared = True
            first = slice(0, 1)
            alone = batch.rows(first)
            with edit(first):
                whole = self._logits(alone)
            with self._restarted(clean, first), edit(first):
                again = self._logits(alone)
            if not float((whole - again).abs().max()) <= 1e-4 * float(whole.abs().max()):
                self._start = -1
        every = slice(None)
        if self._start < 0 or clean.block is None:
            with edit(every):
                return self._logits(batch)
        with self._restarted(clean, every), edit(every):
            return self._logits(batch)

    def _restarted(self, clean: Clean, rows: slice) -> AbstractContextManager[None]:
        hidden, blocks = first_tensor(clean.block)[rows], self.anatomy.layers
        return restarted(blocks, self._start, hidden, wrap_like(clean.block))  # type: ignore[arg-type]

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


class Losses:
    """Losses of edited logits beside those of clean logits, of which the probabilities are computed once.

    Args:
        clean: logits of the model itself, ``(rows, width, vocabulary)``.
        batch: whose next tokens the losses are of; at a token that none follows a loss has no meaning, see `has_next`.
    """

    def __init__(self, clean: Tensor, batch: Batch) -> None:
        self._clean, self._targets = clean, batch.ids.roll(-1, dims=1).to(clean.device)
        self._step = max(1, CHUNK // clean.shape[-1] // max(len(clean), 1))
        self._probabilities: list[Tensor] = []
        self._normalizers: list[Tensor] = []
        for part in self._parts():
            logits = clean[:, part].float()
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            self._probabilities.append((logits - normalizer).exp_())
            self._normalizers.append(normalizer.squeeze(-1))

    def of_clean(self) -> Tensor:
        """Return the loss of the next token without edits in nats, ``(rows, width)``."""
        return torch.cat(self._normalizers, dim=1) - self._of_targets(self._clean)

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the next token, and KL(clean ‖ edited), in nats, each ``(rows, width)``."""
        normalizers, divergences = [], []
        for part, p, of_clean in zip(self._parts(), self._probabilities, self._normalizers, strict=True):
            edited = logits[:, part].float()
            normalizer = edited.logsumexp(dim=-1)
            change = self._clean[:, part].float() - edited
            expected = torch.linalg.vecdot(p, change)
            if not bool(expected.isfinite().all()):  # a logit may be -inf, whose probability is 0
                expected = torch.where(p > 0, p * change, 0.0).sum(dim=-1)
            normalizers.append(normalizer)
            divergences.append(expected + normalizer - of_clean)
        return torch.cat(normalizers, dim=1) - self._of_targets(logits), torch.cat(divergences, dim=1)

    def _parts(self) -> list[slice]:
        return [slice(start, start + self._step) for start in range(0, self._clean.shape[1], self._step)]

    def _of_targets(self, logits: Tensor) -> Tensor:
        return logits.gather(-1, self._targets[..., None]).squeeze(-1).float()


def has_next(batch: Batch) -> Tensor:
    """Return ``(rows, width)``: True for measured tokens that another token follows."""
    following = torch.zeros_like(batch.is_token)
    following[:, :-1] = batch.is_token[:, 1:]
    return batch.is_measured & following

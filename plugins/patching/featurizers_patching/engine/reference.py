"""The cells of a sweep through `featurizers.intervene`: whole runs, one prompt of a batch for each cell."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import featurizers
import numpy as np
import torch
from featurizers import Anatomy, Site
from featurizers.errors import ShapeError, UsageError
from featurizers.features import Featurizer
from featurizers.models import Operation, collect, eager, intervene, unedited, without_cache
from torch import Tensor, nn

from featurizers_patching.engine.cells import BoolArray, Cells, Edit, IntArray
from featurizers_patching.engine.clean import Prompts
from featurizers_patching.engine.ending import narrowed
from featurizers_patching.engine.scope import entered
from featurizers_patching.engine.spots import spot_of


@dataclass(frozen=True, eq=False)
class _EditOperation(Operation):
    """Edits of some tokens of some examples."""

    edit: Edit = field(kw_only=True)
    numbers: IntArray = field(kw_only=True)
    """Of the edits, ``(examples, n)``; -1 for an example that is not edited."""

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return the activations ``(examples, n, d)`` with their edits."""
        edited = torch.as_tensor(self.numbers >= 0, device=base.device)
        rows = base[edited]
        new = self.edit(rows, self.numbers[self.numbers >= 0])
        if new.shape != rows.shape:
            raise ShapeError(f"the edit of {tuple(rows.shape)} gives {tuple(new.shape)}")
        result = base.clone()
        result[edited] = new.to(base.dtype)
        return result


@dataclass(frozen=True, eq=False)
class _FreezeOperation(Operation):
    """Gives some tokens their clean activations."""

    clean: Tensor = field(kw_only=True)
    frozen: BoolArray = field(kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return the activations ``(examples, tokens, d)``, clean where they are frozen."""
        frozen = torch.as_tensor(self.frozen, device=base.device).unsqueeze(-1)
        return torch.where(frozen, self.clean, base)


def whole_runs(
    model: nn.Module,
    prompts: Prompts,
    cells: Cells,
    sites: Sequence[Site],
    edits: Sequence[Edit],
    freeze: Sequence[str],
    reads: Collection[int] = (),
) -> Tensor:
    """Return the logits of cells ``(cells, n, vocabulary)`` by one whole run of the model on a batch of their prompts.

    Args:
        model: a decoder with its head.
        prompts: of the sweep.
        cells: to run.
        sites: of the sweep.
        edits: one for each site.
        freeze: "attn.out", "mlp.out"; see `advance`.
        reads: numbers of the sites whose edits change nothing and only read.

    Raises:
        UsageError: attention patterns cannot be frozen by whole runs.
    """
    batch = Prompts([prompts.tokens[pair] for pair in cells.pair], prompts.at[cells.pair])
    device = next(model.parameters()).device
    operations: dict[Site, list[Operation]] = {}
    inputs = batch.inputs(device)
    identity = featurizers.create("identity")
    with unedited(), eager():
        if freeze:
            for site, operation in _freezes(model, inputs, cells, sites, freeze, reads, identity).items():
                operations.setdefault(site, []).append(operation)
        for number in np.unique(cells.spot):
            positions, numbers = _by_example(cells, int(number))
            operation = _EditOperation(identity, positions=positions, edit=edits[number], numbers=numbers)
            operations.setdefault(sites[number], []).append(operation)
        run = object()
        at = torch.as_tensor(batch.at, device=device)
        with ExitStack() as stack:
            stack.enter_context(entered(model, run))
            stack.enter_context(intervene(model, operations))
            stack.enter_context(narrowed(model, run, at))
            logits: Tensor = model(**inputs, **without_cache(model)).logits
    return logits[:, : at.shape[1]]


def _by_example(cells: Cells, spot: int) -> tuple[Tensor, IntArray]:
    """Return the tokens that cells edit at a site, ``(cells, n)``, and the numbers of the edits.

    A cell with fewer edits than others repeats its first; one without any has the token 0 and the number -1.
    """
    chosen = np.flatnonzero(cells.spot == spot)
    chosen = chosen[np.argsort(cells.cell[chosen], kind="stable")]
    cell = cells.cell[chosen]
    count = np.bincount(cell, minlength=len(cells))
    first = np.cumsum(count) - count  # of each cell, among the chosen
    steps = np.arange(int(count.max()))
    index = first[:, None] + np.where(steps < count[:, None], steps, 0)
    edited = count > 0
    tokens, numbers = np.zeros(index.shape, dtype=np.int64), np.full(index.shape, -1)
    tokens[edited], numbers[edited] = cells.token[chosen][index[edited]], cells.number[chosen][index[edited]]
    return torch.from_numpy(tokens), numbers


def _freezes(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    cells: Cells,
    sites: Sequence[Site],
    freeze: Sequence[str],
    reads: Collection[int],
    identity: Featurizer[Any],
) -> dict[Site, Operation]:
    if "attn.pattern" in freeze:
        raise UsageError("attention patterns can be frozen only in models that run on packed rows")
    anatomy = Anatomy(model)
    spots = [spot_of(anatomy, site) for site in sites]
    frozen_sites = [Site(kind, block) for kind in freeze for block in range(anatomy.n_layers)]
    clean = collect(model, inputs, frozen_sites)
    width = inputs["input_ids"].shape[1]
    tokens = np.arange(width)
    block = np.array([spot.block for spot in spots])[cells.spot]
    start = np.full(len(cells), anatomy.n_layers)
    np.minimum.at(start, cells.cell, np.maximum(block, 0))
    operations: dict[Site, Operation] = {}
    for site in frozen_sites:
        frozen = np.repeat((start <= site.layer)[:, None], width, axis=1)
        for cell, spot, token in zip(cells.cell, cells.spot, cells.token, strict=True):
            where = spots[spot]
            if spot not in reads and (where.part, where.block) == (site.kind, site.layer):  # inside of this module
                frozen[cell] &= (tokens < token) if where.mixes else (tokens != token)
        operations[site] = _FreezeOperation(identity, clean=clean[site], frozen=frozen)
    return operations

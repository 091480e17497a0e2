"""`advance`: runs a chunk of cells together, each from its first edit on, and returns their logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from featurizers import Site
from featurizers.models import eager, first_tensor, stoppable, without_cache
from torch import Tensor

from featurizers_patching.engine.attention import Attender, Kernel, attention, weighted
from featurizers_patching.engine.cells import BoolArray, Cells, Edit, IntArray, with_effect
from featurizers_patching.engine.clean import CleanRun
from featurizers_patching.engine.editing import RowHooks, SpotEdits
from featurizers_patching.engine.ending import unembed
from featurizers_patching.engine.frozen import frozen_output
from featurizers_patching.engine.scope import NotPackableError, entered, standing_in
from featurizers_patching.engine.spots import BEFORE_BLOCKS, Spot


def advance(
    clean: CleanRun,
    cells: Cells,
    spots: Sequence[Spot],
    edits: Sequence[Edit],
    *,
    freeze: Sequence[str] = (),
    columns: Tensor | None = None,
) -> Tensor:
    """Return the logits of cells, ``(cells, n, vocabulary or columns)``, at the tokens that are read of their prompts.

    It is differentiable in what the edits return.

    Args:
        clean: run of the prompts.
        cells: to run together.
        spots: sites of the sweep.
        edits: one for each site.
        freeze: "attn.out", "mlp.out", "attn.pattern": what is kept as in the clean run, from a cell's first block on.
            A module that an edit is inside of is not frozen for the tokens that this edit changes in it.
        columns: tokens whose logits to compute, if `ending.takes_columns`; None for the whole vocabulary.

    Raises:
        NotPackableError: the model cannot run on packed rows.
    """
    attends = "attn.out" not in freeze
    cells = cells.keep(with_effect(cells, spots, clean.prompts.at, len(clean.layers), attends=attends))
    first_block = np.array([max(spot.block, 0) for spot in spots])
    start = np.full(len(cells), len(clean.layers))
    np.minimum.at(start, cells.cell, first_block[cells.spot])
    order = np.argsort(start, kind="stable")
    chunk = _Chunk(clean, cells.take(order), start[order], spots, edits, freeze)
    with eager(), entered(clean.model, chunk), attention(clean.model.config.get_text_config()):  # type: ignore[operator, union-attr]
        logits = chunk.run(columns)
    return logits.index_select(0, torch.as_tensor(np.argsort(order), device=logits.device))


class _Chunk(Attender):
    """Cells that advance together, in the order of their first blocks.

    A slot is the place of a token of a cell: the cell's number times the width of the prompts, plus the token.
    """

    def __init__(
        self,
        clean: CleanRun,
        cells: Cells,
        start: IntArray,
        spots: Sequence[Spot],
        edits: Sequence[Edit],
        freeze: Sequence[str],
    ) -> None:
        self.clean, self.cells, self.start = clean, cells, start
        self.spots, self.edits, self.freeze = spots, edits, freeze
        self.width, self.n_blocks = clean.shape[1], len(clean.layers)
        self.at = clean.prompts.at[cells.pair]  # (cells, n)
        self.block_of_edit = np.array([spot.block for spot in spots])[cells.spot]
        self.mixes = np.array([spot.mixes for spot in spots])[cells.spot]
        self.own_attention = np.array([spot.part == "attn.out" and not spot.reads for spot in spots])[cells.spot]
        self.own_mlp = np.array([spot.part == "mlp.out" and not spot.reads for spot in spots])[cells.spot]
        self.slot_of_edit = cells.cell * self.width + cells.token
        self.is_read = np.zeros((len(cells), self.width), dtype=bool)
        np.put_along_axis(self.is_read, self.at, True, axis=1)
        tokens = np.arange(self.width)
        self.until_read = tokens <= self.at.max(axis=1, keepdims=True)  # later tokens change nothing that is read
        self.row_of = np.full(len(cells) * self.width, -1)
        self.slots = np.empty(0, dtype=np.int64)
        self.x = clean.resid[0].new_empty(0, clean.resid[0].shape[-1])
        self.block = 0
        self.begun = 0
        self.needed: IntArray | None = None  # rows that the MLP of the last block computes, while it runs

    # ------------------------------------------------------------------ the run

    def run(self, columns: Tensor | None) -> Tensor:
        """Run all blocks, and return the logits ``(cells, n, k)``."""
        for block in range(int(self.start.min(initial=self.n_blocks)), self.n_blocks):
            self._begin(block)
            self._run_block(block)
        return self._logits(columns)

    def _begin(self, block: int) -> None:
        """Let rows join that an edit of this block or the last one changes, with their clean values."""
        self.block, self.begun = block, int(np.searchsorted(self.start, block, side="right"))
        here = np.maximum(self.block_of_edit, 0) == block
        joining = np.zeros((len(self.cells), self.width), dtype=bool)
        joining.ravel()[self.slot_of_edit[here]] = True
        attends = "attn.out" not in self.freeze
        spread = here & self.mixes & (attends | self.own_attention)
        if attends:
            spread |= ~self.mixes & (self.block_of_edit == block - 1)
        tail = self._later(spread)
        # clean keys and values are known: in the last block only rows that are read need to run
        joining |= tail & (self.is_read if block == self.n_blocks - 1 else self.until_read)
        self._join(block, np.flatnonzero(joining))
        embedded = here & (self.block_of_edit == BEFORE_BLOCKS)
        if embedded.any():
            slots = np.unique(self.slot_of_edit[embedded])
            rows = torch.as_tensor(self.row_of[slots], device=self.x.device)
            self.x = self.x.index_copy(0, rows, self._embedded(embedded, slots))

    def _later(self, edits: BoolArray) -> BoolArray:
        """Return which tokens of each cell come after one of these edits, ``(cells, width)``."""
        first = np.full(len(self.cells), self.width)
        np.minimum.at(first, self.cells.cell[edits], self.cells.token[edits])
        later: BoolArray = np.arange(self.width) > first[:, None]
        return later

    def _join(self, block: int, slots: IntArray) -> None:
        slots = slots[self.row_of[slots] < 0]
        self.row_of[slots] = len(self.slots) + np.arange(len(slots))
        self.slots = np.concatenate([self.slots, slots])
        clean = self.clean.rows(block, self._tensor(self._clean_rows(slots)))
        self.x = torch.cat([self.x, clean]) if len(self.x) else clean

    def _clean_rows(self, slots: IntArray) -> IntArray:
        """Return the rows of the clean run's tensors that belong to slots."""
        rows: IntArray = self.cells.pair[slots // self.width] * self.width + slots % self.width
        return rows

    def _tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(array, device=self.clean.device)

    def _run_block(self, block: int) -> None:
        cell, token = np.divmod(self.slots, self.width)
        pair_of_row, token_of_row = self._tensor(self.cells.pair[cell]), self._tensor(token)
        args, kwargs = self.clean.packed_arguments(block, pair_of_row, token_of_row)
        self._set_attention(block, token)
        hooks = RowHooks(self, self._edits_at(block), self._seen)
        with ExitStack() as stack:
            for kind in self.freeze:
                if kind != "attn.pattern":
                    self._freeze(stack, kind, block)
            if block == self.n_blocks - 1:
                self._narrow_mlp(stack, block)
            hooks.register(stack)
            output = first_tensor(self.clean.layers[block](self.x.unsqueeze(0), *args, **kwargs))
        hooks.check()
        if output.shape != (1, *self.x.shape):
            raise NotPackableError(f"block {block} returns {tuple(output.shape)} for {tuple(self.x.shape)} rows")
        self.x = output[0]

    def _edits_at(self, block: int) -> list[SpotEdits]:
        """Return the edits inside a block, by site; those of the embedding are done already."""
        found = []
        for number in np.unique(self.cells.spot[self.block_of_edit == block]):
            chosen = self.cells.spot == number
            rows = self.row_of[self.slot_of_edit[chosen]]
            found.append(SpotEdits(self.spots[number], self.edits[number], rows, self.cells.number[chosen]))
        return found

    def _seen(self, rows: IntArray, n_seen: int) -> IntArray:
        """Return where rows of the batch are among those that a module sees."""
        if n_seen == len(self.slots):
            return rows
        if self.needed is not None and n_seen == len(self.needed):
            found: IntArray = np.searchsorted(self.needed, rows)
            return found
        raise NotPackableError(f"a module sees {n_seen} rows of {len(self.slots)}")

    # ------------------------------------------------------------------ frozen modules, and the last MLP

    def _own(self, kind: str, block: int) -> BoolArray:
        """Return the rows whose output of a module is changed by an edit inside of it."""
        inside = (self.own_attention if kind != "mlp.out" else self.own_mlp) & (self.block_of_edit == block)
        own = np.zeros((len(self.cells), self.width), dtype=bool)
        own.ravel()[self.slot_of_edit[inside]] = True
        own |= self._later(inside & self.mixes)
        of_rows: BoolArray = own.ravel()[self.slots]
        return of_rows

    def _freeze(self, stack: ExitStack, kind: str, block: int) -> None:
        place = self.clean.anatomy.place(Site(kind, block))
        clean = self.clean.frozen[kind, block].index_select(0, self._tensor(self._clean_rows(self.slots)))
        own = self._own(kind, block)
        here = self.cells.spot[self.block_of_edit == block]
        is_read = any(self.spots[number].reads and self.spots[number].part == kind for number in here)
        of_rows = self._tensor(own) if own.any() or is_read else None
        stack.enter_context(frozen_output(self, place, self.clean.frozen_wraps[kind, block], clean, of_rows))

    def _narrow_mlp(self, stack: ExitStack, block: int) -> None:
        """Let the MLP of the last block compute the rows that are read, and no others."""
        path = self.clean.anatomy.parts(block).mlp
        if path is None or ("mlp.out" in self.freeze and not self._own("mlp.out", block).any()):
            return
        here = self.cells.spot[self.block_of_edit == block]
        if any(self.spots[number].place.tokens is not None for number in here):  # a router, which counts tokens
            return
        needed = np.flatnonzero(self.is_read.ravel()[self.slots])
        mlp = self.clean.layers[block].get_submodule(path)
        narrow = functools.partial(self._narrow, mlp.forward, needed, self._tensor(needed))
        stack.enter_context(standing_in(mlp, self, narrow))

    def _narrow(self, forward: Callable[..., Any], needed: IntArray, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else None
        others = [*args[1:], *kwargs.values()]
        if not isinstance(x, Tensor) or x.dim() != 3 or any(isinstance(each, Tensor) for each in others):
            return forward(*args, **kwargs)
        self.needed = needed
        try:
            output = forward(x.index_select(1, rows), *args[1:], **kwargs)
        finally:
            self.needed = None
        first = first_tensor(output)
        first = first.reshape(1, len(needed), first.shape[-1])
        padded = first.new_zeros(1, x.shape[1], first.shape[-1]).index_copy(1, rows, first)
        return (padded, *output[1:]) if isinstance(output, tuple) else padded

    # ------------------------------------------------------------------ attention

    def _set_attention(self, block: int, token: IntArray) -> None:
        """Compute the index tensors of attention."""
        first = int(token.min())
        self.queries = first, int(token.max()) + 1
        n_queries = self.queries[1] - first
        self.pair_of_cell = self._tensor(self.cells.pair[: self.begun])
        self.key_slots = self._tensor(self.slots)
        self.query_slots = self._tensor(self.slots // self.width * n_queries + token - first)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: Kernel) -> Tensor:
        """Attend from each cell's rows to the clean keys and values of its prompt, with its own in their place."""
        known, n, (first, end) = self.clean.blocks[self.block], self.begun, self.queries
        if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == len(self.slots):
            raise NotPackableError("its attention does not take the tokens of its block")
        keys = self._written(known.keys, key, self.key_slots)
        values = self._written(known.values, value, self.key_slots)
        masks = known.mask[:, first:end]
        masks = (masks if masks.shape[0] == 1 else masks.index_select(0, self.pair_of_cell)).unsqueeze(1)
        zeros = query.new_zeros(n * (end - first), query.shape[1], query.shape[3])
        queries = zeros.index_copy(0, self.query_slots, query[0].transpose(0, 1))
        q = queries.view(n, end - first, query.shape[1], query.shape[3]).transpose(1, 2)
        own = None if known.weights is None else self._own("attn.pattern", self.block)
        if own is None or own.any():
            rows = self._rows_of(kernel(q, keys, values, masks))
        if known.weights is not None and own is not None:
            weights = known.weights[:, :, first:end].index_select(0, self.pair_of_cell)
            under_clean = self._rows_of(weighted(weights, values))
            rows = torch.where(self._tensor(own)[:, None, None], rows, under_clean) if own.any() else under_clean
        return rows.unsqueeze(0)

    def _written(self, clean: Tensor, new: Tensor, slots: Tensor) -> Tensor:
        """Return clean keys or values of each cell's prompt with its own rows written over them."""
        tokens, heads, width = clean.shape[1:]
        of_cells = clean.index_select(0, self.pair_of_cell).view(-1, heads, width)
        new = new[0].transpose(0, 1)
        written = of_cells.index_copy(0, slots, new) if new.requires_grad else of_cells.index_copy_(0, slots, new)
        return written.view(-1, tokens, heads, width).transpose(1, 2)

    def _rows_of(self, attended: Tensor) -> Tensor:
        """Return attention's output for the packed rows, ``(rows, heads, width)``."""
        out = attended.transpose(1, 2)
        return out.reshape(-1, *out.shape[2:]).index_select(0, self.query_slots)

    # ------------------------------------------------------------------ before the blocks and after them

    def _embedded(self, edits: BoolArray, slots: IntArray) -> Tensor:
        """Return the inputs of the first block ``(slots, d)`` after edits of the embedding."""
        cells = np.unique(slots // self.width)
        place_of = np.full(len(self.cells), -1)
        place_of[cells] = np.arange(len(cells))

        def local(of: IntArray) -> IntArray:
            moved: IntArray = place_of[of // self.width] * self.width + of % self.width
            return moved

        found = []
        for number in np.unique(self.cells.spot[edits]):
            chosen = self.cells.spot == number
            rows = local(self.slot_of_edit[chosen])
            found.append(SpotEdits(self.spots[number], self.edits[number], rows, self.cells.number[chosen]))
        hooks, kept = RowHooks(self, found, lambda rows, _: rows), list[Tensor]()
        inputs = self.clean.prompts.inputs(self.clean.device)
        inputs = {name: x[self._tensor(self.cells.pair[cells])] for name, x in inputs.items()}

        with stoppable() as stop, ExitStack() as stack:

            def keep(*args: Any, **kwargs: Any) -> None:
                kept.append(args[0] if args else kwargs["hidden_states"])
                stop()

            stack.enter_context(standing_in(self.clean.layers[0], self, keep))
            hooks.register(stack)
            self.clean.model(**inputs, **without_cache(self.clean.model))
        hooks.check()
        flat = kept[0].reshape(-1, kept[0].shape[-1])
        return flat.index_select(0, self._tensor(local(slots)))

    def _logits(self, columns: Tensor | None) -> Tensor:
        clean = self.clean.logits if columns is None else self.clean.logits.index_select(-1, columns)
        logits = clean.index_select(0, self._tensor(self.cells.pair))
        normed = self.block_of_edit == self.n_blocks
        joining = np.zeros(len(self.cells) * self.width, dtype=bool)
        joining[self.slot_of_edit[normed]] = True
        self._join(self.n_blocks, np.flatnonzero(joining & self.is_read.ravel()))
        at_slots = np.arange(len(self.cells))[:, None] * self.width + self.at
        rows = self.row_of[at_slots]
        changed = rows >= 0
        if not changed.any():
            return logits
        needed = np.unique(rows[changed])
        hidden = self.x.index_select(0, self._tensor(needed))

        def among_needed(rows: IntArray, _: int) -> IntArray:
            found: IntArray = np.searchsorted(needed, rows)
            return found

        hooks = RowHooks(self, self._edits_at(self.n_blocks), among_needed)
        with ExitStack() as stack:
            hooks.register(stack)
            computed = unembed(self.clean.model, self, self.clean.layers, self.clean.wraps, hidden, columns)
        hooks.check()
        where = self._tensor(np.flatnonzero(changed.ravel()))
        of_rows = computed.index_select(0, self._tensor(np.searchsorted(needed, rows[changed])))
        flat = logits.reshape(-1, logits.shape[-1])
        return flat.index_copy(0, where, of_rows.to(flat.dtype)).view(logits.shape)

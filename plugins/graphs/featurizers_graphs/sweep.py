"""`sweep`: rows of targets and features from the last layer to the first, with the influence of each node on the way.

An edge leads from an earlier layer to a later one. So when the rows of one layer are made, every row that its features
have an edge to is known, and their influence is final: no dense matrix and no iteration is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featurizers_graphs.collection import Collection
from featurizers_graphs.local_model import LocalModel
from featurizers_graphs.sources import Sources
from featurizers_graphs.targets import Rows

BIN_BITS: Final = 18
"""Bits of a float32 that its bin leaves out: sizes of a bin differ by at most 3 %."""


class Edges(NamedTuple):
    """Kept edges of some rows.

    Attributes:
        rows: of the edges' ends, sorted.
        counts: of edges of each row.
        sources: node at which each begins, sorted within a row.
        weights: of each.
    """

    rows: Int[Tensor, " n"]
    counts: Int[Tensor, " n"]
    sources: Int[Tensor, " edges"]
    weights: Float[Tensor, " edges"]


@final
class Sweep:
    """Rows of a graph; see `featurizers_graphs.Graph` for the names.

    Args:
        local: the model at the prompt.
        collection: its maps.
        sources: their features and errors.
        n_targets: number of targets.
        keep: share of each row's absolute sum whose edges are kept.
        batch: number of rows that are made together.

    Attributes:
        influence: of each node, as far as it is known.
        expanded: features with a row.
        constant: of each row; so are the others.
        total: likewise.
        summed: likewise.
        absolute: likewise.
        error_share: likewise.
        edges: kept, in the order in which rows were made.
    """

    def __init__(
        self, local: LocalModel, collection: Collection, sources: Sources, n_targets: int, keep: float, batch: int
    ) -> None:
        self._local, self._collection, self._sources = local, collection, sources
        self._keep, self._batch = keep, batch
        self._features = len(sources.features)
        self._first_token = self._features + local.n_layers * local.length
        count, rows = self._first_token + local.length + n_targets, self._features + n_targets
        self.influence, self.expanded = (
            self._zeros(count),
            torch.zeros(self._features, dtype=torch.bool, device=local.device),
        )
        self.constant, self.total, self.summed = self._zeros(rows), self._zeros(rows), self._zeros(rows)
        self.absolute, self.error_share = self._zeros(rows), self._zeros(rows)
        self.edges: list[Edges] = []

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._local.dtype, device=self._local.device)

    def run(self, targets: Iterable[Rows], nodes: int, progress: Callable[[float], None] | None) -> None:
        """Make the rows of all targets, and those of the features with the largest influence.

        Args:
            targets: of the graph.
            nodes: most features whose rows are made. At each layer those are chosen that are among the largest of this
                and all lower layers, by what is known of them then.
            progress: is called with the share of layers that are done.
        """
        first = self._features
        for own in targets:
            weights = torch.tensor([target.weight for target in own.targets]).to(self.influence)
            which = torch.arange(first, first + len(own.targets), device=self._local.device)
            self.constant[which], self.total[which] = own.constants, own.totals
            for some in torch.split(torch.arange(len(which)), self._batch):
                self._record(which[some], self._descend(own.point, own.directions[:, some]), weights[some])
            first += len(own.targets)
        layers = self._sources.features[:, 0]
        readers = sorted(self._collection.readers.items(), key=lambda item: item[1].read.point, reverse=True)
        for done, (layer, _) in enumerate(readers):
            chosen = self._largest(layers, layer, nodes - int(self.expanded.sum()))
            for part in torch.split(chosen, self._batch):
                if len(part):
                    self._expand(layer, part)
            if progress is not None:
                progress((done + 1) / len(readers))

    def _largest(self, layers: Tensor, layer: int, budget: int) -> Int[Tensor, " n"]:
        """Return the features of a layer to expand."""
        influence = self.influence[: self._features]
        below = ((layers <= layer) & (influence > 0)).nonzero().flatten()
        here = below[layers[below] == layer]
        if len(below) > budget:
            best = below[influence[below].argsort(descending=True, stable=True)[: max(budget, 0)]]
            here = best[layers[best] == layer].sort().values
        return here

    def _expand(self, layer: int, which: Int[Tensor, " n"]) -> None:
        reader = self._collection.readers[layer]
        _, positions, columns = self._sources.features[which].T
        self.constant[which] = self._sources.constant_of(reader, columns, positions)
        self.total[which] = self._sources.pre_activations[which]
        pulled = self._sources.pull_reader(reader, self._sources.encoders(reader, columns), positions)
        g = self._zeros(int(positions.max()) + 1, len(which), self._local.width)
        g[positions, torch.arange(len(which), device=g.device)] = pulled
        self._record(which, self._descend(reader.read.point, g), self.influence[which])
        self.expanded[which] = True

    def _descend(self, point: int, g: Float[Tensor, "tokens rows d"]) -> Float[Tensor, "nodes rows"]:
        """Return what each node adds to readers of the stream at one point."""
        return contracted(
            self._local, self._sources, descending(self._local, self._collection, self._sources, point, g)
        )

    def _record(self, which: Int[Tensor, " n"], out: Float[Tensor, "nodes n"], weights: Float[Tensor, " n"]) -> None:
        """Keep sums and the largest edges of rows, and pass the influence of their readers on."""
        size, f = out.abs(), self._features
        absolute = size.sum(0)
        divisor = absolute.clamp(min=1e-30)
        self.summed[which], self.absolute[which] = out.sum(0), absolute
        self.error_share[which] = size[f : self._first_token].sum(0) / divisor
        self.influence[: len(out)] += size @ (weights / divisor)
        kept = largest(size, self._keep).T
        row, column = kept.nonzero(as_tuple=True)
        self.edges.append(
            Edges(which.cpu(), kept.sum(1).cpu(), column.to(torch.int32).cpu(), out.T[row, column].float().cpu())
        )


def descending(
    local: LocalModel, collection: Collection, sources: Sources, point: int, g: Float[Tensor, "tokens rows d"]
) -> Iterator[tuple[int, Float[Tensor, "tokens rows d"]]]:
    """Yield each point of the stream from one down to the embedding, with what readers read of the stream there.

    Nothing after the last token that is read matters, so that only the first ``tokens`` tokens are carried.
    """
    waiting: dict[int, Tensor] = {}
    yield point, g
    while point > 0:
        layer, after_mlp = (point - 1) // 2, point % 2 == 0
        parallel = local.circuit.layout.blocks[layer].parallel
        after = g
        for read, write in collection.skips if after_mlp else ():
            if write.layer == layer:
                pulled = sources.pull_skip(read, write, g)
                waiting[read.point] = waiting[read.point] + pulled if read.point in waiting else pulled
        if not after_mlp or parallel:
            g = g + local.pull_attention(layer, after)
        point = 2 * layer if parallel or not after_mlp else 2 * layer + 1
        if point in waiting:
            g = g + waiting.pop(point)
        yield point, g


def contracted(
    local: LocalModel, sources: Sources, points: Iterable[tuple[int, Float[Tensor, "tokens rows d"]]]
) -> Float[Tensor, "nodes rows"]:
    """Return what each node adds to readers, from what they read at each point of the stream."""
    f, length, out = len(sources.features), local.length, torch.zeros(0)
    first_token = f + local.n_layers * length
    for point, g in points:
        if not len(out):
            out = g.new_zeros(first_token + length, g.shape[1])
        tokens = len(g)
        if not point:
            out[first_token : first_token + tokens] = (g @ sources.embeddings[:tokens, :, None]).squeeze(-1)
        elif point % 2 == 0:
            layer = point // 2 - 1
            written = sources.written(layer)
            products = torch.bmm(written.vectors[:tokens], g.mT)  # token, source, row
            near = int(torch.searchsorted(written.positions, tokens))
            out.index_add_(0, written.features[:near], products[written.positions[:near], written.slots[:near]])
            out[f + layer * length : f + layer * length + tokens] = products[:, -1]
    return out


def largest(size: Float[Tensor, "nodes rows"], keep: float) -> Bool[Tensor, "nodes rows"]:
    """Return the largest entries of each column, which hold at least a share of its sum.

    Entries are put into bins by the leading bits of their floats; whole bins are kept, from the largest down.

    Args:
        size: not negative.
        keep: share of the sum; 1 keeps all but zeros.
    """
    if keep >= 1:
        return size > 0
    bins = size.float().view(torch.int32) >> BIN_BITS
    sums = torch.zeros(1 << (31 - BIN_BITS), size.shape[1], dtype=size.dtype, device=size.device)
    sums.scatter_add_(0, bins.long(), size)
    above = sums.flip(0).cumsum(0)
    lowest = len(sums) - 1 - (above >= keep * above[-1]).int().argmax(0)
    return (bins >= lowest) & (size > 0)


def assembled(edges: list[Edges], n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the offsets of all rows, and sources and weights of their edges in the order of the rows."""
    counts = torch.zeros(n_rows, dtype=torch.long)
    for part in edges:
        counts[part.rows] = part.counts
    parts = sorted((part for part in edges if len(part.rows)), key=lambda part: int(part.rows[0]))
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    if not parts:
        return offsets, torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    return offsets, torch.cat([part.sources for part in parts]), torch.cat([part.weights for part in parts])

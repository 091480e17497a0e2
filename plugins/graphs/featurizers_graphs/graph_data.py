"""`GraphData`: nodes, edges and scores of an attribution graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch
from featurizers.errors import FeaturizerError, UsageError, shown
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featurizers_graphs.influence import Scores, Sizes, pass_on, scores_of

NodeKind: TypeAlias = Literal["feature", "error", "token", "target"]
NodeLike: TypeAlias = "int | Node | tuple[int, int, int]"
"""A node: its number, a `Node`, or layer, position and number of a feature."""


class IncompleteGraphError(FeaturizerError, ArithmeticError):
    """Rows of a graph that do not add up to what their readers read."""


class Node(NamedTuple):
    """A node of a graph.

    Attributes:
        number: within the graph.
        kind: ``feature``, ``error`` (what a layer's map leaves out at a token), ``token`` or ``target``.
        layer: of a feature or an error; None for the others.
        position: token; of a target, the last one that it reads.
        feature: number of the feature in its map; None for the others.
        value: of a feature, its activation; of a target, its weight; None for the others.
        influence: share of the targets that goes through the node.
        label: what is known of it, for people.
    """

    number: int
    kind: NodeKind
    layer: int | None
    position: int
    feature: int | None
    value: float | None
    influence: float
    label: str


class Edge(NamedTuple):
    """An edge: what a source adds to a target in the local replacement model.

    Attributes:
        source: number of the node that writes.
        target: number of the node that reads: a feature's pre-activation, or a target's value.
        weight: signed contribution, in units of the target.
    """

    source: int
    target: int
    weight: float


@final
@dataclass(frozen=True)
class Target:
    """What a graph explains.

    Attributes:
        kind: ``logit``, less the mean logit; ``metric``, a linear function of the logits; or ``feature``, a
            pre-activation.
        label: for people.
        weight: share of the influence that starts here; the weights of all targets add up to at most 1.
        position: last token that it reads.
        token: token id of a logit.
        layer: of a feature.
        feature: its number in its map.
    """

    kind: Literal["logit", "metric", "feature"]
    label: str
    weight: float
    position: int
    token: int | None = None
    layer: int | None = None
    feature: int | None = None


@dataclass(frozen=True, eq=False)
class GraphData:
    """What a `Graph` holds.

    Nodes are numbered: features, sorted by layer, position and number; errors by layer and position; tokens; targets.
    A row is what all nodes and the constants add to one reader, a feature or a target: ``Σ edges + constant = total``.
    Rows are numbered as features and then targets. Only the largest edges of a row are kept, and the sums, scores and
    influences are those of whole rows.

    Attributes:
        tokens: ids of the prompt, int64 ``(T,)``.
        token_texts: the same as texts.
        features: layer, position and number in its map of each active feature, int64 ``(F, 3)``.
        values: their activations, ``(F,)``.
        n_layers: number of layers of the model.
        targets: what is explained.
        influence: of each node, float32 ``(nodes,)``. Exact if every feature with influence was expanded; else a lower
            bound.
        expanded: which features have a row, ``(F,)``.
        offsets: where the edges of each row begin, int64 ``(rows + 1,)``.
        sources: the node at which each edge begins, int32 ``(edges,)``.
        weights: of each edge, float32 ``(edges,)``.
        constant: what biases, positions and dropped tokens add to each row, ``(rows,)``; 0 for rows that were not made.
        total: the reader's own value, ``(rows,)``: a pre-activation, a logit less the mean logit, or a metric.
        summed: sum of all edges of a row, ``(rows,)``.
        absolute: sum of their absolute values, ``(rows,)``.
        error_share: part of ``absolute`` that errors bring, ``(rows,)``.
        kept: nodes that pruning has left, ``(nodes,)``.
        about: JSON object: model, maps with their sites, settings and versions.
        labels: texts for features by layer and number.
        groups: named sets of nodes, supernodes, by name.
    """

    tokens: Int[Tensor, " T"]
    token_texts: tuple[str, ...]
    features: Int[Tensor, "F 3"]
    values: Float[Tensor, " F"]
    n_layers: int
    targets: tuple[Target, ...]
    influence: Float[Tensor, " nodes"]
    expanded: Bool[Tensor, " F"]
    offsets: Int[Tensor, " rows_1"]
    sources: Int[Tensor, " edges"]
    weights: Float[Tensor, " edges"]
    constant: Float[Tensor, " rows"]
    total: Float[Tensor, " rows"]
    summed: Float[Tensor, " rows"]
    absolute: Float[Tensor, " rows"]
    error_share: Float[Tensor, " rows"]
    kept: Bool[Tensor, " nodes"]
    about: Mapping[str, Any]
    labels: Mapping[tuple[int, int], str] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    # ---- nodes

    @property
    def n_features(self) -> int:
        """Number of active features."""
        return len(self.features)

    @property
    def n_nodes(self) -> int:
        """Number of nodes, with those that pruning left out."""
        return len(self.influence)

    @property
    def first_error(self) -> int:
        """Number of the first error node."""
        return self.n_features

    @property
    def first_token(self) -> int:
        """Number of the first token node."""
        return self.n_features + self.n_layers * len(self.tokens)

    @property
    def first_target(self) -> int:
        """Number of the first target node."""
        return self.first_token + len(self.tokens)

    def node(self, which: NodeLike) -> Node:
        """Return a node.

        Raises:
            UsageError: there is no such node.
        """
        number = self.number(which)
        influence = float(self.influence[number])
        if number < self.n_features:
            layer, position, feature = self.features[number].tolist()
            label = self.labels.get((layer, feature), f"{layer}/{feature}")
            value = float(self.values[number])
            return Node(number, "feature", layer, position, feature, value, influence, label)
        if number < self.first_token:
            layer, position = divmod(number - self.first_error, len(self.tokens))
            return Node(number, "error", layer, position, None, None, influence, f"error of layer {layer}")
        if number < self.first_target:
            position = number - self.first_token
            return Node(number, "token", None, position, None, None, influence, self.token_texts[position])
        target = self.targets[number - self.first_target]
        where = target.layer, target.position, target.feature
        return Node(number, "target", *where, target.weight, influence, target.label)

    def number(self, which: NodeLike) -> int:
        """Return the number of a node.

        Raises:
            UsageError: there is no such node, or no such feature is active.
        """
        if isinstance(which, Node):
            which = which.number
        if isinstance(which, tuple):
            place = len(which) == 3 and all(type(each) is int and abs(each) < 2**62 for each in which)
            found = (self.features == torch.tensor(which if place else (-1, -1, -1))).all(dim=1).nonzero()
            if not len(found):
                raise UsageError(
                    f"no feature {shown(which)} is active; a feature is given by its layer, position and number"
                )
            return int(found[0])
        if isinstance(which, bool) or not isinstance(which, int) or not 0 <= which < self.n_nodes:
            raise UsageError(f"nodes are numbers from 0 to {self.n_nodes - 1}, not {shown(which)}")
        return which

    def top(self, count: int = 20, kind: NodeKind | None = "feature") -> list[Node]:
        """Return the nodes of the largest influence among those that are kept.

        Args:
            count: at most so many.
            kind: of the nodes; None for all but targets.
        """
        allowed = self.kept.clone()
        allowed[self.first_target :] = False
        if kind is not None:
            allowed &= self._is(kind)
        order = torch.where(allowed, self.influence, -1.0).argsort(descending=True, stable=True)
        return [self.node(int(i)) for i in order[: min(count, int(allowed.sum()))]]

    def _is(self, kind: NodeKind) -> Tensor:
        bounds = (0, self.first_error, self.first_token, self.first_target, self.n_nodes)
        start = ("feature", "error", "token", "target").index(kind)
        numbers = torch.arange(self.n_nodes)
        return (numbers >= bounds[start]) & (numbers < bounds[start + 1])

    # ---- rows and edges

    @property
    def n_edges(self) -> int:
        """Number of edges that are kept."""
        return len(self.sources)

    @property
    def edge_targets(self) -> Int[Tensor, " edges"]:
        """Node at which each edge ends, int64."""
        rows = torch.repeat_interleave(torch.arange(len(self.total)), self.offsets.diff())
        return self.reader(rows)

    def reader(self, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return the nodes that rows belong to."""
        return torch.where(rows < self.n_features, rows, rows + self.first_target - self.n_features)

    def row(self, which: NodeLike) -> int:
        """Return the row of a node.

        Raises:
            UsageError: errors and tokens have no row.
        """
        number = self.number(which)
        if self.first_error <= number < self.first_target:
            raise UsageError(f"{self.node(number).label!r} is no reader: errors and tokens have no edges into them")
        return number if number < self.n_features else number - self.first_target + self.n_features

    def edges(self, *, into: NodeLike | None = None, out_of: NodeLike | None = None) -> list[Edge]:
        """Return the kept edges into a node, out of one, or between two, the largest first.

        Raises:
            UsageError: neither end is given, or there is no such node.
        """
        if into is not None:
            row = self.row(into)
            chosen = torch.arange(int(self.offsets[row]), int(self.offsets[row + 1]))
            if out_of is not None:
                chosen = chosen[self.sources[chosen] == self.number(out_of)]
        elif out_of is not None:
            chosen = torch.nonzero(self.sources == self.number(out_of)).flatten()
        else:
            raise UsageError("give the node that edges lead into, or the one that they come out of")
        chosen = chosen[self.weights[chosen].abs().argsort(descending=True, stable=True)]
        rows = torch.searchsorted(self.offsets, chosen, right=True) - 1
        targets = self.reader(rows)
        parts = (self.sources[chosen].tolist(), targets.tolist(), self.weights[chosen].tolist())
        return [Edge(*edge) for edge in zip(*parts, strict=True)]

    def check_complete(self, tolerance: float | None = None) -> float:
        """Return how far rows are from adding up: the largest ``|Σ edges + constant - total|`` over the largest size.

        The size of a row is the larger of its total and of the absolute sum of its edges.

        Args:
            tolerance: the largest ratio that passes; None for 1e-3, and for 5e-2 where the model itself rounds to half
                precision.

        Raises:
            IncompleteGraphError: a row is further off, so that edges or constants are wrong.
            UsageError: another program made the graph, and computed no totals.
        """
        if bool(self.total.isnan().any()):
            raise UsageError("this graph has no totals to compare with: another program made it; check it there")
        made = torch.cat([self.expanded, torch.ones(len(self.targets), dtype=torch.bool)])
        off = (self.summed + self.constant - self.total).abs()[made]
        size = torch.maximum(self.total.abs(), self.absolute)[made].clamp(min=1e-30)
        ratio = float((off / size).max()) if len(off) else 0.0
        if tolerance is None:
            tolerance = 5e-2 if self.about.get("dtype") in ("bfloat16", "float16") else 1e-3
        if not ratio <= tolerance:
            raise IncompleteGraphError(
                f"a row of the graph misses its total by {ratio:.1e} of its size, more than {tolerance:.0e}: the model "
                "computes something that its edges leave out"
            )
        return ratio

    # ---- scores and pruning

    @property
    def scores(self) -> Scores:
        """Replacement and completeness of the whole graph, with bounds where features were not expanded."""
        parts = self.error_share, self.features[:, 0], self.expanded
        return scores_of(self.sizes, self.influence, self._start, *parts)

    @property
    def kept_scores(self) -> Scores:
        """Scores of the kept nodes and edges alone; each row is divided by the sum of the edges that it has left."""
        start = torch.zeros(self.n_nodes)
        start[self.first_target :] = self._start
        source, target = self.sources.long(), self.edge_targets
        reached, share = pass_on(source, target, self.weights, start)
        error = (source >= self.first_error) & (source < self.first_token)
        of_errors = torch.zeros(self.n_nodes).index_add_(0, target[error], share[error])
        rows = torch.cat([of_errors[: self.n_features], of_errors[self.first_target :]])
        made = torch.ones(self.n_features, dtype=torch.bool)
        return scores_of(self.sizes, reached - start, self._start, rows, self.features[:, 0], made)

    @property
    def sizes(self) -> Sizes:
        """Numbers of nodes of each kind."""
        return Sizes(self.n_features, self.n_layers * len(self.tokens), len(self.tokens), len(self.targets))

    @property
    def _start(self) -> Tensor:
        return torch.tensor([target.weight for target in self.targets])

    def __iter__(self) -> Iterator[Node]:
        """Iterate over the nodes that are kept."""
        return (self.node(int(i)) for i in self.kept.nonzero().flatten())

    def __len__(self) -> int:
        """Return the number of nodes that are kept."""
        return int(self.kept.sum())

    def __repr__(self) -> str:
        """Return sizes and scores."""
        sizes = f"{len(self.tokens)} tokens, {len(self)} of {self.n_nodes} nodes, {self.n_edges} edges"
        return f"Graph({sizes}, {self.scores})"


def targets_text(targets: Sequence[Target], most: int = 3) -> str:
    """Return the labels of the first targets, for titles."""
    names = [target.label for target in targets[:most]]
    return ", ".join(names) + (", …" if len(targets) > most else "")

"""Scores of a graph and pruning: circuit-tracer's definitions on sparse edges."""

from __future__ import annotations

from typing import NamedTuple

import torch
from featurizers.errors import UsageError, shown
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Bounds(NamedTuple):
    """A number that is known to lie between two others; they are equal if it is known exactly."""

    low: float
    high: float

    def __str__(self) -> str:
        """Return one number, or the two with a dash."""
        low, high = f"{self.low:.3f}", f"{self.high:.3f}"
        return low if low == high else f"{low}-{high}"


class Scores(NamedTuple):
    """How much of the targets the features explain, from 0 to 1.

    Attributes:
        replacement: share of the influence that begins at tokens and not at errors.
        completeness: mean share of a node's inputs that are no errors, weighted by the node's influence; a node without
            inputs counts as complete.
    """

    replacement: Bounds
    completeness: Bounds

    def __str__(self) -> str:
        """Return both."""
        return f"replacement {self.replacement}, completeness {self.completeness}"


def check_share(name: str, share: object) -> None:
    """Raise UsageError unless a number is above 0 and at most 1."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise UsageError(f"{name} is a share above 0 and at most 1, not {shown(share)}")


class Sizes(NamedTuple):
    """Numbers of nodes of each kind, in the order in which they are numbered."""

    features: int
    errors: int
    tokens: int
    targets: int

    @property
    def first_token(self) -> int:
        """Number of the first token node."""
        return self.features + self.errors

    @property
    def first_target(self) -> int:
        """Number of the first target node."""
        return self.first_token + self.tokens


def scores_of(
    sizes: Sizes,
    influence: Float[Tensor, " nodes"],
    start: Float[Tensor, " targets"],
    error_share: Float[Tensor, " rows"],
    layers: Int[Tensor, " features"],
    expanded: Bool[Tensor, " features"],
) -> Scores:
    """Return the scores of a whole graph.

    A feature that was not expanded passes its influence on to nodes that are not known. Each such share ends at a token
    or an error after at most as many features as there are layers below, which bounds what it does to the scores.

    Args:
        sizes: of the graph.
        influence: of each node.
        start: weights of the targets.
        error_share: part of the inputs of each feature and each target that errors bring.
        layers: of the features.
        expanded: which features have a row.
    """
    f = sizes.features
    out = influence.double()
    from_errors, from_tokens = out[f : sizes.first_token].sum(), out[sizes.first_token : sizes.first_target].sum()
    cut = out[:f].masked_fill(expanded, 0.0)
    whole = from_tokens + from_errors + cut.sum()
    replacement = Bounds(_ratio(from_tokens, whole), _ratio(from_tokens + cut.sum(), whole))
    out[sizes.first_target :] += start.double()
    share = torch.ones_like(out)
    share[:f] -= error_share[:f].double()
    share[sizes.first_target :] -= error_share[f:].double()
    out[:f] -= cut
    good, total = (share * out).sum(), out.sum()
    # an unexpanded feature counts itself, at most one feature in each layer below it, and one token or error
    visits = (cut * (layers.double() + 2)).sum()
    completeness = Bounds(_ratio(good + cut.sum(), total + visits), _ratio(good + visits, total + visits))
    return Scores(replacement, completeness)


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else 1.0


def pass_on(
    source: Int[Tensor, " edges"],
    target: Int[Tensor, " edges"],
    weight: Float[Tensor, " edges"],
    start: Float[Tensor, " nodes"],
) -> tuple[Float[Tensor, " nodes"], Float[Tensor, " edges"]]:
    """Return what reaches each node from the start, and the share that each edge has of its target's inputs.

    Args:
        source: node at which each edge begins.
        target: node at which it ends, in a later layer.
        weight: of the edge; its sign does not matter.
        start: what each node has to begin with, which is counted as having reached it.
    """
    size = weight.abs()
    share = size / torch.zeros_like(start).index_add_(0, target, size).clamp(min=1e-10)[target]
    reached, now = start.clone(), start
    while bool(now.any()):  # ends: an edge always leads to a later layer
        now = torch.zeros_like(start).index_add_(0, source, now[target] * share)
        reached = reached + now
    return reached, share


def pruned(
    sizes: Sizes,
    readers: Int[Tensor, " rows"],
    offsets: Int[Tensor, " rows_1"],
    sources: Int[Tensor, " edges"],
    weights: Float[Tensor, " edges"],
    influence: Float[Tensor, " nodes"],
    start: Float[Tensor, " targets"],
    candidates: Bool[Tensor, " nodes"],
    expanded: Bool[Tensor, " features"],
    shares: tuple[float, float],
) -> tuple[Bool[Tensor, " nodes"], Int[Tensor, " kept"]]:
    """Return which nodes stay, and the numbers of the edges that stay, by circuit-tracer's rule.

    Nodes stay down to the score at which their summed influence reaches a share of the whole; then edges among them, by
    their part of the influence of what is left; then features and errors that lead nowhere, and features that nothing
    leads into, are left out until nothing changes. A feature that was not expanded stays without inputs.

    Args:
        sizes: of the graph.
        readers: node of each row.
        offsets: where the edges of each row begin.
        sources: node at which each edge begins.
        weights: of each edge.
        influence: of each node.
        start: weights of the targets.
        candidates: nodes that may stay.
        expanded: which features have a row.
        shares: of the nodes' influence and of the edges' influence that is kept.
    """
    count, f, first_token = len(influence), sizes.features, sizes.first_token
    always = torch.arange(first_token, count)
    mask = (influence >= threshold(influence, shares[0])).index_fill(0, always, value=True) & candidates
    counts, left = offsets.diff(), mask[readers]  # few rows are left, so that the others' edges are not looked at
    numbers = torch.repeat_interleave(left, counts).nonzero().flatten()
    target = torch.repeat_interleave(readers[left], counts[left])
    among = mask[sources[numbers].long()]
    numbers, target = numbers[among], target[among]
    source, weight = sources[numbers].long(), weights[numbers]
    at_targets = torch.zeros(count).index_copy_(0, torch.arange(sizes.first_target, count), start)
    reached, share = pass_on(source, target, weight, at_targets)
    score = share * reached[target]
    kept = score >= threshold(score, shares[1])
    before = ~mask
    while not torch.equal(mask, before):
        before = mask.clone()
        leads, is_led = (_marked(end[kept], count) for end in (source, target))
        mask[:first_token] &= leads[:first_token]
        mask[:f] &= is_led[:f] | ~expanded
        kept &= mask[target] & mask[source]
    return mask, numbers[kept]


def _marked(nodes: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, nodes, value=True)


def threshold(scores: Float[Tensor, " n"], mass: float) -> Float[Tensor, ""]:
    """Return the score down to which a share of the sum of scores is reached."""
    if not len(scores):
        return torch.tensor(0.0)
    ordered = scores.sort(descending=True).values
    place = int(torch.searchsorted(ordered.cumsum(0) / ordered.sum(), mass))
    return ordered[min(place, len(ordered) - 1)]

"""`validate`: ablate nodes of a graph in the model itself, and compare with what the graph says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

import torch
from featurizers.errors import UsageError, shown
from featurizers.models import backend_of
from featurizers_patching import Addition, logits_with_additions
from jaxtyping import Float
from torch import Tensor

from featurizers_graphs.attention import Traced
from featurizers_graphs.result import Graph

Mode: TypeAlias = Literal["recomputed", "frozen"]


@final
@dataclass(frozen=True)
class Validation:
    """Effects of ablations beside what a graph says.

    Attributes:
        mode: as asked for.
        nodes: numbers of the features that were ablated, each alone.
        influence: of each, as the graph has it.
        direct: sum over the targets of weight times the absolute edge from the feature straight to the target: what is
            known without a graph.
        predicted: change of each target that the direct edge predicts, ``(nodes, targets)``.
        change: change of each target that was measured, ``(nodes, targets)``; a target is a logit less the mean.
        kl: KL divergence of the next token's distribution from that of the clean run, in nats.
        kept: numbers of features of the faithfulness curve.
        recovered: share of the KL divergence that is undone when these features of the largest influence stay and all
            others are ablated; 0 for none.
    """

    mode: Mode
    nodes: tuple[int, ...]
    influence: Float[Tensor, " nodes"]
    direct: Float[Tensor, " nodes"]
    predicted: Float[Tensor, "nodes targets"]
    change: Float[Tensor, "nodes targets"]
    kl: Float[Tensor, " nodes"]
    kept: tuple[int, ...] = ()
    recovered: tuple[float, ...] = field(default=())

    @property
    def influence_rank(self) -> float:
        """Spearman correlation of influence and KL divergence."""
        return spearman(self.influence, self.kl)

    @property
    def direct_rank(self) -> float:
        """Spearman correlation of the absolute direct edge and KL divergence, the baseline."""
        return spearman(self.direct, self.kl)

    @property
    def direct_fit(self) -> float:
        """Pearson correlation of the predicted and the measured changes of the targets."""
        return pearson(self.predicted.flatten(), self.change.flatten())

    def __repr__(self) -> str:
        """Return the correlations."""
        return (
            f"Validation({len(self.nodes)} nodes, {self.mode}: rank of influence {self.influence_rank:.2f}, of direct "
            f"edges {self.direct_rank:.2f}; fit of direct edges {self.direct_fit:.2f})"
        )


def validate(
    graph: Graph,
    model: Any,
    maps: Any,
    *,
    nodes: int | Sequence[int] = 64,
    mode: Mode = "recomputed",
    curve: Sequence[int] = (),
    progress: Callable[[float], None] | None = None,
) -> Validation:
    """Ablate features of a graph in the model, one at a time, and compare the effects with the graph.

    A feature is ablated by taking away what it writes at its token: the error and all other features of its layer stay.
    The model then computes everything after it anew. All ablations run together on packed rows, as in
    `featurizers.patch`.

    Args:
        graph: with logits as targets.
        model: that the graph was made of.
        maps: that the graph was made of.
        nodes: features to ablate: a number of those with the largest influence, or the nodes.
        mode: ``recomputed`` computes all later activations anew; ``frozen`` keeps the attention patterns of the clean
            run.
        curve: numbers of features for the faithfulness curve: so many stay, and all others are ablated together.
        progress: is called with the share of the work that is done.

    Raises:
        UsageError: the graph is of other targets, or of another model; or a node is no feature.
    """
    if any(target.kind != "logit" for target in graph.targets):
        raise UsageError("the effects of ablations are measured on logits; make the graph of logits")
    if mode not in ("recomputed", "frozen"):
        raise UsageError(f"mode is 'recomputed' or 'frozen', not {shown(mode)}")
    order = graph.influence[: graph.n_features].argsort(descending=True, stable=True)
    if isinstance(nodes, str):
        raise UsageError(f"nodes is a number of features or a list of nodes, not {shown(nodes)}")
    chosen = order[: max(nodes, 0)].tolist() if isinstance(nodes, int) else [graph.number(node) for node in nodes]
    if not chosen or any(number >= graph.n_features for number in chosen):
        raise UsageError("only features are ablated; give numbers of features, or how many")
    if any(type(count) is not int or not 0 <= count <= graph.n_features for count in curve):
        raise UsageError(f"curve gives numbers of features from 0 to {graph.n_features}, not {shown(list(curve))}")
    traced = Traced(graph, model, maps)
    cells = [traced.ablation(number) for number in chosen]
    counts = list(dict.fromkeys([0, *curve])) if curve else []
    cells += [[each for number in order[count:].tolist() for each in traced.ablation(number)] for count in counts]
    additions = [[Addition(site, token, vector) for site, token, vector in cell] for cell in cells]
    frozen = ("attn.pattern",) if mode == "frozen" else ()
    logits, clean = logits_with_additions(
        backend_of(model).model, graph.tokens.tolist(), additions, freeze=frozen, progress=progress
    )
    logits, clean = logits.float(), clean.float()
    kl = (clean.softmax(-1) * (clean.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    tokens = [target.token for target in graph.targets]
    moved = logits - logits.mean(-1, keepdim=True) - (clean - clean.mean())
    n = len(chosen)
    predicted = torch.zeros(n, len(tokens))
    for column in range(len(tokens)):
        into = {edge.source: edge.weight for edge in graph.edges(into=graph.first_target + column)}
        predicted[:, column] = torch.tensor([-into.get(number, 0.0) for number in chosen])
    weights = torch.tensor([target.weight for target in graph.targets])
    none = float(kl[n]) if counts else 0.0
    recovered = [1 - float(each) / none if none > 0 else 1.0 for each in kl[n:]]
    return Validation(
        mode=mode,
        nodes=tuple(chosen),
        influence=graph.influence[chosen],
        direct=(predicted.abs() * weights).sum(1),
        predicted=predicted,
        change=moved[:n][:, tokens],
        kl=kl[:n],
        kept=tuple(counts),
        recovered=tuple(recovered),
    )


def pearson(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Return the correlation of two rows of numbers; 0 if one does not vary."""
    a, b = (x.double() - x.double().mean() for x in (a, b))
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 0.0


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Return the correlation of two rows of numbers by their ranks, those that are equal sharing their mean rank."""
    return pearson(*(_ranks(x) for x in (a, b)))


def _ranks(x: Tensor) -> Tensor:
    found: tuple[Tensor, Tensor, Tensor] = torch.unique(x, return_inverse=True, return_counts=True)
    _, group, counts = found
    return (counts.cumsum(0) - (counts - 1) / 2)[group]

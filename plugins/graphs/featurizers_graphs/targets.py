"""What a graph explains: logits, a metric of the logits, or features; and the directions that they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from featurizers.errors import UsageError, printable, shown
from featurizers_derived_scalars import Place, RawActivations
from jaxtyping import Float
from torch import Tensor

from featurizers_graphs.collection import Collection
from featurizers_graphs.local_model import LocalModel
from featurizers_graphs.result import Target
from featurizers_graphs.sources import Sources

MOST_LOGITS: Final = 10
LOGIT_MASS: Final = 0.95
"""By default the targets are the fewest logits, at most so many, that hold this much of the probability."""


class Rows(NamedTuple):
    """Targets that read the stream at one point.

    Attributes:
        point: of the residual stream.
        targets: what they are.
        directions: at the stream, ``(T, n, d)``.
        constants: what no node brings, ``(n,)``.
        totals: values of the targets, ``(n,)``.
    """

    point: int
    targets: tuple[Target, ...]
    directions: Float[Tensor, "T n d"]
    constants: Float[Tensor, " n"]
    totals: Float[Tensor, " n"]


def rows_of(targets: Any, local: LocalModel, collection: Collection, sources: Sources, tokenizer: Any) -> list[Rows]:
    """Return the targets of a graph, by the point at which they read the stream, the last first.

    Args:
        targets: see `featurizers_graphs.graph`.
        local: the model at the prompt.
        collection: its maps.
        sources: their features.
        tokenizer: of the model, for texts.

    Raises:
        UsageError: a target is none of these, or is not there.
        SiteError: the model has no language-model head, and a target is of the logits.
    """
    if targets is None:
        return [_logits(local, sources, *_probable(local), tokenizer)]
    listed: list[Any] = list(targets) if isinstance(targets, list) else [targets]
    if not listed:
        raise UsageError("there are no targets; leave them out for the most probable next tokens")
    if all(isinstance(each, tuple) and len(each) == 3 and all(type(i) is int for i in each) for each in listed):
        return _features(local, collection, sources, listed)
    if all(isinstance(each, int | str) and not isinstance(each, bool) for each in listed):
        ids = torch.tensor([_token(each, local, tokenizer) for each in listed])
        if len(set(ids.tolist())) < len(ids):
            raise UsageError(f"a token is twice among the targets {shown(listed)}")
        return [_logits(local, sources, ids, _probabilities(local)[ids], tokenizer)]
    if len(listed) == 1 and callable(listed[0]):
        return [_metric(local, sources, listed[0])]
    raise UsageError(
        "targets are token ids or texts, one metric, or triples (layer, position, number) of features, not "
        f"{shown(targets)}"
    )


def _token(target: int | str, local: LocalModel, tokenizer: Any) -> int:
    vocabulary = local.circuit.d_vocab
    if isinstance(target, int):
        if not 0 <= target < vocabulary:
            raise UsageError(f"token {target} is not in the vocabulary, which has {vocabulary}")
        return target
    if tokenizer is None:
        raise UsageError(f"the target {shown(target)} is a text; give the tokenizer, or the token's id")
    ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UsageError(
            f"the target {shown(target)} is {len(ids)} tokens; a target is one, such as ' Paris' with its space"
        )
    return int(ids[0])


def _probabilities(local: LocalModel) -> Tensor:
    local.circuit.check(Place("logits"))
    return local.at("logits")[-1].softmax(-1).cpu()


def _probable(local: LocalModel) -> tuple[Tensor, Tensor]:
    found = _probabilities(local)
    values, ids = found.topk(min(MOST_LOGITS, len(found)))
    count = min(int(torch.searchsorted(values.cumsum(0), LOGIT_MASS)) + 1, len(values))
    return ids[:count], values[:count]


def _logits(local: LocalModel, sources: Sources, ids: Tensor, weights: Tensor, tokenizer: Any) -> Rows:
    """Return rows of logits less the mean logit, as they are before a soft cap."""
    unembedding = local.circuit.unembedding
    weight, bias = unembedding.weight, unembedding.bias
    chosen = (weight[:, ids.to(weight.device)] - weight.mean(1, keepdim=True)).T.to(local.device, local.dtype)
    offset = torch.zeros(len(ids)) if bias is None else (bias[ids.to(bias.device)] - bias.mean()).cpu()
    directions = chosen.new_zeros(local.length, len(ids), local.width)
    directions[-1] = chosen
    last = local.length - 1
    targets = tuple(
        Target("logit", f"logit {_text(int(i), tokenizer)}", float(w), last, token=int(i))
        for i, w in zip(ids, weights, strict=True)
    )
    return _at_the_end(local, sources, targets, directions, offset)


def _text(token: int, tokenizer: Any) -> str:
    return str(token) if tokenizer is None else printable(repr(tokenizer.decode([token])), 40)


def _metric(local: LocalModel, sources: Sources, metric: Any) -> Rows:
    """Return the row of a metric: its gradient in the logits, which are taken before a soft cap, at this prompt."""
    local.circuit.check(Place("logits"))
    unembedding, final = local.circuit.unembedding, Place("norm.final.scale")
    normed = local.normed(final, local.at("resid.final"))
    weight = unembedding.weight.to(normed)
    logits = normed @ weight
    logits = (logits if unembedding.bias is None else logits + unembedding.bias.to(logits)).detach().requires_grad_()
    with torch.enable_grad():
        value = metric(_view(local, logits)) if hasattr(metric, "needs") else metric(logits)
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        raise UsageError(f"a metric gives one number that depends on the logits, not {shown(value)}")
    (gradient,) = torch.autograd.grad(value, logits)
    read = gradient.abs().sum(1).nonzero().flatten()
    if not len(read) or not bool(gradient.isfinite().all()):
        raise UsageError("the gradient of the metric is zero or not finite, so that nothing can be traced")
    offset = 0.0 if unembedding.bias is None else float((gradient @ unembedding.bias.to(gradient)).sum())
    target = Target("metric", shown(metric), 1.0, int(read[-1]))
    return _at_the_end(local, sources, (target,), (gradient @ weight.T)[:, None], torch.tensor([offset]))


def _view(local: LocalModel, logits: Tensor) -> RawActivations:
    return RawActivations(local.circuit, local.tokens, {(Place("logits"), "forward"): logits})


def _at_the_end(
    local: LocalModel, sources: Sources, targets: tuple[Target, ...], directions: Tensor, offset: Tensor
) -> Rows:
    """Return rows of directions ``(T, n, d)`` at the final norm's output."""
    point, offset = 2 * local.n_layers, offset.to(directions)
    place = Place("norm.final.scale")
    streams = local.stream(point), sources.constants[point]
    totals, constants = ((directions * local.normed(place, x)[:, None]).sum((0, 2)) + offset for x in streams)
    return Rows(point, targets, local.pull_norm(place, directions, (slice(None), None)), constants, totals)


def _features(
    local: LocalModel, collection: Collection, sources: Sources, which: Sequence[tuple[int, int, int]]
) -> list[Rows]:
    """Return rows of features as targets, each with the same weight."""
    by_point: dict[int, list[tuple[int, int, int]]] = {}
    for layer, where, number in which:
        if layer not in collection.readers:
            known = ", ".join(map(str, sorted(collection.readers)))
            raise UsageError(f"no map reads layer {shown(layer)}; layers with features are {known}")
        if not -local.length <= where < local.length:
            raise UsageError(f"the prompt has {local.length} tokens, and a target is at {shown(where)}")
        by_point.setdefault(collection.readers[layer].read.point, []).append((layer, where % local.length, number))
    found = []
    for point, own in sorted(by_point.items(), reverse=True):
        reader = collection.readers[own[0][0]]
        numbers = reader.read.map.numbers(reader.group).to(local.device)
        columns = []
        for layer, _, number in own:
            column = (numbers == number).nonzero().flatten()
            if not len(column):
                raise UsageError(f"the map of layer {layer} has no feature {shown(number)}")
            columns.append(int(column[0]))
        column, position = torch.tensor([columns, [where for _, where, _ in own]], device=local.device)
        rows = sources.encoders(reader, column)
        directions = rows.new_zeros(local.length, len(own), local.width)
        directions[position, torch.arange(len(own))] = sources.pull_reader(reader, rows, position)
        targets = tuple(
            Target("feature", f"{layer}/{number} at {where}", 1 / len(which), where, layer=layer, feature=number)
            for layer, where, number in own
        )
        constants = sources.constant_of(reader, column, position)
        found.append(Rows(point, targets, directions, constants, sources.pre_activation(reader, column, position)))
    return found

"""`capture`: run a decoder once per sequence, and keep the activations and gradients that were asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import torch
from featurizers.errors import UsageError, shown
from featurizers.features import check_placement
from featurizers.models import evaluating, without_parameter_gradients
from jaxtyping import Int
from torch import Tensor, nn

from featurizers_derived_scalars.capturing.activations import RawActivations
from featurizers_derived_scalars.capturing.batches import Batch
from featurizers_derived_scalars.capturing.keeping import Keeper
from featurizers_derived_scalars.capturing.metrics import LogitFunction, Metric, as_metric, check_position
from featurizers_derived_scalars.capturing.prompts import Inputs, sequences
from featurizers_derived_scalars.capturing.recording import Edit, Recorder
from featurizers_derived_scalars.circuit import KINDS, Circuit, Need, Pass, Place
from featurizers_derived_scalars.circuit.places import NORMS
from featurizers_derived_scalars.circuit.running import run


def capture(
    model: nn.Module | Circuit,
    inputs: Inputs,
    needs: Iterable[Need],
    *,
    metric: Metric | LogitFunction | None = None,
    freeze_norms: Iterable[str] = ("final",),
    edits: Iterable[Edit] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 1,
) -> list[RawActivations]:
    """Capture the needs of each sequence.

    The model runs once per sequence or batch, with its own eager attention, as far as something is needed, and only
    what is needed is kept. Its attention, its mode, its parameters and their gradients are left as they were. Places
    that the metric does not depend on have zero gradients.

    With the final norm frozen, ``resid.final · gradient`` sums to the metric minus the part of the norm's bias, if the
    metric is linear in the logits and the logits are not capped. Where they are (Gemma 2) the gradient at
    ``resid.final`` is right, and parts written to the stream still sum to ``resid.final · gradient``, but not to the
    metric.

    Args:
        model: a decoder of `transformers`, or its `Circuit`, which saves looking at the model again.
        inputs: token ids of one sequence or of several; or a tokenizer's output with ``attention_mask``. Padding is
            dropped on either side, so that it never changes a number.
        needs: what to keep. Backward needs require a metric.
        metric: scalar whose gradient is taken: a `Metric`, or a function of the logits ``(token, vocab)``.
        freeze_norms: norms whose scale the gradient takes as constant: of ``final``, ``attn``, ``mlp``,
            ``attn.post``, ``mlp.post``.
        edits: changes to make during the run, in order; edited places are kept as edited.
        device: where to put what is kept; None leaves it on the model's device.
        dtype: of what is kept; None leaves the model's dtype.
        batch_size: sequences that run together, padded on the right, those of similar length beside each other. Results
            are those of one at a time but for rounding. A run needs memory for all that it holds.

    Raises:
        SiteError: the model is not supported, or does not have a place.
        UsageError: inputs, metric or norms are not what they should be, or a backward need has no metric.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=9))
        >>> needs = [Need("mlp.neurons"), Need("attn.probs", "backward", frozenset({1}))]
        >>> raw = capture(model, [3, 1, 4], needs, metric=lambda logits: logits[-1, 5])[0]
        >>> raw[Place("mlp.neurons", 0), "forward"].shape, raw[Place("attn.probs", 1), "backward"].shape
        (torch.Size([3, 32]), torch.Size([3, 3, 2]))
    """
    circuit = model if isinstance(model, Circuit) else Circuit(model)
    check_placement(device, dtype)
    frozen = frozenset((freeze_norms,) if isinstance(freeze_norms, str) else freeze_norms)
    if unknown := frozen - NORMS:
        raise UsageError(f"norms to freeze are {', '.join(sorted(NORMS))}, not {', '.join(map(shown, unknown))}")
    scalar = None if metric is None else as_metric(metric)
    to_keep = _expand(circuit, needs)
    if scalar is None and (backward := sorted(place for place, pass_ in to_keep if pass_ == "backward")):
        raise UsageError(f"the gradient at {backward[0]} needs a metric; give capture(..., metric=...)")
    edits = tuple(edits)
    for edit in edits:
        circuit.check(edit.place)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size is the number of sequences that run together, from 1; not {shown(batch_size)}")
    if edits and batch_size > 1:
        raise UsageError("an edit is of one sequence, and so runs with one; leave batch_size out")
    prompts = sequences(inputs)
    for tokens in prompts:
        circuit.check_tokens(tokens)
    read = frozenset() if scalar is None else _expand(circuit, scalar.needs)
    make = functools.partial(Recorder, circuit, to_keep, read, frozen, edits, Keeper(device, dtype))
    captured: dict[int, RawActivations] = {}
    for numbers in _batches([len(tokens) for tokens in prompts], batch_size):
        rows = [_logit_row(scalar, to_keep, len(prompts[n])) for n in numbers]
        batch = [prompts[n] for n in numbers]
        captured.update(zip(numbers, _capture(circuit, batch, make, rows, scalar), strict=True))
    return [captured[n] for n in range(len(prompts))]


def _batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Yield numbers of sequences that run together: with a size above 1, those of similar length, longest first."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n]) if size > 1 else list(range(len(lengths)))
    yield from (order[start : start + size] for start in range(0, len(order), size))


def _expand(circuit: Circuit, needs: Iterable[Need]) -> frozenset[tuple[Place, Pass]]:
    """Return the places of needs in one model, each checked to be there."""
    expanded: set[tuple[Place, Pass]] = set()
    for need in needs:
        if need.layers is None:
            places = circuit.places(need.kind)
            if not places:
                circuit.check(Place(need.kind, 0 if KINDS[need.kind].layered else None))
        else:
            places = tuple(Place(need.kind, layer) for layer in sorted(need.layers))
            for place in places:
                circuit.check(place)
        expanded |= {(place, need.pass_) for place in places}
    return frozenset(expanded)


def _capture(
    circuit: Circuit,
    prompts: list[Int[Tensor, " token"]],
    make: Callable[[int | None], Recorder],
    rows: list[int | None],
    metric: Metric | None,
) -> list[RawActivations]:
    """Run the model once on all prompts; each has its recorder, which gets the only token whose logits are needed."""
    recorders = [make(row) for row in rows]
    prompts = [tokens.to(circuit.token_device) for tokens in prompts]
    first = recorders[0]
    with ExitStack() as stack:
        stack.enter_context(evaluating(circuit.model))
        stack.enter_context(torch.set_grad_enabled(first.graph))
        if first.graph:
            stack.enter_context(without_parameter_gradients(circuit.model))
        batch = Batch(recorders, prompts) if len(prompts) > 1 else None
        output = run(
            circuit.model,
            prompts[0] if batch is None else batch.ids,
            first.taps() if batch is None else batch.taps(),
            listener=first if batch is None else batch,
            on_arguments=first.argument_receivers() if batch is None else None,
            stop_after=first.stop_after(),
        )
        (first if batch is None else batch).finish(getattr(output, "logits", None))
        del output  # its logits are large
        if metric is not None:
            _differentiate(prompts, recorders, metric, batch)
        return [recorder.kept(tokens) for recorder, tokens in zip(recorders, prompts, strict=True)]


def _differentiate(prompts: list[Tensor], recorders: list[Recorder], metric: Metric, batch: Batch | None) -> None:
    """Take the metric of each sequence, and all gradients in one backward pass."""
    values, roots = [], []
    for recorder, tokens in zip(recorders, prompts, strict=True):
        value = metric(recorder.live(tokens))
        _check_scalar(value, recorder.graph)
        values.append(value)
        roots.append(recorder.roots(value))
    if batch is not None:
        gradients = batch.gradients(values, roots)
    else:
        gradients = [list(torch.autograd.grad(value, roots[0], allow_unused=True)) if roots[0] else []]
    for recorder in reversed(recorders):
        recorder.keep_gradients(roots.pop(), gradients.pop())


def _logit_row(metric: Metric | None, to_keep: frozenset[tuple[Place, Pass]], length: int) -> int | None:
    """Return the only token whose logits are needed; None if those of all are, or none.

    Raises:
        PositionError: the prompt does not have the metric's position.
    """
    if metric is None or metric.logit_position is None:
        return None
    check_position(metric.logit_position, length)
    return None if any(place.kind == "logits" for place, _ in to_keep) else metric.logit_position % length


def _check_scalar(value: object, graph: bool) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
        what = tuple(value.shape) if isinstance(value, Tensor) else value
        raise UsageError(f"a metric gives one number, a tensor without axes; this gives {shown(what)}")
    if graph and not value.requires_grad:
        raise UsageError("the metric does not depend on what the model computes, so that it has no gradient")

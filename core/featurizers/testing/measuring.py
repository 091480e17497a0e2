"""`measure`: an edit of a held model, beside the same edit by plain torch hooks on the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import featurizers
from featurizers.errors import FeaturizerError
from featurizers.models.operations import Ablate, Collect, Interchange, Mask, Operation, Steer
from featurizers.testing.held import MASK, SITE, Cell, Held

FEATURES = [1, 4, 6]
_DELTA, _LARGE_DELTA = 3.0, 20.0
"""Of steering: for logits, and for ``generate``, whose tokens have to change."""


@dataclass(frozen=True)
class Outcome:
    """Result of one cell with a holder.

    Attributes:
        difference: largest difference from plain hooks, over the largest value; of tokens, the part that differs.
        effect: the same between plain hooks and no edit. Without an effect a difference of 0 says nothing.
        refusal: message of the error, if there was one; the numbers are NaN then.
    """

    difference: float = float("nan")
    effect: float = float("nan")
    refusal: str | None = None


def measure(held: Held, cell: Cell) -> Outcome:
    """Try one thing with a holder, and compare it with plain hooks.

    Raises:
        AssertionError: something of the edit was left on the model.
    """
    before, hooks = _clean(held, cell), _hooks(held.hooked)
    try:
        found = _found(held, cell)
    except FeaturizerError as error:
        return Outcome(refusal=str(error))
    finally:
        assert _hooks(held.hooked) == hooks, f"{cell}: a hook was left on the model"
        assert torch.equal(before, _clean(held, cell)), f"{cell}: the model is not as before"
    if cell.site not in held.modules:
        raise AssertionError(f"{cell}: the plain model has no {cell.site}, so this edit should have been refused")
    expected, unedited = _expected(held, cell)
    if not expected.is_floating_point():
        return Outcome(_share(found, expected), _share(expected, unedited))
    scale = float(expected.abs().max())
    return Outcome(float((found - expected).abs().max()) / scale, float((expected - unedited).abs().max()) / scale)


def _share(tokens: Tensor, others: Tensor) -> float:
    return float((tokens != others).float().mean()) if tokens.shape == others.shape else 1.0


def _hooks(model: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [(name, kind, list(getattr(module, kind))) for name, module in model.named_modules() for kind in kinds]


@torch.no_grad()
def _clean(held: Held, cell: Cell) -> Tensor:
    return held.logits(held.inputs(padded=cell.padded))


# ---------------------------------------------------------------------- with featurizers


def _featurizer(width: int) -> Any:
    """Return a dictionary of seven features with random weights."""
    generator = torch.Generator().manual_seed(width)
    encoder, decoder = (torch.randn(7, width, generator=generator) for _ in range(2))
    return featurizers.DictionaryFeaturizer.from_tensors(encoder, decoder, torch.ones(7))


def _operation(held: Held, cell: Cell, gate: Tensor) -> Operation:
    f, where = _featurizer(_width(held, cell)), cell.positions
    source_inputs = held.of_holder(held.inputs(source=True))
    source = _read(held, cell.site, held.inputs(source=True))
    if cell.positions is not None and cell.edit in ("interchange", "mask"):
        source = source[_ROWS, _columns(cell.positions, padded=False)]
    makers: dict[str, Callable[[], Operation]] = {
        "steer": lambda: Steer(f, delta=_delta(cell), indices=FEATURES, positions=where),
        "ablate": lambda: Ablate(f, value=-1.0, indices=FEATURES, positions=where),
        "interchange": lambda: Interchange(f, source=source, indices=FEATURES, positions=where),
        "interchange of inputs": lambda: Interchange(f, source=source_inputs, indices=FEATURES, positions=where),
        "interchange with itself": lambda: Interchange(
            f, source=held.of_holder(held.inputs(padded=cell.padded)), indices=FEATURES, positions=where
        ),
        "mask": lambda: Mask(f, source=source, gate=gate, positions=where),
        "collect": lambda: Collect(f, indices=FEATURES, positions=where),
    }
    return makers[cell.edit]()


def _found(held: Held, cell: Cell) -> Tensor:
    inputs = held.inputs(padded=cell.padded)
    if cell.edit == "collect()":
        given = held.of_holder(inputs)
        return featurizers.collect(held.holder, given, [cell.site], positions=cell.positions)[cell.site]
    gate = _gate().requires_grad_(cell.gradient)
    operations = {cell.site: _operation(held, cell, gate)}
    if cell.options is not None:
        tokens, collected = held.generate(operations, _of_generate(inputs), **_GREEDY, **cell.options)
        return collected[cell.site] if cell.edit == "collect" else tokens
    with torch.set_grad_enabled(cell.gradient):
        logits, collected = held.run(operations, inputs)
    if cell.gradient:
        return _gradient(_tokens(logits, cell), gate)
    return collected[cell.site] if cell.edit == "collect" else _tokens(logits, cell)


_GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def _of_generate(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "position_ids"}


def _tokens(logits: Tensor, cell: Cell) -> Tensor:
    """Return the logits of tokens that are not padding, ``(tokens, vocabulary)``."""
    return logits[MASK.bool()] if cell.padded else logits.flatten(0, 1)


def _gradient(logits: Tensor, gate: Tensor) -> Tensor:
    """Return the gradient of the mean square of logits; it is accumulated, as reentrant checkpointing needs it."""
    logits.square().mean().backward()  # type: ignore[no-untyped-call]
    assert gate.grad is not None, "the gate has no gradient"
    return gate.grad


def _delta(cell: Cell) -> float:
    return _DELTA if cell.options is None else _LARGE_DELTA


def _gate() -> Tensor:
    return torch.linspace(0, 1, 7)


# ---------------------------------------------------------------------- with plain hooks alone


_ROWS = torch.arange(2)[:, None]


def _columns(positions: Sequence[Any], *, padded: bool) -> Tensor:
    """Return the columns of positions, ``(2, n)``."""
    rows = positions if isinstance(positions[0], list) else [positions, positions]
    lengths, firsts = ((4, 6), (2, 0)) if padded else ((6, 6), (0, 0))
    return torch.tensor(
        [[first + each % n for each in row] for row, n, first in zip(rows, lengths, firsts, strict=True)]
    )


def _place(held: Held, site: str) -> tuple[nn.Module, str, slice]:
    path, side, columns = held.modules.get(site, held.modules[SITE])
    return held.plain.get_submodule(path), side, slice(None) if columns is None else columns


@contextmanager
def _hooked(module: nn.Module, side: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass what a module is given or returns through a function."""

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle: Any = (
        module.register_forward_pre_hook(on_input, with_kwargs=True)
        if side == "input"
        else module.register_forward_hook(on_output)
    )
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _read(held: Held, site: str, inputs: Mapping[str, Tensor], *, generate: bool = False) -> Tensor:
    """Return the activations of the plain model at a site, in one pass or in all passes of ``generate``."""
    module, side, columns = _place(held, site)
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden[..., columns].clone())
        return hidden

    with _hooked(module, side, keep):
        if generate:
            held.plain.generate(**inputs, **_GREEDY)  # type: ignore[operator]
        else:
            held.plain(**inputs)
    return torch.cat(seen, dim=1)


def _width(held: Held, cell: Cell) -> int:
    return _read(held, cell.site, held.inputs()).shape[-1]


def _by_hand(held: Held, cell: Cell, gate: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the operation of a cell written out, on activations ``(batch, n, d)``."""
    weights = copy.deepcopy(_featurizer(_width(held, cell))).state_dict()
    encoder, decoder, chosen = weights["W_enc"], weights["W_dec"], FEATURES
    source = _read(held, cell.site, held.inputs(source=True))
    if cell.positions is not None:
        source = source[_ROWS, _columns(cell.positions, padded=False)]

    def features(x: Tensor) -> Tensor:
        pre: Tensor = x @ encoder.T + weights["b_enc"]
        return pre.relu()

    def swapped(x: Tensor) -> Tensor:
        changes = (features(source) - features(x))[..., chosen]
        edited: Tensor = x + changes @ decoder[chosen]
        return edited

    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "steer": lambda x: x + decoder[chosen].sum(0) * _delta(cell),
        "ablate": lambda x: x + (-1.0 - features(x)[..., chosen]) @ decoder[chosen],
        "interchange": swapped,
        "interchange of inputs": swapped,
        "interchange with itself": lambda x: x,
        "mask": lambda x: x + (gate * (features(source) - features(x))) @ decoder,
        "collect": lambda x: features(x)[..., chosen],
        "collect()": lambda x: x,
    }
    return formulas[cell.edit]


def _expected(held: Held, cell: Cell) -> tuple[Tensor, Tensor]:
    """Return what plain hooks give, and what the model gives unedited."""
    inputs = held.inputs(padded=cell.padded)
    gate = _gate().requires_grad_(cell.gradient)
    formula = _by_hand(held, cell, gate)
    chosen = None if cell.positions is None else _columns(cell.positions, padded=cell.padded)
    module, side, columns = _place(held, cell.site)
    if cell.edit in ("collect", "collect()"):
        at_site = _read(held, cell.site, inputs, generate=cell.options is not None)
        found = formula(at_site if chosen is None else at_site[_ROWS, chosen])
        return found, torch.zeros_like(found)
    passes = 0

    def edit(hidden: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if chosen is not None and passes > 1:  # a token of the prompt, which later passes do not compute
            return hidden
        edited = hidden.clone()
        part = hidden[..., columns]
        if chosen is None:
            edited[..., columns] = formula(part)
        else:
            each = torch.arange(len(hidden))[:, None]  # beams repeat each prompt
            where = chosen.repeat_interleave(len(hidden) // len(chosen), dim=0)
            new = part.clone()
            new[each, where] = formula(part[each, where])
            edited[..., columns] = new
        return edited

    def run() -> Tensor:
        if cell.options is not None:
            options = {name: value for name, value in cell.options.items() if name != "use_cache"}
            tokens: Tensor = held.plain.generate(**_of_generate(inputs), **_GREEDY, **options)  # type: ignore[operator]
            return tokens
        return _tokens(held.plain_logits(inputs), cell)

    with torch.set_grad_enabled(cell.gradient):
        unedited = run()
        with _hooked(module, side, edit):
            edited = run()
    if cell.gradient:
        gradient = _gradient(edited, gate)
        return gradient, torch.zeros_like(gradient)
    return edited, unedited

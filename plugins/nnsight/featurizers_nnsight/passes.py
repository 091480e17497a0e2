"""Which forward pass the body of a trace is in: its inputs, read once, and what they say of prompt and padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from featurizers.errors import PositionError, UsageError
from featurizers.models import Operation, Pass, SourcedOperation, bound
from greenlet import getcurrent, greenlet
from nnsight.intervention.envoy import Envoy
from torch import Tensor

from featurizers_nnsight.requests import Call, mediator_of, step_of


@dataclass
class _Read:
    """Inputs that the body of a trace has read.

    Attributes:
        step: forward pass that they are of.
        call: its arguments; of an invoke its own rows.
        inputs: the same by name.
        cached: number of tokens that were in its cache.
        prompt_columns: number of columns of the first pass, if that was read.
    """

    step: int = -1
    call: Call = ((), {})
    inputs: dict[str, Any] = field(default_factory=dict)
    cached: int = 0
    prompt_columns: int | None = None


_read: WeakKeyDictionary[greenlet, _Read] = WeakKeyDictionary()
"""By the greenlet that runs the body; a body that nnsight keeps for later traces has another in each."""


def call_of(lm: Envoy) -> Call:
    """Return the arguments of the current pass, asked for once in each pass.

    Raises:
        UsageError: the pass has gone past its inputs before any edit asked for them.
    """
    return _current(lm).call


def _current(lm: Envoy) -> _Read:
    mediator = mediator_of(lm)
    step, read = step_of(lm, mediator), _read.setdefault(getcurrent(), _Read())
    if read.step == step:
        return read
    if mediator.occurrence(f"{lm.path}.input") > step:
        raise UsageError(
            "the mask and the tokens of this pass are needed, and the trace has gone past them: let edit with "
            "positions, a source or special tokens be the first request of each pass or invoke, before other values "
            "are read"
        )
    read.step, read.call = step, lm.inputs
    read.inputs = bound(lm._module, read.call[0], dict(read.call[1]))
    read.cached = max((cache.get_seq_length() for cache in _caches(read)), default=0) if step == 0 else 0
    tokens = _tokens(read.inputs)
    if step == 0 and tokens is not None:
        read.prompt_columns = tokens.shape[1]
    return read


def needs_pass(operation: Operation) -> bool:
    """Return whether an operation depends on the mask or the tokens of a pass; else it edits all tokens alike."""
    return (
        operation.positions is not None
        or isinstance(operation, SourcedOperation)
        or bool(operation.featurizer.special_tokens)
    )


def is_prompt(lm: Envoy, operation: Operation, site: str) -> bool:
    """Return whether an operation concerns the current pass: one with positions or a source concerns the prompt alone.

    Raises:
        PositionError: the prompt was computed before, in parts, or twice.
    """
    if operation.positions is None and not isinstance(operation, SourcedOperation):
        return True
    read = _current(lm)
    for name, why in (("prefill_chunk_size", "computes the prompt in parts"), ("guidance_scale", _GUIDED)):
        if (_option(lm, name) or 1) != 1:
            raise PositionError(f"{site}: with {name} `generate` {why}; generate without it, or use positions=None")
    if read.step == 0:
        if read.cached:
            raise PositionError(
                f"{site}: the first tokens of the prompt are in a cache already, so its positions cannot be edited; "
                "run the whole prompt inside the trace"
            )
        return True
    if _caches(read):
        return False
    if read.prompt_columns is None:
        raise PositionError(
            f"{site}: without a cache each pass computes the prompt again, and the length of the prompt is not known; "
            "call edit in every step from the first on: for step in tr.iter[:n]"
        )
    return True


_GUIDED = "passes a second, unconditional prompt through the model"


def pass_of(lm: Envoy, hidden: Tensor) -> Pass:
    """Return the state of the current pass, for activations that it computes.

    Args:
        lm: holder of the model.
        hidden: ``(batch, sequence, d)``.
    """
    read = _current(lm)
    mask, tokens = read.inputs.get("attention_mask"), _tokens(read.inputs)
    shown = isinstance(mask, Tensor) and mask.dim() == 2
    columns = None if tokens is None or hidden.dim() != 3 else hidden.shape[1] - tokens.shape[1]
    return Pass(
        start=0,
        began=0,
        attention_mask=mask if shown else None,
        opaque_mask=mask is not None and not shown,
        prompt_columns=read.prompt_columns,
        tokens=tokens if tokens is not None and tokens.dim() == 2 else None,
        has_position_ids=read.inputs.get("position_ids") is not None,
        added_columns=columns or 0,
    )


def padded_as_given(current: Pass) -> bool:
    """Return whether the pass has padding and counts its positions by columns."""
    mask = current.attention_mask
    return not current.has_position_ids and mask is not None and not bool((mask != 0).all())


def _caches(read: _Read) -> list[Any]:
    return [value for value in read.inputs.values() if hasattr(value, "get_seq_length")]


def _tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    ids = inputs.get("input_ids")
    return ids if isinstance(ids, Tensor) else None


def _option(lm: Envoy, name: str) -> Any:
    """Return an option of the call of ``generate`` that is traced; None if it is not set."""
    batcher = lm.interleaver.batcher
    given = [] if batcher is None else [batcher.extra_kwargs, *(kwargs for _, kwargs in batcher.invokes)]
    configs = [each.get("generation_config") for each in given]
    configs.append(getattr(lm._module, "generation_config", None))
    candidates = [*(each.get(name) for each in given), *(getattr(config, name, None) for config in configs)]
    return next((value for value in candidates if value is not None), None)

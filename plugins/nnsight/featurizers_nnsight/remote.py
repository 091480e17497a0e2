"""`remote_edit`: fixed edits as one plain function, for traces that run on a server without this library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from featurizers.errors import LoweringError, UsageError
from featurizers.features import Program
from featurizers.models import Anatomy, Place, lower
from nnsight.intervention.envoy import Envoy

from featurizers_nnsight.editing import Operations, as_operations
from featurizers_nnsight.requests import in_order, requests_of


def remote_edit(lm: Envoy, operations: Operations) -> Callable[[Envoy], None]:
    """Return a function of the model that carries out fixed edits, made of plain code, numbers and tensors.

    Call it in the body of a trace with ``remote=True`` or ``remote="local"``: nnsight sends the code of the function
    and its tensors, and the server needs nothing of this library. It is the first request of the body. The weights of
    the model need not be loaded here.

    Args:
        lm: model of nnsight, such as ``TransformersModel``.
        operations: as in `featurizers_nnsight.edit`, of those that `featurizers.lower` takes.

    Raises:
        LoweringError: an operation has no fixed form; the message says why.
        SiteError: the model does not have a site.

    Examples:
        >>> change = remote_edit(lm, {"resid.post:8": featurizers.Steer(f, delta=2.0)})  # doctest: +SKIP
        >>> with lm.trace(ids, remote=True):
        ...     change(lm)
        ...     logits = lm.output.logits.save()
    """
    if not isinstance(lm, Envoy):
        raise UsageError(f"remote_edit takes a model of nnsight, such as TransformersModel, not {type(lm).__name__}")
    anatomy = Anatomy(lm._module)
    requests, programs = [], {}
    for key, value in operations.items():
        own = as_operations(key, value)
        site, place = str(anatomy.site(key)), anatomy.place(key)
        if place.stream is not None:
            raise LoweringError(
                f"{site} is a sum, which needs this library where it runs; edit 'attn.out' or 'resid.pre', or use edit "
                "in a local trace"
            )
        programs[site] = [_as_plain(lower(each)) for each in own]
        requests += requests_of(site, place, lambda hidden: hidden)
    steps = [
        (request.place.path, request.place.side, _columns(request.place), program)
        for request in in_order(lm, requests, lambda: ((), {}))
        for program in programs[request.site]
    ]
    return _function(steps)


def _as_plain(program: Program) -> dict[str, Any]:
    """Return the numbers of a program as tensors and lists."""
    rows, gate = program.rows, program.rows.gate
    gated = gate is not None and bool(program.factor.any())
    return {
        "read": rows.read,
        "bias": rows.bias,
        "write": rows.write,
        "constant": program.constant,
        "factor": program.factor,
        "gate": [gate.threshold, gate.slope, gate.offset, gate.floor] if gate is not None and gated else None,
        "positions": None if program.positions is None else list(program.positions),
        "special": list(program.special_tokens),
    }


def _columns(place: Place) -> tuple[int, int, int] | None:
    """Return the columns of a place: first, end, and number of groups that each have them."""
    return None if place.columns is None else (place.columns.start, place.columns.stop, place.groups)


# Each function below returns a function made within it. nnsight sends the source of such functions, with the variables
# that it names: they use their arguments, one another and torch, and nothing else.


def _function(steps: Sequence[tuple[str, str, tuple[int, int, int] | None, dict[str, Any]]]) -> Callable[[Any], None]:
    """Return the function of some steps."""
    prompts, kept, applied, spliced = _prompts(), _kept(), _applied(), _spliced()

    def edit(lm: Any) -> None:
        needs_prompts = any(program["positions"] is not None or program["special"] for _, _, _, program in steps)
        prompt = prompts(lm.inputs[1]) if needs_prompts else None
        for path, side, columns, program in steps:
            envoy = lm.get(path)
            value = envoy.output if side == "output" else envoy.inputs
            value = spliced(value, side, columns, lambda x, own=program: kept(own, x, applied(own, x), prompt))
            if side == "output":
                envoy.output = value
            else:
                envoy.inputs = value

    return edit


def _prompts() -> Callable[..., Any]:
    """Return the function from a model's inputs to token ids, columns of tokens in their order, and lengths."""

    def prompts(inputs: Any) -> Any:
        mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
        if tokens is None:
            raise ValueError("positions and special tokens need input_ids as a keyword argument of the model")
        if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
            raise ValueError("positions need a mask of two dimensions, which shows the padding")
        present = torch.ones_like(tokens) if mask is None else mask[:, : tokens.shape[1]]
        # a stable sort puts the columns of tokens, in their order, before those of padding
        order = torch.argsort((present == 0).int(), dim=-1, stable=True)
        return tokens, order, (present != 0).sum(-1, keepdim=True)

    return prompts


def _kept() -> Callable[..., Any]:
    """Return the function that keeps the activations of tokens that a program does not edit."""

    def kept(program: Any, x: Any, edited: Any, prompt: Any) -> Any:
        if prompt is None:
            return edited
        tokens, order, lengths = prompt
        if x.shape[:2] != tokens.shape:
            raise ValueError(f"the site has activations {tuple(x.shape)}, which have no positions of the prompt's")
        if program["positions"] is not None:
            at = torch.tensor(program["positions"], device=lengths.device).expand(len(lengths), -1)
            at = torch.where(at < 0, at + lengths, at)
            if bool(((at < 0) | (at >= lengths)).any()):
                raise IndexError(f"a prompt does not have the positions {program['positions']}")
            chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, order.gather(1, at), True)
            edited = torch.where(chosen.to(x.device).unsqueeze(-1), edited, x)
        if program["special"]:
            special = torch.isin(tokens, torch.tensor(program["special"], device=tokens.device))
            edited = torch.where(special.to(x.device).unsqueeze(-1), x, edited)
        return edited

    return kept


def _applied() -> Callable[..., Any]:
    """Return the function that computes a program, as `Program.apply` does."""

    def applied(program: Any, x: Any) -> Any:
        read, bias, write, amounts, factor = (
            program[name].to(x.device) for name in ("read", "bias", "write", "constant", "factor")
        )
        if program["gate"] is not None:
            threshold, slope, offset, floor = (part.to(x.device) for part in program["gate"])
            pre = x.to(write.dtype) @ read.mT + bias
            active = torch.maximum(slope * pre + offset, floor)
            amounts = amounts + factor * torch.where(pre > threshold, active, 0.0)
        return (x + amounts @ write).to(x.dtype)

    return applied


def _spliced() -> Callable[..., Any]:
    """Return the function that changes the activations within a module's output or its arguments."""

    def spliced(value: Any, side: str, columns: Any, change: Any) -> Any:
        if side == "input":
            args, kwargs = value
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), None)
            whole = args[0] if args else kwargs[name]
        else:
            whole = value[0] if isinstance(value, tuple) else value
        if columns is None:
            edited = change(whole)
        else:
            start, stop, groups = columns
            grouped = whole.reshape(*whole.shape[:-1], groups, whole.shape[-1] // groups)
            part = change(grouped[..., start:stop].flatten(-2))
            part = part.reshape(*part.shape[:-1], groups, stop - start)
            edited = torch.cat([grouped[..., :start], part, grouped[..., stop:]], dim=-1).flatten(-2)
        if side == "input":
            return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, name: edited})
        return (edited, *value[1:]) if isinstance(value, tuple) else edited

    return spliced

"""Computes one block's attention or MLP anew, by the model's own modules, from another residual stream."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, TypeAlias, final

import torch
from featurizers.errors import SiteError, UsageError, shown
from featurizers.models import Place as Tap
from featurizers.models import evaluating, first_tensor, hook
from torch import Tensor, nn

from featurizers_derived_scalars.attention import Listener, Part, listening
from featurizers_derived_scalars.places import Place

if TYPE_CHECKING:
    from featurizers_derived_scalars.activations import RawActivations
    from featurizers_derived_scalars.circuit import Circuit

Through: TypeAlias = Literal["q", "k", "v"]

_ATTENTION: dict[str, Part] = {
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.logits": "logits",
    "attn.probs": "probs",
    "attn.z": "z",
}


def shaped(part: Part, tensor: Tensor) -> Tensor:
    """A part of attention as its place holds it: no batch axis, tokens first."""
    if part == "z":
        return tensor[0]
    return tensor[0].transpose(0, 1) if part in ("q", "k", "v") else tensor[0].permute(1, 2, 0)


def unshaped(part: Part, tensor: Tensor) -> Tensor:
    """The inverse of `shaped`."""
    if part == "z":
        return tensor[None]
    return tensor.transpose(0, 1)[None] if part in ("q", "k", "v") else tensor.permute(2, 0, 1)[None]


def replay(
    circuit: Circuit,
    place: Place,
    resid: Tensor,
    raw: RawActivations,
    *,
    through: Through | None,
    freeze_norm: bool,
) -> Tensor:
    """What `Circuit.recompute` answers."""
    circuit.check(place)
    if through is not None and (through not in ("q", "k", "v") or not place.kind.startswith("attn.")):
        raise UsageError(f"through is 'q', 'k' or 'v', for a place of attention; it is {shown(through)} for {place}")
    parts = tuple(circuit.model.parameters())
    resid = resid.to(parts[0].device, parts[0].dtype) if parts else resid
    with evaluating(circuit.model):
        if place.kind == "logits":
            return circuit.unembedding(_normed(circuit, "final", None, resid, raw, freeze_norm))
        if place.kind in _ATTENTION or place.kind in ("attn.out", "attn.delta"):
            return _attention(circuit, place, resid, raw, through, freeze_norm)
        if place.kind in ("mlp.pre", "mlp.neurons", "mlp.out", "mlp.delta"):
            return _mlp(circuit, place, resid, raw, freeze_norm)
    raise SiteError(f"{place} is not computed from the residual stream by attention, an MLP or the head")


def _normed(
    circuit: Circuit, name: str, layer: int | None, x: Tensor, raw: RawActivations, freeze_norm: bool
) -> Tensor:
    """What a norm gives: the module itself, or the formula with its captured scale; x where there is no such norm."""
    place = Place(f"norm.{name}.scale", layer)
    norm, path = circuit.norm(place), circuit.norm_path(place)
    if norm is None or path is None:
        return x
    if freeze_norm:
        return norm.frozen(x, raw.scale(name, layer).to(x.device)).to(x.dtype)
    return first_tensor(circuit.model.get_submodule(path)(x))


def _added(circuit: Circuit, place: Place, out: Tensor, raw: RawActivations, freeze_norm: bool) -> Tensor:
    half = place.kind.partition(".")[0]
    if place.kind.endswith(".out"):
        return out
    return _normed(circuit, f"{half}.post", place.layer, out, raw, freeze_norm) * circuit.factor(place)


@final
class _Through(Listener):
    """Keeps the parts of one module's attention, and holds two of q, k and v where one is to be followed."""

    def __init__(self, through: Through | None, wanted: Part | None) -> None:
        self.parts: dict[Part, Tensor] = {}
        self._through, self._wanted = through, wanted

    def wants_logits(self, module: nn.Module) -> bool:
        """If they are what is asked for."""
        return self._wanted == "logits"

    def hear(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        """The tensor, or its value alone."""
        if self._through is not None and part in ("q", "k", "v") and part != self._through:
            tensor = held(tensor)
        self.parts[part] = tensor
        return tensor


def held(tensor: Tensor) -> Tensor:
    """A tensor's value, through which no derivative passes, forward or backward."""
    return torch.ops.aten.detach(tensor)  # type: ignore[no-any-return]


def _attention(
    circuit: Circuit, place: Place, resid: Tensor, raw: RawActivations, through: Through | None, freeze_norm: bool
) -> Tensor:
    layer = place.layer
    if layer is None or layer not in raw.arguments:
        raise SiteError(f"{place} cannot be computed: attention of that layer was not run when this was captured")
    module, arguments = circuit.model.get_submodule(circuit.block(place).attention), raw.arguments[layer]
    part = _ATTENTION.get(place.kind)
    listener = _Through(through, part)
    with listening(circuit.model, listener):
        normed = _normed(circuit, "attn", layer, resid, raw, freeze_norm)
        out = first_tensor(module(normed[None], *arguments.positional, **arguments.named))[0]
    if part is not None:
        return shaped(part, listener.parts[part])
    return _added(circuit, place, out, raw, freeze_norm)


def _mlp(circuit: Circuit, place: Place, resid: Tensor, raw: RawActivations, freeze_norm: bool) -> Tensor:
    block, model = circuit.block(place), circuit.model
    normed = _normed(circuit, "mlp", place.layer, resid, raw, freeze_norm)
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with ExitStack() as stack:
        if place.kind in ("mlp.pre", "mlp.neurons") and (point := circuit.tap_point(place)) is not None:
            stack.callback(hook(Tap(point[0], model.get_submodule(point[0]), point[1]), keep).remove)
        if block.mlp is not None:
            out = first_tensor(model.get_submodule(block.mlp)(normed[None]))[0]
        else:
            out = normed
            for path in (block.up_projection, block.activation, block.down_projection):
                out = out if path is None else model.get_submodule(path)(out)
    if seen:
        return seen[-1][0] if seen[-1].dim() == 3 else seen[-1]
    return _added(circuit, place, out, raw, freeze_norm)

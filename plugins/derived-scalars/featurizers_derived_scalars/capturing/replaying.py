"""`Replay`: compute one block's attention or MLP again, by the model's own modules, from another residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

import torch
from featurizers.errors import SiteError, UsageError, shown
from featurizers.models import Place as Tap
from featurizers.models import eager, evaluating, first_tensor, hook
from torch import Tensor, nn

from featurizers_derived_scalars.circuit import Circuit, Listener, Place
from featurizers_derived_scalars.circuit.attention import PARTS, Part, listening, place_layout
from featurizers_derived_scalars.circuit.running import Arguments

Through: TypeAlias = Literal["q", "k", "v"]


@final
@dataclass(frozen=True)
class Replay:
    """Settings of `RawActivations.recompute`.

    Attributes:
        circuit: circuit of the model.
        scale: from the name of a norm and its layer to its captured scale, ``(token, 1)``.
        arguments: arguments of each attention module, by layer.
        through: input of attention that derivatives go through; None for all.
        freeze_norm: hold norms at their captured scales.
    """

    circuit: Circuit
    scale: Callable[[str, int | None], Tensor]
    arguments: Mapping[int, Arguments]
    through: Through | None
    freeze_norm: bool

    def run(self, place: Place, resid: Tensor) -> Tensor:
        """Return a place's tensor, computed from the residual stream before it."""
        self.circuit.check(place)
        if self.through is not None and (self.through not in get_args(Through) or not place.kind.startswith("attn.")):
            raise UsageError(
                f"through is 'q', 'k' or 'v', for a place of attention; it is {shown(self.through)} for {place}"
            )
        parameter = next(self.circuit.model.parameters(), None)
        resid = resid if parameter is None else resid.to(parameter.device, parameter.dtype)
        with evaluating(self.circuit.model):
            if place.kind == "logits":
                return self.circuit.unembedding(self._normed("final", None, resid))
            if place.kind in PARTS or place.kind in ("attn.out", "attn.delta"):
                return self._attention(place, resid)
            if place.kind in ("mlp.pre", "mlp.neurons", "mlp.out", "mlp.delta"):
                return self._mlp(place, resid)
        raise SiteError(f"{place} is not computed from the residual stream by attention, an MLP or the head")

    def _normed(self, name: str, layer: int | None, x: Tensor) -> Tensor:
        """Apply a norm: the formula with its captured scale, or the module itself; x if the model lacks the norm."""
        place = Place(f"norm.{name}.scale", layer)
        norm, path = self.circuit.norm(place), self.circuit.norm_path(place)
        if norm is None or path is None:
            return x
        if self.freeze_norm:
            return norm.frozen(x, self.scale(name, layer).to(x.device)).to(x.dtype)
        return first_tensor(self.circuit.model.get_submodule(path)(x))

    def _added(self, place: Place, out: Tensor) -> Tensor:
        """Return ``attn.delta`` or ``mlp.delta`` of a module's output, or the output itself if that is the place."""
        half, _, kind = place.kind.partition(".")
        if kind == "out":
            return out
        return self._normed(f"{half}.post", place.layer, out) * self.circuit.factor(place)

    def _attention(self, place: Place, resid: Tensor) -> Tensor:
        layer, model = place.layer, self.circuit.model
        if layer is None or layer not in self.arguments:
            raise SiteError(f"{place} cannot be computed: attention of that layer was not run when this was captured")
        module, arguments = model.get_submodule(self.circuit.block(place).attention), self.arguments[layer]
        part = PARTS.get(place.kind)
        listener = _Through(self.through, part)
        with eager(), listening(model, listener):
            normed = self._normed("attn", layer, resid)
            out = first_tensor(module(normed[None], *arguments.positional, **arguments.named))[0]
        return self._added(place, out) if part is None else place_layout(part, listener.parts[part])

    def _mlp(self, place: Place, resid: Tensor) -> Tensor:
        block, model = self.circuit.block(place), self.circuit.model
        normed = self._normed("mlp", place.layer, resid)
        neurons: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            neurons.append(tensor)
            return tensor

        with eager(), ExitStack() as stack:
            if place.kind in ("mlp.pre", "mlp.neurons") and (point := self.circuit.tap_point(place)) is not None:
                stack.callback(hook(Tap(point[0], model.get_submodule(point[0]), point[1]), keep).remove)
            if block.mlp is not None:
                out = first_tensor(model.get_submodule(block.mlp)(normed[None]))[0]
            else:
                out = normed
                for path in (block.up_projection, block.activation, block.down_projection):
                    out = out if path is None else model.get_submodule(path)(out)
        if neurons:
            return neurons[-1][0] if neurons[-1].dim() == 3 else neurons[-1]
        return self._added(place, out)


@final
class _Through(Listener):
    """Keeps the parts of one module's attention, and holds two of q, k and v where the third is followed."""

    def __init__(self, through: Through | None, part: Part | None) -> None:
        self.parts: dict[Part, Tensor] = {}
        self._through, self._part = through, part

    def wants_logits(self, module: nn.Module) -> bool:
        return self._part == "logits"

    def on_event(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        if self._through is not None and part in ("q", "k", "v") and part != self._through:
            tensor = torch.ops.aten.detach(tensor)  # stops derivatives forward and backward
        self.parts[part] = tensor
        return tensor

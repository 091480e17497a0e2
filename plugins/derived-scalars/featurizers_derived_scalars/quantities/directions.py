"""Directions: gradients in the residual stream that direct effects are measured along."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from featurizers.errors import ShapeError, SiteError, UsageError, shown
from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.capturing import RawActivations
from featurizers_derived_scalars.circuit import Circuit, Need, Place
from featurizers_derived_scalars.nodes import Node, NodeAxis, View, at_least_float32
from featurizers_derived_scalars.quantities.layer_maps import Layers
from featurizers_derived_scalars.quantities.sources import ScalarSource
from featurizers_derived_scalars.quantities.tracing import (
    node_needs,
    node_value,
    residual_of,
    through_values,
    traced_place,
)

FINAL: Final = Place("resid.final")
"""End of the residual stream."""


class Direction(ScalarSource):
    """A vector at each token, at one place of the residual stream. As a source it serves every layer."""

    axes: ClassVar[tuple[NodeAxis, ...]] = ("token", "d_model")
    constant: ClassVar[bool] = True

    @abstractmethod
    def place(self, circuit: Circuit) -> Place:
        """Return its place in the model: what is computed before has a direct effect along it."""

    @abstractmethod
    def vector(self, raw: RawActivations) -> Float[Tensor, "token d_model"]:
        """Return the direction, in float32 or better."""

    @final
    def layers(self, raw: RawActivations) -> Layers | None:
        """Return None, for any layer."""
        return None

    @final
    def derive(self, raw: RawActivations, layer: int | None) -> Tensor:
        """Return the direction."""
        return self.vector(raw)


class _AtPlace(Direction):
    """A direction at a given place of the residual stream."""

    at: Place

    def __post_init__(self) -> None:
        """Check the place."""
        if not self.at.kind.startswith("resid."):
            raise SiteError(f"a direction is at a place of the residual stream (resid.*), not at {self.at}")

    @final
    def place(self, circuit: Circuit) -> Place:
        """Return the place."""
        return self.at


@final
@dataclass(frozen=True)
class MetricGrad(_AtPlace):
    """Gradient of the capture's metric at a place of the residual stream: ``MetricGrad()`` at the end of it.

    Attributes:
        at: the place; for a traced node, the one before the node (`residual_of`).

    Raises:
        SiteError: the place is not of the residual stream.
    """

    at: Place = FINAL

    def needs(self, circuit: Circuit, layers: Layers | None = None) -> frozenset[Need]:
        """Return the need of the gradient."""
        circuit.check(self.at)
        return frozenset({Need.at(self.at, "backward")})

    def vector(self, raw: RawActivations) -> Float[Tensor, "token d_model"]:
        """Return the gradient."""
        return at_least_float32(raw[self.at, "backward"])

    def __str__(self) -> str:
        """Return a description."""
        return f"the metric's gradient at {self.at}"


@final
@dataclass(frozen=True, eq=False)
class NodeGrad(Direction):
    """Gradient of one node in the residual stream before it, without a backward pass of the model.

    Attributes:
        node: the node.
        times_metric: multiply by the metric's gradient at the node, which makes it the gradient of the node's
            attribution: activation times gradient, with the gradient held. A head through ``v`` has no other.
        freeze_norm: hold the scale of the norm before the node.

    Raises:
        UsageError: the node is a head through ``v``, and ``times_metric`` is not set.
    """

    node: Node
    times_metric: bool = False
    freeze_norm: bool = True

    def __post_init__(self) -> None:
        """Check that the node is a scalar."""
        traced_place(self.node)
        if through_values(self.node) and not self.times_metric:
            raise UsageError(
                f"{self.node} is no scalar by itself; take its attribution: NodeGrad(node, times_metric=True)"
            )

    def place(self, circuit: Circuit) -> Place:
        """Return the residual stream before the node."""
        return residual_of(self.node, circuit)

    def needs(self, circuit: Circuit, layers: Layers | None = None) -> frozenset[Need]:
        """Return the needs of that residual stream, and of the gradient that the node's is multiplied by."""
        node, needs = self.node, node_needs(self.node, circuit)
        if through_values(node):
            return needs | {Need.at(node.place), Need.at(Place("attn.z", node.layer), "backward")}
        if self.times_metric:
            needs |= {Need.at(traced_place(node), "backward")}
            if node.basis.featurizer is not None:
                needs |= {Need.at(node.place)}
        return needs

    def vector(self, raw: RawActivations) -> Float[Tensor, "token d_model"]:
        """Return the gradient, by a VJP of the node's block."""
        node, output = self.node, None
        if through_values(node):
            token, _, head = node.numbers()
            output = at_least_float32(raw[Place("attn.z", node.layer), "backward"])[token, head]
        resid = at_least_float32(raw[self.place(raw.circuit), "forward"])

        def scalar(resid: Tensor) -> Tensor:
            return node_value(node, resid, raw, freeze_norm=self.freeze_norm, output=output)

        with torch.no_grad():  # no graph of the model's parameters
            gradient: Tensor = torch.func.grad(scalar)(resid)
            if self.times_metric and not through_values(node):
                gradient = gradient * _metric_gradient(node, raw)
        return gradient

    def __str__(self) -> str:
        """Return a description."""
        return f"the gradient of {'the attribution of ' if self.times_metric else ''}{self.node}"


def _metric_gradient(node: Node, raw: RawActivations) -> Float[Tensor, ""]:
    """Return the metric's gradient in one node."""
    if node.pre_activation and node.basis.featurizer is not None:
        raise UsageError(f"{node}: the metric's gradient before a latent's rule is not known; take the latent itself")
    gradient = at_least_float32(raw[traced_place(node), "backward"])
    if node.basis.featurizer is not None:
        gradient = View(node.basis, raw, node.layer).pull(gradient)
    return gradient[node.numbers()]


@final
@dataclass(frozen=True, eq=False)
class Fixed(_AtPlace):
    """A given vector.

    Attributes:
        direction: ``(d_model,)``, or one for each token ``(token, d_model)``.
        at: place of the residual stream where it is read.

    Raises:
        ShapeError: the tensor has another number of axes, or is not real.
        SiteError: the place is not of the residual stream.
    """

    direction: Tensor
    at: Place = FINAL

    def __post_init__(self) -> None:
        """Check the tensor and the place."""
        super().__post_init__()
        if self.direction.dim() not in (1, 2) or not self.direction.is_floating_point():
            raise ShapeError(
                f"a direction is (d_model,) or (token, d_model), real, not {self.direction.dtype} "
                f"{tuple(self.direction.shape)}"
            )

    def needs(self, circuit: Circuit, layers: Layers | None = None) -> frozenset[Need]:
        """Return no needs."""
        circuit.check(self.at)
        return frozenset()

    def vector(self, raw: RawActivations) -> Float[Tensor, "token d_model"]:
        """Return the vector at each token.

        Raises:
            ShapeError: it has another width than the residual stream, or another number of tokens.
        """
        length, width = len(raw.tokens), raw.circuit.d_model
        shape = tuple(self.direction.shape)
        if shape not in ((width,), (length, width)):
            raise ShapeError(f"the direction is {shape}; this prompt takes {(width,)} or {(length, width)}")
        return at_least_float32(self.direction.detach().to(raw.tokens.device)).expand(length, width)

    def __str__(self) -> str:
        """Return a description."""
        return f"a fixed direction at {self.at}"


def as_direction(target: Direction | Node | Tensor | None) -> Direction:
    """Return the direction that a target stands for: the metric's gradient, a node's gradient, or a vector.

    Raises:
        UsageError: it has another type.
    """
    if target is None:
        return MetricGrad()
    if isinstance(target, Direction):
        return target
    if isinstance(target, Node):
        return NodeGrad(target)
    if isinstance(target, Tensor):
        return Fixed(target)
    raise UsageError(f"a direction is a Direction, a Node, a tensor or None for the metric, not {shown(target)}")

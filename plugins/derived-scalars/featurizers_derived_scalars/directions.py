"""Directions: gradients in the residual stream that direct effects are measured along."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from featurizers.errors import ShapeError, SiteError, UsageError, shown
from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.axes import Axis, exact
from featurizers_derived_scalars.bases import HEADS
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.places import Need, Place
from featurizers_derived_scalars.sources import need
from featurizers_derived_scalars.tracing import node_needs, node_value, residual_of, traced_place
from featurizers_derived_scalars.views import View

if TYPE_CHECKING:
    from featurizers_derived_scalars.circuit import Circuit


FINAL: Final = Place("resid.final")
"""The end of the residual stream."""


class Direction(ABC):
    """A vector of the residual stream at each token, at one place of it."""

    @abstractmethod
    def place(self, circuit: Circuit) -> Place:
        """Where in the model it is: what is computed before has a direct effect along it."""

    @abstractmethod
    def needs(self, circuit: Circuit) -> frozenset[Need]:
        """What must be captured.

        Raises:
            SiteError: the model has no such place; the message says why.
        """

    @abstractmethod
    def vector(self, raw: RawActivations) -> Float[Tensor, "token d_model"]:
        """The direction, in float32 or better."""


def _residual(place: Place) -> Place:
    if not place.kind.startswith("resid."):
        raise SiteError(f"a direction is at a place of the residual stream (resid.*), not at {place}")
    return place


@final
@dataclass(frozen=True)
class MetricGrad(Direction):
    """The gradient of the capture's metric at a place of the residual stream: ``MetricGrad()`` at the end of it.

    Attributes:
        at: the place; for a traced node, that before the node (`residual_of`).

    Raises:
        SiteError: the place is not of the residual stream.
    """

    at: Place = FINAL

    def __post_init__(self) -> None:
        """Refuse another place."""
        _residual(self.at)

    def place(self, circuit: Circuit) -> Place:
        """The place."""
        return self.at

    def needs(self, circuit: Circuit) -> frozenset[Need]:
        """The gradient there."""
        circuit.check(self.at)
        return frozenset({need(self.at.kind, "backward", [self.at.layer])})

    def vector(self, raw: RawActivations) -> Float[Tensor, "token d_model"]:
        """The gradient."""
        return exact(raw[self.at, "backward"])

    def __str__(self) -> str:
        """What it is."""
        return f"the metric's gradient at {self.at}"


@final
@dataclass(frozen=True, eq=False)
class NodeGrad(Direction):
    """The gradient of one node in the residual stream before it, without a backward pass of the model.

    Attributes:
        node: which.
        times_metric: whether it is multiplied by the metric's gradient at the node, which makes it the gradient of the
            node's attribution: activation times gradient, with the gradient held. A head through ``v`` has no other.
        freeze_norm: whether the scale of the norm before the node is held.

    Raises:
        UsageError: the node is a head through ``v``, and ``times_metric`` is not set.
    """

    node: Node
    times_metric: bool = False
    freeze_norm: bool = True

    def __post_init__(self) -> None:
        """Refuse a node that is no scalar."""
        traced_place(self.node)
        if self._through_v and not self.times_metric:
            raise UsageError(
                f"{self.node} is no scalar by itself; take its attribution: NodeGrad(node, times_metric=True)"
            )

    @property
    def _through_v(self) -> bool:
        return self.node.basis.kind == HEADS and self.node.basis.via == "v"

    def place(self, circuit: Circuit) -> Place:
        """The residual stream before the node."""
        return residual_of(self.node, circuit)

    def needs(self, circuit: Circuit) -> frozenset[Need]:
        """That residual stream; the probabilities of a head through ``v``; the gradient if it is multiplied."""
        needs = node_needs(self.node, circuit)
        if self._through_v:
            layer = [self.node.layer]
            return needs | {need(HEADS, "forward", layer), need("attn.z", "backward", layer)}
        if self.times_metric:
            needs |= {need(traced_place(self.node).kind, "backward", [self.node.layer])}
            if self.node.basis.featurizer is not None:
                needs |= {need(self.node.basis.kind, "forward", [self.node.layer])}
        return needs

    def vector(self, raw: RawActivations) -> Float[Tensor, "token d_model"]:
        """The gradient, by a VJP of the node's block."""
        output = None
        if self._through_v:
            token, _, head = self.node.numbers()
            output = exact(raw[Place("attn.z", self.node.layer), "backward"])[token, head]
        resid = exact(raw[self.place(raw.circuit), "forward"])

        def scalar(resid: Tensor) -> Tensor:
            return node_value(self.node, resid, raw, freeze_norm=self.freeze_norm, output=output)

        with torch.no_grad():  # the model's parameters have no part in it
            gradient: Tensor = torch.func.grad(scalar)(resid)
            if self.times_metric and not self._through_v:
                gradient = gradient * metric_at(self.node, raw)
        return gradient

    def __str__(self) -> str:
        """What it is."""
        return f"the gradient of {'the attribution of ' if self.times_metric else ''}{self.node}"


def metric_at(node: Node, raw: RawActivations) -> Float[Tensor, ""]:
    """The metric's gradient in one node.

    Raises:
        UsageError: the node is the pre-activation of a latent, in which no gradient is known.
    """
    if node.pre_activation and node.basis.featurizer is not None:
        raise UsageError(f"{node}: the metric's gradient before a latent's rule is not known; take the latent itself")
    gradient = exact(raw[traced_place(node), "backward"])
    if node.basis.featurizer is not None:
        gradient = View(node.basis, raw, node.layer).pull(gradient)
    return gradient[node.numbers()]


@final
@dataclass(frozen=True, eq=False)
class Fixed(Direction):
    """A vector given by hand.

    Attributes:
        direction: ``(d_model,)``, or one for each token ``(token, d_model)``.
        at: place of the residual stream where it is read.

    Raises:
        ShapeError: it is no such tensor.
        SiteError: the place is not of the residual stream.
    """

    direction: Tensor
    at: Place = FINAL

    def __post_init__(self) -> None:
        """Refuse what is no vector of the residual stream."""
        _residual(self.at)
        if self.direction.dim() not in (1, 2) or not self.direction.is_floating_point():
            raise ShapeError(
                f"a direction is (d_model,) or (token, d_model), real, not {self.direction.dtype} "
                f"{tuple(self.direction.shape)}"
            )

    def place(self, circuit: Circuit) -> Place:
        """The place."""
        return self.at

    def needs(self, circuit: Circuit) -> frozenset[Need]:
        """Nothing."""
        circuit.check(self.at)
        return frozenset()

    def vector(self, raw: RawActivations) -> Float[Tensor, "token d_model"]:
        """The vector at each token.

        Raises:
            ShapeError: it has another width than the residual stream, or another number of tokens.
        """
        length, width = len(raw.tokens), raw.circuit.d_model
        given = tuple(self.direction.shape)
        if given not in ((width,), (length, width)):
            raise ShapeError(f"the direction is {given}; this prompt takes {(width,)} or {(length, width)}")
        return exact(self.direction.detach().to(raw.tokens.device)).expand(length, width)

    def __str__(self) -> str:
        """What it is."""
        return f"a fixed direction at {self.at}"


def as_direction(target: Direction | Node | Tensor | None) -> Direction:
    """The direction that a target stands for: the metric's gradient, a node's, or a vector.

    Raises:
        UsageError: it is none of these.
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


@final
@dataclass(frozen=True, eq=False)
class DirectionSource:
    """A direction as a scalar source that serves every layer.

    Attributes:
        direction: which.
    """

    direction: Direction

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Token and ``d_model``."""
        return ("token", "d_model")

    @property
    def constant(self) -> bool:
        """Yes."""
        return True

    def needs(self, circuit: Circuit, layers: frozenset[int | None] | None) -> frozenset[Need]:
        """What the direction needs."""
        return self.direction.needs(circuit)

    def layers(self, raw: RawActivations) -> frozenset[int | None] | None:
        """Any."""
        return None

    def derive(self, raw: RawActivations, layer: int | None) -> Tensor:
        """The direction.

        Raises:
            SiteError: what it needs was not captured.
        """
        return self.direction.vector(raw)

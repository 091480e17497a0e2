"""Directions: gradients in the residual stream that direct effects are measured along."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.places import Need, Place

if TYPE_CHECKING:
    from featurizers_derived_scalars.circuit import Circuit


class Direction(ABC):
    """A vector of the residual stream at each token, at one place of it."""

    @abstractmethod
    def place(self, circuit: Circuit) -> Place:
        """Where in the model it is: what is computed before has a direct effect along it."""

    @abstractmethod
    def needs(self, circuit: Circuit) -> frozenset[Need]:
        """What must be captured."""

    @abstractmethod
    def vector(self, raw: RawActivations) -> Float[Tensor, "token d_model"]:
        """The direction, in float32 or better."""


@final
@dataclass(frozen=True)
class MetricGrad(Direction):
    """The gradient of the capture's metric at a place of the residual stream: ``MetricGrad()`` at the end of it.

    Attributes:
        at: the place; for a traced node, that before the node.
    """

    at: Place = Place("resid.final")


@final
@dataclass(frozen=True, eq=False)
class NodeGrad(Direction):
    """The gradient of one node in the residual stream before it, without a backward pass of the model.

    Attributes:
        node: which.
        times_metric: whether it is multiplied by the metric's gradient at the node, which makes it the gradient of the
            node's attribution, act * grad with grad held.
        freeze_norm: whether the scale of the norm before the node is held.
    """

    node: Node
    times_metric: bool = False
    freeze_norm: bool = True


@final
@dataclass(frozen=True, eq=False)
class Fixed(Direction):
    """A vector given by hand, ``(d_model,)`` or ``(token, d_model)``.

    Attributes:
        direction: the vector.
        at: place of the residual stream where it is read.
    """

    direction: Tensor
    at: Place = Place("resid.final")

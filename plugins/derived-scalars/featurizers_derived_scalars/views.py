"""`View`: the activations of one place of one sequence, in a basis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from featurizers import Featurizer
from featurizers.errors import ShapeError, UsageError
from torch import Tensor

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.axes import exact
from featurizers_derived_scalars.bases import Basis
from featurizers_derived_scalars.places import Place


def without_error(error: Any) -> Any:
    """An error term of a featurizer with all that it adds set to zero.

    A token's statistics, such as its mean and its scale, have width 1 and stay: the decoder needs them.
    """
    if isinstance(error, Tensor):
        return error if error.shape[-1:] == (1,) else torch.zeros_like(error)
    return tuple(map(without_error, error)) if isinstance(error, tuple) else error


def flat(x: Tensor, place: Place) -> Tensor:
    """Activations of a place as a featurizer takes them: heads side by side."""
    return x.flatten(-2) if len(place.axes) == 3 else x


def _like(x: Tensor, place: Place, like: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], *like.shape[-2:]) if len(place.axes) == 3 else x


@final
@dataclass(frozen=True, eq=False)
class View:
    """The activations of one place of one sequence, in a basis.

    The activations are what the features, the error term and the bias stand for together:

        x = J f + error + bias        J = the decoder's derivative at f

    of which the bias is the decoder's own where it is linear. All is in float32 or better.

    Attributes:
        basis: which nodes.
        raw: what was captured.
        layer: which; None for a place that the model has once.
        x: the activations; those captured unless given, such as ones with a graph.
    """

    basis: Basis
    raw: RawActivations
    layer: int | None
    given: Tensor | None = None

    @cached_property
    def place(self) -> Place:
        """The place."""
        return Place(self.basis.kind, self.layer)

    @cached_property
    def x(self) -> Tensor:
        """The activations of the place."""
        return exact(self.raw[self.place, "forward"] if self.given is None else self.given)

    @cached_property
    def featurizer(self) -> Featurizer[Any] | None:
        """The featurizer of the layer.

        Raises:
            UsageError: it is on another device than the activations.
        """
        found = self.basis.featurizer_at(self.layer)
        if found is not None:
            for tensor in found.state_dict().values():
                if tensor.device != self.x.device:
                    raise UsageError(
                        f"the featurizer {found.id!r} of {self.place} is on {tensor.device}, and what was captured on "
                        f"{self.x.device}; move it: featurizer.to({str(self.x.device)!r})"
                    )
        return found

    @cached_property
    def encoded(self) -> tuple[Tensor, Any]:
        """Features and the featurizer's own error term.

        Raises:
            ShapeError: the featurizer is of another width than the place.
        """
        if self.featurizer is None:
            return self.x, None
        try:
            features, error = self.featurizer.featurize(flat(self.x, self.place))
        except ShapeError as fault:
            raise ShapeError(f"{self.place}: {fault}") from fault
        return exact(features), error

    @cached_property
    def values(self) -> Tensor:
        """The value of each node; of a whole vector, its entries."""
        if self.featurizer is None:
            return self.x
        features, error = self.encoded
        if self.basis.part == "features":
            return features
        decoded = exact(self.featurizer.inverse_featurize(features, without_error(error)))
        if self.basis.part == "bias":
            decoded = decoded - exact(self.featurizer.decode_jvp(features, error, features))
            return _like(decoded, self.place, self.x)
        return self.x - _like(decoded, self.place, self.x)

    def pull(self, gradient: Tensor) -> Tensor:
        """A gradient in the activations as one in the nodes: that of features is the decoder's VJP of it."""
        if self.featurizer is None or self.basis.part != "features":
            return gradient
        features, error = self.encoded
        return exact(self.featurizer.decode_vjp(features, error, flat(gradient, self.place)))

    def lift(self, tangent: Tensor) -> Tensor:
        """A change of the nodes as one of the activations: of features the decoder's JVP of it."""
        if self.featurizer is None or self.basis.part != "features":
            return tangent
        features, error = self.encoded
        return _like(exact(self.featurizer.decode_jvp(features, error, tangent)), self.place, self.x)

    def follow(self, tangent: Tensor) -> Tensor:
        """A change of the activations as one of the nodes: of features the encoder's JVP of it."""
        if self.featurizer is None:
            return tangent
        inputs, change = flat(self.x, self.place), flat(tangent, self.place)
        moved = exact(self.featurizer.encode_jvp(inputs, change))
        if self.basis.part == "features":
            return moved
        features, error = self.encoded
        if self.basis.part == "bias":
            return torch.zeros_like(tangent)
        decoded = exact(self.featurizer.decode_jvp(features, error, moved))
        return tangent - _like(decoded, self.place, self.x)

"""`View`: the activations of one place of one sequence, in a basis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from featurizers import Featurizer
from featurizers.errors import ShapeError, UsageError
from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.capturing import RawActivations
from featurizers_derived_scalars.circuit import Place
from featurizers_derived_scalars.nodes.axes import at_least_float32
from featurizers_derived_scalars.nodes.bases import Basis


@final
@dataclass(frozen=True, eq=False)
class View:
    """Activations of one place of one sequence, in a basis.

    Features, error term and bias together are the activations:

        x = J f + error + bias        J = the decoder's derivative at f

    The bias is the decoder's own if the decoder is linear. All is in float32 or better.

    Attributes:
        basis: nodes to see.
        raw: captured tensors of the sequence.
        layer: layer of the place; None for a place that the model has once.
        tensor: activations to use instead of the captured ones, such as activations with a graph.
    """

    basis: Basis
    raw: RawActivations
    layer: int | None
    tensor: Tensor | None = None

    @cached_property
    def place(self) -> Place:
        """Place that is seen."""
        return Place(self.basis.kind, self.layer)

    @cached_property
    def x(self) -> Tensor:
        """Activations of the place."""
        return at_least_float32(self.raw[self.place, "forward"] if self.tensor is None else self.tensor)

    @cached_property
    def featurizer(self) -> Featurizer[Any] | None:
        """Featurizer of the layer.

        Raises:
            UsageError: it is on another device than the activations.
        """
        featurizer = self.basis.featurizer_at(self.layer)
        if featurizer is not None:
            for tensor in featurizer.state_dict().values():
                if tensor.device != self.x.device:
                    raise UsageError(
                        f"the featurizer {featurizer.id!r} of {self.place} is on {tensor.device}, and what was "
                        f"captured on {self.x.device}; move it: featurizer.to({str(self.x.device)!r})"
                    )
        return featurizer

    @cached_property
    def encoded(self) -> tuple[Tensor, Any]:
        """Features, and the featurizer's own error term.

        Raises:
            ShapeError: the featurizer has another width than the place.
        """
        if self.featurizer is None:
            return self.x, None
        try:
            features, error = self.featurizer.featurize(flat(self.x, self.place))
        except ShapeError as fault:
            raise ShapeError(f"{self.place}: {fault}") from fault
        return at_least_float32(features), error

    @cached_property
    def values(self) -> Tensor:
        """Value of each node; for a whole vector, its entries."""
        if self.featurizer is None:
            return self.x
        features, error = self.encoded
        if self.basis.part == "features":
            return features
        decoded = at_least_float32(self.featurizer.inverse_featurize(features, _without_error(error)))
        if self.basis.part == "bias":
            return self._apart(decoded - at_least_float32(self.featurizer.decode_jvp(features, error, features)))
        return self.x - self._apart(decoded)

    def pull(self, gradient: Tensor) -> Tensor:
        """Return the gradient in the nodes, given the gradient in the activations: the decoder's VJP for features."""
        if self.featurizer is None or self.basis.part != "features":
            return gradient
        features, error = self.encoded
        return at_least_float32(self.featurizer.decode_vjp(features, error, flat(gradient, self.place)))

    def lift(self, tangent: Tensor) -> Tensor:
        """Return the change of the activations, given a change of the nodes: the decoder's JVP for features."""
        if self.featurizer is None or self.basis.part != "features":
            return tangent
        features, error = self.encoded
        return self._apart(at_least_float32(self.featurizer.decode_jvp(features, error, tangent)))

    def follow(self, tangent: Tensor) -> Tensor:
        """Return the change of the nodes, given a change of the activations: the encoder's JVP for features."""
        if self.featurizer is None:
            return tangent
        inputs, change = flat(self.x, self.place), flat(tangent, self.place)
        moved = at_least_float32(self.featurizer.encode_jvp(inputs, change))
        if self.basis.part == "features":
            return moved
        if self.basis.part == "bias":
            return torch.zeros_like(tangent)
        features, error = self.encoded
        return tangent - self._apart(at_least_float32(self.featurizer.decode_jvp(features, error, moved)))

    def follow_each(self, tangents: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Return `follow` of each of n changes, with one encoding where `torch.vmap` takes the encoder."""
        try:
            return torch.vmap(self.follow)(tangents)
        except RuntimeError:  # random numbers, or operations without a rule for batches
            return torch.stack([self.follow(tangent) for tangent in tangents])

    def _apart(self, x: Tensor) -> Tensor:
        """Undo `flat`: split the last axis into heads if the place has them."""
        return x.reshape(*x.shape[:-1], *self.x.shape[-2:]) if len(self.place.axes) == 3 else x


def flat(x: Tensor, place: Place) -> Tensor:
    """Return activations of a place as a featurizer takes them: heads side by side."""
    return x.flatten(-2) if len(place.axes) == 3 else x


def _without_error(error: Any) -> Any:
    """Return a featurizer's error term with everything that it adds set to zero.

    A token's statistics, such as its mean and its scale, have width 1 and stay: the decoder needs them.
    """
    if isinstance(error, Tensor):
        return error if error.shape[-1:] == (1,) else torch.zeros_like(error)
    return tuple(map(_without_error, error)) if isinstance(error, tuple) else error

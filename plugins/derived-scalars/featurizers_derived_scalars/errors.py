"""Errors of derived scalars."""

from __future__ import annotations

from typing import final

from featurizers.errors import FeaturizerError


@final
class IncompleteError(FeaturizerError, ArithmeticError):
    """Derived scalars that do not sum to the expected total.

    Attributes:
        total: the expected sum.
        residual: the total minus their sum.
    """

    def __init__(self, total: float, residual: float, names: str) -> None:
        self.total, self.residual = total, residual
        super().__init__(
            f"the scalars {names} should sum to {total:.6g}, but {residual:.6g} is missing; nodes that take part are "
            "the embedding, every head and neuron (or the features, the error and the bias of every featurizer), and "
            "attn.bias and mlp.bias of every layer"
        )

"""`Program`: an edit of features as a few rows of numbers, for whatever runs without this library.

With U the rows that read features, W the rows that write them, and a gate for each feature,

    p = U x + b        gate(p) = max(m p + a, floor) where p > threshold, else 0
    x' = x + Σ (constant + factor gate(p)) W
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from featurizers.features.precision import without_autocast
from featurizers.format.sites import Site


@dataclass(frozen=True, eq=False)
class Gate:
    """Activation of each of k features alone: max(slope p + offset, floor) where p exceeds the threshold, else 0.

    The identity has a threshold and a floor of minus infinity, a ReLU a threshold of 0.

    Attributes:
        threshold: ``(k,)``, compared with the pre-activations.
        slope: ``(k,)``.
        offset: ``(k,)``.
        floor: ``(k,)``, lowest value of an active feature.
    """

    threshold: Float[Tensor, " k"]
    slope: Float[Tensor, " k"]
    offset: Float[Tensor, " k"]
    floor: Float[Tensor, " k"]

    @classmethod
    def of(
        cls,
        like: Float[Tensor, " k"],
        *,
        threshold: float | Tensor = -torch.inf,
        slope: float | Tensor = 1.0,
        offset: float | Tensor = 0.0,
        floor: float | Tensor = -torch.inf,
    ) -> Gate:
        """Return the gate of these numbers, in the shape, dtype and device of ``like``; by default the identity."""
        parts = (torch.as_tensor(part).to(like).expand_as(like) for part in (threshold, slope, offset, floor))
        return cls(*parts)

    @property
    def is_affine(self) -> bool:
        """True if every feature is slope p + offset, whatever p is."""
        return bool((self.threshold == -torch.inf).all() and (self.floor == -torch.inf).all())

    def __call__(self, pre: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """Return features of pre-activations."""
        active = torch.maximum(self.slope * pre + self.offset, self.floor)
        return torch.where(pre > self.threshold, active, 0.0) if not self.is_affine else active

    def scaled(self, factor: Tensor) -> Gate:
        """Return the gate whose features are multiplied by positive factors ``(k,)``."""
        return replace(self, slope=self.slope * factor, offset=self.offset * factor, floor=self.floor * factor)


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Some features of a featurizer as rows: how each is read from the activations, and what it adds to them.

    Attributes:
        read: ``(k, d_in)``; a pre-activation is ``read @ x + bias``.
        bias: ``(k,)``.
        gate: from pre-activations to features; None where a feature depends on other features of the token, as with
            ``topk``, so that it can be added to but not read.
        write: ``(k, d_in)``, the change of the activations when a feature grows by 1.
    """

    read: Float[Tensor, "k d_in"]
    bias: Float[Tensor, " k"]
    gate: Gate | None
    write: Float[Tensor, "k d_in"]

    @classmethod
    def linear(cls, read: Float[Tensor, "k d_in"], write: Float[Tensor, "k d_in"]) -> FeatureRows:
        """Return the rows of linear features, ``read @ x``."""
        zero = read.new_zeros(len(read))
        return cls(read, zero, Gate.of(zero), write)


@dataclass(frozen=True, eq=False)
class Program:
    """A fixed edit of k features at one site; `featurizers.lower` makes it.

    Tensors are in float32, or in float64 if the featurizer is, without gradient.

    Attributes:
        rows: the features.
        constant: ``(k,)``, what each feature is given, in its own units.
        factor: ``(k,)``, how much of the feature's present value is added: 0 to steer, -1 to replace it.
        site: that the activations are from, if the featurizer knows it.
        positions: tokens of each prompt to edit, counted without padding, negative from the end; None for all.
        special_tokens: ids of tokens that are not edited.
    """

    rows: FeatureRows
    constant: Float[Tensor, " k"]
    factor: Float[Tensor, " k"]
    site: Site | None = None
    positions: tuple[int, ...] | None = None
    special_tokens: tuple[int, ...] = ()

    def apply(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the edited activations, in the dtype of x; positions and special tokens are the caller's to choose."""
        rows = self.rows
        with without_autocast(x):
            wide = x.to(rows.write.dtype)
            amounts = self.constant
            if rows.gate is not None and self.factor.any():
                amounts = amounts + self.factor * rows.gate(wide @ rows.read.mT + rows.bias)
            return (x + amounts @ rows.write).to(x.dtype)

    @property
    def vector(self) -> Float[Tensor, " d_in"] | None:
        """Vector that the edit adds to every activation; None if what it adds depends on them."""
        return None if self.factor.any() else self.constant @ self.rows.write

    @property
    def affine(self) -> tuple[Float[Tensor, "d_in k"], Float[Tensor, "k d_in"], Float[Tensor, " d_in"]] | None:
        """Matrices A, B and a vector c with ``x' = x + x A B + c``; None if a feature can be inactive."""
        rows, gate = self.rows, self.rows.gate
        if gate is None or not gate.is_affine:
            return None
        slope = self.factor * gate.slope
        amounts = self.constant + self.factor * (gate.slope * rows.bias + gate.offset)
        return (slope[:, None] * rows.read).mT, rows.write, amounts @ rows.write

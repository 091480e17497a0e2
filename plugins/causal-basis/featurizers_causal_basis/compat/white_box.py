"""Names, signature and field order in which causal basis extraction was first published."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from featurizers_causal_basis import solve
from featurizers_causal_basis.compat import without_last
from featurizers_causal_basis.lens import ExternalLens, Readout
from featurizers_causal_basis.record import Mode


class CausalBasis(NamedTuple):
    """Orthonormal basis; the fields of `compat.CausalBasis`, as in tuned-lens, are in the other order.

    Attributes:
        basis: vectors as columns.
        energies: of ablating each vector alone, descending, nats per token.
    """

    basis: Float[Tensor, "d k"]
    energies: Float[Tensor, " k"]


def extract_causal_bases(
    model: Readout | nn.Module | Callable[..., Tensor],
    inputs: Int[Tensor, "batch sequence"] | Sequence[Float[Tensor, "*tokens d"]],
    k: int,
    *,
    max_iter: int = 100,
    min_energy: float = 0.0,
    mode: Mode = "mean",
) -> list[CausalBasis]:
    """Return the causal basis of each layer's input, by the first schedule: each search begins at a unit axis.

    A vector with less than ``min_energy`` is dropped; the published code kept one such vector.

    Args:
        model: a decoder of activations, a lens called as ``lens(h, idx)``, or a model of transformers.
        inputs: token ids for a model of transformers, else hidden states of each layer, whose last entry is ignored.
        k: vectors per layer; all if less than 1.
        max_iter: iterations of L-BFGS per vector.
        min_energy: nats per token.
        mode: of ablation.

    Raises:
        UsageError: an option is out of range.
        ShapeError: the hidden states do not fit together, or not the model.
    """
    chosen: Sequence[Tensor] | Tensor = inputs
    if not isinstance(inputs, Tensor):
        chosen, k = without_last(inputs, k)
    call = model.forward if isinstance(model, nn.Module) else model
    indexed = not isinstance(call, Readout) and "idx" in inspect.signature(call).parameters
    bases = solve.extract_causal_bases(
        ExternalLens(model) if indexed else model,  # type: ignore[arg-type]  # checked above
        chosen,
        k,
        max_iter=max_iter,
        min_energy=min_energy,
        mode=mode,
        preset="reference-axes",
    )
    return [CausalBasis(basis.vectors, basis.energies) for basis in bases]

"""The names, the signature and the field order in which causal basis extraction was first published."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

from featurizers.errors import UsageError
from jaxtyping import Float, Int
from torch import Tensor, nn

from featurizers_causal_basis import extraction
from featurizers_causal_basis.lenses import ForeignLens
from featurizers_causal_basis.readouts import Readout
from featurizers_causal_basis.record import Mode


class CausalBasis(NamedTuple):
    """An orthonormal basis; in `compat`, as in tuned-lens, its fields are the other way round.

    Attributes:
        basis: vectors as columns.
        energies: of ablating each alone, descending, nats per token.
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
    """The causal basis of each layer's input, by the first schedule: each vector's search begins at a unit axis.

    A vector that has less than ``min_energy`` is left out, where that code kept one.

    Args:
        model: a decoder of activations, a lens called as ``lens(h, idx)``, or a model of transformers.
        inputs: token ids for a model of transformers, else hidden states of each layer; the last one is left out.
        k: vectors a layer; all if less than 1.
        max_iter: iterations of L-BFGS a vector.
        min_energy: nats per token.
        mode: what a direction is ablated to.

    Raises:
        UsageError: an option is none of those allowed.
        ShapeError: the hidden states do not fit together, or not the model.
    """
    given: Sequence[Tensor] | Tensor = inputs
    if not isinstance(inputs, Tensor):
        given = list(inputs)[:-1]
        if not given:
            raise UsageError("the last hidden states get no basis: give those of two layers or more")
        k = given[0].shape[-1] if k < 1 else k
    call = model.forward if isinstance(model, nn.Module) else model
    indexed = not isinstance(call, Readout) and "idx" in inspect.signature(call).parameters
    found = extraction.extract_causal_bases(
        ForeignLens(model) if indexed else model,  # type: ignore[arg-type]  # seen above
        given,
        k,
        max_iter=max_iter,
        min_energy=min_energy,
        mode=mode,
        preset="reference-axes",
    )
    return [CausalBasis(basis.vectors, basis.energies) for basis in found]

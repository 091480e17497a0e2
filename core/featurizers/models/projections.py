"""Weights of linear projections, in one orientation whatever the class."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featurizers.errors import SiteError


def projection(
    module: nn.Module, hint: str = ""
) -> tuple[Float[Tensor, "inputs outputs"], Float[Tensor, " outputs"] | None]:
    """Return the weight ``(inputs, outputs)`` and the bias of a projection, in float32 or better.

    No tensor is copied that is in float32 or float64 already.

    Args:
        module: `nn.Linear`, `Conv1D` of transformers, or any module whose weight is ``(outputs, inputs)``.
        hint: sentence to end the error with: what the user can do.

    Raises:
        SiteError: it has no weight of two axes in floating point.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise SiteError(f"{type(module).__name__} has no weight of two axes in floating point. {hint}".rstrip())
    weight = weight.detach() if _is_transposed(module) else weight.detach().T
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype), bias.detach().to(dtype) if isinstance(bias, Tensor) else None


def input_width(module: nn.Module) -> int | None:
    """Return the number of inputs of a projection, or None if the module does not say it.

    The module's own number comes first: a packed weight of four bits has another shape, and some quantised modules have
    no ``weight``.
    """
    return _width(module, ("in_features", "nx"), axis=1)  # nn.Linear and what stands in for it; Conv1D of transformers


def output_width(module: nn.Module) -> int | None:
    """Return the number of outputs of a projection, or None if the module does not say it; as `input_width`."""
    return _width(module, ("out_features", "nf"), axis=0)


def _width(module: nn.Module, names: tuple[str, ...], *, axis: int) -> int | None:
    """Return the first of the named numbers that a module has, else the size of an axis of its weight."""
    for name in names:
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return weight.shape[1 - axis if _is_transposed(module) else axis]


def _is_transposed(module: nn.Module) -> bool:
    """Return True for transformers' Conv1D, which stores (inputs, outputs); nn.Linear stores (outputs, inputs)."""
    return type(module).__name__ == "Conv1D"

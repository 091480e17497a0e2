"""What the kinds of this plugin share: parameters of zeros, and the check of weights that take their place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from featurizers.errors import ConfigError, ShapeError
from torch import Tensor, nn


def zeros(*shape: int) -> nn.Parameter:
    """Return a parameter of zeros without a gradient."""
    return nn.Parameter(torch.zeros(shape), requires_grad=False)


def check_tensors(kind: str, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise an error unless there are tensors of these names and shapes.

    Raises:
        ConfigError: a tensor is missing or unknown.
        ShapeError: a tensor has another shape.
    """
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise ConfigError(f"{kind}: missing or unknown tensors {wrong}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, it must be {tuple(expected[name].shape)}")

"""A model as it is to be while something is measured in it, and then as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and then as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, and then as it was: graphs are smaller, and no ``.grad`` is touched."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Both: the model in evaluation mode and without gradients of its own, and then as it was."""
    with evaluating(model), without_parameter_gradients(model):
        yield

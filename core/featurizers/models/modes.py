"""Contexts that put a model into evaluation mode or freeze it, and restore it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and restore each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Turn off the gradients of all parameters, and restore them: graphs are smaller, and no ``.grad`` changes."""
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
    """Put a model into evaluation mode without parameter gradients, and restore both afterwards."""
    with evaluating(model), without_parameter_gradients(model):
        yield

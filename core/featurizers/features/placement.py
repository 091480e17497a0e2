"""Devices and dtypes as callers name them, checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from featurizers.errors import UsageError, one_line, shown


def check_placement(device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Raise `UsageError` unless ``device`` names a device of this machine and ``dtype`` is a floating-point dtype.

    None is fine for both.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype must be a floating-point torch.dtype such as torch.float16, not {shown(dtype)}")
    try:
        named = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device must be a device such as 'cpu' or 'cuda:0', not {shown(device)}") from error
    if named.type == "meta":
        raise UsageError("tensors on the device 'meta' have no values; choose a device such as 'cpu' or 'cuda:0'")
    try:
        torch.empty(0, device=named)
    except (AssertionError, RuntimeError, NotImplementedError, ImportError) as error:  # raised by torch
        reason = str(error).partition("\n")[0]
        raise UsageError(f"the device {shown(str(device))} cannot be used here: {one_line(reason)}") from error


def check_device(module: nn.Module, x: Tensor, name: Callable[[], str]) -> None:
    """Raise `UsageError` unless the tensors of a module are on the device of x; only the first tensor is looked at.

    Args:
        module: a featurizer; one without tensors works anywhere.
        x: activations or features.
        name: returns the name of the featurizer.
    """
    own = _first_tensor(module)
    if own is None or own.device == x.device:
        return
    if own.is_meta:
        raise UsageError(
            f"{name()} is on the device 'meta', so its tensors have no values; load it, or build it, elsewhere"
        )
    raise UsageError(
        f"{name()} is on {own.device}, and what it is given on {x.device}; move one of them with .to(device)"
    )


def _first_tensor(module: nn.Module) -> Tensor | None:
    """Return a parameter or buffer of a module; many times as fast as a walk over ``parameters()``."""
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None:
                return tensor
    parts = (_first_tensor(part) for part in module._modules.values() if part is not None)
    return next((tensor for tensor in parts if tensor is not None), None)

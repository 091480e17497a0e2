"""Devices and dtypes as callers name them, checked."""

from __future__ import annotations

import torch

from featurizers.errors import UsageError, shown


def check_placement(device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Raise `UsageError` unless ``device`` names a device and ``dtype`` is a floating-point dtype; None is fine."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype must be a floating-point torch.dtype such as torch.float16, not {shown(dtype)}")
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device must be a device such as 'cpu' or 'cuda:0', not {shown(device)}") from error

"""Where tensors are put: a device and a dtype, as a caller names them."""

from __future__ import annotations

import torch

from featurizers.errors import UsageError, shown


def check_placement(device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Raise `UsageError` unless these are the name of a device and a floating-point dtype, or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype is a floating-point torch.dtype such as torch.float16, not {shown(dtype)}")
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device is one such as 'cpu' or 'cuda:0', not {shown(device)}") from error

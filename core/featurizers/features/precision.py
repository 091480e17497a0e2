"""Precision of a featurizer: autocast, which it does not follow, and activations that overflow float16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from featurizers.errors import UsageError

LARGEST = torch.finfo(torch.float16).max


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of x; it does nothing where autocast is off.

    Examples:
        >>> import torch
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(x):
        ...     (x @ x).dtype
        torch.float32
    """
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@functools.cache
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def without_overflow(
    featurizer: nn.Module, result: Tensor, base: Tensor, source: Tensor | None, kept: Callable[[], Tensor]
) -> Tensor:
    """Return the result of an edit, after a check of its range if the featurizer is in float16.

    A token that overflows float16 gets its activations back if the operation changes none of its features.

    Args:
        featurizer: nothing is checked unless a tensor of it is float16.
        result: of the edit, ``(*batch, d_in)``.
        base: the activations.
        source: activations that features were taken from, if any.
        kept: returns booleans that broadcast to ``(*batch,)``: True for tokens of which the operation changes no
            feature. The features cannot tell, because those of a token that overflows are NaN, infinite or zero.

    Raises:
        UsageError: the operation changes features of a token that overflows float16.
    """
    if not is_half(featurizer) or torch._C._are_functorch_transforms_active():
        return result
    with torch.no_grad():
        beyond = base.abs().amax(dim=-1) > LARGEST
        if source is not None:
            beyond = beyond | (source.abs().amax(dim=-1) > LARGEST)
        broken = ~result.isfinite().all(dim=-1)
        if not bool((beyond | broken).any()):
            return result
        features = featurizer.encode(base.reshape(-1, base.shape[-1])[:0])  # type: ignore[operator]
        overflows = (broken | beyond if features.dtype == torch.float16 else broken) & base.isfinite().all(dim=-1)
        if bool((overflows & ~kept()).any()):
            largest = max(float(x.abs().amax()) for x in (base, source) if x is not None)
            raise UsageError(
                f"the featurizer is in float16, which ends at {LARGEST:.0f}, and activations of up to {largest:.4g} "
                "overflow it; convert it first: featurizer.float() or featurizer.bfloat16()"
            )
        given = base.detach()
    return torch.where(overflows.unsqueeze(-1), given, result)


def is_half(module: nn.Module) -> bool:
    """Return True if a parameter or buffer is float16; faster than a walk over ``parameters()``."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(tensor is not None and tensor.dtype == torch.float16 for tensor in tensors):
        return True
    return any(part is not None and is_half(part) for part in module._modules.values())

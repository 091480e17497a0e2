"""`Keeper`: stores tensors of a run without the graph and the memory that they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Keeper:
    """Stores tensors without their graph.

    Attributes:
        device: where to store them; None leaves them where they are.
        dtype: dtype to store them in; None leaves it as it is.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy the tensor."""
        return self.copy_exactly(tensor).to(self.dtype)

    def keep(self, tensor: Tensor) -> Tensor:
        """Keep the tensor if it is its whole storage, in any order of axes, else copy it.

        A view of a part would keep all of a large base alive.
        """
        tensor = tensor.detach()
        whole = _is_dense(tensor) and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor.to(self.device, self.dtype) if whole else self.copy(tensor)

    def copy_exactly(self, tensor: Tensor) -> Tensor:
        """Copy the tensor in its own dtype: for token ids, and for scales, which are divided by."""
        return tensor.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is contiguous with its axes in some order."""
    axes = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(axes).is_contiguous()

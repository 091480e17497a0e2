"""`Pieces`: a tensor that is written to a file in pieces, because no process holds it whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """Tensor that is read in pieces along its first axis while it is written.

    Attributes:
        dtype: of each piece.
        shape: of the whole.
        read: yields the pieces in their order.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.element_size()

    def element_size(self) -> int:
        """Return the bytes of one number, as a tensor does."""
        return self.dtype.itemsize


Stored: TypeAlias = "Tensor | Pieces"
"""What `featurizers.save` writes under a name."""

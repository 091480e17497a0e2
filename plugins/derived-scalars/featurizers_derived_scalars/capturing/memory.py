"""Giving memory that is free back to the system while a capture goes on."""

from __future__ import annotations

import ctypes
from typing import Final, final

from torch import Tensor

TRIM_AFTER: Final = 64 * 2**20
"""Bytes of tensors that come to stay between two trims of the heap."""


@final
class HeapTrimmer:
    """Trims the C heap each time tensors of 64 MiB have come to stay.

    glibc keeps what is freed between tensors that stay, often in pieces that are too small for the next large tensor.
    In a capture of many layers these holes grow to a fifth of all memory.
    """

    def __init__(self) -> None:
        self._bytes = 0

    def note(self, tensor: Tensor) -> None:
        """Count a tensor that comes to stay; those on other devices do not count."""
        if tensor.device.type == "cpu":
            self._bytes += tensor.nbytes
        if self._bytes >= TRIM_AFTER:
            self._bytes = 0
            trim_heap()


def trim_heap() -> None:
    """Return the free pages of the C heap to the system, by glibc's ``malloc_trim``; do nothing without it."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim(0)

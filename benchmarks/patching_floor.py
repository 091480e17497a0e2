"""The least work of an exact grid, counted cell by cell: products with weights alone, without attention's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Sizes:
    """Weights of one block of a decoder whose MLP is not gated, and of its head.

    Attributes:
        layers: number of blocks.
        width: of the residual stream.
        vocabulary: number of logits.
    """

    layers: int
    width: int
    vocabulary: int

    @property
    def square(self) -> int:
        """FLOPs of one projection of attention for one token."""
        return 2 * self.width**2

    @property
    def mlp(self) -> int:
        """FLOPs of one MLP for one token."""
        return 8 * self.square

    def forward(self, tokens: int, head_rows: int) -> int:
        """Return the FLOPs of a forward pass with the logits of some tokens."""
        block = 4 * self.square + self.mlp
        return tokens * self.layers * block + head_rows * 2 * self.width * self.vocabulary

    def floor(self, tokens: int, columns: int) -> int:
        """Return the least FLOPs of all cells layers × tokens of ``resid.pre``, measured at the last token.

        In the block of the edit, queries, keys and values of the edited token are computed, and the rest of the block
        for it and all later tokens; then everything for these; in the last block keys and values for these, and the
        rest for the last token.
        """
        total = 0
        for layer in range(self.layers):
            for first in range(tokens):
                n, is_last = tokens - first, layer == self.layers - 1
                tail = self.square + self.mlp  # output projection and MLP of a token
                if is_last:
                    total += 2 * self.square + tail + (self.square if n == 1 else 0)
                else:
                    total += 3 * self.square + n * tail
                    total += (self.layers - layer - 2) * n * (3 * self.square + tail)
                    total += n * 2 * self.square + self.square + tail
                total += 2 * self.width * columns
        return total


def counted(call: Callable[[], Any]) -> int:
    """Return the FLOPs of the products with weights in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in by_operation.items() if str(operation) in ("aten.mm", "aten.addmm"))

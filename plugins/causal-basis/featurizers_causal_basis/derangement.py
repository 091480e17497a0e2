"""Derangements: orders in which nothing stays in its place."""

from __future__ import annotations

import torch
from featurizers.errors import UsageError
from jaxtyping import Float, Int
from torch import Tensor


def derangement(n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """A derangement of n things, each as likely as any other.

    By rejection: e permutations are drawn on average, however many things there are.

    Args:
        n: how many; there is no derangement of one.
        generator: where the randomness comes from; the result is on its device.

    Raises:
        UsageError: n is less than 2.

    Example:
        >>> derangement(2, torch.Generator().manual_seed(0))
        tensor([1, 0])
    """
    if n < 2:
        raise UsageError(f"there is no order of {n} tokens in which none stays in its place; give 2 or more")
    own = torch.arange(n, device=generator.device)
    while True:
        order = torch.randperm(n, generator=generator, device=generator.device)
        if not (order == own).any():
            return order


def derange(tokens: Float[Tensor, "n *shape"], generator: torch.Generator) -> Float[Tensor, "n *shape"]:
    """The rows of a tensor in an order in which none stays in its place.

    Raises:
        UsageError: there are fewer than 2.
    """
    return tokens[derangement(len(tokens), generator).to(tokens.device)]

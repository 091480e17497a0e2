"""Inputs of a model and masks of tokens: checked, split into batches, deranged, and searched for massive tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from featurizers.errors import ShapeError, UsageError
from featurizers.models import Inputs
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

MASSIVE = 20.0
"""A token is massive if its activation is this many times as long as that of the median token."""


class MassiveTokenWarning(UserWarning):
    """A selected token has an enormous activation, which dominates every mean and most energies."""


def refuse_training(model: nn.Module) -> None:
    """Check that a model is in evaluation mode.

    Raises:
        UsageError: the model is in training mode.
    """
    if model.training:
        raise UsageError("the model is in training mode, in which dropout changes every run; call model.eval()")


# ---------------------------------------------------------------------- masks and batches


def boolean_mask(mask: Tensor, shape: torch.Size) -> Bool[Tensor, "*tokens"]:
    """Return a mask of booleans or 0 and 1 as booleans.

    Raises:
        ShapeError: the mask has another shape than the tokens, or is floating-point.
    """
    if mask.shape != shape or mask.is_floating_point():
        raise ShapeError(
            f"a mask has one boolean, 0 or 1 for each token, so shape {tuple(shape)}; got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    return mask.bool()


def selected_tokens(mask: Tensor | None, shape: torch.Size) -> Bool[Tensor, "*tokens"]:
    """Return the tokens that a mask selects, all tokens if there is no mask.

    Raises:
        ShapeError: the mask has another shape than the tokens.
        UsageError: the mask selects no token.
    """
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    selected = boolean_mask(mask, shape)
    if not selected.any():
        raise UsageError("the mask leaves out every token")
    return selected


def checked_inputs(inputs: Inputs, mask: Tensor | None) -> tuple[dict[str, Any], Bool[Tensor, "batch sequence"], str]:
    """Return a model's inputs, the selected tokens, and the rule that selected them in words.

    Without a mask the attention mask selects the tokens.

    Raises:
        ShapeError: the prompts are not token ids, or the mask has another shape.
        UsageError: the mask selects no token.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ShapeError("the prompts are token ids (batch, sequence), alone or as the input_ids of a mapping")
    rule = "every token" if mask is None else "as the mask says"
    if mask is None and isinstance(attention := inputs.get("attention_mask"), Tensor):
        mask, rule = attention, "the attention mask"
    return dict(inputs), selected_tokens(mask, ids.shape), rule


def batches(inputs: Inputs, size: int) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Yield the rows of each batch of prompts and its inputs: those rows of every tensor with one row per prompt."""
    n = len(inputs["input_ids"])
    per_prompt = {
        name for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() and len(value) == n
    }
    for start in range(0, n, size):
        rows = slice(start, start + size)
        yield rows, {name: value[rows] if name in per_prompt else value for name, value in inputs.items()}


def warn_of_massive(hidden: Float[Tensor, "*batch sequence d"], mask: Bool[Tensor, "*batch sequence"]) -> None:
    """Warn if a selected token has a far longer activation than the others.

    Such tokens, mostly the first of a prompt, contribute the greatest share of every mean (Sun et al. 2024,
    arXiv:2402.17762).
    """
    if not mask.any():
        return
    lengths = hidden.detach().float().norm(dim=-1)
    median = float(lengths[mask].median())
    massive = mask & (lengths > MASSIVE * median)
    if massive.any():
        positions = sorted(set(massive.nonzero()[:, -1].tolist()))
        listed = ", ".join(map(str, positions[:5])) + (", …" if len(positions) > 5 else "")
        warnings.warn(
            f"{int(massive.sum())} of {int(mask.sum())} tokens, at position {listed}, are up to "
            f"{float(lengths[massive].max()) / median:.0f} times as long as the median token; "
            "leave them out with a mask",
            MassiveTokenWarning,
            stacklevel=3,
        )


# ---------------------------------------------------------------------- derangements


def derangement(n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Return a derangement of n things, a permutation that leaves none in its place, uniformly at random.

    By rejection: e permutations are drawn on average, for any n.

    Args:
        n: at least 2.
        generator: source of randomness; the result is on its device.

    Raises:
        UsageError: n is less than 2.

    Examples:
        >>> derangement(2, torch.Generator().manual_seed(0))
        tensor([1, 0])
    """
    if n < 2:
        raise UsageError(f"a derangement leaves no token in its place and needs 2 tokens or more, got {n}")
    identity = torch.arange(n, device=generator.device)
    while True:
        order = torch.randperm(n, generator=generator, device=generator.device)
        if not (order == identity).any():
            return order


def derange(tokens: Float[Tensor, "n *shape"], generator: torch.Generator) -> Float[Tensor, "n *shape"]:
    """Return the rows of a tensor in a random order that leaves none in its place.

    Raises:
        UsageError: there are fewer than 2 rows.
    """
    return tokens[derangement(len(tokens), generator).to(tokens.device)]

"""Tokens of massive activations, which no basis should be found with."""

from __future__ import annotations

import warnings

from jaxtyping import Bool, Float
from torch import Tensor

MASSIVE = 20.0
"""A token is massive if its activations are so many times as long as those of the median token."""


class MassiveTokenWarning(UserWarning):
    """A token with an enormous activation takes part; it decides every mean and most energies."""


def warn_of_massive(hidden: Float[Tensor, "*batch sequence d"], mask: Bool[Tensor, "*batch sequence"]) -> None:
    """Warn if a token that takes part has an activation far longer than the others'.

    Such tokens, mostly the first of a prompt, hold the greatest share of every mean (Sun et al. 2024,
    arXiv:2402.17762).
    """
    lengths = hidden.detach().float().norm(dim=-1)
    if not mask.any():
        return
    median = float(lengths[mask].median())
    massive = mask & (lengths > MASSIVE * median)
    if massive.any():
        columns = sorted(set(massive.nonzero()[:, -1].tolist()))
        shown = ", ".join(map(str, columns[:5])) + (", …" if len(columns) > 5 else "")
        warnings.warn(
            f"{int(massive.sum())} of {int(mask.sum())} tokens, at position {shown}, are up to "
            f"{float(lengths[massive].max()) / median:.0f} times as long as the median token and take part; "
            "leave them out with a mask",
            MassiveTokenWarning,
            stacklevel=3,
        )

"""Directions to start from: singular vectors of the unembedding, and maxima of a quartic in the tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from featurizers_causal_basis.energy import Energy, Tokens

ITERATIONS = 30
"""Of the power method."""
ALIKE = 0.9
"""Two candidates with a greater |cosine| are one."""


def singular_vectors(unembedding: Float[Tensor, "vocabulary d"]) -> Float[Tensor, "d d"]:
    """Right singular vectors of a matrix with few columns, as columns, the one of the largest value first.

    From the eigenvectors of WᵀW: the matrix of tokens is large, and only one side is wanted.
    """
    gram = torch.zeros(unembedding.shape[1], unembedding.shape[1], dtype=torch.float64)
    for rows in torch.split(unembedding, 2**14):
        part = rows.to(torch.promote_types(rows.dtype, torch.float32))
        gram += (part.mT @ part).cpu().double()
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)


def outside(v: Float[Tensor, "d *n"], earlier: Float[Tensor, "d j"]) -> Float[Tensor, "d *n"]:
    """Vectors without their part in the span of orthonormal columns; taken away twice, for rounding."""
    for _ in range(2):
        v = v - earlier @ (earlier.mT @ v)
    return v


def scores_of(energy: Energy, seed: int) -> Float[Tensor, "n d"]:
    """`Energy.scores` at random y, the same y for a token however the tokens are shared out."""
    tokens = energy.tokens
    uniform = torch.rand(tokens.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return energy.scores(uniform[tokens.start : tokens.start + len(tokens.h)].to(tokens.h))


def quartic_maxima(
    tokens: Tokens, scores: Float[Tensor, "n d"], earlier: Float[Tensor, "d j"], restarts: int, picked: int, seed: int
) -> list[Float[Tensor, " d"]]:
    """Unit vectors v outside the earlier ones at which mean (x·v)² (g·v)² is greatest, the best first.

    x is how far a token is from what it is ablated to and g = ∇ log p(y) at a y of its own distribution. The energy of
    v is ½ mean (x·v)² vᵀ E[g gᵀ] v to second order in x, so that this is an estimate of it. By the higher-order power
    method (De Lathauwer et al. 2000, section 3) from random starts; different ones that end together count once.
    """
    d = len(earlier)
    start = torch.randn(d, restarts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors = _unit(outside(start, earlier))
    x, g = tokens.deviation, scores
    values = torch.zeros(restarts, dtype=torch.float64)
    for _ in range(ITERATIONS):
        c, s = x @ vectors.to(x), g @ vectors.to(g)
        sums = tokens.processes.sum(torch.cat([x.mT @ (c * s * s) + g.mT @ (c * c * s), (c * s).square().sum(0)[None]]))
        values, before = sums[-1], values
        if bool((values <= before * (1 + 1e-3)).all()):
            break
        vectors = _unit(outside(sums[:-1], earlier))
    found: list[Tensor] = []
    for number in values.argsort(descending=True).tolist():
        v = vectors[:, number]
        if len(found) < picked and bool(v.isfinite().all()) and all(abs(float(v @ other)) < ALIKE for other in found):
            found.append(v)
    return found


def _unit(v: Tensor) -> Tensor:
    lengths: Tensor = v.norm(dim=0)
    return v / lengths.clamp_min(torch.finfo(v.dtype).tiny)

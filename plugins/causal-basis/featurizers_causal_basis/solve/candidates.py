"""Start directions of the search: singular vectors of the unembedding, and maxima of a quartic form of the tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from featurizers_causal_basis.solve.energy import Energy, Tokens

ITERATIONS = 30
"""Most iterations of the power method."""
ALIKE = 0.9
"""Two candidates with a greater |cosine| are duplicates."""


def singular_vectors(unembedding: Float[Tensor, "vocabulary d"]) -> Float[Tensor, "d d"]:
    """Return the right singular vectors of a matrix with few columns, as columns, by descending singular value.

    Computed as eigenvectors of WᵀW: W has a row per token of the vocabulary, and the left side is not needed.
    """
    gram = torch.zeros(unembedding.shape[1], unembedding.shape[1], dtype=torch.float64)
    for rows in torch.split(unembedding, 2**14):
        part = rows.to(torch.promote_types(rows.dtype, torch.float32))
        gram += (part.mT @ part).cpu().double()
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)


def outside(v: Float[Tensor, "d *n"], earlier: Float[Tensor, "d j"]) -> Float[Tensor, "d *n"]:
    """Return vectors minus their projection on orthonormal columns; subtracted twice to remove rounding errors."""
    for _ in range(2):
        v = v - earlier @ (earlier.mT @ v)
    return v


def scores_of(energy: Energy, seed: int) -> Float[Tensor, "n d"]:
    """Return `Energy.scores` at random y, which do not depend on how processes share the tokens."""
    tokens = energy.tokens
    uniform = torch.rand(tokens.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return energy.scores(uniform[tokens.start : tokens.start + len(tokens.h)].to(tokens.h))


def quartic_maxima(
    tokens: Tokens, scores: Float[Tensor, "n d"], earlier: Float[Tensor, "d j"], restarts: int, picked: int, seed: int
) -> list[Float[Tensor, " d"]]:
    """Return unit vectors v, orthogonal to the earlier ones, that maximise mean (x·v)² (g·v)², the best first.

    x is the deviation of a token and g = ∇ log p(y) at a y drawn from its own distribution. To second order in x the
    energy of v is ½ mean (x·v)² vᵀ E[g gᵀ] v, which this estimates. Maximised by the higher-order power method (De
    Lathauwer et al. 2000, section 3) from ``restarts`` random starts; at most ``picked``
    different vectors are returned.
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
    maxima: list[Tensor] = []
    for number in values.argsort(descending=True).tolist():
        v = vectors[:, number]
        distinct = all(abs(float(v @ other)) < ALIKE for other in maxima)
        if len(maxima) < picked and bool(v.isfinite().all()) and distinct:
            maxima.append(v)
    return maxima


def _unit(v: Tensor) -> Tensor:
    lengths: Tensor = v.norm(dim=0)
    return v / lengths.clamp_min(torch.finfo(v.dtype).tiny)

"""`ExactEnergy`: the energy and its gradient in closed form, through a norm and an unembedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from featurizers_causal_basis.lens import AffineNorm
from featurizers_causal_basis.solve.energy import Energy, Tokens, draw

CHUNK = {"cpu": 2**18}
"""Number of logits per chunk, by device: few enough to stay in a processor's cache."""
OTHER_CHUNK = 2**25
"""Number of logits per chunk on other devices, which need more work at once."""
PRODUCTS = 2**21
"""Least number of logits per chunk of a product with the unembedding, which each chunk reads from memory."""


@final
class ExactEnergy(Energy):
    """Energy in closed form, for readouts of the form `AffineNorm`.

    Ablating v subtracts c = v·(h - m) times T v from z = T h + t. The logits change by a multiple of u = G w with
    w = c(T v), and the norm scales all of them by one factor. With s² = |zc|²/d + eps for the centred zc, the log
    probabilities l of h, and p = exp(l), the terms of a token are::

        s'² = s² + (c²|w|² - 2 c zc·w) / d        a = s / s'        b = c / s'
        l' = a l - b u + (1 - a) bias             (up to a constant)
        KL = (a - 1) H + b p·u - (1 - a) p·bias + logsumexp(l')

    where H is the entropy and p·u = (p G)·w. An evaluation costs O(V d + N V) for N tokens and a vocabulary of V,
    instead of O(N V d), and builds no graph. It keeps l, N V numbers; the rest is computed in chunks of tokens.
    """

    def __init__(self, tokens: Tokens, form: AffineNorm) -> None:
        self.tokens = tokens
        self.form = form = form.to(tokens.h.device, tokens.h.dtype)
        self._step = max(1, CHUNK.get(tokens.h.device.type, OTHER_CHUNK) // len(form.unembedding))
        self._zc = form.translated(tokens.h)
        self._d = self._zc.shape[-1]
        self._s = (self._zc.square().mean(dim=-1) + form.eps).sqrt()
        n, vocabulary = len(tokens.h), len(form.unembedding)
        self._log_p = self._zc.new_empty(n, vocabulary)
        self._pg = torch.empty_like(self._zc)
        self._entropy = self._zc.new_empty(n)
        self._pbias = self._zc.new_zeros(n)
        for rows in self._chunks(products=True):
            log_p = self._log_p[rows] = form.log_probs(tokens.h[rows])
            p = log_p.exp()
            self._pg[rows] = form.scaled(p @ form.unembedding)
            self._entropy[rows] = -(p * log_p).sum(dim=-1)
            if form.bias is not None:
                self._pbias[rows] = p @ form.bias

    def value_and_grad(self, v: Float[Tensor, " d"]) -> tuple[float, Float[Tensor, " d"]]:
        """See `Energy.value_and_grad`."""
        form, zc, s = self.form, self._zc, self._s
        v = v.to(zc)
        w = form.centre(v if form.translator is None else form.translator @ v)
        u = form.unembedding @ form.scaled(w)
        c = self.tokens.deviation @ v
        length, along = w @ w, zc @ w
        # below eps only by rounding
        new = (s * s + (c * c * length - 2 * c * along) / self._d).clamp_min_(form.eps).sqrt_()
        a, b = s / new, c / new
        pu = self._pg @ w
        lse, qlog_p, qu, qbias = (torch.zeros_like(c) for _ in range(4))
        pulled = torch.zeros_like(u)
        first, second = (zc.new_empty(self._step, len(u)) for _ in range(2))
        for rows in self._chunks():
            log_p = self._log_p[rows]
            moved = torch.mul(log_p, a[rows].unsqueeze(-1), out=first[: len(log_p)])
            moved.addr_(b[rows], u, alpha=-1)
            if form.bias is not None:
                moved.addr_(1 - a[rows], form.bias)
            # unlike exp, torch's softmax is not slow where exponents underflow
            q = torch.softmax(moved, dim=-1, out=second[: len(log_p)])
            lse[rows] = moved.amax(dim=-1) - q.amax(dim=-1).log()
            qu[rows] = q @ u
            if form.bias is not None:
                qbias[rows] = q @ form.bias
            pulled += b[rows] @ q
            qlog_p[rows] = torch.mul(q, log_p, out=moved).sum(dim=-1)
        kl = (a - 1) * self._entropy + b * pu - (1 - a) * self._pbias + lse
        by_a = self._entropy + self._pbias + qlog_p - qbias
        by_b = pu - qu
        by_square = -(by_a * a + by_b * b) / (2 * new * new)
        by_c = by_b / new + by_square * (2 * c * length - 2 * along) / self._d
        by_w = (
            b @ self._pg
            - form.scaled(pulled @ form.unembedding)
            + (2 / self._d) * ((by_square @ (c * c)) * w - (by_square * c) @ zc)
        )
        by_w = form.centre(by_w)
        grad = self.tokens.deviation.mT @ by_c + (by_w if form.translator is None else form.translator.mT @ by_w)
        total_kl = kl.cpu().double().sum().unsqueeze(0)
        reduced = self.tokens.processes.sum(torch.cat([total_kl, grad.cpu().double()])) / self.tokens.n
        return float(reduced[0]), reduced[1:]

    def direct(self, vectors: Float[Tensor, "d k"]) -> float:
        """See `Energy.direct`."""
        ablated = self.tokens.without(vectors)
        total = torch.zeros(1, dtype=torch.float64)
        for rows in self._chunks(products=True):
            log_p = self._log_p[rows]
            kl = (log_p.exp() * (log_p - self.form.log_probs(ablated[rows]))).sum(dim=-1)
            total += kl.cpu().double().sum()
        return float(self.tokens.processes.sum(total)) / self.tokens.n

    def scores(self, uniform: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """See `Energy.scores`."""
        form = self.form
        y = torch.empty(len(self._zc), dtype=torch.long, device=self._zc.device)
        for rows in self._chunks():
            y[rows] = draw(self._log_p[rows], uniform[rows])
        g = form.scaled(form.unembedding[y]) - self._pg
        normal = self._zc / self._s.unsqueeze(-1)
        g = (g - normal * (normal * g).mean(dim=-1, keepdim=True)) / self._s.unsqueeze(-1)
        g = form.centre(g)
        return g if form.translator is None else g @ form.translator

    def _chunks(self, *, products: bool = False) -> Iterator[slice]:
        step = max(self._step, PRODUCTS // self._log_p.shape[1]) if products else self._step
        return (slice(i, i + step) for i in range(0, len(self._zc), step))

"""`ExactEnergy`: the energy and its gradient through a norm and an unembedding, without running them again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from featurizers_causal_basis.energy import Energy, Tokens, draw
from featurizers_causal_basis.readouts import AffineNorm

CHUNK = {"cpu": 2**18}
"""Logits that are worked on at a time, by device: few enough to stay in a processor's cache."""
OTHER_CHUNK = 2**25
"""The same on devices that want much work at once."""
PRODUCTS = 2**21
"""The same, at least, where tokens are multiplied with the unembedding, which is read from memory for each chunk."""


@final
class ExactEnergy(Energy):
    """The energy by a formula, for readouts of the form `AffineNorm`.

    Ablating v takes c = v·(h - m) times T v from z = T h + t, so that the logits change by a multiple of u = G w with
    w = c(T v), and every logit by the factor of the norm. With s² = |zc|²/d + eps of the centred zc, the log
    probabilities l of h, and p = exp(l), a token's terms are::

        s'² = s² + (c²|w|² - 2 c zc·w) / d        a = s / s'        b = c / s'
        l' = a l - b u + (1 - a) bias             (but for a constant)
        KL = (a - 1) H + b p·u - (1 - a) p·bias + logsumexp(l')

    where H is the entropy and p·u = (p G)·w. An evaluation costs O(V d + N V) for N tokens and a vocabulary of V,
    instead of O(N V d), and needs no graph. l is kept, N V numbers; the rest is made a chunk of tokens at a time.
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
        # of rounding alone below eps
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
            # torch's softmax is not slowed down by exponents that underflow, as its exp is
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
        """See `Energy.scores`; in closed form."""
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

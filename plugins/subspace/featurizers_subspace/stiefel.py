"""Orthonormal matrices as parameters: the polar retraction onto the Stiefel manifold, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from featurizers.features import without_autocast
from jaxtyping import Float
from torch import Tensor


def deviation(w: Float[Tensor, "d k"]) -> float:
    """Return the largest element of ``|WᵀW - I|``. Cost O(d k²)."""
    w = w.detach().to(_working_dtype(w))
    with without_autocast(w):
        return _from_identity(w.mT @ w)


def tolerance(dtype: torch.dtype) -> float:
    """Return the deviation that rounding an orthonormal matrix to a dtype may cause."""
    return max(1e-5, torch.finfo(dtype).eps)


@torch.no_grad()
def retract_(w: Float[Tensor, "d k"]) -> None:
    """Replace W in place by its polar factor, unless it is orthonormal to the precision of its dtype.

    This is the matrix that `polar` returns, but without the gradient and the last Newton-Schulz step. Cost O(d k²).
    """
    with without_autocast(w):
        x = w.to(_working_dtype(w))
        gram = x.mT @ x
        if _from_identity(gram) > tolerance(w.dtype):
            values, vectors = torch.linalg.eigh(gram.double())
            root = (vectors * values.clamp_min(torch.finfo(x.dtype).tiny).rsqrt()) @ vectors.mT
            w.copy_(x @ root.to(x.dtype))


def polar(w: Float[Tensor, "*n d k"]) -> Float[Tensor, "*n d k"]:
    """Return the orthonormal matrix nearest to W: the factor Q of the polar decomposition W = QP.

    Differentiable in reverse and forward mode, and under `torch.func`. Cost O(d k²) in time and O(d k) in memory;
    Higham 1986, "Computing the polar decomposition".
    """
    q: Tensor = _Polar.apply(w)[0]  # type: ignore[no-untyped-call]
    return q


def tangent(q: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Return an orthonormal Q unchanged, with the gradient that `polar` has at Q.

    The gradient G is projected on the tangent space, ``G - Q sym(QᵀG)`` (Absil, Mahony and Sepulchre, "Optimization
    Algorithms on Matrix Manifolds", §3.6.1), so a step along it is a step along the manifold.
    """
    unchanged: Tensor = _Tangent.apply(q)  # type: ignore[no-untyped-call]
    return unchanged


def _from_identity(gram: Tensor) -> float:
    return float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax())


def _working_dtype(w: Tensor) -> torch.dtype:
    return torch.float64 if w.dtype == torch.float64 else torch.float32


class _Polar(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q and the eigenvectors and eigenvalues of P."""
        with without_autocast(w):
            x = w.to(_working_dtype(w))
            values, vectors = torch.linalg.eigh(x.mT @ x)
            sizes = values.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
            q = x @ ((vectors / sizes.unsqueeze(-2)) @ vectors.mT)
            # one Newton-Schulz step squares the deviation that rounding left
            q = q @ (1.5 * torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) - 0.5 * (q.mT @ q))
            return q.to(w.dtype), vectors, sizes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Save the tensors that the gradient needs."""
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        """Return ``(I - QQᵀ) G P⁻¹ + 2 Q Y``, where Y solves ``Y P + P Y = (QᵀG - GᵀQ) / 2``."""
        q, vectors, sizes = ctx.saved_tensors
        with without_autocast(q):
            q, g = q.to(vectors.dtype), grad.to(vectors.dtype)
            along = q.mT @ g
            y = _sylvester(along - along.mT, vectors, sizes)
            normal = _times_inverse(g - q @ along, vectors, sizes)
            return (normal + q @ y).to(grad.dtype)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:
        """Return ``Q Ω + (I - QQᵀ) dW P⁻¹``, where Ω solves ``Ω P + P Ω = QᵀdW - dWᵀQ``."""
        q, vectors, sizes = ctx.saved_tensors
        with without_autocast(q):
            q, dw = q.to(vectors.dtype), tangent.to(vectors.dtype)
            along = q.mT @ dw
            omega = _sylvester(along - along.mT, vectors, sizes)
            return (q @ omega + _times_inverse(dw - q @ along, vectors, sizes)).to(tangent.dtype), None, None


def _sylvester(a: Tensor, vectors: Tensor, sizes: Tensor) -> Tensor:
    """Solve ``X P + P X = A`` for X, where ``P = V diag(s) Vᵀ``."""
    rotated = vectors.mT @ a @ vectors
    return vectors @ (rotated / (sizes.unsqueeze(-1) + sizes.unsqueeze(-2))) @ vectors.mT


def _times_inverse(a: Tensor, vectors: Tensor, sizes: Tensor) -> Tensor:
    return a @ ((vectors / sizes.unsqueeze(-2)) @ vectors.mT)


class _Tangent(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor) -> Tensor:
        """Return a view of Q."""
        return q.view_as(q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep Q as an attribute: a second backward pass needs it, and saved tensors are freed by the first."""
        ctx.q, ctx.version = inputs[0].detach(), inputs[0]._version

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return ``G - Q (QᵀG + GᵀQ) / 2``."""
        if ctx.q._version != ctx.version:
            raise RuntimeError(
                "the basis was changed in place between forward and backward, for example by an optimizer step; "
                "run forward again"
            )
        q = ctx.q.to(_working_dtype(ctx.q))
        with without_autocast(q):
            g = grad.to(q.dtype)
            along = q.mT @ g
            return torch.addmm(g, q, along + along.mT, alpha=-0.5).to(grad.dtype)

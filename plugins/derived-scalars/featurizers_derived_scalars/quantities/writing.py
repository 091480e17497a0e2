"""Writes of the nodes of a view to the residual stream, contracted where possible without a big tensor."""

from __future__ import annotations

from typing import Any

import torch
from featurizers import Featurizer
from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.circuit import Place
from featurizers_derived_scalars.nodes import HEADS, View, at_least_float32

_CHUNK = 2**24
"""Numbers held at a time where the lengths of writes are computed and the writes are not kept."""


def effects(view: View, direction: Float[Tensor, "token d_model"]) -> Tensor:
    """Return the inner product of each node's write with a direction; no tensor of all writes is made.

    For heads: probability * (value . direction pulled back to ``attn.z``).
    """
    raw = view.raw
    if view.basis.kind == HEADS:
        pulled = at_least_float32(raw.write_vjp(_heads(view), direction))
        return view.x * torch.einsum("khd,qhd->qkh", _values(view), pulled)
    pulled = at_least_float32(raw.write_vjp(view.place, direction))
    return summed_if_whole(view, view.values * view.pull(pulled))


def summed_if_whole(view: View, products: Tensor) -> Tensor:
    """Sum products of activations and gradients over the vector if the basis takes it whole."""
    if not view.basis.whole:
        return products
    return products.sum(-1) if view.basis.axes[-1] == "head" else products.sum(-1, keepdim=True)


def lengths(view: View) -> Tensor:
    """Return the length of what each node writes."""
    raw = view.raw
    if view.basis.kind == HEADS:
        return _scaled(view, _heads(view), view.x.abs() * _quadratic(_values(view), _head_matrix(view)))
    if view.basis.whole and view.basis.axes[-1] == "head":
        return _scaled(view, _heads(view), _quadratic(view.values, _head_matrix(view)))
    if view.basis.whole:
        written = at_least_float32(raw.write(view.place, view.lift(view.values)))
        whole: Tensor = torch.linalg.vector_norm(written, dim=-1, keepdim=True)
        return whole
    return view.values.abs() * unit_lengths(view)


def unit_lengths(view: View) -> Tensor:
    """Return the length of what one unit of each node writes, shaped like the values."""
    if view.featurizer is not None and view.basis.part == "features":
        return _feature_lengths(view, view.featurizer)
    matrix = view.raw.circuit.write_matrix(view.place)
    ones = torch.ones_like(view.values)
    if matrix is not None:
        ones = ones * torch.linalg.vector_norm(at_least_float32(matrix).to(ones.device), dim=-1)
    return _scaled(view, view.place, ones)


def writes(view: View) -> Tensor:
    """Return what each node writes: axes of the basis, then ``d_model``; ``(token, d_model)`` for a whole vector."""
    raw = view.raw
    if view.basis.kind == HEADS:
        return _scaled(view, _heads(view), torch.einsum("qkh,khd,hdm->qkhm", view.x, _values(view), _head_matrix(view)))
    if view.basis.whole and view.basis.axes[-1] == "head":
        return _scaled(view, _heads(view), torch.einsum("qhd,hdm->qhm", view.values, _head_matrix(view)))
    if view.basis.whole:
        return at_least_float32(raw.write(view.place, view.lift(view.values)))
    if view.featurizer is not None and view.basis.part == "features":
        values = view.values
        each = torch.arange(values.shape[-1], device=values.device).unsqueeze(-1)
        rows = [view.lift(torch.zeros_like(values).index_copy(-1, i, values[:, i])) for i in each]
        return at_least_float32(raw.write(view.place, torch.stack(rows))).movedim(0, -2)
    matrix = raw.circuit.write_matrix(view.place)
    if matrix is None:
        return torch.diag_embed(view.values)
    return _scaled(view, view.place, view.values.unsqueeze(-1) * at_least_float32(matrix).to(view.x.device))


def _heads(view: View) -> Place:
    """Return the place of the outputs of heads, through which their probabilities write."""
    return Place("attn.z", view.layer)


def _values(view: View) -> Float[Tensor, "key head d_head"]:
    return at_least_float32(view.raw[Place("attn.v", view.layer), "forward"])


def _head_matrix(view: View) -> Float[Tensor, "head d_head d_model"]:
    matrix = view.raw.circuit.write_matrix(_heads(view))
    if matrix is None:  # heads always have an output projection
        raise ValueError(f"{_heads(view)} has no write matrix")
    return at_least_float32(matrix).to(view.x.device)


def _quadratic(vectors: Float[Tensor, "any head d_head"], matrix: Float[Tensor, "head d_head d_model"]) -> Tensor:
    """Return ``|v W|`` of each vector without ``v W``: the root of ``v (W Wᵀ) vᵀ``."""
    gram = matrix @ matrix.mT
    squared = torch.einsum("nhd,hde,nhe->nh", vectors, gram, vectors)
    return squared.clamp_min(0).sqrt()


def _scaled(view: View, place: Place, tensor: Tensor) -> Tensor:
    """Divide by the scale of a norm behind the place, at each token; tokens are the first axis."""
    scale = view.raw.write_scale(place)
    if scale is None:
        return tensor
    return tensor / at_least_float32(scale).reshape(-1, *[1] * (tensor.dim() - 1))


def _feature_lengths(view: View, featurizer: Featurizer[Any]) -> Tensor:
    """Return the length of what one unit of each feature writes, ``(token, n_features)``.

    The decoder of the first token is used for all tokens if it is the same at all of them. One random vector tells:
    two different linear maps have the same image of it with probability 0.
    """
    features, error = view.encoded
    first = _decoder(featurizer, features, error, 0)
    probe = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0), dtype=features.dtype)
    probe = probe.to(features.device)
    images = at_least_float32(featurizer.decode_jvp(features, error, probe.expand_as(features)))
    expected = (probe @ first).expand_as(images)
    if torch.allclose(images, expected, rtol=1e-3, atol=1e-4 * float(images.abs().max())):
        return _scaled(view, view.place, _row_lengths(view, first).expand(len(features), -1))
    rows = [_row_lengths(view, _decoder(featurizer, features, error, token)) for token in range(len(features))]
    return _scaled(view, view.place, torch.stack(rows))


def _decoder(featurizer: Featurizer[Any], features: Tensor, error: Any, token: int) -> Float[Tensor, "n_features d_in"]:
    """Return the decoder's derivative at one token."""
    row = features[token]
    width = at_least_float32(featurizer.inverse_featurize(row, _at_token(error, token))).shape[-1]
    unit = torch.eye(width, dtype=features.dtype, device=features.device)
    rows = featurizer.decode_vjp(row.expand(width, -1), _at_token(error, token, width), unit)
    return at_least_float32(rows).T


def _at_token(error: Any, token: int, repeat: int | None = None) -> Any:
    if isinstance(error, Tensor):
        return error[token] if repeat is None else error[token].expand(repeat, -1)
    return tuple(_at_token(part, token, repeat) for part in error) if isinstance(error, tuple) else error


def _row_lengths(view: View, decoder: Float[Tensor, "n_features d_in"]) -> Float[Tensor, " n_features"]:
    matrix = view.raw.circuit.write_matrix(view.place)
    if matrix is None:
        norms: Tensor = torch.linalg.vector_norm(decoder, dim=-1)
        return norms
    matrix = at_least_float32(matrix).flatten(0, -2).to(decoder)
    chunk = max(1, _CHUNK // matrix.shape[-1])
    return torch.cat([torch.linalg.vector_norm(rows @ matrix, dim=-1) for rows in torch.split(decoder, chunk)])

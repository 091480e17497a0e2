"""What the nodes of a basis write to the residual stream, contracted where that needs no big tensor."""

from __future__ import annotations

from typing import Any

import torch
from featurizers import Featurizer
from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.axes import exact
from featurizers_derived_scalars.bases import HEADS
from featurizers_derived_scalars.places import Place
from featurizers_derived_scalars.views import View

_CHUNK = 2**24
"""Numbers held at a time where writes are measured without being kept."""


def effect(view: View, direction: Float[Tensor, "token d_model"]) -> Tensor:
    """The inner product of each node's write with a direction; nothing of the size of a write is made.

    For heads: probability * (value . direction seen from ``attn.z``).
    """
    circuit, raw = view.raw.circuit, view.raw
    if view.basis.kind == HEADS:
        seen = exact(circuit.write_vjp(Place("attn.z", view.layer), direction, raw))
        values = exact(raw[Place("attn.v", view.layer), "forward"])
        return view.x * torch.einsum("khd,qhd->qkh", values, seen)
    seen = exact(circuit.write_vjp(view.place, direction, raw))
    return total(view, view.values * view.pull(seen))


def total(view: View, tensor: Tensor) -> Tensor:
    """A product of activations and gradients as the basis counts nodes: summed where a whole vector is one."""
    if not view.basis.whole:
        return tensor
    return tensor.sum(-1) if view.basis.axes[-1] == "head" else tensor.sum(-1, keepdim=True)


def sizes(view: View) -> Tensor:
    """The length of what each node writes."""
    raw, circuit = view.raw, view.raw.circuit
    if view.basis.kind == HEADS:
        matrix = _matrix(view, Place("attn.z", view.layer))
        values = exact(raw[Place("attn.v", view.layer), "forward"])
        lengths = _quadratic(values, matrix)
        return _scaled(view, Place("attn.z", view.layer), view.x.abs() * lengths)
    if view.basis.whole and view.basis.axes[-1] == "head":
        return _scaled(view, view.place, _quadratic(view.values, _matrix(view, view.place)))
    if view.basis.whole:
        written = view.lift(view.values)
        whole: Tensor = torch.linalg.vector_norm(exact(circuit.write(view.place, written, raw)), dim=-1, keepdim=True)
        return whole
    return view.values.abs() * unit_lengths(view)


def unit_lengths(view: View) -> Tensor:
    """The length of what one unit of each node writes: like the values."""
    if view.featurizer is not None and view.basis.part == "features":
        return _feature_lengths(view, view.featurizer)
    matrix = view.raw.circuit.write_matrix(view.place)
    ones = torch.ones_like(view.values)
    lengths = ones if matrix is None else ones * torch.linalg.vector_norm(exact(matrix).to(ones.device), dim=-1)
    return _scaled(view, view.place, lengths)


def writes(view: View) -> Tensor:
    """What each node writes, ``d_model`` last: axes of the basis and one more, token and it for one vector a token."""
    raw, circuit = view.raw, view.raw.circuit
    if view.basis.kind == HEADS:
        place = Place("attn.z", view.layer)
        values = exact(raw[Place("attn.v", view.layer), "forward"])
        written = torch.einsum("qkh,khd,hdm->qkhm", view.x, values, _matrix(view, place))
        return _scaled(view, place, written)
    if view.basis.whole and view.basis.axes[-1] == "head":
        written = torch.einsum("qhd,hdm->qhm", view.values, _matrix(view, view.place))
        return _scaled(view, view.place, written)
    if view.basis.whole:
        return exact(circuit.write(view.place, view.lift(view.values), raw))
    if view.featurizer is not None and view.basis.part == "features":
        values = view.values
        each = torch.arange(values.shape[-1], device=values.device).unsqueeze(-1)
        rows = [view.lift(torch.zeros_like(values).index_copy(-1, i, values[:, i])) for i in each]
        return exact(circuit.write(view.place, torch.stack(rows), raw)).movedim(0, -2)
    matrix = circuit.write_matrix(view.place)
    if matrix is None:
        return torch.diag_embed(view.values)
    return _scaled(view, view.place, view.values.unsqueeze(-1) * exact(matrix).to(view.x.device))


def _matrix(view: View, place: Place) -> Float[Tensor, "head d_head d_model"]:
    matrix = view.raw.circuit.write_matrix(place)
    if matrix is None:  # a head's output always has a projection
        raise ValueError(f"{place} has no write matrix")
    return exact(matrix).to(view.x.device)


def _quadratic(vectors: Float[Tensor, "any head d_head"], matrix: Float[Tensor, "head d_head d_model"]) -> Tensor:
    """``|v W|`` of each vector, without ``v W``: the root of ``v (W Wᵀ) vᵀ``."""
    gram = matrix @ matrix.mT
    squared = torch.einsum("nhd,hde,nhe->nh", vectors, gram, vectors)
    return squared.clamp_min(0).sqrt()


def _scaled(view: View, place: Place, tensor: Tensor) -> Tensor:
    """Divided by the scale of a norm behind the place, at each token, which is the first axis."""
    scale = view.raw.circuit.write_scale(place, view.raw)
    if scale is None:
        return tensor
    return tensor / exact(scale).reshape(-1, *[1] * (tensor.dim() - 1))


def _feature_lengths(view: View, featurizer: Featurizer[Any]) -> Tensor:
    """The length of what one unit of each feature writes, ``(n_features,)`` or ``(token, n_features)``.

    One token's decoder serves all tokens if it is the same at all of them, which one random vector tells: two
    different linear maps give it the same image with probability 0.
    """
    features, error = view.encoded
    first = _decoder(featurizer, features, error, 0)
    probe = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0), dtype=features.dtype)
    probe = probe.to(features.device)
    there = exact(featurizer.decode_jvp(features, error, probe.expand_as(features)))
    same = torch.allclose(there, (probe @ first).expand_as(there), rtol=1e-3, atol=1e-4 * float(there.abs().max()))
    if same:
        return _scaled(view, view.place, _lengths(view, first).expand(len(features), -1))
    rows = [_lengths(view, _decoder(featurizer, features, error, token)) for token in range(len(features))]
    return _scaled(view, view.place, torch.stack(rows))


def _decoder(featurizer: Featurizer[Any], features: Tensor, error: Any, token: int) -> Float[Tensor, "n_features d_in"]:
    """The decoder's derivative at one token."""
    one = features[token]
    held = _token(error, token)
    width = exact(featurizer.inverse_featurize(one, held)).shape[-1]
    unit = torch.eye(width, dtype=features.dtype, device=features.device)
    rows = exact(featurizer.decode_vjp(one.expand(width, -1), _token(error, token, width), unit))
    return rows.T


def _token(error: Any, token: int, repeat: int | None = None) -> Any:
    if isinstance(error, Tensor):
        return error[token] if repeat is None else error[token].expand(repeat, -1)
    return tuple(_token(part, token, repeat) for part in error) if isinstance(error, tuple) else error


def _lengths(view: View, decoder: Float[Tensor, "n_features d_in"]) -> Float[Tensor, " n_features"]:
    matrix = view.raw.circuit.write_matrix(view.place)
    if matrix is None:
        lengths: Tensor = torch.linalg.vector_norm(decoder, dim=-1)
        return lengths
    matrix = exact(matrix).flatten(0, -2).to(decoder)
    chunk = max(1, _CHUNK // matrix.shape[-1])
    return torch.cat([torch.linalg.vector_norm(rows @ matrix, dim=-1) for rows in torch.split(decoder, chunk)])

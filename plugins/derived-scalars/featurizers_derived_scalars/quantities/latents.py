"""Quantities of features of a featurizer: the direction that a feature reads, and what heads write along it."""

from __future__ import annotations

from typing import Any, Final

import torch
from featurizers import Featurizer
from featurizers.errors import FeatureIndexError, SiteError, UsageError
from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.circuit import KINDS, Place
from featurizers_derived_scalars.nodes import HEADS, Basis, NodeAxis, View, at_least_float32
from featurizers_derived_scalars.nodes.dependencies import anywhere
from featurizers_derived_scalars.quantities.derivers import Context, Deriver
from featurizers_derived_scalars.quantities.sources import RawSource

PAIR_SITES: Final = ("attn.delta", "attn.out")
PAIR_ENTRIES: Final = 2**26
"""Entries of `pair_attribution` that are computed at a time."""


def latent_direction(basis: Basis, latent: int) -> Deriver:
    """Return the gradient of one feature in the activations that it reads, at each token: the axes of the place.

    Args:
        basis: features of a featurizer.
        latent: number of the feature.

    Raises:
        UsageError: the basis has no featurizer.
        FeatureIndexError: the featurizer has no such feature.
    """
    _check_latent(basis, latent)

    def fn(context: Context, x: Tensor) -> Tensor:
        return _gradient(basis, context, latent, x)

    axes, params = KINDS[basis.kind].axes, {"latent": latent}
    return Deriver("latent_direction", (RawSource(basis.kind),), axes, fn, params, within=anywhere(basis))


def write_to_latent(basis: Basis, latent: int) -> Deriver:
    """Return what each head writes at each pair of tokens along one feature's gradient, ``(token, key, head)``.

    Args:
        basis: features of a featurizer at ``attn.delta``.
        latent: number of the feature.

    Raises:
        UsageError: the basis is another.
        FeatureIndexError: the featurizer has no such feature.
    """
    _check_attention(basis)
    _check_latent(basis, latent)

    def fn(context: Context, x: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
        pulled = _pulled_to_heads(basis, context, latent, x)
        return probabilities * torch.einsum("khd,qhd->qkh", values, pulled)

    sources = (RawSource(basis.kind), RawSource(HEADS), RawSource("attn.v"))
    nodes = Basis(HEADS)
    return Deriver("write_to_latent", sources, nodes.axes, fn, {"latent": latent}, nodes, anywhere(basis))


def token_write_to_latent(basis: Basis, latent: int) -> Deriver:
    """Return what each head writes at each token along one feature's gradient, ``(token, head)``.

    Arguments and errors are those of `write_to_latent`.
    """
    _check_attention(basis)
    _check_latent(basis, latent)

    def fn(context: Context, x: Tensor, z: Tensor) -> Tensor:
        return (z * _pulled_to_heads(basis, context, latent, x)).sum(-1)

    sources, nodes = (RawSource(basis.kind), RawSource("attn.z")), Basis("attn.z", whole=True)
    return Deriver("token_write_to_latent", sources, nodes.axes, fn, {"latent": latent}, nodes, anywhere(basis))


def token_write_to_latents(basis: Basis) -> Deriver:
    """Return what each head writes at each token along every feature's gradient, ``(token, head, feature)``.

    Args:
        basis: features of a featurizer at ``attn.delta``.

    Raises:
        UsageError: the basis is another.
    """
    _check_attention(basis)

    def fn(context: Context, x: Tensor, z: Tensor) -> Tensor:
        featurizer, place = _featurizer(basis, context.layer), Place("attn.z", context.layer)
        changes = []
        for head in range(z.shape[1]):
            alone = torch.zeros_like(z)
            alone[:, head] = z[:, head]
            changes.append(featurizer.encode_jvp(x, context.raw.write(place, alone).to(x.dtype)))
        return torch.stack(changes, dim=1)

    sources = (RawSource(basis.kind), RawSource("attn.z"))
    return Deriver("token_write_to_latents", sources, ("token", "head", "feature"), fn, within=anywhere(basis))


def pair_attribution(basis: Basis) -> Deriver:
    """Return what all heads of a layer write from a key to a token along each feature's gradient.

    ``(token, key, feature)``: the encoder's JVP of the write of each key, so that any featurizer will do. Features of a
    TopK or JumpReLU dictionary that do not fire have none. Summed over keys it is the JVP of the write of all heads
    together, which is the site without its bias. The prompt is encoded once for all pairs, or once for each
    `PAIR_ENTRIES` of a long result; each pair costs the encoder's derivative.

    Args:
        basis: features of a featurizer at ``attn.delta``; or at ``attn.out``, in models without a norm or a factor
            behind it.

    Raises:
        UsageError: the basis is another.
    """
    if not basis.is_features or basis.whole or basis.kind not in PAIR_SITES:
        raise UsageError(
            f"pairs are attributed to the features of a featurizer at {' or '.join(PAIR_SITES)}, not to {basis}"
        )

    def fn(context: Context, x: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
        view, heads = View(basis, context.raw, context.layer, x), Place("attn.z", context.layer)
        if context.circuit.write_matrix(view.place) is not None:
            raise UsageError("this model has a norm or a factor behind attn.out; take attn.delta, which heads write")
        written = _written_by_heads(context, heads, values)
        scale, parts = context.raw.write_scale(heads), []
        step = max(1, PAIR_ENTRIES // (len(x) * (_featurizer(basis, context.layer).n_features or x.shape[-1])))
        for at, write in zip(probabilities.split(step, dim=1), written.split(step), strict=True):  # type: ignore[no-untyped-call]
            tangents = torch.einsum("qkh,khd->kqd", at.to(write), write)
            parts.append(view.follow_each(tangents if scale is None else tangents / scale.to(tangents)))
        return torch.cat(parts).transpose(0, 1)

    sources = (RawSource(basis.kind), RawSource(HEADS), RawSource("attn.v"))
    axes: tuple[NodeAxis, ...] = ("token", "key", "feature")
    return Deriver(f"pair_attribution:{basis}", sources, axes, fn, {"basis": basis}, basis, anywhere(basis))


def _written_by_heads(context: Context, heads: Place, values: Tensor) -> Float[Tensor, "key head d_model"]:
    """Return what each head writes for each key at probability 1, before a norm behind attention divides it."""
    matrix = context.circuit.write_matrix(heads)
    if matrix is None:
        raise SiteError(f"{heads} has no output projection")
    values = at_least_float32(values)
    matrix = matrix.to(values.device, torch.promote_types(values.dtype, matrix.dtype))
    return torch.einsum("khe,hed->khd", values.to(matrix), matrix)


def _gradient(basis: Basis, context: Context, latent: int, x: Tensor) -> Tensor:
    featurizer, flat = _featurizer(basis, context.layer), x.reshape(len(x), -1)
    cotangent = flat.new_zeros(len(flat), featurizer.n_features or flat.shape[-1])
    cotangent[:, latent] = 1
    return at_least_float32(featurizer.encode_vjp(flat, cotangent)).reshape(x.shape)


def _pulled_to_heads(basis: Basis, context: Context, latent: int, x: Tensor) -> Tensor:
    """Pull the gradient of a feature back to the outputs of heads."""
    gradient = _gradient(basis, context, latent, x)
    return at_least_float32(context.raw.write_vjp(Place("attn.z", context.layer), gradient))


def _featurizer(basis: Basis, layer: int | None) -> Featurizer[Any]:
    featurizer = basis.featurizer_at(layer)
    if featurizer is None:
        raise UsageError(f"{basis} has no featurizer: its units are no features")
    return featurizer


def _check_attention(basis: Basis) -> None:
    if basis.kind != "attn.delta" or not basis.is_features:
        raise UsageError(f"heads write to features of a featurizer at attn.delta, not to {basis}")


def _check_latent(basis: Basis, latent: int) -> None:
    if not basis.is_features:
        raise UsageError(f"a latent is a feature of a featurizer, and {basis} has none")
    for featurizer in basis.featurizers:
        size = featurizer.n_features
        if latent < 0 or (size is not None and latent >= size):
            raise FeatureIndexError(
                f"there is no latent {latent} in {featurizer.id!r}; the first is 0, and there are {size}"
            )

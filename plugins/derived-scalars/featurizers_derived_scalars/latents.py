"""Quantities of one feature of a featurizer: where it looks, and what heads write there, at every token at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from featurizers import Featurizer
from featurizers.errors import FeatureIndexError, UsageError
from torch import Tensor

from featurizers_derived_scalars.axes import exact
from featurizers_derived_scalars.bases import Basis
from featurizers_derived_scalars.derivers import Context, Deriver
from featurizers_derived_scalars.places import KINDS, Place
from featurizers_derived_scalars.sources import RawSource

if TYPE_CHECKING:
    from featurizers_derived_scalars.circuit import Circuit


def latent_direction(basis: Basis, latent: int) -> Deriver:
    """The gradient of one feature in the activations that it reads, at each token: the axes of the place.

    Args:
        basis: the features of a featurizer.
        latent: number of the feature.

    Raises:
        UsageError: the basis has no featurizer.
        FeatureIndexError: there is no such feature.
    """
    _check(basis, latent)

    def gradient(context: Context, x: Tensor) -> Tensor:
        return _gradient(_at(basis, context.layer), latent, x)

    axes = KINDS[basis.kind].axes
    return Deriver("latent_direction", (_source(basis),), axes, gradient, {"latent": latent}, within=_within(basis))


def write_to_latent(basis: Basis, latent: int) -> Deriver:
    """What each head writes at each pair of tokens along one feature's gradient, ``(token, key, head)``.

    Args:
        basis: the features of a featurizer at ``attn.delta``.
        latent: number of the feature.

    Raises:
        UsageError: the basis is another one.
        FeatureIndexError: there is no such feature.
    """
    _check_attention(basis)
    _check(basis, latent)

    def pairs(context: Context, x: Tensor, probs: Tensor, value: Tensor) -> Tensor:
        seen = _seen_from_heads(context, basis, latent, x)
        return probs * torch.einsum("khd,qhd->qkh", value, seen)

    return Deriver(
        "write_to_latent",
        (_source(basis), RawSource("attn.probs"), RawSource("attn.v")),
        ("token", "key", "head"),
        pairs,
        {"latent": latent},
        basis=Basis("attn.probs"),
        within=_within(basis),
    )


def token_write_to_latent(basis: Basis, latent: int) -> Deriver:
    """What each head writes at each token along one feature's gradient, ``(token, head)``; as `write_to_latent`."""
    _check_attention(basis)
    _check(basis, latent)

    def heads(context: Context, x: Tensor, z: Tensor) -> Tensor:
        return (z * _seen_from_heads(context, basis, latent, x)).sum(-1)

    return Deriver(
        "token_write_to_latent",
        (_source(basis), RawSource("attn.z")),
        ("token", "head"),
        heads,
        {"latent": latent},
        basis=Basis("attn.z", whole=True),
        within=_within(basis),
    )


def token_write_to_latents(basis: Basis) -> Deriver:
    """What each head writes at each token along every feature's gradient, ``(token, head, feature)``.

    Args:
        basis: the features of a featurizer at ``attn.delta``.

    Raises:
        UsageError: the basis is another one.
    """
    _check_attention(basis)

    def heads(context: Context, x: Tensor, z: Tensor) -> Tensor:
        featurizer, place = _at(basis, context.layer), Place("attn.z", context.layer)
        found = []
        for head in range(z.shape[1]):
            alone = torch.zeros_like(z)
            alone[:, head] = z[:, head]
            found.append(featurizer.encode_jvp(x, context.circuit.write(place, alone, context.raw).to(x.dtype)))
        return torch.stack(found, dim=1)

    return Deriver(
        "token_write_to_latents",
        (_source(basis), RawSource("attn.z")),
        ("token", "head", "feature"),
        heads,
        within=_within(basis),
    )


def _gradient(featurizer: Featurizer[Any], latent: int, x: Tensor) -> Tensor:
    flat = x.reshape(len(x), -1)
    cotangent = flat.new_zeros(len(flat), featurizer.n_features or flat.shape[-1])
    cotangent[:, latent] = 1
    return exact(featurizer.encode_vjp(flat, cotangent)).reshape(x.shape)


def _seen_from_heads(context: Context, basis: Basis, latent: int, x: Tensor) -> Tensor:
    gradient = _gradient(_at(basis, context.layer), latent, x)
    return exact(context.circuit.write_vjp(Place("attn.z", context.layer), gradient, context.raw))


def _source(basis: Basis) -> RawSource:
    return RawSource(basis.kind)


def _within(basis: Basis) -> Callable[[Circuit, int | None], bool]:
    def within(_: Circuit, layer: int | None) -> bool:
        return basis.has(layer)

    return within


def _at(basis: Basis, layer: int | None) -> Featurizer[Any]:
    featurizer = basis.featurizer_at(layer)
    if featurizer is None:
        raise UsageError(f"{basis} has no featurizer: its units are no features")
    return featurizer


def _check_attention(basis: Basis) -> None:
    if basis.kind != "attn.delta" or basis.featurizer is None or basis.part != "features":
        raise UsageError(f"heads write to features of a featurizer at attn.delta, not to {basis}")


def _check(basis: Basis, latent: int) -> None:
    if basis.featurizer is None or basis.part != "features":
        raise UsageError(f"a latent is a feature of a featurizer, and {basis} has none")
    given = basis.featurizer
    for featurizer in [given] if isinstance(given, Featurizer) else given.values():
        most = featurizer.n_features
        if latent < 0 or (most is not None and latent >= most):
            raise FeatureIndexError(
                f"there is no latent {latent} in {featurizer.id!r}; the first is 0, and there are {most}"
            )

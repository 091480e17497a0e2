"""Directions that features write: how a reconstruction changes with each feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from featurizers import FeatureSpace, Featurizer, SiteMap
from featurizers.builtin import LinearDecoderFeaturizer
from featurizers.errors import FeaturizerError, LoweringError
from featurizers.features import without_autocast
from torch import Tensor

PROBED: Final = 8
"""Features that are tried to see whether a kind decodes linearly."""
PROBES: Final = 2**16
"""Features of a kind without a closed form up to which each is decoded."""
STEP: Final = 512

Rows = Callable[[Tensor], Tensor]
"""Returns the directions ``(k, d)`` of features whose columns ``(k,)`` are given."""


@dataclass(frozen=True)
class Directions:
    """Directions of features at each write.

    Attributes:
        writes: by name of the write; empty if they are not defined.
        why: reason why they are not defined, or what is to be known of them; empty if nothing is.
    """

    writes: Mapping[str, Rows]
    why: str = ""


def directions_of(space: FeatureSpace[Any], x: Tensor | None) -> Directions:
    """Return the directions of all features of a featurizer or a map.

    Args:
        space: any kind. Closed forms are used where a kind has them; of another kind a few features are decoded at two
            activations and in two sizes, and if they are not linear there is no direction.
        x: two activations ``(2, d)`` at the site of a featurizer; None for a map.
    """
    if isinstance(space, SiteMap):
        return _of_map(space)
    if isinstance(space, Featurizer) and x is not None:
        return _of_featurizer(space, x)
    return Directions({}, f"{type(space).__name__} is neither a featurizer nor a map")


def _of_map(space: SiteMap[Any]) -> Directions:
    """Return the directions of a map, whose law is that a change of its features is decoded linearly."""
    starts, start = {}, 0
    for name, group in space.groups.items():
        starts[name], start = start, start + group.n_features

    def rows(write: str, columns: Tensor) -> Tensor:
        found = torch.zeros(len(columns), space.write_widths[write])
        for name, group in space.groups.items():
            own = (columns >= starts[name]) & (columns < starts[name] + group.n_features)
            if (name, write) not in space.decoders or not bool(own.any()):
                continue
            local = (columns[own] - starts[name]).to(_device(space))
            unit = torch.eye(len(local), dtype=_dtype(space), device=local.device)
            found[own] = space.decode_change(write, name, unit, local).float().cpu()
        return found

    return Directions({write: lambda columns, write=write: rows(write, columns) for write in space.write_widths})  # type: ignore[misc]


def _of_featurizer(f: Featurizer[Any], x: Tensor) -> Directions:
    some = torch.arange(1)
    if isinstance(f, LinearDecoderFeaturizer):
        try:
            f.feature_rows(some.to(_device(f)))
        except LoweringError:
            units = "in the normalisation of each token, so that their lengths are those before it is undone"

            def decoded(columns: Tensor) -> Tensor:
                here = columns.to(_device(f))
                unit = torch.eye(len(here), dtype=f.W_dec.dtype, device=here.device)
                return f.decode_change(unit, here).float().cpu()

            return Directions({"site": decoded}, units)
    try:
        f.feature_rows(some.to(_device(f)))
    except LoweringError:
        return _probed(f, x)
    return Directions({"site": lambda columns: f.feature_rows(columns.to(_device(f))).write.float().cpu()})


def _probed(f: Featurizer[Any], x: Tensor) -> Directions:
    """Return directions by decoding each feature, if a few of them are decoded linearly."""
    x = x.to(_device(f))
    try:
        with without_autocast(x):
            features, _ = f.featurize(x)
        n = features.shape[-1]
        if n > PROBES:
            return Directions({}, f"the kind {f.kind!r} has no closed form, and {n} features are too many to decode")
        few = torch.linspace(0, n - 1, min(n, PROBED)).long()
        first, second, double = _changes(f, x[:1], few, 1.0), _changes(f, x[1:], few, 1.0), _changes(f, x, few, 2.0)
    except (FeaturizerError, RuntimeError, ValueError, TypeError) as error:
        return Directions({}, f"features of the kind {f.kind!r} cannot be decoded one by one: {type(error).__name__}")
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max())) or not torch.allclose(
        2 * first, double, rtol=1e-3, atol=1e-4 * float(double.abs().max())
    ):
        return Directions({}, f"what a feature of the kind {f.kind!r} writes depends on the activation")
    return Directions({"site": lambda columns: _changes(f, x[:1], columns, 1.0)})


def _changes(f: Featurizer[Any], x: Tensor, columns: Tensor, size: float) -> Tensor:
    """Return how the activation changes, ``(k, d)``, if each feature alone is larger by ``size`` at ``x[0]``."""
    parts = []
    for some in torch.split(columns.to(x.device), STEP):
        base = x[:1].expand(len(some), -1)
        with without_autocast(base):
            features, error = f.featurize(base)
            edited = features.clone()
            edited[torch.arange(len(some), device=x.device), some] += size
            parts.append(f.inverse_featurize(edited, error) - f.inverse_featurize(features, error))
    return torch.cat(parts).float().cpu()


def _device(space: FeatureSpace[Any]) -> torch.device:
    return next((t.device for t in (*space.parameters(), *space.buffers())), torch.device("cpu"))


def _dtype(space: FeatureSpace[Any]) -> torch.dtype:
    return next((t.dtype for t in space.parameters() if t.is_floating_point()), torch.float32)

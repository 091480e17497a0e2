"""Models that TransformerLens holds: our sites at its hook points, and its names for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featurizers import hookimpl

from featurizers_transformer_lens.filling import fill_cache

if TYPE_CHECKING:
    from featurizers.models import Backend
    from torch import nn

__all__ = ["fill_cache"]


@hookimpl
def featurizers_backend(model: object, part: nn.Module | None) -> Backend | None:
    """Return how TransformerLens holds a model; None for other models."""
    from featurizers_transformer_lens.bridges import backend

    return backend(model, part)

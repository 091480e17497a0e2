"""Whether the weights of a model are loaded: nnsight builds models without them until they run."""

from __future__ import annotations

from torch import nn


def are_missing(module: nn.Module) -> bool:
    """Return whether a model has no weights at all; those that accelerate keeps elsewhere are not missing."""
    if not all(parameter.is_meta for parameter in module.parameters()):
        return False
    if next(module.parameters(), None) is None:
        return False
    return not any(hasattr(each, "_hf_hook") for each in module.modules())  # by which accelerate brings the weights

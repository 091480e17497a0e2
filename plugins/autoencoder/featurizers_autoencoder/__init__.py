"""Autoencoders in pyvene: interchange in their latent space, with an error term, saved without pickle.

The interventions are imported when first used, because importing pyvene takes seconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from featurizers import hookimpl
from featurizers_pyvene import SavedIntervention

from featurizers_autoencoder.layers import AutoencoderLayer, AutoencoderLayerBase, JumpReLUAutoencoderLayer

if TYPE_CHECKING:
    from featurizers_autoencoder.intervenable import get_intervenable_with_autoencoder
    from featurizers_autoencoder.intervention import AutoencoderIntervention, JumpReLUAutoencoderIntervention

__all__ = [
    "AutoencoderIntervention",
    "AutoencoderLayer",
    "AutoencoderLayerBase",
    "JumpReLUAutoencoderIntervention",
    "JumpReLUAutoencoderLayer",
    "get_intervenable_with_autoencoder",
]


@hookimpl
def featurizers_interventions(register: Callable[[type[SavedIntervention]], None]) -> None:
    """Register the two interventions."""
    from featurizers_autoencoder.intervention import AutoencoderIntervention, JumpReLUAutoencoderIntervention

    register(AutoencoderIntervention)
    register(JumpReLUAutoencoderIntervention)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "intervention" if name.endswith("Intervention") else "intervenable"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)

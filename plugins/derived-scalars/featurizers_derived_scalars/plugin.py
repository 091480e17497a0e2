"""Hooks of the plugin ``derived-scalars``; each imports what it needs when it is called."""

from __future__ import annotations

from typing import Any

from featurizers import hookimpl


@hookimpl(optionalhook=True, trylast=True)
def featurizers_circuits(model: Any) -> Any:
    """Return the layout of any decoder that can be found by following a prompt; asked after all other plugins."""
    from featurizers_derived_scalars.circuit.layout import find_layout

    return find_layout(model)


@hookimpl(optionalhook=True)
def featurizers_scalars(register: Any) -> None:
    """Register the quantities of this package."""
    from featurizers_derived_scalars.builtin_quantities import SPECS

    for spec in SPECS:
        register(spec)


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``derived-scalars.diagonal``."""
    from featurizers_derived_scalars.featurize.diagonal import DiagonalFeaturizer

    register(DiagonalFeaturizer)

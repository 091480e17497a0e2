"""Hooks of the plugin ``transformer-debugger``; each imports what it needs when it is called."""

from __future__ import annotations

from typing import Any

from featurizers import hookimpl


@hookimpl(optionalhook=True)
def featurizers_scalars(register: Any) -> None:
    """Register the 106 names as quantities of `featurizers_derived_scalars`."""
    from featurizers_transformer_debugger.scalars import SPECS

    for spec in SPECS:
        register(spec)

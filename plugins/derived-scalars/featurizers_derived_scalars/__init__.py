"""Scalars derived from a decoder's activations and gradients, in the basis of any featurizer."""

from __future__ import annotations

from typing import Any

from featurizers import hookimpl


@hookimpl(optionalhook=True, trylast=True)
def featurizers_circuits(model: Any) -> Any:
    """The layout of any decoder that can be found by following a prompt through it; asked after all other plugins."""
    from featurizers_derived_scalars.layout import find_layout

    return find_layout(model)


@hookimpl(optionalhook=True)
def featurizers_scalars(register: Any) -> None:
    """Register the quantities of this package, and transformer-debugger's names of them."""
    from featurizers_derived_scalars.plain import plain_specs
    from featurizers_derived_scalars.transformer_debugger import upstream_specs

    for spec in (*plain_specs(), *upstream_specs()):
        register(spec)


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``derived-scalars.diagonal``."""
    from featurizers_derived_scalars.diagonal import DiagonalFeaturizer

    register(DiagonalFeaturizer)


@hookimpl
def featurizers_commands(app: Any) -> None:
    """Add ``scalars``."""
    from featurizers_derived_scalars import command

    app.command("scalars")(command.scalars_command)

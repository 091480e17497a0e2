"""Scalars derived from a decoder's activations and gradients, in the basis of any featurizer.

Names are imported when they are first used, so that looking for a command costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from featurizers import hookimpl

if TYPE_CHECKING:
    from featurizers_derived_scalars.activations import RawActivations as RawActivations
    from featurizers_derived_scalars.bases import Basis as Basis
    from featurizers_derived_scalars.capturing import capture as capture
    from featurizers_derived_scalars.circuit import Circuit as Circuit
    from featurizers_derived_scalars.derivers import Deriver as Deriver
    from featurizers_derived_scalars.directions import Fixed as Fixed
    from featurizers_derived_scalars.directions import MetricGrad as MetricGrad
    from featurizers_derived_scalars.directions import NodeGrad as NodeGrad
    from featurizers_derived_scalars.entry import Plan as Plan
    from featurizers_derived_scalars.entry import direct_total as direct_total
    from featurizers_derived_scalars.entry import plan as plan
    from featurizers_derived_scalars.entry import scalars as scalars
    from featurizers_derived_scalars.errors import IncompleteError as IncompleteError
    from featurizers_derived_scalars.metrics import log_probability as log_probability
    from featurizers_derived_scalars.metrics import logit_difference as logit_difference
    from featurizers_derived_scalars.metrics import logit_minus_mean as logit_minus_mean
    from featurizers_derived_scalars.metrics import probability as probability
    from featurizers_derived_scalars.nodes import Node as Node
    from featurizers_derived_scalars.places import Need as Need
    from featurizers_derived_scalars.places import Place as Place
    from featurizers_derived_scalars.results import Scalars as Scalars
    from featurizers_derived_scalars.specs import ScalarSpec as ScalarSpec
    from featurizers_derived_scalars.specs import deriver as deriver
    from featurizers_derived_scalars.transformer_debugger import upstream as upstream

_HOME = {
    "Basis": "bases",
    "Circuit": "circuit",
    "Deriver": "derivers",
    "Fixed": "directions",
    "IncompleteError": "errors",
    "MetricGrad": "directions",
    "Need": "places",
    "Node": "nodes",
    "NodeGrad": "directions",
    "Place": "places",
    "Plan": "entry",
    "RawActivations": "activations",
    "ScalarSpec": "specs",
    "Scalars": "results",
    "capture": "capturing",
    "deriver": "specs",
    "direct_total": "entry",
    "log_probability": "metrics",
    "logit_difference": "metrics",
    "logit_minus_mean": "metrics",
    "plan": "entry",
    "probability": "metrics",
    "scalars": "entry",
    "upstream": "transformer_debugger",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'featurizers_derived_scalars' has no attribute {name!r}")
    home = importlib.import_module(f"featurizers_derived_scalars.{_HOME[name]}")
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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

"""Causal bases: the orthonormal directions of a layer whose ablation moves a model's output most.

Rooms, lowest first: `lens` (readouts), `solve` (the search), then `command` and `compat` (the names of tuned-lens).
The files `record`, `inputs`, `featurizer`, `ablation`, `fidelity` and `pictures` hold the featurizer and its tools.
"""

from typing import Any

from featurizers import hookimpl

from featurizers_causal_basis.ablation import ablate_subspace, remove_subspace
from featurizers_causal_basis.featurizer import CausalBasisConfig, CausalBasisFeaturizer
from featurizers_causal_basis.fidelity import Fidelity, causal_fidelity
from featurizers_causal_basis.inputs import MassiveTokenWarning, derange
from featurizers_causal_basis.lens import AffineNorm, Decoder, LogitLens, Readout, TunedLens
from featurizers_causal_basis.record import BasisRecord, Mode
from featurizers_causal_basis.solve import (
    PRESETS,
    NoDirectionWarning,
    Preset,
    Progress,
    extract_causal_bases,
    iterate_causal_bases,
)

__all__ = [
    "PRESETS",
    "AffineNorm",
    "BasisRecord",
    "CausalBasisConfig",
    "CausalBasisFeaturizer",
    "Decoder",
    "Fidelity",
    "LogitLens",
    "MassiveTokenWarning",
    "Mode",
    "NoDirectionWarning",
    "Preset",
    "Progress",
    "Readout",
    "TunedLens",
    "ablate_subspace",
    "causal_fidelity",
    "derange",
    "extract_causal_bases",
    "iterate_causal_bases",
    "remove_subspace",
]


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``causal-basis``."""
    register(CausalBasisFeaturizer)


@hookimpl
def featurizers_commands(app: Any) -> None:
    """Add ``fit causal-basis``."""
    import typer

    from featurizers_causal_basis.command import fit_command

    fit = typer.Typer(no_args_is_help=True, help="Fit featurizers to a model.")
    fit.callback()(lambda: None)
    fit.command("causal-basis")(fit_command)
    app.add_typer(fit, name="fit")

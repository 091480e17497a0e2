"""Causal bases: the orthonormal directions of a layer whose ablation moves a model's output most."""

from typing import Any

from featurizers import hookimpl

from featurizers_causal_basis.ablation import ablate_subspace, remove_subspace
from featurizers_causal_basis.derangement import derange
from featurizers_causal_basis.extraction import NoDirectionWarning, extract_causal_bases, iterate_causal_bases
from featurizers_causal_basis.featurizer import CausalBasisConfig, CausalBasisFeaturizer
from featurizers_causal_basis.fidelity import Fidelity, causal_fidelity
from featurizers_causal_basis.logit_lens import LogitLens
from featurizers_causal_basis.massive import MassiveTokenWarning
from featurizers_causal_basis.presets import PRESETS, Preset
from featurizers_causal_basis.progress import Progress
from featurizers_causal_basis.readouts import AffineNorm, Decoder, Readout
from featurizers_causal_basis.record import BasisRecord, Mode
from featurizers_causal_basis.tuned_lens import TunedLens

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

    from featurizers_causal_basis import command

    fit = typer.Typer(no_args_is_help=True, help="Fit featurizers to a model.")
    fit.callback()(lambda: None)
    fit.command("causal-basis")(command.fit_command)
    app.add_typer(fit, name="fit")

"""Finds features by training interventions on counterfactual pairs: DAS, DBM, both, and boundless DAS."""

from typing import Any

from featurizers import hookimpl

from featurizers_training.controls import CONTROLS, randomly_initialised
from featurizers_training.evaluation import Accuracy, accuracy, evaluate
from featurizers_training.found import Found
from featurizers_training.gates import BoundaryGate
from featurizers_training.methods import (
    BASELINES,
    DAS,
    DASDBM,
    DBM,
    METHODS,
    PCA,
    BoundlessDAS,
    FullVector,
    Method,
    RandomSubspace,
)
from featurizers_training.objectives import OBJECTIVES, Answers, Objective, cross_entropy, logit_difference
from featurizers_training.pairs import Pair, PairError, Pairs
from featurizers_training.runs import CleanRuns
from featurizers_training.search import Settings, train
from featurizers_training.sweep import Cell, Sweep, sweep

__all__ = [
    "BASELINES",
    "CONTROLS",
    "DAS",
    "DASDBM",
    "DBM",
    "METHODS",
    "OBJECTIVES",
    "PCA",
    "Accuracy",
    "Answers",
    "BoundaryGate",
    "BoundlessDAS",
    "Cell",
    "CleanRuns",
    "Found",
    "FullVector",
    "Method",
    "Objective",
    "Pair",
    "PairError",
    "Pairs",
    "RandomSubspace",
    "Settings",
    "Sweep",
    "accuracy",
    "cross_entropy",
    "evaluate",
    "logit_difference",
    "randomly_initialised",
    "sweep",
    "train",
]


@hookimpl
def featurizers_commands(app: Any) -> None:
    """Add ``train``, ``evaluate`` and ``sweep``."""
    from featurizers_training import command

    app.command("train")(command.train_command)
    app.command("evaluate")(command.evaluate_command)
    app.command("sweep")(command.sweep_command)

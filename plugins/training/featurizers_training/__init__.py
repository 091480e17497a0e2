"""Find features by training interventions on counterfactual pairs: DAS, DBM, both, and boundless DAS.

The rooms, lowest first: `statistics` (intervals and tests), `pairs` (data), `runs` (the model's runs with and without
edits), `methods` (what is trained) and `evaluation` (accuracy), `search` (the training loop), `sweeps` (sites,
positions and methods), `demo`, `command`.
"""

from typing import Any

from featurizers import hookimpl

from featurizers_training.evaluation import Accuracy, accuracy, evaluate
from featurizers_training.methods.base import Method, Searched
from featurizers_training.methods.gates import BoundaryGate
from featurizers_training.methods.searches import (
    BASELINES,
    DAS,
    DASDBM,
    DBM,
    METHODS,
    PCA,
    BoundlessDAS,
    FullVector,
    RandomSubspace,
)
from featurizers_training.pairs import Pairs
from featurizers_training.records import Pair, PairError
from featurizers_training.runs.clean_runs import CleanRuns
from featurizers_training.search.found import Found
from featurizers_training.search.objectives import OBJECTIVES, Answers, Objective, cross_entropy, logit_difference
from featurizers_training.search.settings import Settings
from featurizers_training.search.training import train
from featurizers_training.statistics import Estimate, clustered_mean, holm, paired_difference
from featurizers_training.sweeps.controls import CONTROLS, randomly_initialised
from featurizers_training.sweeps.sweeping import Cell, Sweep, sweep

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
    "Estimate",
    "Found",
    "FullVector",
    "Method",
    "Objective",
    "Pair",
    "PairError",
    "Pairs",
    "RandomSubspace",
    "Searched",
    "Settings",
    "Sweep",
    "accuracy",
    "clustered_mean",
    "cross_entropy",
    "evaluate",
    "holm",
    "logit_difference",
    "paired_difference",
    "randomly_initialised",
    "sweep",
    "train",
]


def evaluate_command(**options: Any) -> None:
    """Run ``featurizers evaluate SOURCE --pairs FILE``, which the command of featurizers-evaluate hands on."""
    from featurizers_training.command.evaluate import evaluate_command as run

    run(**options)


@hookimpl
def featurizers_commands(app: Any) -> None:
    """Add ``train``, ``sweep`` and ``demo``; ``evaluate`` is added by featurizers-evaluate."""
    from featurizers_training.command.demo import demo_command
    from featurizers_training.command.sweep import sweep_command
    from featurizers_training.command.train import train_command

    app.command("train")(train_command)
    app.command("sweep")(sweep_command)
    app.command("demo")(demo_command)

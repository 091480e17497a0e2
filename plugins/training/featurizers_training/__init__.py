"""Finds features by training interventions on counterfactual pairs: DAS, DBM, both, and boundless DAS."""

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

__all__ = [
    "DAS",
    "DASDBM",
    "DBM",
    "METHODS",
    "OBJECTIVES",
    "Accuracy",
    "Answers",
    "BoundaryGate",
    "BoundlessDAS",
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
    "accuracy",
    "cross_entropy",
    "evaluate",
    "logit_difference",
    "train",
]

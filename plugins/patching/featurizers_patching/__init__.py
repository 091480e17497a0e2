"""Exact activation patching: the effect of each edit of a grid, a whole sweep in a few forward passes.

`patch` is the entry. The files, lowest first: `engine` (runs of many edits at once), `pairs`, `positions` and `sites`
(the axes of a grid), `operations` and `metrics`, `grid` with its files and pictures, `grid_run`,
`patching`, `command`.
"""

from typing import Any

from featurizers import hookimpl

from featurizers_patching.grid import Grid, GridCell, load_grid
from featurizers_patching.metrics import KL, METRICS, Accuracy, LogitDifference, Loss, Metric, Probability, Scored
from featurizers_patching.pairs import Pair, pairs_of, read_pairs
from featurizers_patching.patching import patch

__all__ = [
    "KL",
    "METRICS",
    "Accuracy",
    "Grid",
    "GridCell",
    "LogitDifference",
    "Loss",
    "Metric",
    "Pair",
    "Probability",
    "Scored",
    "load_grid",
    "pairs_of",
    "patch",
    "read_pairs",
]


@hookimpl
def featurizers_commands(app: Any) -> None:
    """Add ``patch``."""
    from featurizers_patching.command import patch_command

    app.command("patch")(patch_command)

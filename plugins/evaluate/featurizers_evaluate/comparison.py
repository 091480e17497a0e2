"""`Comparison`: several evaluations of the same data, as one table and one picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from featurizers_evaluate.result import Evaluation, frame_of, rows_of, table_of


@dataclass(frozen=True)
class Comparison:
    """Several evaluations of the same data.

    Attributes:
        labels: one for each.
        evaluations: in the order of the labels.
    """

    labels: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]

    def __getitem__(self, label: str) -> Evaluation:
        """Return the evaluation of a label."""
        return self.evaluations[self.labels.index(label)]

    def __iter__(self) -> Iterator[tuple[str, Evaluation]]:
        """Iterate over labels with their evaluations."""
        return iter(zip(self.labels, self.evaluations, strict=True))

    def __len__(self) -> int:
        """Return the number of evaluations."""
        return len(self.labels)

    def __repr__(self) -> str:
        """Return a table with a column for each evaluation."""
        from rich.console import Console

        buffer = io.StringIO()
        Console(file=buffer, width=40 + 24 * len(self), emoji=False, highlight=False).print(self.table())
        return buffer.getvalue().rstrip("\n")

    def table(self) -> Any:
        """Return a table of `rich`."""
        return table_of(list(self.evaluations), list(self.labels))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data: each evaluation by its label."""
        return {label: evaluation.to_dict() for label, evaluation in self}

    def to_pandas(self) -> Any:
        """Return a data frame with a row for each metric of each evaluation."""
        return frame_of(list(self.evaluations), list(self.labels))

    def write_csv(self, path: Path) -> None:
        """Write a table with a row for each metric of each evaluation."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["label", "site", "metric", "value", "low", "high", "unit", "why"])
            writer.writeheader()
            writer.writerows(rows_of(list(self.evaluations), list(self.labels)))

    def draw(self, path: Path, *, joined: bool) -> bool:
        """Save the picture of `plot` and return True; return False without matplotlib or a metric to draw."""
        heights = ("explained_variance", "ce_recovered_zero_ablation", "ce_recovered_mean_ablation", "l1")
        drawable = (y for y in heights if all(has_value(each, y) for each in self.evaluations))
        y = next(drawable, None)
        if y is None or find_spec("matplotlib") is None:
            return False
        self.plot(y=y, joined=joined).figure.savefig(path, dpi=150)
        return True

    def plot(self, x: str = "l0", y: str = "explained_variance", *, ax: Any = None, joined: bool = False) -> Any:
        """Draw one metric against another, a point with its intervals for each evaluation; return matplotlib's axes.

        Args:
            x: metric on the horizontal axis; where it is not defined, the number of features is drawn.
            y: metric on the vertical axis.
            ax: axes to draw on; None for new ones.
            joined: whether to join the points by a line, as for a sweep.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            UsageError: the vertical metric was not measured.
        """
        from featurizers_evaluate.pictures import trade_off

        return trade_off(self.labels, self.evaluations, x, y, ax=ax, joined=joined)


def has_value(evaluation: Evaluation, name: str) -> bool:
    """Return whether a metric was measured and is defined."""
    return name in evaluation.metrics and evaluation.metrics[name].value is not None

"""Heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featurizers.errors import MissingDependencyError, printable
from torch import Tensor


def heat_map(
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    ax: Any = None,
    dotted: Tensor | None = None,
) -> Any:
    """Draw values ``(rows, columns)``, rows from the bottom up, with white at 0; return matplotlib's axes.

    Args:
        values: to draw.
        rows: their labels.
        columns: their labels.
        title: of the axes.
        ax: axes to draw on; None for new ones.
        dotted: cells to mark with a dot, ``(rows, columns)``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("a heat map", "matplotlib", "pip install 'featurizers-patching[plots]'") from error
    if ax is None:
        size = 2.5 + 0.5 * len(columns), 1.5 + 0.25 * len(rows)
        ax = Figure(figsize=size, layout="constrained").add_subplot()
    largest = max(float(values.abs().nan_to_num(0.0).max()), 1e-12)
    image = ax.imshow(values.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", origin="lower")
    if dotted is not None:
        y, x = dotted.nonzero(as_tuple=True)
        ax.scatter(x.numpy(), y.numpy(), s=4, color="grey")
    labels = [printable(label, 16).replace("$", r"\$") for label in columns]
    ax.set_xticks(range(len(columns)), labels, rotation=90 if len(columns) > 4 else 0)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_title(title, fontsize="small")
    ax.figure.colorbar(image, ax=ax)
    return ax

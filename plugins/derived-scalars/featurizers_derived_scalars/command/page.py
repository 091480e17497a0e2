"""A page about one prompt, in one file: plots, tables, and the tokens that the largest nodes read and write."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import MissingDependencyError, printable
from featurizers.files import os_errors
from jinja2 import Environment, StrictUndefined

from featurizers_derived_scalars.capturing import RawActivations
from featurizers_derived_scalars.command.labels import basis_label
from featurizers_derived_scalars.command.observing import Observation
from featurizers_derived_scalars.command.tokens import reads_tokens, tokens_read, tokens_written, writes_tokens
from featurizers_derived_scalars.registry import spec
from featurizers_derived_scalars.results import Ranked, Scalar
from featurizers_derived_scalars.results.scalar import Key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELLED_TOKENS = 48
"""Plots of longer prompts have no labels on the axis of tokens."""

COLUMNS = {"value": "value", "layer": "layer", "node": "node", "token": "token", "key": "attends to"}
"""Key of each column of a table in the rows, and its title."""

EXPLAINED = {
    "value": "The activation of each node.",
    "grad": "How much the metric changes per unit of each node's activation.",
    "act_times_grad": "About how much the metric would fall if the node were set to zero, with all that later nodes "
    "make of it.",
    "write_to": "How much what the node adds to the residual stream raises the metric by itself, without later nodes; "
    "with the final norm held at its scale.",
    "write_norm": "Length of the vector that the node adds to the residual stream. It says nothing of direction.",
    "norm": "Length of the vector at each place of the residual stream.",
    "edge_to": "How much of the traced node's effect on the metric comes from each earlier node.",
    "edge_from": "How much the traced node adds to the effect of each later node on the metric.",
}
"""What common quantities mean, in a sentence or two."""

SHOWN = ("featurizers", "featurizers-derived-scalars", "torch", "transformers")
"""Distributions whose versions a page names."""


@dataclass(frozen=True)
class Page:
    """Content of a page.

    Attributes:
        model: name of the model.
        tokens: tokens of the prompt, as text.
        about: the metric in words, with its value.
        rows: for each quantity, the largest scalars as `labels.rows_of` returns them.
        scalars: descriptions of the scalars of all quantities, by name.
        observations: for each quantity, its sums.
        largest: for each quantity, the largest scalars.
        tokenizer: tokenizer of the model.
        raw: captured tensors of the prompt.
        command: the command line that wrote the page.
        masked: number of tokens left out at the start.
    """

    model: str
    tokens: Sequence[str]
    about: str
    rows: Mapping[str, Sequence[Mapping[str, object]]]
    scalars: Mapping[str, Scalar]
    observations: Mapping[str, Observation]
    largest: Mapping[str, Sequence[Ranked]]
    tokenizer: Any
    raw: RawActivations
    command: str = ""
    masked: int = 0


def write_page(file: Path, page: Page) -> None:
    """Write a page that needs no other file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ArtefactError: the file cannot be written.
    """
    pictures = {name: [(drawn, _png(drawn.figure)) for drawn in _pictures(page, name)] for name in page.rows}
    source = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    text = template.render(
        page=page,
        prompt=[_token(text) for text in page.tokens],
        quantities={name: _about(name) for name in page.rows},
        pictures=pictures,
        columns=COLUMNS,
        vocabulary=list(_vocabulary(page)),
        versions=[f"{name} {metadata.version(name)}" for name in SHOWN],
    )
    with os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n", encoding="utf-8")


def _about(name: str) -> tuple[str, str, str]:
    """Return title, explanation and unit of a quantity."""
    known = spec(name.partition(":")[0])
    title = known.text[:1].upper() + known.text[1:]
    return title, EXPLAINED.get(known.name, ""), known.group


def _token(text: str) -> str:
    """Return a token without characters that move text or break lines."""
    return printable(text.replace("\n", "⏎"), 40)


def _vocabulary(page: Page, most: int = 10) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the label of each of the largest nodes of the first quantity, with the tokens it writes and reads."""
    rows = next(iter(page.rows.values()))
    nodes = [entry.node for entry in next(iter(page.largest.values())) if entry.node is not None]
    for node, row in zip(nodes[:most], rows, strict=False):
        written = tokens_written(page.raw, node) if writes_tokens(node) else ([], [])
        read = tokens_read(page.raw, node) if reads_tokens(node) else ([], [])
        ends = [[_token(page.tokenizer.decode([i])) for i in ids] for ids in (*written, *read)]
        yield ("" if node.layer is None else f"layer {node.layer}, ") + str(row["node"]), ends


# ---------------------------------------------------------------------- plots


def _png(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return base64.b64encode(data.getvalue()).decode("ascii")


@dataclass(frozen=True)
class _Picture:
    """A figure with its title and a sentence on its colours."""

    title: str
    note: str
    figure: Figure


def _pictures(page: Page, name: str) -> Iterator[_Picture]:
    sums = page.observations[name]
    if sums.by_token:
        ticks = [f"{i} {_token(text)}" for i, text in enumerate(page.tokens)][page.masked :]
        yield _heat_maps("Sums at each token and layer", page, sums.by_token, ticks, "token")
    if sums.by_head:
        heads = range(max(map(len, sums.by_head.values())))
        yield _heat_maps("Sums of each head, over tokens", page, sums.by_head, [str(head) for head in heads], "head")
    if page.rows[name]:
        note = "Red bars are positive, blue bars negative."
        yield _Picture("Largest nodes", note, _bars(page.rows[name], spec(name.partition(":")[0]).group))


def _blank(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "a page with plots", "matplotlib", "pip install 'featurizers-derived-scalars[plots]'"
        ) from error
    return Figure(figsize=(10, height), layout="constrained")


def colour_limit(rows: Sequence[Sequence[float]], *, first_apart: bool) -> float:
    """Return the magnitude at which colours end, so that a few cells do not leave the others pale.

    It is the largest magnitude, or three times the 95th percentile of those that are not zero if that is less.

    Args:
        rows: values of the cells.
        first_apart: the first column counts only if there is no other: first tokens often have enormous values.
    """
    kept = [row[1:] if first_apart and len(row) > 1 else row for row in rows]
    sizes = sorted(abs(x) for row in kept for x in row if x) or sorted(abs(x) for row in rows for x in row)
    return min(sizes[-1], 3 * sizes[int(0.95 * (len(sizes) - 1))]) or 1.0


def _heat_maps(
    title: str, page: Page, sums: Mapping[Key, Sequence[float]], ticks: Sequence[str], label: str
) -> _Picture:
    """Draw one panel per scalar, layers down, all on one scale of colours; panels of zeros are left out."""
    panels: dict[str, dict[int | None, Sequence[float]]] = {}
    for (name, layer), values in sums.items():
        panels.setdefault(name, {})[layer] = values
    filled = {name: lines for name, lines in panels.items() if any(x for line in lines.values() for x in line)}
    panels = filled or panels
    rows = [line for lines in panels.values() for line in lines.values()]
    limit, most = colour_limit(rows, first_apart=label == "token"), max((x for row in rows for x in row), key=abs)
    signed = any(x < 0 for row in rows for x in row)
    heights = [max(0.13 * len(lines), 0.35) for lines in panels.values()]
    labelled = len(ticks) <= LABELLED_TOKENS
    figure = _blank(0.5 + sum(heights) + (1.15 if labelled and label == "token" else 0.7) * len(panels))
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
        cells, colours = list(lines.values()), "RdBu_r" if signed else "Reds"
        image = axes.imshow(cells, aspect="auto", cmap=colours, vmin=-limit if signed else 0.0, vmax=limit)
        layers = ["" if layer is None else str(layer) for layer in lines]
        step = max(1, len(layers) // 10)
        numbered = [row for row in range(0, len(layers), step) if layers[row]]
        axes.set_yticks(numbered, [layers[row] for row in numbered], fontsize=7)
        axes.set_title(basis_label(name, page.scalars.get(name)), fontsize=10, loc="left")
        axes.set_xticks([])
        if len(layers) > 1:
            axes.set_ylabel("layer", fontsize=8)
        if labelled:
            turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if label == "token" else {}
            axes.set_xticks(range(len(ticks)), [_plain(text) for text in ticks], fontsize=7, **turned)
        if not labelled or label != "token":
            axes.set_xlabel(label, fontsize=8)
    clipped = "neither" if abs(most) <= limit else "both" if signed else "max"
    bar = figure.colorbar(image, ax=list(all_axes), aspect=40, extend=clipped)
    bar.ax.tick_params(labelsize=7)
    note = "Red is positive, blue negative, white zero." if signed else "White is zero, dark red large."
    if clipped != "neither":
        note += f" Colours end at {limit:.3g}, so that the largest, {most:.3g}, does not leave the others pale."
    return _Picture(title, note, figure)


def _bars(rows: Sequence[Mapping[str, object]], unit: str) -> Figure:
    """Draw the largest nodes as bars, the largest on top."""
    figure = _blank(1.0 + 0.22 * len(rows))
    axes = figure.subplots()
    names, values = [], []
    for row in rows:
        layer = "" if row["layer"] is None else f"layer {row['layer']}, "
        token = "" if row["token"] is None else f" at {row['token']}"
        key = "" if row["key"] is None else f" → {row['key']}"
        names.append(_plain(f"{layer}{row['node']}{token}{key}"))
        values.append(float(str(row["value"])))
    axes.barh(range(len(rows)), values, color=["#b2182b" if value > 0 else "#2166ac" for value in values])
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel(unit, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    return figure


def _plain(text: str) -> str:
    """Escape dollar signs, which begin a formula in matplotlib."""
    return text.replace("$", r"\$")

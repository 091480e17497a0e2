"""A page about one prompt, in one file: plots, tables, and the tokens that the largest nodes read and write."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import MissingDependencyError
from jinja2 import Environment, StrictUndefined

from featurizers_derived_scalars.capturing import RawActivations
from featurizers_derived_scalars.command.observing import Observation
from featurizers_derived_scalars.command.tokens import reads_tokens, tokens_read, tokens_written, writes_tokens
from featurizers_derived_scalars.results import Ranked
from featurizers_derived_scalars.results.scalar import Key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELLED_TOKENS = 48
"""Plots of longer prompts have no labels on the axis of tokens."""

COLUMNS = ("value", "layer", "node", "token", "key")


@dataclass(frozen=True)
class Page:
    """Content of a page.

    Attributes:
        model: name of the model.
        tokens: tokens of the prompt, as text.
        about: the metric in words, with its value.
        rows: for each quantity, the largest scalars as `labels.rows_of` returns them.
        observations: for each quantity, its sums.
        largest: for each quantity, the largest scalars.
        tokenizer: tokenizer of the model.
        raw: captured tensors of the prompt.
    """

    model: str
    tokens: Sequence[str]
    about: str
    rows: Mapping[str, Sequence[Mapping[str, object]]]
    observations: Mapping[str, Observation]
    largest: Mapping[str, Sequence[Ranked]]
    tokenizer: Any
    raw: RawActivations


def write_page(file: Path, page: Page) -> None:
    """Write a page that needs no other file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    pictures = {name: [(title, _png(figure)) for title, figure in _figures(page, name)] for name in page.rows}
    source = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    text = template.render(page=page, pictures=pictures, columns=COLUMNS, vocabulary=list(_vocabulary(page)))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n", encoding="utf-8")


def _vocabulary(page: Page, most: int = 10) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the label of each of the largest nodes of the first quantity, with the tokens it writes and reads."""
    rows = next(iter(page.rows.values()))
    nodes = [entry.node for entry in next(iter(page.largest.values())) if entry.node is not None]
    for node, row in zip(nodes[:most], rows, strict=False):
        written = tokens_written(page.raw, node) if writes_tokens(node) else ([], [])
        read = tokens_read(page.raw, node) if reads_tokens(node) else ([], [])
        ends = [[page.tokenizer.decode([i]) for i in ids] for ids in (*written, *read)]
        yield ("" if node.layer is None else f"layer {node.layer}, ") + str(row["node"]), ends


# ---------------------------------------------------------------------- plots


def _png(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return base64.b64encode(data.getvalue()).decode("ascii")


def _figures(page: Page, name: str) -> Iterator[tuple[str, Figure]]:
    sums = page.observations[name]
    if sums.by_token:
        yield "sums at each token and layer", _heat_maps(sums.by_token, page.tokens, "token")
    if sums.by_head:
        heads = range(max(map(len, sums.by_head.values())))
        yield "sums of each head", _heat_maps(sums.by_head, [str(head) for head in heads], "head")
    if page.rows[name]:
        yield "largest nodes", _bars(page.rows[name])


def _blank(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "a page with plots", "matplotlib", "pip install 'featurizers-derived-scalars[plots]'"
        ) from error
    return Figure(figsize=(10, height), layout="constrained")


def _heat_maps(sums: Mapping[Key, Sequence[float]], ticks: Sequence[str], label: str) -> Figure:
    """Draw one panel per name, layers down; red is positive and blue negative, on one scale."""
    panels: dict[str, dict[int | None, Sequence[float]]] = {}
    for (name, layer), values in sums.items():
        panels.setdefault(name, {})[layer] = values
    sizes = {name: max(abs(x) for line in lines.values() for x in line) for name, lines in panels.items()}
    panels = {name: lines for name, lines in panels.items() if sizes[name]} or panels  # without biases that are zero
    most = max(sizes.values()) or 1.0
    heights = [max(len(lines), 2) for lines in panels.values()]
    figure = _blank(1.2 + 0.11 * sum(heights) + 0.5 * len(panels))
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
        image = axes.imshow(list(lines.values()), aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
        layers = ["" if layer is None else str(layer) for layer in lines]
        step = max(1, len(layers) // 10)
        axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=7)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xticks([])
        axes.set_ylabel("layer", fontsize=8)
    if len(ticks) <= LABELLED_TOKENS:
        names = [_plain(text).replace("\n", "⏎") for text in ticks]
        all_axes[-1].set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    all_axes[-1].set_xlabel(label, fontsize=8)
    figure.colorbar(image, ax=list(all_axes), aspect=30)
    return figure


def _bars(rows: Sequence[Mapping[str, object]]) -> Figure:
    """Draw the largest nodes as bars, the largest on top."""
    figure = _blank(0.8 + 0.22 * len(rows))
    axes = figure.subplots()
    names, values = [], []
    for row in rows:
        layer = "" if row["layer"] is None else f"layer {row['layer']}, "
        token = "" if row["token"] is None else f" at {row['token']}"
        names.append(_plain(f"{layer}{row['node']}{token}"))
        values.append(float(str(row["value"])))
    axes.barh(range(len(rows)), values, color=["#b2182b" if value > 0 else "#2166ac" for value in values])
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    return figure


def _plain(text: str) -> str:
    """Escape dollar signs, which begin a formula in matplotlib."""
    return text.replace("$", r"\$")

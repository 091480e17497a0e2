"""A page about one prompt, one file: plots, tables, and what the largest nodes read and write."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import MissingDependencyError

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.circuit import Circuit
from featurizers_derived_scalars.ranking import Ranked
from featurizers_derived_scalars.vocabulary import reads_tokens, tokens_read, tokens_written, writes_tokens
from featurizers_derived_scalars.watching import Seen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_TOKENS = 48
"""Prompts with more tokens than this are drawn without their names."""

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.4rem}h2{font-size:1.15rem;margin-top:2.2rem;border-top:1px solid #ddd;padding-top:1rem}
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.15rem .7rem;border-bottom:1px solid #eee;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}code,.t{font-family:ui-monospace,monospace}
.t{background:#f2f2f2;border-radius:3px;padding:0 .2em;white-space:pre-wrap}"""


@dataclass(frozen=True)
class Page:
    """What a page is about.

    Attributes:
        prompt: the text.
        model: its name.
        tokens: the prompt's, as text.
        about: the metric in words, with its value.
        rows: of each quantity, the largest scalars as `labels.rows_of` gives them.
        seen: of each quantity, its sums.
        found: of each quantity, the largest scalars.
        circuit: of the model.
        tokenizer: of the model.
        raw: what was captured of the prompt.
    """

    prompt: str
    model: str
    tokens: Sequence[str]
    about: str
    rows: Mapping[str, Sequence[Mapping[str, object]]]
    seen: Mapping[str, Seen]
    found: Mapping[str, Sequence[Ranked]]
    circuit: Circuit
    tokenizer: Any
    raw: RawActivations


def write_page(file: Path, page: Page) -> None:
    """Write a page that needs no other file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    title = f"Scalars of {page.model}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{''.join(_token(token) for token in page.tokens)}</p>",
        f"<p>{len(page.tokens)} tokens; {html.escape(page.about)}.</p>",
    ]
    for name, rows in page.rows.items():
        parts += [f"<h2>{html.escape(name)}</h2>"]
        parts += [_picture(drawn, f"{name}: {what}") for what, drawn in _figures(page, name)]
        parts += [_table(rows)]
    parts += _read_and_written(page)
    file.parent.mkdir(parents=True, exist_ok=True)
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    file.write_text(f"{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n", encoding="utf-8")


def _token(text: str) -> str:
    return f'<span class="t">{html.escape(text)}</span> '


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    columns = ("value", "layer", "node", "token", "key")
    lines = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in columns) + "</tr>"]
    for row in rows:
        cells = [f'<td class="n">{row["value"]:+.4g}</td>']
        cells += [f"<td>{'' if row[name] is None else html.escape(str(row[name]))}</td>" for name in columns[1:]]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "".join(lines) + "</table>"


# ---------------------------------------------------------------------- plots


def _picture(drawn: Figure, text: str) -> str:
    data = io.BytesIO()
    drawn.savefig(data, format="png", dpi=110)
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{encoded}"></p>'


def _figures(page: Page, name: str) -> list[tuple[str, Figure]]:
    seen = page.seen[name]
    drawn = [("sums at each token and layer", _by_token(seen, page.tokens))] if seen.by_token else []
    if seen.by_head:
        drawn.append(("sums of each head", _by_head(seen)))
    if page.rows[name]:
        drawn.append(("largest nodes", _bars(page.rows[name])))
    return drawn


def _blank(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "a page with plots", "matplotlib", "pip install 'featurizers-derived-scalars[plots]'"
        ) from error
    return Figure(figsize=(10, height), layout="constrained")


def _heat_maps(panels: Mapping[str, Mapping[int | None, Sequence[float]]], ticks: Sequence[str], label: str) -> Figure:
    """A picture of one panel a name, layers down; red is positive and blue negative, of one scale."""
    sizes = {name: max(abs(x) for line in lines.values() for x in line) for name, lines in panels.items()}
    panels = {name: lines for name, lines in panels.items() if sizes[name]} or panels  # biases that there are not
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
    if len(ticks) <= SHOWN_TOKENS:
        # a dollar sign would begin a formula
        names = [text.replace("$", r"\$").replace("\n", "⏎") for text in ticks]
        all_axes[-1].set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    all_axes[-1].set_xlabel(label, fontsize=8)
    figure.colorbar(image, ax=list(all_axes), aspect=30)
    return figure


def _panels(sums: Mapping[tuple[str, int | None], Sequence[float]]) -> dict[str, dict[int | None, Sequence[float]]]:
    panels: dict[str, dict[int | None, Sequence[float]]] = {}
    for (name, layer), values in sums.items():
        panels.setdefault(name, {})[layer] = values
    return panels


def _by_token(seen: Seen, tokens: Sequence[str]) -> Figure:
    return _heat_maps(_panels(seen.by_token), tokens, "token")


def _by_head(seen: Seen) -> Figure:
    heads = max(map(len, seen.by_head.values()))
    return _heat_maps(_panels(seen.by_head), [str(head) for head in range(heads)], "head")


def _bars(rows: Sequence[Mapping[str, object]]) -> Figure:
    """The largest nodes as bars, the largest on top."""
    figure = _blank(0.8 + 0.22 * len(rows))
    axes = figure.subplots()
    names, values = [], []
    for row in rows:
        layer = "" if row["layer"] is None else f"layer {row['layer']}, "
        token = "" if row["token"] is None else f" at {row['token']}"
        names.append(f"{layer}{row['node']}{token}".replace("$", r"\$"))
        values.append(float(str(row["value"])))
    colors = ["#b2182b" if value > 0 else "#2166ac" for value in values]
    axes.barh(range(len(rows)), values, color=colors)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    return figure


# ---------------------------------------------------------------------- tokens


def _read_and_written(page: Page, most: int = 10) -> list[str]:
    """What the largest nodes of the first quantity read and write, as tokens of the vocabulary."""
    entries = [entry for entry in next(iter(page.found.values())) if entry.node is not None][:most]
    labels = [row["node"] for row in next(iter(page.rows.values()))]
    lines = []
    for entry, label in zip(entries, labels, strict=False):
        ends: list[list[int]] = [[], [], [], []]
        if entry.node is not None and writes_tokens(entry.node):
            ends[:2] = tokens_written(page.circuit, page.raw, entry.node)
        if entry.node is not None and reads_tokens(entry.node):
            ends[2:] = tokens_read(page.circuit, page.raw, entry.node)
        cells = [f"<td>{''.join(_token(page.tokenizer.decode([i])) for i in ids) or '–'}</td>" for ids in ends]
        layer = "" if entry.layer is None else f"layer {entry.layer}, "
        lines.append(f"<tr><td>{html.escape(f'{layer}{label}')}</td>{''.join(cells)}</tr>")
    if not lines:
        return []
    head = "".join(f"<th>{name}</th>" for name in ("node", "writes most", "least", "reads most", "least"))
    return ["<h2>Tokens read and written</h2>", f"<table><tr>{head}</tr>{''.join(lines)}</table>"]

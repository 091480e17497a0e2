"""One HTML file that shows a report; it needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Final

from featurizers.errors import printable
from featurizers.files import replacing_file
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from featurizers_evaluate.definitions import DEFINITIONS
from featurizers_evaluate.reporting.data import ReportData
from featurizers_evaluate.reporting.packing import packed
from featurizers_evaluate.result import Metric

POLICY: Final = "default-src 'none'; base-uri 'none'; form-action 'none'"
SCRIPTS: Final = ("page_base.js", "page_charts.js", "page_feature.js", "page_list.js")
TILES: Final = {
    "explained_variance": "explained variance",
    "l0": "features of a token",
    "dead_features": "never active",
    "ce_recovered_zero_ablation": "loss recovered (zeros)",
    "ce_recovered_mean_ablation": "loss recovered (means)",
    "kl": "KL divergence, nats",
}
"""Metrics at the head of the page."""
SHARES: Final = ("explained_variance", "dead_features", "ce_recovered_zero_ablation", "ce_recovered_mean_ablation")


def write_page(path: Path, report: ReportData) -> Path:
    """Write a page of a report, and return its path.

    The page may run only its own script and use only its own style, by their hashes, and may load nothing.

    Raises:
        ArtefactError: the file cannot be written.
    """
    text = page_of(report)
    with replacing_file(path) as new:
        new.write_text(text, encoding="utf-8", newline="\n")
    return path


def page_of(report: ReportData) -> str:
    """Return the page of a report."""
    style = _file("page.css")
    script = "\n".join(['"use strict";', *(_file(name) for name in SCRIPTS)])
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_file("page.html"))
    about = report.about
    text: str = template.render(
        title=printable(str(about["featurizer"]), 120),
        lead=_lead(report),
        policy=f"{POLICY}; script-src '{_hash(script)}'; style-src '{_hash(style)}'",
        style=Markup(style),
        script=Markup(script),
        data=Markup(packed(report)),
        tiles=_tiles(report),
        metrics=_metrics(report),
        stored=about["stored"],
        facts=_facts(report),
        dense=report.is_dense,
        many=len(about["groups"]) > 1,
        versions=f"featurizers-evaluate {metadata.version('featurizers-evaluate')}",
    )
    return f"{text}\n"


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    """Return the source expression of a policy that allows exactly this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _lead(report: ReportData) -> str:
    """Return what was measured on what, as a sentence."""
    about = report.about
    part = "" if len(report) == about["n_features"] else f"{len(report):,} of "
    data = f" of {about['data']}" if about["data"] else ""
    text = (
        f"{about['kind']} with {part}{about['n_features']:,} features at {about['site']} of {about['model']}; "
        f"measured on {about['tokens']:,} tokens{data}"
    )
    return printable(text, 600)


def _tiles(report: ReportData) -> list[tuple[str, str, str]]:
    """Return name, value and definition of the metrics at the head of the page."""
    found = {**report.evaluation.metrics, **({} if report.effect is None else report.effect.metrics)}
    tiles = []
    for name, title in TILES.items():
        metric = found.get(name)
        if metric is not None and metric.value is not None:
            value = f"{100 * metric.value:.1f} %" if name in SHARES else f"{metric.value:.3g}"
            tiles.append((title, value.replace("-", "−"), metric.definition))
    return tiles


def _metrics(report: ReportData) -> list[dict[str, str]]:
    """Return the rows of the table of metrics: those measured here, and those that the artefact has."""
    stored = {} if report.about["stored"] is None else report.about["stored"]["metrics"]
    rows = []
    for name, definition in DEFINITIONS.items():
        source = next((each for each in (report.evaluation, report.effect) if each and name in each.metrics), None)
        if source is None and name not in stored:
            continue
        metric = None if source is None else source.metrics[name]
        rows.append(
            {
                "name": name,
                "value": "" if metric is None else printable(str(metric), 300),
                "interval": _interval(metric),
                "tokens": "" if source is None else f"{source.about['tokens']:,}",
                "stored": f"{stored[name]:.4g}" if name in stored else "",
                "definition": f"{definition.text}; unit: {definition.unit}",
            }
        )
    return rows


def _interval(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return ""
    return f"{metric.interval[0]:.4g} to {metric.interval[1]:.4g}" if metric.interval else f"none: {metric.why}"


def _facts(report: ReportData) -> dict[str, str]:
    """Return what the page says of the featurizer, the data and the programs, by name."""
    about = report.about
    width = about["d"]
    reads, writes = (_sites(about[name]) for name in ("reads", "writes"))
    facts: dict[str, Any] = {
        "kind": about["kind"],
        "id": about["featurizer"],
        "revision": about["revision"],
        "site" if reads == writes else "reads": reads,
        "writes": None if reads == writes else writes,
        "width": ", ".join(f"{each:,}" for each in dict.fromkeys(width)) if isinstance(width, list) else width,
        "features": f"{about['n_features']:,}",
        "features shown": None if len(report) == about["n_features"] else f"{len(report):,}",
        **{f"{name} (config)": value for name, value in about["config"].items()},
        "model": about["model"],
        "model revision": about["model_revision"],
        "dtype of the model": about["dtype"],
        "data": about["data"],
        "documents": f"{about['documents']:,}",
        "tokens measured": f"{about['tokens']:,} of {about['tokens_read']:,} read",
        "tokens of a row, at most": about["context"],
        "tokens left out at the start of a row": about["mask_first"] or None,
        "token ids left out": ", ".join(map(str, about["excluded_tokens"])) or None,
        "tokens for the effect on the model": about["effect_tokens"],
        "effect on the model": f"not measured, because {about['no_effect']}" if about["no_effect"] else None,
        **{f"version of {name}": number for name, number in about["versions"].items()},
    }
    return {name: printable(str(value), 400) for name, value in facts.items() if value is not None}


def _sites(sites: dict[str, str]) -> str:
    texts = list(sites.values())
    return ", ".join(texts if len(texts) < 9 else [*texts[:7], "…", texts[-1]])

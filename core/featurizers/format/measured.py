"""Measured metrics of an artefact: data in its metadata, rows of its card, and results as the Hub reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from featurizers.errors import ArtefactError, UsageError, explain, one_line, shown
from featurizers.files.regular import read_bytes
from featurizers.format.manifest import MAX_CONFIG_BYTES, Manifest, parse_json

KEY: Final = "evaluation"
"""Key in the metadata of an artefact."""
TASK: Final = "feature-extraction"
TASK_NAME: Final = "featurizer evaluation"
DATASET: Final = re.compile(r"hub:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?=$|@|,)")
"""Name of data that is a data set of the Hub, such as ``hub:owner/name@revision, split test``."""
MOST: Final = 256
"""Metrics that an artefact may have."""


class MetricRecord(BaseModel):
    """One metric; see ``featurizers_evaluate.Metric``."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    value: float | int | None
    interval_95: list[float | int] | None = None
    unit: str = ""
    definition: str = ""
    why: str = ""

    def text(self) -> str:
        """Return the value with its interval, or that it is not defined."""
        if self.value is None:
            return f"not defined, because {self.why or 'no reason is given'}"
        bounds = self.interval_95
        return f"{self.value:.4g}" + (f" ({bounds[0]:.4g} to {bounds[1]:.4g})" if bounds and len(bounds) == 2 else "")


class Measured(BaseModel):
    """What ``Evaluation.to_dict`` returns, as far as a card needs it.

    Attributes:
        about: model, data, tokens, versions, seed.
        metrics: by name.
        sha256: of the weights that were measured.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    about: dict[str, Any]
    metrics: dict[str, MetricRecord]
    sha256: str | None = None

    def said(self, name: str) -> str | None:
        """Return what ``about`` says of a name, as one line; None if it says nothing."""
        value = self.about.get(name)
        return None if value is None else one_line(str(value), 200)


def added(manifest: Manifest, metrics: object) -> Manifest:
    """Return a manifest with metrics in its metadata, which are those of its weights.

    Args:
        manifest: of the artefact that was measured.
        metrics: an evaluation of `featurizers.evaluate`, its ``to_dict()``, or the path of its file.

    Raises:
        UsageError: they are none of these.
        ArtefactError: the file cannot be read.
    """
    data = _data(metrics)
    try:
        Measured.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"metrics are what featurizers.evaluate returns or saves: {explain(error)}") from error
    about = data["about"]
    if (kind := about.get("kind", manifest.kind)) != manifest.kind:
        raise UsageError(f"the metrics are of a featurizer of kind {shown(kind)}, and this one is {manifest.kind!r}")
    record = {"about": about, "metrics": data["metrics"], "sha256": manifest.sha256}
    return manifest.model_copy(update={"metadata": {**manifest.metadata, KEY: record}})


def of(manifest: Manifest) -> Measured | None:
    """Return the metrics of an artefact; None if it has none, or if its weights have changed since."""
    record = manifest.metadata.get(KEY)
    if not isinstance(record, dict):
        return None
    try:
        measured = Measured.model_validate(record)
    except ValidationError:  # metadata may be any JSON
        return None
    fits = measured.sha256 == manifest.sha256 and 0 < len(measured.metrics) <= MOST
    return measured if fits else None


def about_in_words(measured: Measured) -> str:
    """Return what was measured on what, in one line."""
    names = {"model": "model", "model_revision": "at", "data": "data", "tokens": "tokens", "documents": "documents"}
    parts = [f"{word} {text}" for name, word in names.items() if (text := measured.said(name)) is not None]
    return ", ".join(parts)


def model_index(manifest: Manifest, measured: Measured) -> list[dict[str, Any]]:
    """Return the metrics as a ``model-index``, which the Hub's client reads as ``eval_results``."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    data = measured.said("data") or "not named"
    known = ("tokens", "documents", "model", "model_revision", "context", "excluded_tokens", "seed")
    arguments = {name: value for name in known if (value := _short(measured.about.get(name))) is not None}
    results = [
        EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=_repository(measured) or "other",
            dataset_name=data,
            dataset_args=arguments,
            metric_type=name,
            metric_name=one_line(each.definition, 200) or name,
            metric_value=each.value,
            metric_args=None if each.interval_95 is None else {"interval_95": each.interval_95},
        )
        for name, each in measured.metrics.items()
        if each.value is not None
    ]
    index = eval_results_to_model_index(manifest.id, results)
    return json.loads(json.dumps(index))  # type: ignore[no-any-return]


def eval_results(manifest: Manifest) -> bytes | None:
    """Return the metrics in the form of ``.eval_results/NAME.yaml``; None if the data is no data set of the Hub."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    measured = of(manifest)
    repository = None if measured is None else _repository(measured)
    if measured is None or repository is None:
        return None
    notes = one_line(f"{manifest.id}: {about_in_words(measured)}", 300)
    entries = [
        EvalResultEntry(dataset_id=repository, task_id=name, value=each.value, notes=notes)
        for name, each in measured.metrics.items()
        if each.value is not None
    ]
    text: str = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=False)
    return text.encode()


def merged(existing: Any, own: list[dict[str, Any]]) -> Any:
    """Return a ``model-index`` with the entries of others that stand in a card already, and these of an artefact."""
    others = [entry for entry in existing if not _is_own(entry)] if isinstance(existing, list) else []
    unchanged = not own and (not isinstance(existing, list) or len(others) == len(existing))
    return existing if unchanged else others + own


def _is_own(entry: object) -> bool:
    results = entry.get("results") if isinstance(entry, dict) else None
    if not isinstance(results, list) or not results:
        return False
    tasks = [result.get("task") if isinstance(result, dict) else None for result in results]
    return all(isinstance(task, dict) and task.get("name") == TASK_NAME for task in tasks)


def _short(value: object) -> object:
    """Return a number, a short text or a short list of numbers as it is; None for anything else."""
    if isinstance(value, str):
        return one_line(value, 200)
    if isinstance(value, list):
        return value if len(value) <= 64 and all(type(each) is int for each in value) else None
    return value if type(value) in (int, float) else None


def _repository(measured: Measured) -> str | None:
    """Return the id of the data set on the Hub that was measured on; None for other data."""
    name = measured.about.get("data")
    found = DATASET.match(name) if isinstance(name, str) else None
    return None if found is None else found[1]


def _data(metrics: object) -> dict[str, Any]:
    to_dict = getattr(metrics, "to_dict", None)
    if callable(to_dict):
        metrics = to_dict()
    if isinstance(metrics, str | Path):
        where = str(metrics)
        raw = read_bytes(Path(metrics).expanduser(), where, ArtefactError, MAX_CONFIG_BYTES)
        metrics = parse_json(raw, where, "it")
    if not isinstance(metrics, Mapping):
        raise UsageError(f"metrics are what featurizers.evaluate returns or saves, not {type(metrics).__name__}")
    return dict(metrics)

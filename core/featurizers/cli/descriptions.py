"""What ``featurizers kinds KIND`` and ``featurizers info`` show of a kind and of an artefact."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from featurizers import features
from featurizers.errors import shown
from featurizers.format import card
from featurizers.format import edits as edits_format
from featurizers.format import labels as labels_format
from featurizers.format.manifest import WEIGHTS_NAME, Manifest, named_folder
from featurizers.format.weights import read_header

MOST_SHOWN: Final = 300
"""Characters of JSON that ``info`` prints of one entry of the metadata."""


def about_class(cls: type) -> str:
    """Return the first paragraph of the docstring of a class, on one line."""
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ").replace("``", "")


def constructors_of(cls: type) -> dict[str, str]:
    """Return the first line of the docstring of each public class method that a kind adds."""
    common = dir(features.Featurizer)
    return {
        name: inspect.cleandoc(getattr(cls, name).__doc__ or "").partition("\n")[0]
        for name, value in vars(cls).items()
        if isinstance(value, classmethod) and not name.startswith("_") and name not in common
    }


def readable(record: Manifest, tensors: Mapping[str, str]) -> dict[str, Any]:
    """Return what people want to know of an artefact; long metadata, such as the history of a search, by their size."""
    fields: dict[str, Any] = {"kind": record.kind, "id": record.id, "config": record.config}
    if site := next(iter(record.sites().values()), None):
        tokens = None if site.position is None else ", ".join(map(str, site.position[:20]))
        model = site.model and " at ".join(filter(None, (site.model, site.model_revision)))
        about = {"site": record.sites_text(), "model": model, "tokens": tokens}
        fields |= {name: value for name, value in about.items() if value is not None}
    fields |= {name: text for name, text in card.summary_of(record).items() if name not in fields}
    if edits := edits_format.record_in(record, record.id):
        fields["edits"] = "\n".join(edits_format.in_words(edit) for edit in edits.edits[:20])
    if labels := labels_format.record_in(record, record.id):
        fields["labels"] = labels_format.in_words(labels)
    for name, value in record.metadata.items():
        if name not in ("summary", labels_format.KEY, edits_format.KEY):
            size = len(text := json.dumps(value, ensure_ascii=True))
            fields[f"metadata: {shown(name)[1:-1]}"] = text if size <= MOST_SHOWN else f"{size} characters; see --json"
    if record.features:
        fields["feature sets"] = ", ".join(record.features)
    if tensors:
        fields["tensors"] = "\n".join(f"{shown(name)[1:-1]}: {spec}" for name, spec in tensors.items())
    saved_with = ", ".join(f"{name} {version}" for name, version in record.saved_with.items())
    return fields | {"saved with": saved_with, "sha256": record.sha256}


def tensors_of(path: Path, subfolder: str | None) -> dict[str, str]:
    """Return the dtype and the shape of each tensor of an artefact in a folder, read from the header of its weights.

    Raises:
        ArtefactError: there is no such artefact, or its weights are damaged.
    """
    folder = named_folder(path) / (subfolder or "")
    header = read_header(folder / WEIGHTS_NAME, str(folder))
    return {name: f"{spec.dtype} {list(spec.shape)}" for name, spec in header.items()}

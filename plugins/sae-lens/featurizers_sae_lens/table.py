"""Reads ``catalogue.json``, the table of SAELens' catalogue, which ``make_catalogue.py`` writes.

A release is a list of groups of entries whose names have the same form. A group has templates (``id``, ``path``,
``neuronpedia``), in which ``{0}`` stands for the word of the first column, and numbers: one for all rows, or a list. In
a column ``word*3`` stands for the word three times, and the whole column is repeated until it has ``rows`` words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

FILE = "catalogue.json"
TEMPLATES = ("id", "path", "neuronpedia")
NUMBERS = ("l0", "norm_scaling_factor", "variance_explained")


@dataclass(frozen=True, slots=True)
class Entry:
    """Entry of the catalogue: an autoencoder. A fact that the catalogue lacks is None.

    Attributes:
        id: its name in the release.
        path: its folder or file in the release's repository. The loader ``mntss_clt_layer_transcoder`` takes it for
            the number of a layer.
        neuronpedia: its id in Neuronpedia.
        l0: mean number of features that fire for a token.
        norm_scaling_factor: factor that activations were multiplied by in training.
        variance_explained: share of the variance of the activations.
    """

    id: str
    path: str
    neuronpedia: str | None
    l0: float | None
    norm_scaling_factor: float | None
    variance_explained: float | None


@dataclass(frozen=True)
class Release:
    """Release of the catalogue.

    Attributes:
        name: of the release.
        repo_id: its repository on the Hub.
        model: the model that it is for, as TransformerLens or the Hub names it.
        loader: SAELens' name of the function that reads it.
        overrides: keys of the configuration that replace those of the files.
        links: addresses of web pages.
        groups: entries of the table.
    """

    name: str
    repo_id: str
    model: str
    loader: str
    overrides: dict[str, Any]
    links: dict[str, str]
    groups: list[dict[str, Any]]

    @functools.cached_property
    def entries(self) -> dict[str, Entry]:
        """Return the entries by their ids."""
        return {entry.id: entry for group in self.groups for entry in _entries(group)}


@dataclass(frozen=True)
class Catalogue:
    """The whole catalogue.

    Attributes:
        version: of the package sae-lens whose catalogue it is.
        releases: by name.
    """

    version: str
    releases: dict[str, Release]


@functools.cache
def catalogue() -> Catalogue:
    """Return SAELens' catalogue; the file is read once, and entries are made when their release is used."""
    return parse(resources.files("featurizers_sae_lens").joinpath(FILE).read_text(encoding="utf-8"))


def parse(text: str) -> Catalogue:
    """Return the catalogue in the text of the file."""
    data = json.loads(text)
    releases = {
        name: Release(name, **{"overrides": {}, "links": {}, **release}) for name, release in data["releases"].items()
    }
    return Catalogue(data["sae_lens"], releases)


def _entries(group: dict[str, Any]) -> Iterator[Entry]:
    columns = [_column(text, group["rows"]) for text in group["columns"]]
    for row in range(group["rows"]):
        words = [column[row] for column in columns]
        facts: dict[str, Any] = dict.fromkeys((*TEMPLATES, *NUMBERS))
        facts |= {name: group[name].format(*words) for name in TEMPLATES if name in group}
        numbers = {name: group[name] for name in NUMBERS if name in group}
        facts |= {name: value[row] if isinstance(value, list) else value for name, value in numbers.items()}
        yield Entry(**facts)


def _column(text: str, rows: int) -> list[str]:
    words: list[str] = []
    for part in text.split(" "):
        word, _, times = part.partition("*")
        words += [word] * int(times or 1)
    return words * (rows // len(words))

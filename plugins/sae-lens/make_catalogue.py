"""Write ``featurizers_sae_lens/catalogue.json`` from the catalogue in the installed package sae-lens.

    pip install -r requirements/dev.txt && python plugins/sae-lens/make_catalogue.py

SAELens is not imported. The file is compared with its source before it is written.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from featurizers_sae_lens.table import FILE, NUMBERS, TEMPLATES, Catalogue, Entry, Release, parse

FOLDER = Path(__file__).parent / "featurizers_sae_lens"
RELEASE = {"repo_id", "model", "conversion_func", "config_overrides", "links", "saes"}


def installed() -> tuple[str, dict[str, Any]]:
    """Return the version of the installed package sae-lens, and the contents of its catalogue."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or spec.origin is None:
        raise SystemExit("sae-lens is not installed; run: pip install -r requirements/dev.txt")
    text = Path(spec.origin).with_name("pretrained_saes.yaml").read_text(encoding="utf-8")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return importlib.metadata.version("sae-lens"), yaml.load(text, Loader=loader)


def table(version: str, source: dict[str, Any]) -> str:
    """Return the text of the file: a line for each release and for each of its groups.

    Raises:
        SystemExit: the catalogue has a field that is not known, or the text does not say what the catalogue says.
    """
    lines = []
    for name, release in source.items():
        if unknown := release.keys() - RELEASE:
            raise SystemExit(f"the release {name!r} has unknown fields {sorted(unknown)!r}")
        facts = {
            "repo_id": release["repo_id"],
            "model": release["model"],
            "loader": release.get("conversion_func") or "sae_lens",
            "overrides": release.get("config_overrides"),
            "links": release.get("links"),
        }
        head = _compact({key: value for key, value in facts.items() if value})[:-1]
        groups = ",\n".join(map(_compact, _groups(_entry(name, sae) for sae in release["saes"])))
        lines.append(f'{json.dumps(name)}:{head},"groups":[\n{groups}]}}')
    text = f'{{"sae_lens":{json.dumps(version)},"releases":{{\n' + ",\n".join(lines) + "\n}}\n"
    for name, written in parse(text).releases.items():
        if written.entries != {entry.id: entry for entry in (_entry(name, sae) for sae in source[name]["saes"])}:
            raise SystemExit(f"the entries of {name!r} are not written as they are: mend this script")
    return text


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _entry(release: str, sae: dict[str, Any]) -> Entry:
    # one entry has a copy of its release's fields, wrongly indented; SAELens does not read them
    if unknown := sae.keys() - {*TEMPLATES, *NUMBERS} - RELEASE:
        raise SystemExit(f"{release}/{sae['id']} has unknown fields {sorted(unknown)!r}")
    known = {key: sae.get(key) for key in (*TEMPLATES, *NUMBERS)}
    known |= {"id": str(sae["id"]), "path": str(sae["path"])}
    if any(sign in (known[name] or "") for sign in " *{}\n" for name in TEMPLATES):
        raise SystemExit(f"{release}/{sae['id']}: the table cannot hold names with a space, a brace or *")
    return Entry(**known)


def _groups(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Group entries that have the same facts, and the same separators in their names."""
    forms: dict[Any, list[Entry]] = {}
    for entry in entries:
        present = tuple(getattr(entry, fact) is not None for fact in (*TEMPLATES, *NUMBERS))
        forms.setdefault((present, tuple(_parts(entry)[1::2])), []).append(entry)
    return [_group(group) for group in forms.values()]


def _parts(entry: Entry) -> list[str]:
    """Split the names of an entry into words, at even places, and separators."""
    return re.split(r"([_/\n-])", "\n".join(getattr(entry, name) or "" for name in TEMPLATES))


def _group(entries: list[Entry]) -> dict[str, Any]:
    numbers: dict[tuple[str, ...], int] = {}
    template = ""
    for words in zip(*map(_parts, entries), strict=True):
        same = len(set(words)) == 1
        template += words[0] if same else f"{{{numbers.setdefault(words, len(numbers))}}}"
    group: dict[str, Any] = {"rows": len(entries), "columns": [_column(words) for words in numbers]}
    group |= {name: text for name, text in zip(TEMPLATES, template.split("\n"), strict=True) if text}
    for name in NUMBERS:
        values = [getattr(entry, name) for entry in entries]
        if values[0] is not None:
            group[name] = values[0] if len(set(map(repr, values))) == 1 else values
    return group


def _column(words: tuple[str, ...]) -> str:
    """Write the words of a column; see `featurizers_sae_lens.table`."""
    rows = len(words)
    period = next(n for n in range(1, rows + 1) if rows % n == 0 and words[:n] * (rows // n) == words)
    runs = [(word, len(list(run))) for word, run in itertools.groupby(words[:period])]
    return " ".join(word if times == 1 else f"{word}*{times}" for word, times in runs)


def _names(catalogue: Catalogue) -> set[str]:
    releases: Iterable[Release] = catalogue.releases.values()
    return {f"{release.name}/{name}" for release in releases for name in release.entries}


def main() -> None:
    """Write the file, and say which entries are new and which are gone."""
    file = FOLDER / FILE
    before = _names(parse(file.read_text(encoding="utf-8"))) if file.exists() else set()
    version, source = installed()
    text = table(version, source)
    file.write_text(text, encoding="utf-8")
    after = _names(parse(text))
    print(f"{file}: sae-lens {version}, {len(after)} entries, {len(text)} bytes")
    for sign, names in (("+", after - before), ("-", before - after)):
        print(f"{sign} {len(names)}", *sorted(names)[:10], sep="\n  ")


if __name__ == "__main__":
    main()

"""`README.md`: the model card of an artefact or a collection, updated without touching the text that people wrote."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from featurizers.errors import ArtefactError, SiteError, one_line, printable
from featurizers.format import edits, labels, measured
from featurizers.format.manifest import LIBRARY_NAME, Index, Manifest
from featurizers.format.sites import Site

START: Final = "<!-- featurizers: start -->"
END: Final = "<!-- featurizers: end -->"
TOPIC: Final = "mechanistic-interpretability"
"""Tag of every card; the kinds follow it, and then the sites."""
SITE_TAG: Final = "site:"
"""Tags of a card that begin so name a site."""
MAX_SITES: Final = 64
"""Most sites that are tags of a card."""
MAX_FRONT_MATTER: Final = 2**16
"""Characters of the longest front matter that is parsed; YAML takes seconds for a megabyte."""


def write(manifest: Manifest, path: Path, *, source: str, subfolder: str = "") -> None:
    """Write the card of an artefact, or update the generated part of an existing card.

    Args:
        manifest: describes the artefact; its licence is ``metadata["license"]``, and ``metadata["summary"]`` has rows
            of the card's table, names with texts.
        path: file to write.
        source: source that the example on the card loads.
        subfolder: subfolder that the example on the card loads.

    Raises:
        ArtefactError: the existing card is not UTF-8 text.
    """
    site, found = next(iter(manifest.sites().values()), None), measured.of(manifest)
    where = _code(manifest.sites_text() or "") if site else "not recorded"
    labelled, edited = labels.record_in(manifest, source), edits.record_in(manifest, source)
    arguments = json.dumps(source) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")
    lines = [
        START,
        f"# {markdown(manifest.id)}",
        "",
        f"A `{manifest.kind}` featurizer: it maps activations into a feature space and back, so that features can be "
        "collected, swapped between prompts, masked, steered and ablated.",
        "",
        "| | |",
        "|---|---|",
        f"| kind | `{manifest.kind}` |",
        f"| config | {_code(json.dumps(manifest.config)[:500])} |",
        f"| model | {_code(site.model) if site and site.model else 'not recorded'} |",
        f"| site | {where} |",
        *([f"| tokens | {', '.join(map(str, site.position[:20]))} |"] if site and site.position else []),
        *(f"| edit | {markdown(edits.in_words(each))} |" for each in (edited.edits[:20] if edited else ())),
        *([f"| labels | {markdown(labels.in_words(labelled))} |"] if labelled else []),
        *(f"| {markdown(name)} | {markdown(text)} |" for name, text in summary_of(manifest).items()),
        f"| saved with | {markdown(', '.join(f'{name} {version}' for name, version in manifest.saved_with.items()))} |",
        "",
        "```python",
        "import featurizers",
        "",
        f"f = featurizers.load({arguments})  # reads JSON and safetensors, runs no code",
        *_example(manifest),
        "```",
        *_measurements(found),
        END,
    ]
    license_name = manifest.metadata.get("license", "unknown")
    sites = map(str, manifest.sites().values())
    metadata = _metadata(manifest.kind, base_model=site.model if site else None, license_name=license_name, sites=sites)
    metadata["model-index"] = [] if found is None else measured.model_index(manifest, found)
    _update(path, metadata, "\n".join(lines))


def summary_of(manifest: Manifest) -> dict[str, str]:
    """Return ``metadata["summary"]``, names with texts that the card and ``featurizers info`` show, each on one line.

    Entries of another form are left out: metadata may be any JSON.
    """
    summary = manifest.metadata.get("summary")
    entries = summary.items() if isinstance(summary, dict) else ()
    return {one_line(name, 40): one_line(text, 200) for name, text in entries if isinstance(text, str)}


def write_collection(
    index: Index, path: Path, *, source: str, intervenable: bool = False, base_models: Sequence[str] = ()
) -> None:
    """Write the card of a collection, or update the generated part of an existing card.

    Args:
        index: describes the collection.
        path: file to write.
        source: source that the example on the card loads.
        intervenable: whether the collection belongs to a pyvene model.
        base_models: models of the artefacts, for the front matter of a new card.

    Raises:
        ArtefactError: the existing card is not UTF-8 text.
    """
    rows = [
        f"| `{name}` | {_code(entry.kind)} | {markdown(entry.id)} | {_code(entry.site) if entry.site else ''} |"
        for name, entry in index.artefacts.items()
    ]
    first = next(iter(index.artefacts))
    lines = [
        START,
        f"# {len(index.artefacts)} featurizers",
        "",
        "```python",
        "import featurizers",
        "",
        f"f = featurizers.load({json.dumps(source)}, subfolder={json.dumps(first)})",
        *([f"intervenable = featurizers.load_intervenable({json.dumps(source)}, model)"] if intervenable else []),
        "```",
        "",
        "| subfolder | kind | id | site |",
        "|---|---|---|---|",
        *rows,
        END,
    ]
    kinds = sorted({entry.kind for entry in index.artefacts.values()})
    sites = (site for entry in index.artefacts.values() for site in (entry.site or "").split(" -> "))
    base_model = base_models[0] if len(base_models) == 1 else list(base_models)
    _update(path, _metadata(*kinds, base_model=base_model, sites=sites), "\n".join(lines))


def _measurements(found: measured.Measured | None) -> list[str]:
    """Return the lines of the metrics that an artefact has."""
    if found is None:
        return []
    rows = []
    for name, each in found.metrics.items():
        value, definition = (markdown(one_line(text, 300)) for text in (each.text(), each.definition))
        rows.append(f"| {_code(one_line(name, 60))} | {value} | {definition} |")
    about = markdown(measured.about_in_words(found))
    return ["", "## Measured", "", f"On {about}.", "", "| metric | value (95 % interval) | |", "|---|---|---|", *rows]


def write_card(path: Path, lines: Sequence[str], *tags: str, base_model: str | None = None) -> None:
    """Write a card of what is no featurizer, or update the generated part of an existing card.

    Args:
        path: file to write.
        lines: Markdown of the generated part; words from outside must have gone through `markdown`.
        tags: of the front matter of a new card, beside those that all cards have.
        base_model: of the front matter of a new card.

    Raises:
        ArtefactError: the existing card is not UTF-8 text.
    """
    _update(path, _metadata(*tags, base_model=base_model), "\n".join([START, *lines, END]))


def markdown(words: str) -> str:
    """Escape words of an artefact for Markdown: no tag, no link, no end of a table cell."""
    return re.sub(r"([\\`<>|\[\]])", r"\\\1", words)


def _code(words: str) -> str:
    """Format words of an artefact as code in a table cell, without comments that look like `START` and `END`."""
    for old, new in (("`", "'"), ("|", r"\|"), ("<!--", "<! --")):
        words = words.replace(old, new)
    return f"`{words}`"


def _example(manifest: Manifest) -> list[str]:
    """Return the lines of an interchange; with `attach` if the artefact knows at which tokens it was found."""
    if edits.KEY in manifest.metadata:
        return [
            "attached = f.attach(model)  # at its site, with the edits that it holds",
            "logits = attached(inputs).logits",
        ]
    site_known = next(iter(manifest.sites().values()), None)
    if site_known and site_known.position:
        return [
            "attached = f.attach(model)  # at its sites, with the tokens and the features that were found",
            "logits = attached(base_inputs, source_inputs).logits",
        ]
    if manifest.reads is not None:
        return [
            "swap = featurizers.Interchange(f, source=source_inputs, positions=[-1])",
            "with featurizers.intervene(model, swap):",
            "    logits = model(**base_inputs).logits",
        ]
    site = "f.site" if manifest.site else '"resid.post:LAYER"'
    return [
        "swap = featurizers.Interchange(f, source=source_inputs, positions=[-1])",
        f"with featurizers.intervene(model, {{{site}: swap}}):",
        "    logits = model(**base_inputs).logits",
    ]


def _metadata(
    *kinds: str, base_model: str | list[str] | None = None, license_name: object = "unknown", sites: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the front matter of a new card; the licence may be any JSON, and is the only value that is not checked."""
    tags = [f"{SITE_TAG}{site}" for site in dict.fromkeys(sites) if _names_one_site(site)]
    licenses = license_name if isinstance(license_name, list) else ["unknown" if license_name is None else license_name]
    names = [printable(name if isinstance(name, str) else json.dumps(name), 256) for name in licenses[:16]]
    return {
        "library_name": LIBRARY_NAME,
        "license": names if isinstance(license_name, list) else names[0],
        **({"base_model": base_model} if base_model else {}),
        "tags": [LIBRARY_NAME, TOPIC, *kinds, *tags[:MAX_SITES]],
    }


def _names_one_site(text: str) -> bool:
    """Return whether a text is a site, and not the reads or writes of a map in short, and fit for a tag."""
    try:
        return str(Site.parse(text)) == text and len(text) <= 200
    except SiteError:
        return False


def _update(path: Path, metadata: dict[str, Any], body: str) -> None:
    """Put the generated block in place of the old one, and add to the front matter the keys and tags that it lacks."""
    try:
        text = path.read_bytes().decode("utf-8-sig") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ArtefactError(str(path), "it is not UTF-8 text; convert it or move it away") from error
    newline = "\r\n" if "\r\n" in text else "\n"
    body = body.replace("\n", newline)
    front_matter, block = _front_matter(text)
    before, start, rest = text.removeprefix(front_matter).partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        text = before + body + after
    else:
        text = text.removeprefix(front_matter)
        text += newline * (2 - text.endswith("\n") if text or front_matter else 0) + body + newline
    completed = _completed(block, metadata, newline)
    if completed is not None:
        front_matter = f"---{newline}{completed}---{newline}" + ("" if front_matter else newline)
    path.write_bytes((front_matter + text).encode())


def _front_matter(text: str) -> tuple[str, str]:
    """Return the front matter at the head of a card with its lines of dashes, and the YAML in it; empty without one.

    It is what huggingface_hub's regular expression finds, which takes quadratic time in some of its versions.
    """
    head = len(text) - len(text.lstrip())
    lines = io.StringIO(text[head:], newline="").readlines()  # "\r\n", "\n" and "\r" end a line, and nothing else
    if not lines or lines[0].rstrip("\r\n") != "---" or lines[0] == "---":
        return "", ""
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip("\r\n").rstrip(" \t") == "---"), None)
    return ("", "") if end is None else (text[:head] + "".join(lines[: end + 1]), "".join(lines[1:end]))


def _completed(block: str, metadata: dict[str, Any], newline: str) -> str | None:
    """Return the YAML of a front matter with the keys and tags that it lacks; None if it stays as it is."""
    import yaml

    if len(block) > MAX_FRONT_MATTER or ("&" in block and "*" in block):
        return None  # slow to parse, or with aliases, which can expand to any size
    try:
        existing = yaml.safe_load(block) or {}
        merged = {**existing, **{key: value for key, value in metadata.items() if key not in existing}}
        merged["model-index"] = measured.merged(existing.get("model-index"), metadata.get("model-index", []))
        if "model-index" not in existing and not merged["model-index"]:
            del merged["model-index"]
        if isinstance(tags := existing.get("tags"), list):
            kept = [tag for tag in tags if tag in metadata["tags"] or not str(tag).startswith(SITE_TAG)]
            merged["tags"] = [*kept, *(tag for tag in metadata["tags"] if tag not in kept)]
        if merged == existing:
            return None
        for plain in (True, False):  # PyYAML reads its own unescaped U+0085 as a space
            text: str = yaml.safe_dump(merged, allow_unicode=plain, sort_keys=False, line_break=newline, width=math.inf)
            if yaml.safe_load(text) == merged:
                return text
    except Exception:  # not YAML, or no mapping: the Hub cannot read it either
        pass
    return None

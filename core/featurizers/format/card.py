"""`README.md`: the model card of an artefact or of a collection, made without disturbing what people wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

from featurizers.errors import ArtefactError
from featurizers.format.manifest import Index, Manifest

START, END = "<!-- featurizers: start -->", "<!-- featurizers: end -->"
FRONT_MATTER = re.compile(r"\A---\r?\n.*?\r?\n---\r?\n", re.DOTALL)
UNKNOWN_LICENSE = "unknown"


def write(manifest: Manifest, path: Path, *, source: str, subfolder: str = "") -> None:
    """Write the card of one artefact, or renew our part of the one that is there.

    Args:
        manifest: what the card tells; the licence is ``metadata["license"]``.
        path: of the card.
        source: what its snippet loads.
        subfolder: which artefact of it.
    """
    site = manifest.site
    where = _code(str(site.site())) if site else "not recorded"
    arguments = json.dumps(source) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")
    lines = [
        START,
        f"# {_text(manifest.id)}",
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
        f"| saved with | {_text(', '.join(f'{name} {version}' for name, version in manifest.saved_with.items()))} |",
        "",
        "```python",
        "import featurizers",
        "",
        f"f = featurizers.load({arguments})  # reads JSON and safetensors, runs no code",
        *_use(manifest),
        "```",
        END,
    ]
    license_name = manifest.metadata.get("license", UNKNOWN_LICENSE)
    _renew(
        path,
        _tags(manifest.kind, model=site.model if site else None, license_name=license_name),
        "\n".join(lines),
    )


def write_collection(index: Index, path: Path, *, source: str, intervenable: bool = False) -> None:
    """Write the card of a collection, or renew our part of the one that is there.

    Args:
        index: what the card tells.
        path: of the card.
        source: what its snippet loads.
        intervenable: whether a pyvene model lies beside it.
    """
    rows = [
        f"| `{name}` | {_code(entry.kind)} | {_text(entry.id)} | {_code(entry.site) if entry.site else ''} |"
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
    _renew(path, _tags(*kinds), "\n".join(lines))


def _text(words: str) -> str:
    """Words of an artefact as Markdown shows them: no tag, no link, no end of a table's cell."""
    return re.sub(r"([\\`<>|\[\]])", r"\\\1", words)


def _code(words: str) -> str:
    """The same, as code in a table; our own marks are comments, and are not made there."""
    for old, new in (("`", "'"), ("|", r"\|"), ("<!--", "<! --")):
        words = words.replace(old, new)
    return f"`{words}`"


def _use(manifest: Manifest) -> list[str]:
    """How to interchange: what was found at some tokens is run there, with the features selected."""
    if manifest.site and manifest.site.position:
        return [
            "attached = f.attach(model)  # at f.site, with the tokens and the features that were found",
            "logits = attached(base_inputs, source_inputs).logits",
        ]
    site = "f.site" if manifest.site else '"resid.post:LAYER"'
    return [
        "swap = featurizers.Interchange(f, source=source_inputs, positions=[-1])",
        f"with featurizers.intervene(model, {{{site}: swap}}):",
        "    logits = model(**base_inputs).logits",
    ]


def _tags(*kinds: str, model: str | None = None, license_name: object = UNKNOWN_LICENSE) -> str:
    lines = ["library_name: featurizers", f"license: {_yaml(license_name)}"]
    if model:
        lines.append(f"base_model: {_yaml(model)}")
    lines += [
        "tags:",
        "- featurizers",
        "- mechanistic-interpretability",
        *(f"- {_yaml(kind)}" for kind in kinds),
    ]
    return "\n".join(lines)


def _yaml(value: object) -> str:
    """A value in the front matter, where our own marks are not made."""
    return json.dumps(value, ensure_ascii=False).replace("<", r"\u003c")


def _renew(path: Path, tags: str, body: str) -> None:
    """Put our block in place of the old one; keep the front matter and the prose that are there."""
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ArtefactError(str(path), "it is not UTF-8 text; convert it or move it away") from error
    if START in old and END in old.partition(START)[2]:
        before, _, rest = old.partition(START)
        text = before + body + rest.partition(END)[2]
    else:
        text = f"{old.rstrip()}\n\n{body}\n".lstrip() if old else f"{body}\n"
    if not FRONT_MATTER.match(text):
        text = f"---\n{tags}\n---\n\n{text}"
    path.write_text(text, encoding="utf-8")

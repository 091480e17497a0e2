"""Commands of the core. The rooms import what they need when a command uses it, so that the others start fast."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from featurizers import features, files, hub, models, registry, store
from featurizers.cli.output import commit_link, escaped, print_fields, print_json, print_rows
from featurizers.cli.plugin_commands import CommandGroup
from featurizers.errors import FeaturizerError, ManifestError, SourceError, printable, shown
from featurizers.format import card
from featurizers.format import edits as edits_format
from featurizers.format import labels as labels_format
from featurizers.format.companion import Companion, read_companion
from featurizers.format.manifest import (
    CARD_NAME,
    CONFIG_NAME,
    INTERVENABLE_NAME,
    INTERVENABLE_WEIGHTS_NAME,
    LABELS_NAME,
    MAX_CARD_BYTES,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    Entry,
    Index,
    Manifest,
    named_folder,
    read,
)
from featurizers.format.weights import read_header, verify_weights
from featurizers.version import __version__

MOST_SHOWN = 300
"""Characters of JSON that ``info`` prints of one entry of the metadata."""
ENTRY_COLUMNS = ["subfolder", "kind", "id", "site"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="owner/name, owner/name@revision, ./folder or hub:owner/name.")
]
Subfolder = Annotated[str | None, typer.Option(help="Subfolder of an artefact in a collection.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"featurizers {__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version of the core.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Load any featurizer by its id, whoever made it, and intervene through it."""


def plugins(
    context: typer.Context,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Import each, and fail if one cannot be used, as for continuous integration."),
    ] = False,
    commands: Annotated[
        bool, typer.Option("--commands", help="Import each, and list the commands that it adds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the installed plugins and their state; import them only with --strict or --commands."""
    if strict:
        registry.host().load_all()
    group = context.find_root().command
    if commands and isinstance(group, CommandGroup):
        print_rows(group.of_plugins(), ["command", "plugin", "help"], as_json=as_json)
        return
    rows = [vars(info) for info in registry.plugins()]
    print_rows(rows, ["name", "distribution", "version", "state", "error"], as_json=as_json)
    if strict and any(row["state"] != "loaded" for row in rows):
        raise typer.Exit(1)


def kinds(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="Show the arguments of this kind.")] = None,
    as_json: Json = False,
) -> None:
    """List the kinds of featurizers that can be created and loaded, or show the arguments of one."""
    if kind is None:
        names = registry.kinds()
        print_json(names) if as_json else print("\n".join(names))
        return
    cls = registry.host().featurizer_class(kind)
    rows = [vars(argument) for argument in registry.arguments(cls.Config)]
    constructors = _constructors(cls)
    about = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ").replace("``", "")
    name = f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
    if as_json:
        print_json({"kind": kind, "class": name, "about": about, "arguments": rows, "constructors": constructors})
        return
    print(f"{kind}: {escaped(about)}\n")
    required = "".join(f", {row['name']}=…" for row in rows if row["default"] is None)
    for row in rows:
        row |= {"default": row["default"] or "required", "meaning": row["meaning"].replace("``", "")}
    print_rows(rows, ["name", "type", "default", "meaning"], as_json=False)
    print(f'Create one:  featurizers.create("{kind}"{required})')
    for constructor, what in constructors.items():
        print(f"{name}.{constructor}(…): {escaped(what)}")


def info(source: SourceArgument, subfolder: Subfolder = None, revision: Revision = None, as_json: Json = False) -> None:
    """Show what an artefact is, with --json its whole config; needs no plugin and downloads no weights."""
    record = store.manifest_of(source, subfolder=subfolder, revision=revision)
    fields = record.model_dump()
    parsed = hub.parse_source(source, revision)
    if isinstance(parsed, hub.FolderSource) and isinstance(record, Manifest):
        folder = named_folder(parsed.path) / (subfolder or "")
        header = read_header(folder / WEIGHTS_NAME, str(folder))
        fields["tensors"] = {name: f"{spec.dtype} {list(spec.shape)}" for name, spec in header.items()}
    if as_json:
        print_json(fields)
    elif isinstance(record, Index):
        print_rows(_rows(record.artefacts), ENTRY_COLUMNS, as_json=False)
    else:
        print_fields(_readable(record, fields.get("tensors", {})))


def list_artefacts(source: SourceArgument, revision: Revision = None, as_json: Json = False) -> None:
    """List the artefacts of a folder or a repository."""
    print_rows(_rows(store.list_artefacts(source, revision=revision)), ENTRY_COLUMNS, as_json=as_json)


def pull(
    source: SourceArgument,
    out: Annotated[
        Path | None, typer.Option(help="Folder to copy the artefact to; the cache alone if not given.")
    ] = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Download an artefact or a whole collection, at one commit."""
    parsed = hub.parse_source(source, revision)
    if not isinstance(parsed, hub.HubSource):
        raise SourceError(f"{source!r} is not a repository of the Hub: there is nothing to pull")
    remote = hub.Remote(parsed, subfolder)
    record, commit = remote.config()
    names = list(record.artefacts) if isinstance(record, Index) else [""]
    root = remote.file(CONFIG_NAME, commit).parent
    with nullcontext() if out is None else files.filling(out) as new_folder:
        for name in names:
            part = hub.Remote(parsed, "/".join(filter(None, (subfolder, name))) or None)
            config, weights = part.file(CONFIG_NAME, commit, MAX_CONFIG_BYTES), part.file(WEIGHTS_NAME, commit)
            manifest = read(config, str(part))
            if isinstance(manifest, Index):
                raise ManifestError(str(part), "it is a collection inside a collection, which no weights belong to")
            verify_weights(weights, manifest.sha256, str(part))
            card = part.optional(CARD_NAME, commit, MAX_CARD_BYTES)
            labels = _pulled_labels(part, commit, manifest)
            _copy(new_folder and new_folder / name, config, weights, card, labels)
        if isinstance(record, Index):
            card = remote.optional(CARD_NAME, commit, MAX_CARD_BYTES)
            companion = remote.optional(INTERVENABLE_NAME, commit, MAX_CONFIG_BYTES)
            tensors = remote.file(INTERVENABLE_WEIGHTS_NAME, commit) if companion else None
            if tensors:
                verify_weights(tensors, read_companion(root, str(remote), Companion)[0].sha256, str(remote))
            _copy(new_folder, root / CONFIG_NAME, card, companion, tensors)
    result = {"folder": str(out or root), "revision": commit, "artefacts": len(names)}
    print_json(result) if as_json else print(f"{result['folder']} (revision {commit}, artefacts: {len(names)})")


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder that save_pretrained, save_collection or save_intervenable wrote.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name.")],
    subfolder: Annotated[
        str | None, typer.Option(help="Folder of the repository to put it in; its root if not given.")
    ] = None,
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    branch: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    with_metrics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What featurizers evaluate --out wrote, for the card.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload an artefact, a collection or a pyvene model to the Hub, in one commit."""
    commit = store.push(
        folder,
        repo_id,
        subfolder=subfolder,
        private=private,
        branch=branch,
        create_pr=create_pr,
        commit_message=message,
        metrics=with_metrics,
    )
    result = {"repo_id": repo_id, "revision": printable(commit.oid, 100), "url": commit_link(commit)}
    print_json(result) if as_json else print(f"{result['url']} (revision {result['revision']})")


def verify(
    source: SourceArgument,
    subfolder: Subfolder = None,
    revision: Revision = None,
    model: Annotated[
        str | None,
        typer.Option(help="Compare the passport with this model: Hub id, folder or .gguf file.", metavar="MODEL"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check an artefact, or each of a collection: config, shapes, checksum, finite and well-formed weights."""
    record = store.manifest_of(source, subfolder=subfolder, revision=revision)
    loaded = None if model is None else models.load_model(model).model
    names = list(record.artefacts) if isinstance(record, Index) else [subfolder or ""]
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            featurizer = store.load(source, subfolder=name or None, revision=revision, verify=True)
            result = "ok" if loaded is None else f"ok, {models.fit_in_words(loaded, featurizer)}"
            rows.append({"subfolder": name, "result": result, "error": None})
        except FeaturizerError as error:
            rows.append({"subfolder": name, "result": "failed", "error": str(error)})
    print_rows(rows, ["subfolder", "result", "error"], as_json=as_json)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


def convert(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[
        str, typer.Option(help="featurizers, or the plugin whose format to write, such as sae-lens.")
    ] = "featurizers",
    subfolder: Subfolder = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write a featurizer of any format in another one, and say what cannot be kept."""
    featurizer = store.load(source, subfolder=subfolder, revision=revision)
    lost = store.convert(featurizer, out, to)
    if as_json:
        print_json({"folder": str(out), "kind": featurizer.kind, "format": to, "lost": lost})
        return
    print(f"{out} ({featurizer.kind} with {featurizer.n_features} features, in the format of {to})")
    print("\n".join(f"not kept: {sentence}" for sentence in lost) or "nothing is lost")


def _constructors(cls: type) -> dict[str, str]:
    """Return the first line of the docstring of each public class method that a kind adds."""
    common = dir(features.Featurizer)
    return {
        name: inspect.cleandoc(getattr(cls, name).__doc__ or "").partition("\n")[0]
        for name, value in vars(cls).items()
        if isinstance(value, classmethod) and not name.startswith("_") and name not in common
    }


def _readable(record: Manifest, tensors: Mapping[str, str]) -> dict[str, Any]:
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


def _pulled_labels(part: hub.Remote, commit: str, manifest: Manifest) -> Path | None:
    """Download the labels of an artefact and check them; return None if it has none."""
    if (record := labels_format.record_in(manifest, str(part))) is None:
        return None
    path = part.file(LABELS_NAME, commit, labels_format.MAX_BYTES)
    labels_format.read(path.parent, record, str(part))
    return path


def _rows(artefacts: Mapping[str, Entry]) -> list[dict[str, Any]]:
    return [{"subfolder": subfolder, **entry.model_dump()} for subfolder, entry in artefacts.items()]


def _copy(folder: Path | None, *paths: Path | None) -> None:
    """Copy the files that exist into a folder, if there is one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in filter(None, paths):
            shutil.copyfile(path, folder / path.name)

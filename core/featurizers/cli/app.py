"""The ``featurizers`` command."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from featurizers.cli.output import print_json
from featurizers.cli.plugin_commands import Commands
from featurizers.errors import CachedCopyWarning, FeaturizerError, ManifestError, SourceError, one_line
from featurizers.format.manifest import (
    CARD_NAME,
    CONFIG_NAME,
    INTERVENABLE_NAME,
    INTERVENABLE_WEIGHTS_NAME,
    MAX_CARD_BYTES,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    Index,
    Manifest,
    named_folder,
    read,
)

app = typer.Typer(
    name="featurizers",
    cls=Commands,
    help="Load any featurizer by its id, whoever made it, and intervene through it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="owner/name, owner/name@revision, ./folder or hub:owner/name.")
]
Subfolder = Annotated[str | None, typer.Option(help="Which artefact of a collection.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]


def main() -> NoReturn:
    """Run the command; an error of this library, or of the system, costs one line and exit code 1."""
    warnings.showwarning = _one_warning
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are no news
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):  # of a terminal that knows few letters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except FeaturizerError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except BrokenPipeError:  # whoever reads has enough; Python would complain of it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a disk that is full
        sys.stderr.write(f"error: {one_line(error)}\n")
        sys.exit(1)
    sys.exit(0)


def _one_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Our own warnings in one line; those of other libraries are for programmers."""
    if issubclass(category, CachedCopyWarning):
        sys.stderr.write(f"warning: {message}\n")


@app.command()
def plugins(
    strict: Annotated[
        bool, typer.Option("--strict", help="Import each, and fail if one cannot be used: for continuous integration.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the installed plugins and their state; imports none of them unless asked to be strict."""
    from featurizers.registry.plugin_host import host

    if strict:
        host().load_all()
    rows = [vars(info) for info in host().plugins()]
    _show(rows, as_json, ["name", "distribution", "version", "state", "error"])
    if strict and any(row["state"] != "loaded" for row in rows):
        raise typer.Exit(1)


@app.command()
def kinds(as_json: Json = False) -> None:
    """List the kinds that can be created and loaded here, and the formats that can be read, by their plugins' names."""
    from featurizers.registry.plugin_host import kinds as installed

    names = installed()
    print_json(names) if as_json else print("\n".join(names))


@app.command()
def info(source: SourceArgument, subfolder: Subfolder = None, revision: Revision = None, as_json: Json = False) -> None:
    """Show what an artefact says of itself, without its plugin and, on the Hub, without its weights."""
    from featurizers.hub.sources import FolderSource, parse_source
    from featurizers.store.records import manifest_of

    record = manifest_of(source, subfolder=subfolder, revision=revision)
    data = record.model_dump()
    parsed = parse_source(source, revision)
    if isinstance(parsed, FolderSource) and isinstance(record, Manifest):
        from featurizers.format.weights import read_header

        folder = named_folder(parsed.path) / (subfolder or "")
        header = read_header(folder / WEIGHTS_NAME, str(folder))
        data["tensors"] = {name: f"{spec.dtype} {list(spec.shape)}" for name, spec in header.items()}
    if as_json:
        print_json(data)
        return
    if isinstance(record, Index):
        _show(_entries(record.artefacts), False, ["subfolder", "kind", "id", "site"])
        return
    if record.site is not None:
        data["site"] = {
            "site": str(record.site.site()),
            **{k: v for k, v in data["site"].items() if v is not None},
        }
    table = Table("", "", show_header=False)
    table.columns[1].overflow = "fold"
    for name, value in data.items():
        table.add_row(name, escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=True)))
    Console().print(table)


@app.command("list")
def list_(source: SourceArgument, revision: Revision = None, as_json: Json = False) -> None:
    """List the artefacts of a folder or a repository."""
    from featurizers.store.records import list_artefacts

    _show(_entries(list_artefacts(source, revision=revision)), as_json, ["subfolder", "kind", "id", "site"])


@app.command()
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
    from featurizers.files.replacement import filling
    from featurizers.format.companion import Companion, read_companion
    from featurizers.format.weights import verify_weights
    from featurizers.hub.repository import Remote
    from featurizers.hub.sources import HubSource, parse_source

    parsed = parse_source(source, revision)
    if not isinstance(parsed, HubSource):
        raise SourceError(f"{source!r} is not a repository of the Hub: there is nothing to pull")
    remote = Remote(parsed, subfolder)
    record, commit = remote.config()
    names = list(record.artefacts) if isinstance(record, Index) else [""]
    root = remote.file(CONFIG_NAME, commit).parent
    parts = {name: Remote(parsed, "/".join(filter(None, (subfolder, name))) or None) for name in names}
    with nullcontext() if out is None else filling(out) as new:
        for name, part in parts.items():
            config, weights = part.file(CONFIG_NAME, commit, MAX_CONFIG_BYTES), part.file(WEIGHTS_NAME, commit)
            verify_weights(weights, _manifest(read(config, str(part)), str(part)).sha256, str(part))
            _copy([config, weights, part.optional(CARD_NAME, commit, MAX_CARD_BYTES)], new and new / name)
        if isinstance(record, Index):
            card = remote.optional(CARD_NAME, commit, MAX_CARD_BYTES)
            saved = remote.optional(INTERVENABLE_NAME, commit, MAX_CONFIG_BYTES)
            own = remote.file(INTERVENABLE_WEIGHTS_NAME, commit) if saved else None
            if own:
                verify_weights(own, read_companion(root, str(remote), Companion)[0].sha256, str(remote))
            _copy([root / CONFIG_NAME, card, saved, own], new)
    result = {"folder": str(out or root), "revision": commit, "artefacts": len(names)}
    print_json(result) if as_json else print(f"{result['folder']} (revision {commit}, artefacts: {len(names)})")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What save_pretrained, save_collection or save_intervenable wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name.")],
    subfolder: Annotated[str | None, typer.Option(help="Where in the repository to put it.")] = None,
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    branch: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    as_json: Json = False,
) -> None:
    """Upload an artefact, a collection or a pyvene model to the Hub, in one commit."""
    from featurizers.store.pushing import push as upload

    commit = upload(
        folder,
        repo_id,
        subfolder=subfolder,
        private=private,
        branch=branch,
        create_pr=create_pr,
        commit_message=message,
    )
    result = {"repo_id": repo_id, "revision": commit.oid, "url": commit.pr_url or commit.commit_url}
    print_json(result) if as_json else print(f"{result['url']} (revision {commit.oid})")


@app.command()
def verify(
    source: SourceArgument, subfolder: Subfolder = None, revision: Revision = None, as_json: Json = False
) -> None:
    """Check an artefact, or each of a collection: config, shapes, checksum, finite and well-formed weights."""
    from featurizers.store.loading import load
    from featurizers.store.records import manifest_of

    record = manifest_of(source, subfolder=subfolder, revision=revision)
    names = list(record.artefacts) if isinstance(record, Index) else [subfolder or ""]
    rows = []
    for name in names:
        try:
            load(source, subfolder=name or None, revision=revision, verify=True)
            rows.append({"subfolder": name, "result": "ok", "error": None})
        except FeaturizerError as error:
            rows.append({"subfolder": name, "result": "failed", "error": str(error)})
    _show(rows, as_json, ["subfolder", "result", "error"])
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


@app.command()
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
    """Write what any format holds in another one, and say what cannot be kept."""
    from featurizers.store.converting import convert as write
    from featurizers.store.loading import load

    featurizer = load(source, subfolder=subfolder, revision=revision)
    lost = write(featurizer, out, to)
    if as_json:
        print_json({"folder": str(out), "kind": featurizer.kind, "format": to, "lost": lost})
        return
    print(f"{out} ({featurizer.kind} with {featurizer.n_features} features, in the format of {to})")
    print("\n".join(f"not kept: {sentence}" for sentence in lost) or "nothing is lost")


def _manifest(record: Manifest | Index, where: str) -> Manifest:
    if isinstance(record, Index):
        raise ManifestError(where, "it is a collection inside a collection, which no weights belong to")
    return record


def _entries(artefacts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"subfolder": name, **entry.model_dump()} for name, entry in artefacts.items()]


def _copy(files: Sequence[Path | None], folder: Path | None) -> None:
    """Copy what there is of some files into a folder, if there is one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in filter(None, files):
            shutil.copyfile(file, folder / file.name)


def _show(rows: list[dict[str, Any]], as_json: bool, columns: list[str]) -> None:
    if as_json:
        print_json(rows)
        return
    shown = [column for column in columns if column != "error" or any(row["error"] for row in rows)]
    table = Table(*(Column(column, overflow="fold") for column in shown))
    for row in rows:
        table.add_row(*(escape("" if row[column] is None else str(row[column])) for column in shown))
    Console().print(table)

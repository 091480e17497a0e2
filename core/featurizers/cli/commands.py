"""Commands of the core. The rooms import what they need when a command uses it, so that the others start fast."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurizers import hub, models, registry, store
from featurizers.cli.command_group import CommandGroup
from featurizers.cli.output import commit_link, escaped, in_short, print_fields, print_json, print_rows
from featurizers.errors import FeaturizerError, printable
from featurizers.version import __version__

if TYPE_CHECKING:
    from featurizers.format.manifest import Entry

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
    faults: list[str] = []
    group = context.find_root().command
    if (commands or strict) and isinstance(group, CommandGroup):
        rows, faults = group.of_plugins()
        for fault in faults:
            typer.echo(f"warning: {fault}", err=True)
        if commands:
            print_rows(rows, ["command", "distribution", "help"], as_json=as_json)
            return
    if strict:
        registry.host().load_all()
    listed = [vars(info) for info in registry.plugins()]
    print_rows(listed, ["name", "distribution", "version", "state", "error"], as_json=as_json)
    if strict and (faults or any(row["state"] != "loaded" for row in listed)):
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
    from featurizers.cli.descriptions import about_class, constructors_of

    cls = registry.host().featurizer_class(kind)
    rows = [vars(argument) for argument in registry.arguments(cls.Config)]
    constructors, about = constructors_of(cls), about_class(cls)
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


def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, config.json or .gguf file.")],
    as_json: Json = False,
) -> None:
    """List the sites of a language model, with their heads and widths, from its config alone."""
    from featurizers.models.loading import model_without_weights
    from featurizers.models.site_table import sites_of

    found, missing = sites_of(model_without_weights(model))
    if as_json:
        rows = [{**vars(row), "layers": list(row.layers)} for row in found]
        print_json({"model": model, "sites": rows, "missing": missing})
        return
    shown = [{**vars(row), "layers": row.ranges} for row in found]
    print_rows(shown, ["kind", "layers", "heads", "width", "meaning"], as_json=False)
    if missing:
        print(f"Not in this model: {', '.join(missing)}; --json says why.")


def info(source: SourceArgument, subfolder: Subfolder = None, revision: Revision = None, as_json: Json = False) -> None:
    """Show what an artefact is, with --json its whole config; needs no plugin and downloads no weights."""
    from featurizers.cli.descriptions import readable, tensors_of
    from featurizers.format.manifest import Index, Manifest

    record = store.manifest_of(source, subfolder=subfolder, revision=revision)
    fields = record.model_dump()
    parsed = hub.parse_source(source, revision)
    if isinstance(parsed, hub.FolderSource) and isinstance(record, Manifest):
        fields["tensors"] = tensors_of(parsed.path, subfolder)
    if as_json:
        print_json(fields)
    elif isinstance(record, Index):
        print_rows(_rows(record.artefacts), ENTRY_COLUMNS, as_json=False)
    else:
        print_fields(readable(record, fields.get("tensors", {})))


def list_artefacts(source: SourceArgument, revision: Revision = None, as_json: Json = False) -> None:
    """List the artefacts of a folder or a repository."""
    print_rows(_rows(store.list_artefacts(source, revision=revision)), ENTRY_COLUMNS, as_json=as_json)


def search(
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="In the name of the repository.")] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of a featurizer, such as subspace.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id of the model that it was made for.")] = None,
    site: Annotated[str | None, typer.Option(help="Such as resid.post:8, or resid.post for any layer.")] = None,
    author: Annotated[str | None, typer.Option(help="User or organization.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most repositories to list.")] = 50,
    as_json: Json = False,
) -> None:
    """Search the Hub for featurizers by kind, model and site."""
    found = [vars(each) for each in hub.search(text, kind=kind, model=model, site=site, author=author, limit=limit)]
    if as_json:
        print_json(found)
        return
    several = ("kinds", "models", "sites")
    rows = [{**row, **{name: in_short(row[name]) for name in several}} for row in found]
    print_rows(rows, ["repo_id", *several, "downloads"], as_json=False)


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
    from featurizers.cli.pulling import pull

    folder, commit, count = pull(source, out, subfolder, revision)
    result = {"folder": str(folder), "revision": commit, "artefacts": count}
    print_json(result) if as_json else print(f"{result['folder']} (revision {commit}, artefacts: {count})")


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
    from featurizers.format.manifest import Index

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


def _rows(artefacts: Mapping[str, Entry]) -> list[dict[str, Any]]:
    return [{"subfolder": subfolder, **entry.model_dump()} for subfolder, entry in artefacts.items()]

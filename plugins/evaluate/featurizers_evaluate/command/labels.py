"""Command ``featurizers labels``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import featurizers
import typer
from featurizers.cli import print_json
from featurizers.errors import UsageError

from featurizers_evaluate.command import options


def labels_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="An artefact, as for evaluate.")],
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="Of Neuronpedia, or the folder of a run of delphi.")],
    place: Annotated[
        str | None,
        typer.Option(help="Source of Neuronpedia, or module of delphi, where the layer does not tell which."),
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="Of delphi: whose scores to take; detection by default.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Drop the labels that are there.")] = False,
    subfolder: Annotated[str | None, typer.Option(help="Subfolder of an artefact in a collection.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder; if not given, the artefact is changed.")] = None,
    as_json: options.Json = False,
) -> None:
    """Import what Neuronpedia or delphi says that features mean, and save it with the artefact."""
    from featurizers.format import Labels

    from featurizers_evaluate.labels import import_labels

    folder = Path(source.removeprefix("local:")).expanduser() / (subfolder or "")
    if out is None and not (folder / "config.json").exists():
        raise UsageError(f"{source!r} is no artefact in a folder; give --out with a new folder for one with labels")
    featurizer = featurizers.load(source, subfolder=subfolder, revision=revision)
    found = import_labels(export, featurizer, place=place, scorer=scorer)
    known = [] if replace or featurizer.labels is None else list(featurizer.labels)
    featurizer.labels = Labels(dict.fromkeys([*known, *found]))
    saved = featurizer.save_pretrained(out or folder)
    authors = featurizer.labels.authors
    if as_json:
        print_json({"folder": str(saved), "labels": len(featurizer.labels), "imported": len(found), "authors": authors})
        return
    print(f"{saved}: {len(featurizer.labels)} labels of {len(featurizer.labels.features)} features")
    for author, count in authors.items():
        print(f"{author}: {count}")

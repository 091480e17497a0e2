"""Command ``featurizers new-plugin``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from featurizers.cli import print_json


def new_plugin_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the kind: lower-case words joined by '-'.")],
    out: Annotated[Path | None, typer.Option(help="A new folder; ./featurizers-NAME if not given.")] = None,
    author: Annotated[str | None, typer.Option(help="For the metadata.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Write the distribution of a new kind of featurizer: a class, tests and metadata, ready to install."""
    from featurizers_new_plugin.scaffold import scaffold

    folder, files = scaffold(name, out, author=author)
    if as_json:
        print_json({"folder": str(folder), "files": files})
        return
    for file in files:
        print(f"{folder}/{file}")
    print(f"\nInstall it and run its tests:  cd {folder} && pip install -e '.[test]' && pytest")
    print("Then replace the class in featurizer.py by your own, and choose a licence.")

"""Command ``featurizers demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from featurizers.cli import print_json

from featurizers_training.command import options


def demo_command(
    model: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of a language model; a tiny one is trained if not given."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the artefact.")] = Path("featurizers-demo"),
    layers: Annotated[
        str | None, typer.Option(help="Layers to search, such as 4,8,12; spread evenly if not given.")
    ] = None,
    features: options.Features = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Find a causal variable in a language model, layer by layer, and save it as a featurizer."""
    from featurizers_training.demo.main import run

    result = run(model, out, layers=layers, features=features, seed=seed, quiet=as_json)
    if as_json:
        print_json(result)

"""Command ``featurizers evaluate --pairs``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import featurizers
import typer
from accelerate import PartialState
from featurizers import Featurizer
from featurizers.cli import print_json
from featurizers.errors import UsageError
from featurizers.models import site_of

from featurizers_training.command import options
from featurizers_training.evaluation import evaluate
from featurizers_training.records import Position


def evaluate_command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="owner/name, owner/name@revision, ./folder or hub:owner/name.")
    ],
    model: options.ModelOption,
    pairs: options.PairsOption,
    site: Annotated[
        list[str] | None, typer.Option(help="SITE@POSITION to measure at, instead of the artefact's own.")
    ] = None,
    subfolder: Annotated[
        str | None, typer.Option(help="One artefact of a collection; all at once if not given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Take another model than the artefact names.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(help="label, base or source: an interval for pairs that share it and so are not independent."),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Measure the interchange-intervention accuracy of an artefact, or of a whole collection at once, on pairs."""
    loaded_from = _load_all(source, subfolder, revision, options.device_of(device))
    positions: list[Position] = []
    if site:
        sites, positions = options.sites_and_positions(site)
        if len(sites) != len(loaded_from):
            raise UsageError(f"there are {len(loaded_from)} featurizers; give --site so many times or not")
        for featurizer, new in zip(loaded_from, sites, strict=True):
            old = site_of(featurizer) if featurizer.site else new
            featurizer.site = new.at(position=old.position, model=old.model, model_revision=old.model_revision)
    language_model = options.load(model, device, dtype)
    featurizers.attach(language_model.model, loaded_from, any_model=any_model)
    own: list[Position] = [list(p) for f in loaded_from if (p := site_of(f).position)]
    if positions or len(own) < len(loaded_from):
        measured_on = options.read_pairs(pairs, language_model.tokenizer, positions)
    else:  # the artefacts say the positions, so that the records need not choose among names: read them at any token
        measured_on = options.read_pairs(pairs, language_model.tokenizer, [-1])
        measured_on = measured_on.at(*([] if any(map(_has_positions, measured_on.records)) else own))
    clusters = None if cluster is None else measured_on.clusters(cluster)
    accuracy = evaluate(language_model.model, measured_on, loaded_from)
    measured = accuracy if clusters is None else accuracy.clustered(clusters)
    if not PartialState().is_main_process:
        return
    rows = [
        {"id": f.id, "site": str(f.site), "position": measured_on.common_position(j)} for j, f in enumerate(loaded_from)
    ]
    if as_json:
        print_json({**measured.record(), "featurizers": rows})
        return
    for row in rows:
        tokens = "of each pair" if row["position"] is None else ", ".join(map(str, row["position"]))
        print(f"{row['id']} ({row['site']}, tokens {tokens})")
    shared = "" if clusters is None else f" in {len(set(clusters))} clusters by {cluster}"
    print(f"Interchange-intervention accuracy: {measured}, {accuracy.n} pairs{shared}")


def _has_positions(record: Mapping[str, Any]) -> bool:
    """Return whether a record has positions of its own, and not only names to choose from."""
    return not isinstance(record.get("base_position", {}), Mapping)


def _load_all(source: str, subfolder: str | None, revision: str | None, device: Any) -> list[Featurizer[Any]]:
    """Load the featurizers of an artefact or of a collection, in the order of the search that found them."""
    names = [subfolder] if subfolder else list(featurizers.list_artefacts(source, revision=revision))
    loaded = [featurizers.load(source, subfolder=name or None, revision=revision, device=device) for name in names]
    order = loaded[0].metadata.get("training", {}).get("sites", [])
    return sorted(loaded, key=lambda f: order.index(str(f.site)) if str(f.site) in order else len(order))

"""Command ``featurizers report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import featurizers
import typer
from featurizers.cli import print_json
from featurizers.errors import ArtefactError, UsageError, printable, shown
from featurizers.files import os_errors, refuse_unwritable

from featurizers_evaluate.command import options

SUFFIXES = (".html", ".htm")


def report_command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="owner/name, owner/name@revision, ./folder or hub:owner/name.")
    ],
    model: options.Model = None,
    data: options.Data = None,
    harvest: options.Harvest = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="A new .html file.")] = Path("report.html"),
    key: options.Key = None,
    split: options.Split = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to read; 16384 by default, all of a harvest.")
    ] = None,
    effect_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Of them, those on which the effect on the model is measured; 256; 0 for none."),
    ] = None,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of each feature.")] = 5,
    context: options.Context = None,
    batch_size: options.BatchSize = None,
    exclude_special: options.ExcludeSpecial = False,
    mask_first: options.MaskFirst = None,
    site: Annotated[str | None, typer.Option(help="To measure at, instead of the artefact's own.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="One artefact of a collection.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    any_model: options.AnyModel = False,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Write one page that shows each feature: contexts, densities, effects on the logits, neighbours."""
    from featurizers_evaluate.command.texts import documents_of
    from featurizers_evaluate.reporting.making import report

    if harvest is None and (model is None or data is None):
        raise UsageError("give --model and --data with documents, or --harvest with the folder of a harvest")
    if harvest is not None:
        of_run = {"--data": data, "--key": key, "--split": split, "--context": context}
        options.refuse_given(
            {**of_run, "--effect-tokens": effect_tokens, "--exclude-special": exclude_special}, options.OF_HARVEST
        )
    options.refuse_torchrun("a report")
    path = out.expanduser()
    _check_new(path)
    documents = None if data is None else documents_of(data, key or "text", split or "train")
    if documents is not None and next(iter(documents), None) is None:
        raise UsageError(f"there are no documents in {shown(data)}")
    f = featurizers.load(source, subfolder=subfolder, revision=revision)
    if site is None and not f.sites:
        raise UsageError(f"{shown(source)} does not say where it belongs; name the site with --site")
    language_model = None if model is None else options.loaded(model, device, dtype)
    if language_model is not None:
        f = f.to(next(language_model.model.parameters()).device)
    of_data: dict[str, Any] = {"harvest": harvest, "max_tokens": tokens, "data": f"harvest {harvest}"}
    if data is not None:
        of_data = {"max_tokens": tokens or 16_384, "context": context or 128, "data": options.name_of(data, split)}
    found = report(
        f,
        None if language_model is None else language_model.model,
        documents,
        site=site,
        contexts=contexts,
        effect_tokens=256 if effect_tokens is None else effect_tokens,
        tokenizer=None if language_model is None else language_model.tokenizer,
        exclude_special_tokens=exclude_special,
        mask_first=mask_first or 0,
        batch_size=batch_size or 8,
        any_model=any_model,
        progress=not as_json,
        **of_data,
    )
    found.save(path)
    if as_json:
        effect = {} if found.effect is None else found.effect.to_dict()["metrics"]
        metrics = {**found.evaluation.to_dict()["metrics"], **effect}
        print_json({"about": dict(found.about), "metrics": metrics, "features": len(found), "written": str(path)})
        return
    never = int((found.count == 0).sum())
    print(f"{len(found):,} features, {never:,} never active, on {found.about['tokens']:,} tokens.")
    print(f"Written: {printable(str(path), 500)}")


def _check_new(path: Path) -> None:
    """Raise an error unless a page can be written to a file that does not exist.

    Raises:
        UsageError: it is not the name of an HTML file.
        ArtefactError: it exists, or its folder does not exist or cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out is a file that ends in .html, not {shown(str(path))}")
    with os_errors(path):
        if path.exists() or path.is_symlink():
            raise ArtefactError(str(path), "it is there already; choose a new file")
        if not path.absolute().parent.is_dir():
            raise ArtefactError(str(path), "its folder does not exist; make it, or choose another")
    refuse_unwritable(path, path.absolute().parent)

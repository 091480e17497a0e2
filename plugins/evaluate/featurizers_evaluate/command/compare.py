"""Command ``featurizers compare``."""

from __future__ import annotations

from typing import Annotated

import featurizers
import typer
from featurizers.errors import UsageError, shown

from featurizers_evaluate.command import options
from featurizers_evaluate.processes import is_first, torchrun_group


def compare_command(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Artefacts, as for evaluate.")],
    model: options.Model = None,
    data: options.Data = None,
    harvest: options.Harvest = None,
    key: options.Key = None,
    split: options.Split = None,
    metrics: options.Metrics = None,
    ablations: options.Ablations = None,
    tokens: options.Tokens = None,
    context: options.Context = None,
    batch_size: options.BatchSize = None,
    exclude_special: options.ExcludeSpecial = False,
    mask_first: options.MaskFirst = None,
    seed: options.Seed = None,
    out: options.Out = None,
    any_model: options.AnyModel = False,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Measure several artefacts on the same documents: one table and one picture."""
    from featurizers_evaluate.evaluating import compare

    if repeated := [each for each in sources if sources.count(each) > 1]:
        raise UsageError(f"the artefact {shown(repeated[0])} is given twice")
    options.check_out(out)
    if harvest is not None:
        options.refuse_torchrun("--harvest")
        of_model = {"--model": model, "--data": data, "--key": key, "--split": split, "--ablations": ablations}
        options.refuse_given(
            {**of_model, "--context": context, "--exclude-special": exclude_special, "--device": device},
            options.OF_HARVEST,
        )
        stored = options.of_harvest(
            metrics=metrics,
            tokens=tokens,
            batch_size=batch_size,
            mask_first=mask_first,
            seed=seed,
            any_model=any_model,
            as_json=as_json,
            harvest=harvest,
        )
        found = compare({source: featurizers.load(source) for source in sources}, **stored)
        options.show(found, out, joined=False, as_json=as_json)
        return
    if model is None or data is None:
        raise UsageError("give --model and --data with documents, or --harvest with the folder of a harvest")
    language_model = options.loaded(model, device, dtype)
    placed = next(language_model.model.parameters()).device
    several = {source: featurizers.load(source, device=placed) for source in sources}
    with torchrun_group() as group:
        documents, arguments = options.arguments(
            language_model,
            data,
            key=key,
            split=split,
            metrics=metrics,
            ablations=ablations,
            tokens=tokens,
            context=context,
            batch_size=batch_size,
            exclude_special=exclude_special,
            mask_first=mask_first,
            seed=seed,
            any_model=any_model,
            as_json=as_json,
            group=group,
        )
        found = compare(several, language_model.model, documents, **arguments)
    if is_first():
        options.show(found, out, joined=False, as_json=as_json)

"""`extra_args`: the JSON of a request from ordinary operations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import featurizers
import torch
from featurizers import Ablate, Featurizer, Interchange, Mask, Steer
from featurizers.errors import LoweringError
from featurizers.format import Site

from featurizers_vllm.spec import ARGUMENT, RequestSpec

Operation: TypeAlias = Steer | Ablate | Interchange | Mask


def extra_args(
    operations: Mapping[Site | str, Operation | Sequence[Operation]],
    *,
    names: Mapping[Featurizer[Any], str] | None = None,
) -> dict[str, str]:
    """Return ordinary operations as a request of a server that serves them.

    The server knows a featurizer by the id and the revision that its operator gave it. The result is for
    ``SamplingParams(extra_args=...)``, and over HTTP for ``vllm_xargs``.

    Args:
        operations: as for `featurizers.intervene`: an operation, or several in their order, by site.
        names: the operator's id of a featurizer, where it is not ``featurizer.id``.

    Raises:
        LoweringError: an operation has no fixed form, so that no server can make it.

    Examples:
        >>> f = featurizers.create("subspace", d_in=8, n_features=2)
        >>> extra_args({"resid.post:3": featurizers.Steer(f, delta=2.0, indices=[1])}, names={f: "owner/name"})
        {'featurizers': '{"version":1,"edits":[{"site":"resid.post:3","featurizer":"owner/name","do":"steer",\
"indices":[1],"delta":[2.0]}]}'}
    """
    edits = []
    for site, given in operations.items():
        for operation in given if isinstance(given, Sequence) else [given]:
            edits.append({"site": str(Site.parse(site)), **_edit(operation, names or {})})
    text = json.dumps({"version": 1, "edits": edits}, separators=(",", ":"))
    RequestSpec.model_validate(json.loads(text))
    return {ARGUMENT: text}


def _edit(operation: Operation, names: Mapping[Featurizer[Any], str]) -> dict[str, Any]:
    """Return one operation as it is written in a request."""
    program = featurizers.lower(operation)
    f = operation.of_site
    edit: dict[str, Any] = {"featurizer": names.get(f, f.id)}
    if f.revision is not None:
        edit["revision"] = f.revision
    numbers = _numbers(operation, f)
    match operation:
        case Steer():
            edit |= {"do": "steer", "indices": numbers, "delta": program.constant.tolist()}
        case Ablate():
            edit |= {"do": "ablate", "indices": numbers, "value": program.constant.tolist()}
        case Interchange():
            edit |= {"do": "interchange", "indices": numbers, "features": program.constant.tolist()}
        case Mask():
            features = featurizers.lower(Interchange(f, source=operation.source)).constant
            edit |= {"do": "mask", "indices": numbers, "features": features.tolist()}
            edit |= {"gate": (-program.factor).tolist()}
        case _:
            raise LoweringError(f"{type(operation).__name__} is no edit of a request")
    if program.positions is not None:
        edit["positions"] = list(program.positions)
    return {key: value for key, value in edit.items() if value is not None}


def _numbers(operation: Operation, f: Featurizer[Any]) -> list[int] | None:
    """Return the numbers of the features of an operation in the whole featurizer, None for all of it."""
    width = f.d_in
    selection = f.select(getattr(operation, "indices", None), torch.empty(1, width or 0))
    columns = selection.as_columns()
    numbers = getattr(f, "numbers", None)  # of a slice
    if isinstance(numbers, torch.Tensor):
        numbers = numbers.cpu()
        return [int(each) for each in (numbers if columns is None else numbers[columns.cpu()])]
    return None if columns is None else [int(each) for each in columns]

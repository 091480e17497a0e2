"""Files of derived scalars: safetensors, with descriptions as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from featurizers.errors import ArtefactError, FeaturizerError, one_line
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from featurizers_derived_scalars.nodes.axes import NodeAxis
from featurizers_derived_scalars.nodes.bases import Basis, Part, Via
from featurizers_derived_scalars.results.scalar import Key, Scalar

FORMAT: Final = "featurizers-derived-scalars"


class _Basis(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    kind: str
    part: Part
    via: Via | None
    whole: bool
    featurized: bool


class _Scalar(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: str
    axes: list[NodeAxis]
    layers: list[Annotated[int, Field(ge=0)] | None]
    basis: _Basis | None
    params: dict[str, str]


class _Header(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal["featurizers-derived-scalars"]
    version: Literal[1]
    scalars: list[_Scalar]


def write_scalars(path: Path | str, tensors: Mapping[Key, Tensor], about: Mapping[str, Scalar]) -> None:
    """Write scalars, each computed once."""
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    rows: list[_Scalar] = []
    for number, (name, known) in enumerate(about.items()):
        layers = [layer for other, layer in tensors if other == name]
        for layer in layers:
            stored[f"{number}/{layer}"] = tensors[name, layer].detach().cpu().contiguous().clone()
        basis = known.basis and _Basis(
            kind=known.basis.kind,
            part=known.basis.part,
            via=known.basis.via,
            whole=known.basis.whole,
            featurized=known.basis.featurizer is not None,
        )
        rows.append(_Scalar(name=name, axes=list(known.axes), layers=layers, basis=basis, params=dict(known.params)))
    header = _Header(format=FORMAT, version=1, scalars=rows)
    save_file(stored, path, metadata={"featurizers": header.model_dump_json()})


def read_scalars(path: Path | str) -> tuple[dict[Key, Tensor], dict[str, Scalar]]:
    """Read tensors, and the description of each name.

    Raises:
        ArtefactError: the file holds no scalars, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get("featurizers", "null")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = _Header.model_validate_json(json.dumps(json.loads(text)))
    except (OSError, SafetensorError, ValidationError, ValueError) as error:
        raise ArtefactError(str(path), f"these are no saved scalars: {one_line(error)}") from error
    expected = {f"{number}/{layer}" for number, row in enumerate(header.scalars) for layer in row.layers}
    if expected != set(stored) or len({row.name for row in header.scalars}) != len(header.scalars):
        raise ArtefactError(str(path), "the tensors are not those of the header")
    tensors: dict[Key, Tensor] = {}
    about: dict[str, Scalar] = {}
    for number, row in enumerate(header.scalars):
        for layer in row.layers:
            tensor = tensors[row.name, layer] = stored[f"{number}/{layer}"]
            if tensor.dim() != len(row.axes):
                raise ArtefactError(str(path), f"a tensor of {row.name!r} has {tensor.dim()} axes, not {len(row.axes)}")
        try:
            about[row.name] = Scalar(tuple(row.axes), _basis(row.basis), row.params)
        except FeaturizerError as error:
            raise ArtefactError(str(path), str(error)) from error
    return tensors, about


def _basis(row: _Basis | None) -> Basis | None:
    if row is None or row.featurized:
        return None
    return Basis(row.kind, None, row.part, row.via, row.whole)

"""Saving and loading `Scalars`: one safetensors file."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from featurizers.errors import ArtefactError, FeaturizerError, one_line
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from featurizers_derived_scalars.axes import Axis
from featurizers_derived_scalars.bases import Basis, Part, Via

if TYPE_CHECKING:
    from featurizers_derived_scalars.results import Scalars

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
    axes: list[Axis]
    layers: list[Annotated[int, Field(ge=0)] | None]
    basis: _Basis | None
    params: dict[str, str]


class _Header(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal["featurizers-derived-scalars"]
    version: Literal[1]
    scalars: list[_Scalar]


def save(scalars: Scalars, path: Path | str) -> None:
    """Write scalars, each computed once."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    rows: list[_Scalar] = []
    for number, (name, about) in enumerate(scalars.about.items()):
        layers = [layer for other, layer in scalars if other == name]
        for layer in layers:
            tensors[f"{number}/{layer}"] = scalars[name, layer].detach().cpu().contiguous().clone()
        basis = about.basis and _Basis(
            kind=about.basis.kind,
            part=about.basis.part,
            via=about.basis.via,
            whole=about.basis.whole,
            featurized=about.basis.featurizer is not None,
        )
        rows.append(_Scalar(name=name, axes=list(about.axes), layers=layers, basis=basis, params=dict(about.params)))
    header = _Header(format=FORMAT, version=1, scalars=rows)
    save_file(tensors, path, metadata={"featurizers": header.model_dump_json()})


def load(path: Path | str) -> Scalars:
    """What `save` wrote.

    Raises:
        ArtefactError: the file is no such file, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    from featurizers_derived_scalars.results import Scalar, Scalars

    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get("featurizers", "null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = _Header.model_validate_json(json.dumps(json.loads(text)))
    except (OSError, SafetensorError, ValidationError, ValueError) as error:
        raise ArtefactError(str(path), f"these are no saved scalars: {one_line(error)}") from error
    expected = {f"{number}/{layer}" for number, row in enumerate(header.scalars) for layer in row.layers}
    if expected != set(tensors) or len({row.name for row in header.scalars}) != len(header.scalars):
        raise ArtefactError(str(path), "the tensors are not those of the header")
    entries, about = {}, {}
    for number, row in enumerate(header.scalars):
        for layer in row.layers:
            tensor = tensors[f"{number}/{layer}"]
            if tensor.dim() != len(row.axes):
                raise ArtefactError(str(path), f"a tensor of {row.name!r} has {tensor.dim()} axes, not {len(row.axes)}")
            entries[row.name, layer] = functools.partial(_given, tensor)
        try:
            about[row.name] = Scalar(tuple(row.axes), _basis(row.basis), row.params)
        except FeaturizerError as error:
            raise ArtefactError(str(path), str(error)) from error
    return Scalars(entries, about)


def _basis(row: _Basis | None) -> Basis | None:
    if row is None or row.featurized:
        return None
    return Basis(row.kind, None, row.part, row.via, row.whole)


def _given(tensor: Tensor) -> Tensor:
    return tensor

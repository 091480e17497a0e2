"""Files of derived scalars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

from featurizers.errors import ArtefactError, FeaturizerError
from featurizers.format import Name, read_state, write_state
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from featurizers_derived_scalars.nodes import Basis, NodeAxis, Part, Via
from featurizers_derived_scalars.results.scalar import Key, Scalar

FORMAT: Final = "featurizers-derived-scalars"
VERSION: Final = 1


class _Basis(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    kind: str
    part: Part
    via: Via | None
    whole: bool
    featurized: bool


class _Scalar(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: Name
    axes: list[NodeAxis]
    layers: list[Annotated[int, Field(ge=0)] | None]
    basis: _Basis | None
    params: dict[str, str]


class _About(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    scalars: list[_Scalar]


def write_scalars(path: Path | str, tensors: Mapping[Key, Tensor], about: Mapping[str, Scalar]) -> None:
    """Write scalars, each computed once."""
    stored: dict[str, Tensor] = {}
    rows: list[_Scalar] = []
    for number, (name, known) in enumerate(about.items()):
        layers = [layer for other, layer in tensors if other == name]
        for layer in layers:
            stored[f"{number}/{layer}"] = tensors[name, layer]
        basis = known.basis and _Basis(
            kind=known.basis.kind,
            part=known.basis.part,
            via=known.basis.via,
            whole=known.basis.whole,
            featurized=known.basis.featurizer is not None,
        )
        rows.append(_Scalar(name=name, axes=list(known.axes), layers=layers, basis=basis, params=dict(known.params)))
    write_state(path, stored, _About(scalars=rows).model_dump(), format=FORMAT, version=VERSION)


def read_scalars(path: Path | str) -> tuple[dict[Key, Tensor], dict[str, Scalar]]:
    """Read tensors, and the description of each name.

    Raises:
        ArtefactError: the file holds no scalars, or is damaged.
    """
    stored, record = read_state(path, format=FORMAT, version=VERSION, schema=_About, expected="saved scalars")
    expected = [f"{number}/{layer}" for number, row in enumerate(record.scalars) for layer in row.layers]
    if sorted(expected) != sorted(stored) or len({row.name for row in record.scalars}) != len(record.scalars):
        raise ArtefactError(str(path), "the tensors are not those of the header")
    tensors: dict[Key, Tensor] = {}
    about: dict[str, Scalar] = {}
    for number, row in enumerate(record.scalars):
        for layer in row.layers:
            tensor = tensors[row.name, layer] = stored[f"{number}/{layer}"]
            if tensor.dim() != len(row.axes):
                raise ArtefactError(str(path), f"a tensor of {row.name!r} has {tensor.dim()} axes, not {len(row.axes)}")
            if not tensor.is_floating_point():
                raise ArtefactError(str(path), f"a tensor of {row.name!r} is {tensor.dtype}, not floating point")
        try:
            about[row.name] = Scalar(tuple(row.axes), _basis(row.basis), row.params)
        except FeaturizerError as error:
            raise ArtefactError(str(path), str(error)) from error
    return tensors, about


def _basis(row: _Basis | None) -> Basis | None:
    if row is None or row.featurized:
        return None
    return Basis(row.kind, None, row.part, row.via, row.whole)

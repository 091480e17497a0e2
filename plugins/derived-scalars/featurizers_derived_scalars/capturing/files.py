"""Files of captured activations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import torch
from featurizers.errors import ArtefactError, FeaturizerError, SiteError, shown
from featurizers.format import read_state, write_state
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from featurizers_derived_scalars.circuit import Pass, Place

FORMAT: Final = "featurizers-raw-activations"
VERSION: Final = 1


class About(BaseModel):
    """JSON of a file.

    Attributes:
        model: `Circuit.fingerprint` of the model.
        metric: value of the metric; None if there was none.
        frozen: names of the norms whose scale the gradients took as constant.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    model: dict[str, str | int]
    metric: Annotated[float, Field(allow_inf_nan=False)] | None
    frozen: list[Literal["attn", "attn.post", "final", "mlp", "mlp.post"]]


class Stored(NamedTuple):
    """Content of a file."""

    tokens: Tensor
    values: Mapping[tuple[Place, Pass], Tensor]
    about: About


def write_activations(
    path: Path | str, tokens: Tensor, values: Mapping[tuple[Place, Pass], Tensor], about: Mapping[str, Any]
) -> None:
    """Write tokens, tensors and JSON, which is that of `About`, to one safetensors file.

    Raises:
        ArtefactError: a tensor could not be read again, or the file cannot be written.
    """
    for (place, pass_), value in values.items():
        _check(place, pass_, value, str(path))
    tensors = {f"{place}/{pass_}": value for (place, pass_), value in values.items()}
    write_state(path, {**tensors, "tokens": tokens}, about, format=FORMAT, version=VERSION)


def read_activations(path: Path | str, model: Mapping[str, str | int]) -> Stored:
    """Read and check a file; the caller checks the shapes.

    Args:
        path: of the file.
        model: `Circuit.fingerprint` of the model that the file must be of.

    Raises:
        ArtefactError: the file holds no activations, is damaged, or is of a model of another shape.
    """
    tensors, about = read_state(path, format=FORMAT, version=VERSION, schema=About, expected="captured activations")
    if about.model != model:
        raise ArtefactError(str(path), f"it is of {shown(about.model)}, the model is {model}")
    tokens = tensors.pop("tokens", None)
    if tokens is None or tokens.dim() != 1 or not len(tokens) or tokens.dtype not in (torch.int64, torch.int32):
        raise ArtefactError(str(path), "it has no row of token ids")
    try:
        values = {_key(name): value for name, value in tensors.items()}
    except FeaturizerError as error:
        raise ArtefactError(str(path), str(error)) from error
    for (place, pass_), value in values.items():
        _check(place, pass_, value, str(path))
    return Stored(tokens, values, about)


def _key(name: str) -> tuple[Place, Pass]:
    text, _, pass_ = name.partition("/")
    place = Place.parse(text)
    if str(place) == text:  # a second spelling would be a second tensor of one place
        if pass_ == "forward":
            return place, "forward"
        if pass_ == "backward":
            return place, "backward"
    raise SiteError(f"{shown(name)} names no place and pass")


def _check(place: Place, pass_: Pass, value: Tensor, where: str) -> None:
    """Raise `ArtefactError` unless a tensor holds finite floats: logits also minus infinity, scales none below 0."""
    problem = None
    if not value.is_floating_point():
        problem = f"is {str(value.dtype).removeprefix('torch.')}, not floating point"
    elif (place.kind, pass_) == ("attn.logits", "forward"):
        problem = "holds NaN or infinity" if (value.isnan() | value.isposinf()).any() else None
    elif not value.isfinite().all():
        problem = "holds NaN or infinity"
    elif place.kind.endswith(".scale") and pass_ == "forward" and not (value > 0).all():
        problem = "holds a scale of 0 or less, by which a norm cannot have divided"
    if problem:
        raise ArtefactError(where, f"{place} ({pass_}) {problem}; capture it again")

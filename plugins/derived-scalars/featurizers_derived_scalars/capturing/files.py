"""Files of captured activations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from featurizers.errors import ArtefactError, FeaturizerError, SiteError, shown
from featurizers.format import read_state, write_state
from pydantic import BaseModel, ConfigDict
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
    metric: float | None
    frozen: list[Literal["attn", "attn.post", "final", "mlp", "mlp.post"]]


class Stored(NamedTuple):
    """Content of a file."""

    tokens: Tensor
    values: Mapping[tuple[Place, Pass], Tensor]
    about: About


def write_activations(
    path: Path | str, tokens: Tensor, values: Mapping[tuple[Place, Pass], Tensor], about: Mapping[str, Any]
) -> None:
    """Write tokens, tensors and JSON, which is that of `About`, to one safetensors file."""
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
    if tokens is None or tokens.dim() != 1 or tokens.is_floating_point():
        raise ArtefactError(str(path), "it has no row of token ids")
    try:
        return Stored(tokens, {_key(name): value for name, value in tensors.items()}, about)
    except FeaturizerError as error:
        raise ArtefactError(str(path), str(error)) from error


def _key(name: str) -> tuple[Place, Pass]:
    text, _, pass_ = name.partition("/")
    if pass_ == "forward":
        return Place.parse(text), "forward"
    if pass_ == "backward":
        return Place.parse(text), "backward"
    raise SiteError(f"{shown(name)} names no place and pass")

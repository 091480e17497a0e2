"""Files of captured activations: safetensors, with the rest as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from featurizers.errors import ArtefactError, FeaturizerError, SiteError, one_line, shown
from torch import Tensor

from featurizers_derived_scalars.circuit.places import NORMS, Pass, Place

FORMAT: Final = "featurizers-raw-activations"
VERSION: Final = 1


class Stored(NamedTuple):
    """Content of a file of captured activations."""

    tokens: Tensor
    values: Mapping[tuple[Place, Pass], Tensor]
    metric: float | None
    frozen: frozenset[str]


def write_activations(
    path: Path | str, tokens: Tensor, values: Mapping[tuple[Place, Pass], Tensor], about: Mapping[str, Any]
) -> None:
    """Write tokens, tensors and the header."""
    from safetensors.torch import save_file

    tensors = {f"{place}/{pass_}": _stored(value) for (place, pass_), value in values.items()}
    header = {"format": FORMAT, "version": VERSION, **about}
    save_file({**tensors, "tokens": _stored(tokens)}, path, metadata={"featurizers": json.dumps(header)})


def read_activations(path: Path | str, model: Mapping[str, Any]) -> Stored:
    """Read and check a file; shapes are left to the caller.

    Args:
        path: of the file.
        model: `Circuit.fingerprint` of the model that the file must be of.

    Raises:
        ArtefactError: the file holds no activations, is damaged, or is of a model of another shape.
    """
    from safetensors import SafetensorError, safe_open

    where = str(path)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("featurizers", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtefactError(where, f"these are no captured activations: {one_line(error)}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ArtefactError(where, "these are no captured activations: the header does not say so")
    if about.get("version") != VERSION:
        raise ArtefactError(where, f"format version {shown(about.get('version'))}; this reads version {VERSION}")
    if about.get("model") != model:
        raise ArtefactError(where, f"it is of {shown(about.get('model'))}, the model is {model}")
    metric, frozen = about.get("metric"), about.get("frozen")
    known = [name for name in frozen if isinstance(name, str) and name in NORMS] if isinstance(frozen, list) else []
    if not isinstance(metric, float | None) or known != frozen:
        raise ArtefactError(where, "the header's metric or frozen norms are not what they should be")
    tokens = tensors.pop("tokens", None)
    if tokens is None or tokens.dim() != 1 or tokens.is_floating_point():
        raise ArtefactError(where, "it has no row of token ids")
    try:
        values = {_key(name): value for name, value in tensors.items()}
    except FeaturizerError as error:
        raise ArtefactError(where, str(error)) from error
    return Stored(tokens, values, metric, frozenset(known))


def _key(name: str) -> tuple[Place, Pass]:
    text, _, pass_ = name.partition("/")
    if pass_ == "forward":
        return Place.parse(text), "forward"
    if pass_ == "backward":
        return Place.parse(text), "backward"
    raise SiteError(f"{shown(name)} names no place and pass")


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()

"""Operations as data and back: what an artefact holds of the edits that are made through its featurizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from pydantic import ValidationError
from torch import Tensor

from featurizers.errors import ShapeError, UsageError, explain, shown
from featurizers.features.feature_space import FeatureSpace
from featurizers.features.featurizer import Featurizer
from featurizers.format.edits import AblateSpec, AnySpec, InterchangeSpec, MaskSpec, SourcedSpec, SteerSpec
from featurizers.models.operations import Ablate, Interchange, Mask, Operation, Steer

SOURCE_DTYPES: Final = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}


@torch.no_grad()
def spec_of(operation: Operation, through: FeatureSpace[Any]) -> AnySpec:
    """Return an operation as data; `operation_of` makes the same operation of it.

    Args:
        operation: `Steer`, `Ablate`, `Interchange` or `Mask` with numbers alone: the same features, values and
            positions for every prompt, and a source of activations.
        through: the featurizer that it goes through, which knows its site.

    Raises:
        UsageError: it holds what is no data, such as a module or a source of inputs; the message says what to do.
        FeatureIndexError: indices that the featurizer does not have.
        ShapeError: there are more values than features.
    """
    name = type(operation).__name__
    if type(operation) not in (Steer, Ablate, Interchange, Mask):
        raise UsageError(f"an artefact holds Steer, Ablate, Interchange and Mask as edits, not {name}")
    if operation.featurizer is not through:
        raise UsageError(
            f"the edits of an artefact go through its own featurizer {through.id!r}, and this {name} goes through "
            f"{operation.featurizer.id!r}, which is another object"
        )
    if not isinstance(through, Featurizer):
        raise UsageError(f"{through.id!r} maps between sites, whose edits are not saved")
    if through.site is None:
        raise UsageError(f"{through.id!r} has edits and no site; say where they act: f.site = 'resid.post:8'")
    columns, numbers = _indices(operation, through, name)
    count = through.n_features or through.d_in if columns is None else len(columns)
    common: dict[str, Any] = {
        "featurizer": through.id,
        "site": str(through.site),
        "indices": numbers,
        "positions": _positions(operation, name),
    }
    try:
        match operation:
            case Steer(delta=delta):
                return SteerSpec(do="steer", delta=_numbers(delta, count, f"the delta of {name}"), **common)
            case Ablate(value="mean"):
                raise UsageError("Ablate to 'mean' depends on the batch; give the mean of a data set as numbers")
            case Ablate(value=value):
                return AblateSpec(do="ablate", value=_numbers(value, count, f"the value of {name}"), **common)
            case Mask(gate=gate, source=source):
                if not isinstance(gate, Tensor):
                    raise UsageError("the gate of a saved Mask is a tensor; give that of a module: gate().detach()")
                values = _numbers(gate, count, "the gate of Mask")
                if not isinstance(values, list) or (count is not None and len(values) != count):
                    raise ShapeError(f"the gate of Mask has the shape {tuple(gate.shape)}, for {count} features")
                return MaskSpec(do="mask", gate=values, **_source(source, through, name), **common)
            case Interchange(source=source):
                return InterchangeSpec(do="interchange", **_source(source, through, name), **common)
    except ValidationError as error:
        raise UsageError(f"this {name} cannot be saved: {explain(error)}") from error
    raise UsageError(f"{name} is no edit of an artefact")


def operation_of(spec: AnySpec, through: Featurizer[Any]) -> Operation:
    """Return the operation that `spec_of` made data of, through a featurizer.

    Raises:
        UsageError: a source is given by its features, as requests of servers have it.
        FeatureIndexError: indices that the featurizer does not have.
        ShapeError: values or a source do not fit the featurizer.
    """
    options: dict[str, Any] = {"positions": spec.positions}
    if not isinstance(spec, MaskSpec):
        options["indices"] = spec.indices
    elif spec.indices is not None or not isinstance(spec.gate, list):
        raise UsageError("a mask of an artefact has a list with a gate for every feature, and no indices")
    if isinstance(spec, SourcedSpec):
        if spec.source is None:
            raise UsageError("an edit of an artefact has the activations of its source, not their features")
        dtype = getattr(torch, spec.source_dtype)
        options["source"] = torch.tensor([spec.source], dtype=torch.float64).to(dtype).to(_device(through))
    operation: Operation
    match spec:
        case SteerSpec(delta=delta):
            operation = Steer(through, delta=_tensor(delta), **options)
        case AblateSpec(value=value):
            operation = Ablate(through, value=_tensor(value), **options)
        case InterchangeSpec():
            operation = Interchange(through, **options)
        case MaskSpec(gate=gate):
            operation = Mask(through, gate=torch.as_tensor(_tensor(gate)), **options)
    spec_of(operation, through)  # raises for what does not fit
    return operation


def _indices(operation: Operation, f: Featurizer[Any], name: str) -> tuple[Tensor | None, list[int] | None]:
    """Return the columns of the features, and their numbers in the whole; None for all."""
    indices, numbering = getattr(operation, "indices", None), f.numbering()[None]
    if indices is None:
        is_slice = not isinstance(numbering.numbers, range) and not isinstance(operation, Mask)
        return None, list(numbering.numbers) if is_slice else None  # all of a slice are some of the whole
    if f.n_features is None and f.d_in is None:
        raise UsageError(f"{f.id!r} takes activations of any width; create it with d_in, to save edits of features")
    selection = f.select(indices, torch.empty(1, f.d_in or 0))
    if selection.differs_by_example:
        raise UsageError(f"{name} has other features for each example, which cannot be saved; give the same for all")
    columns = selection.as_columns()
    return columns, None if columns is None else [numbering.numbers[column] for column in columns.tolist()]


def _positions(operation: Operation, name: str) -> list[int] | None:
    if operation.positions is None:
        return None
    tensor = torch.as_tensor(operation.positions)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool or not tensor.numel():
        raise UsageError(
            f"{name} has the positions {shown(operation.positions)}; to be saved, give one list of integers for all "
            "prompts"
        )
    return [int(position) for position in tensor.tolist()]


def _numbers(value: Any, count: int | None, what: str) -> float | list[float]:
    """Return a number, or a number for each feature."""
    if isinstance(value, Mapping):
        raise UsageError(f"{what} is by group, and the featurizer has no groups")
    if not isinstance(value, Tensor):
        return float(value)
    if value.is_complex() or value.numel() != value.shape[-1:].numel():
        raise UsageError(f"{what} has shape {tuple(value.shape)}; to be saved, give one number for each feature")
    listed = value.detach().reshape(-1).double().tolist()
    if count is not None and len(listed) not in (1, count):
        raise ShapeError(f"{what} has {len(listed)} numbers for {count} features")
    return listed if value.dim() else float(listed[0])


def _source(source: Any, f: Featurizer[Any], name: str) -> dict[str, Any]:
    """Return the activations of a source, a row for each position."""
    if not isinstance(source, Tensor):
        raise UsageError(
            f"{name} reads its source from the model; to be saved, give the activations that featurizers.collect reads"
        )
    flat = f.flatten(source.detach().to(_device(f)))
    if source.dtype not in SOURCE_DTYPES or flat.dim() > 3 or (flat.dim() > 1 and flat.shape[0] != 1):
        raise UsageError(
            f"{name} has a source of shape {tuple(source.shape)}; to be saved, give (1, n_positions, d), the same for "
            "every example"
        )
    rows = flat.reshape(-1, flat.shape[-1]).double().tolist()
    return {"source": rows, "source_dtype": SOURCE_DTYPES[source.dtype]}


def _device(f: Featurizer[Any]) -> torch.device:
    """Return the device of a featurizer's tensors; the CPU if it has none."""
    return next(iter((*f.parameters(), *f.buffers())), torch.empty(0)).device


def _tensor(value: float | list[float]) -> float | Tensor:
    """Return numbers as a tensor, in float32 unless that would round them."""
    if not isinstance(value, list):
        return value
    wide = torch.tensor(value, dtype=torch.float64)
    narrow = wide.float()
    return narrow if bool((narrow.double() == wide).all()) else wide

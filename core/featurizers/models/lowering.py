"""`lower`: the fixed form of an operation, for servers and other frameworks that do not run this library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featurizers.errors import LoweringError, shown
from featurizers.features.featurizer import Featurizer
from featurizers.features.indices import values_like
from featurizers.features.programs import FeatureRows, Gate, Program
from featurizers.models.operations import Ablate, Interchange, Mask, Operation, Steer


@torch.no_grad()
def lower(operation: Operation) -> Program:
    """Return an operation as rows that are read, gated and written, with the numbers of its features.

    Exact up to rounding: `Program.apply` gives the activations that the operation gives. The tensors are copies.

    Args:
        operation: at one site. `Steer` and `Ablate` with fixed values; `Interchange` and `Mask` with one activation
            vector as their source.

    Raises:
        LoweringError: the edit is not the same function of each activation vector; the message says why.
        FeatureIndexError: indices that the featurizer does not have.
    """
    name, f = type(operation).__name__, operation.featurizer
    if not isinstance(f, Featurizer):
        raise LoweringError(f"{f.id!r} maps between sites: its edit of one site depends on another")
    columns = _columns(operation, f, name)
    rows = _in_single(f.feature_rows(columns))
    constant, factor = _amounts(operation, f, columns, rows.bias, name)
    if rows.gate is None and factor.any():
        raise LoweringError(
            f"{name} replaces features, and those of {f.id!r} have no gate of their own, as where all features of a "
            "token are compared; only Steer, which adds to them, has a fixed form"
        )
    return Program(rows, constant, factor, f.site, _positions(operation, name), tuple(f.special_tokens))


def _columns(operation: Operation, f: Featurizer[Any], name: str) -> Tensor | None:
    """Return the columns of the features that an operation edits, None for all."""
    width = f.d_in
    if width is None:
        raise LoweringError(f"{f.id!r} ({f.kind}) takes activations of any width; create it with d_in")
    selection = f.select(getattr(operation, "indices", None), torch.empty(1, width))
    if selection.differs_by_example:
        raise LoweringError(f"{name} has other features for each example; give the same for all")
    return selection.as_columns()


def _amounts(
    operation: Operation, f: Featurizer[Any], columns: Tensor | None, like: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """Return what each feature is given, and how much of its present value is added."""
    match operation:
        case Steer(delta=delta):
            return _fixed(delta, like, name), torch.zeros_like(like)
        case Ablate(value="mean"):
            raise LoweringError("Ablate to 'mean' depends on the batch; give the mean of a data set as numbers")
        case Ablate(value=value):
            return _fixed(value, like, name), -torch.ones_like(like)
        case Interchange(source=source):
            return _features(f, source, columns, name).to(like), -torch.ones_like(like)
        case Mask(source=source, gate=gate):
            given = gate() if isinstance(gate, nn.Module) else gate
            share = _fixed(given, like, name)
            return share * _features(f, source, columns, name).to(like), -share
        case _:
            raise LoweringError(f"{name} has no fixed form; lower Steer, Ablate, Interchange or Mask")


def _fixed(value: Any, like: Tensor, name: str) -> Tensor:
    """Return a number, or a number for each feature, as a vector."""
    if isinstance(value, Tensor) and value.numel() == value.shape[-1:].numel():
        value = value.reshape(value.shape[-1:])
    elif isinstance(value, Tensor):
        raise LoweringError(f"{name} has values of shape {tuple(value.shape)}; give one number for each feature")
    return values_like(value, like).clone()


def _features(f: Featurizer[Any], source: Any, columns: Tensor | None, name: str) -> Tensor:
    """Return the features ``(k,)`` of a source that is one activation vector."""
    if not isinstance(source, Tensor):
        raise LoweringError(
            f"{name} reads its source from the model; read it first with featurizers.collect, and give one vector"
        )
    flat = f.flatten(source)
    if flat.shape[:-1].numel() != 1:
        raise LoweringError(f"{name} has a source of shape {tuple(source.shape)}; give one activation vector")
    return f.encode(flat.reshape(1, -1), columns)[0]


def _positions(operation: Operation, name: str) -> tuple[int, ...] | None:
    """Return the positions of an operation if they are the same for every prompt."""
    positions = operation.positions
    if positions is None:
        return None
    tensor = torch.as_tensor(positions)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise LoweringError(f"{name} has the positions {shown(positions)}; give one list of integers for all prompts")
    return tuple(tensor.tolist())


def _in_single(rows: FeatureRows) -> FeatureRows:
    """Return copies of rows in float32, or in float64 if they have it."""
    dtype = torch.promote_types(rows.write.dtype, torch.float32)

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype, copy=True)

    gate = rows.gate
    if gate is not None:
        gate = Gate(copy(gate.threshold), copy(gate.slope), copy(gate.offset), copy(gate.floor))
    return FeatureRows(copy(rows.read), copy(rows.bias), gate, copy(rows.write))

"""Feature indices: every form that a caller may write, checked and turned into columns or a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from featurizers.errors import FeatureIndexError, ShapeError, UsageError, shown

Indices: TypeAlias = "None | slice | Sequence[int] | Sequence[Sequence[int]] | Tensor | Selection"
"""``None``: every feature. Numbers, a slice, an integer or a boolean tensor: those features, no feature if empty.
A list of lists, or a tensor of two axes: separate features for each example of the batch (the first axis of x)."""


@dataclass(frozen=True)
class Selection:
    """Checked indices. At most one field is set; if both are None, every feature is selected.

    Attributes:
        columns: int64 ``(k,)``, in the order given, the same for every example.
        mask: bool ``(n_features,)``, or ``(batch, n_features)`` with a row for each example.
    """

    columns: Tensor | None = None
    mask: Tensor | None = None

    @property
    def is_everything(self) -> bool:
        """True if every feature is selected."""
        return self.columns is None and self.mask is None

    @property
    def differs_by_example(self) -> bool:
        """True if each example has its own features."""
        return self.mask is not None and self.mask.dim() == 2

    def as_columns(self) -> Tensor | None:
        """Return the columns, in ascending order for a shared mask; None for every feature or if examples differ."""
        if self.mask is not None and self.mask.dim() == 1:
            return self.mask.nonzero().squeeze(-1)
        return self.columns

    def mask_for(self, x: Tensor, n_features: int | None = None) -> Tensor:
        """Return booleans that broadcast against the features of x.

        Args:
            x: activations or features, ``(batch, …, n)``.
            n_features: number of features, n if None.

        Raises:
            FeatureIndexError: the mask has rows for another number of examples than x.
        """
        mask = self.mask
        if mask is None:
            mask = torch.zeros(x.shape[-1] if n_features is None else n_features, dtype=torch.bool, device=x.device)
            mask[slice(None) if self.columns is None else self.columns] = True
        if mask.dim() == 1:
            return mask
        if x.dim() < 2 or mask.shape[0] != x.shape[0]:
            raise FeatureIndexError(
                f"indices are given for {mask.shape[0]} examples, but the activations have shape "
                f"{tuple(x.shape)}; give a list of indices for each example of the batch"
            )
        return mask.reshape(mask.shape[0], *(1,) * (x.dim() - 2), mask.shape[1])


def select(indices: Indices, n_features: int, device: torch.device | str | None = None) -> Selection:
    """Check ``indices`` against ``n_features`` features and return them as a `Selection`.

    Raises:
        FeatureIndexError: an index is out of range (negative ones too), repeated, or not an integer.
        UsageError: the indices are by group, which a `SiteMap` has.
    """
    if isinstance(indices, Selection):
        return indices
    if indices is None:
        return Selection()
    if isinstance(indices, Mapping):
        raise UsageError("indices by group are for maps between sites; of a featurizer give a list of numbers")
    if isinstance(indices, slice):
        return Selection(columns=torch.tensor(_numbers_of(indices, n_features), dtype=torch.long, device=device))
    if isinstance(indices, Sequence) and any(isinstance(row, Sequence | Tensor) for row in indices):
        return Selection(mask=_rows(cast("Sequence[Sequence[int]]", indices), n_features).to(device))
    tensor = _tensor(indices)  # lists are checked on the CPU, so that a GPU need not synchronise
    if tensor.dtype == torch.bool:
        if tensor.shape[-1:] != (n_features,) or tensor.dim() > 2:
            raise FeatureIndexError(
                f"a boolean mask of shape {tuple(tensor.shape)} does not fit {n_features} features; "
                f"give ({n_features},) or (batch, {n_features})"
            )
        return Selection(mask=tensor.to(device))
    if tensor.dim() == 2:
        return Selection(mask=_rows(tensor.tolist(), n_features).to(device))
    return Selection(columns=_checked(tensor, n_features).to(device))


def columns_of(indices: Indices, numbers: Tensor, whole: int) -> Indices:
    """Turn numbers of features in the whole dictionary into columns of a slice.

    Args:
        indices: in any form but a `Selection`; a boolean mask may cover the slice or the whole.
        numbers: of the features that the slice holds, ``(k,)``.
        whole: number of features of the whole dictionary.

    Raises:
        FeatureIndexError: a feature is not in the slice.
    """
    if isinstance(indices, slice):
        chosen = _numbers_of(indices, whole)
        return [column for column, number in enumerate(numbers.tolist()) if number in chosen]
    if indices is None or isinstance(indices, Selection):
        return indices
    if isinstance(indices, Sequence) and any(isinstance(row, Sequence | Tensor) for row in indices):
        return [cast("Sequence[int]", columns_of(row, numbers, whole)) for row in indices]  # type: ignore[arg-type]
    tensor = _tensor(indices)
    if tensor.dtype == torch.bool:
        return tensor[..., numbers.to(tensor.device)] if tensor.shape[-1] == whole else tensor
    if tensor.dim() == 2:
        return [cast("Sequence[int]", columns_of(row, numbers, whole)) for row in tensor]
    column_of = {number: column for column, number in enumerate(numbers.tolist())}
    if missing := [number for number in tensor.tolist() if number not in column_of]:
        raise FeatureIndexError(
            f"feature {missing[0]} is not among the {len(numbers)} of {whole} that were loaded; load it too"
        )
    return [column_of[number] for number in tensor.tolist()]


def _numbers_of(indices: slice, count: int) -> range:
    try:
        return range(count)[indices]
    except (TypeError, ValueError) as error:  # a step of 0, or bounds that are no integers
        raise FeatureIndexError(f"{indices!r} is not a slice of integers with a step other than 0") from error


def _tensor(indices: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
    try:
        tensor = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FeatureIndexError(f"indices must be integers, not {indices!r}") from error
    if tensor.numel() == 0 and not isinstance(indices, Tensor):
        return torch.zeros(0, dtype=torch.long)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dim() not in (1, 2):
        raise FeatureIndexError(
            f"indices must be a list of integers, a list of such lists, or a boolean mask; got a tensor of "
            f"dtype {tensor.dtype} and shape {tuple(tensor.shape)}"
        )
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _checked(columns: Tensor, n_features: int) -> Tensor:
    if columns.numel() == 0:
        return columns
    if (low := int(columns.min())) < 0 or (high := int(columns.max())) >= n_features:
        wrong = low if low < 0 else high
        raise FeatureIndexError(
            f"feature index {wrong} is out of range: there are {n_features} features, 0 to {n_features - 1}"
        )
    # counting is faster than sorting, but its memory grows with the largest index
    repeated = torch.bincount(columns).amax() > 1 if high < 2**20 else len(torch.unique(columns)) < len(columns)
    if repeated:
        raise FeatureIndexError("feature indices are repeated; give each feature once")
    return columns


def _rows(rows: Sequence[Sequence[int]], n_features: int) -> Tensor:
    mask = torch.zeros(len(rows), n_features, dtype=torch.bool)
    for i, row in enumerate(rows):
        if i and type(row) is list and row == rows[i - 1]:
            mask[i] = mask[i - 1]  # long lists are usually the same list, repeated for each example
            continue
        if not isinstance(row, Sequence | Tensor) or isinstance(row, str):
            raise FeatureIndexError(f"the indices of example {i} must be a list of integers, not {row!r}")
        columns = _tensor(row)
        if columns.dtype == torch.bool or columns.dim() != 1:
            raise FeatureIndexError(f"the indices of example {i} must be a list of integers, not {row!r}")
        mask[i, _checked(columns, n_features)] = True
    return mask


def values_like(value: float | Tensor, features: Tensor) -> Tensor:
    """Return the value in the shape, dtype and device of the selected features.

    Raises:
        UsageError: it is neither a number nor a tensor of real numbers.
        ShapeError: it does not broadcast to them.
    """
    try:
        values = torch.as_tensor(value, device=features.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"give a number, or a tensor with one for each feature, not {shown(value)}") from error
    if values.is_complex():
        raise UsageError(f"give real numbers, not {values.dtype}")
    values = values.to(features.dtype)
    try:
        return values.expand_as(features)
    except RuntimeError as error:
        raise ShapeError(
            f"values of shape {tuple(values.shape)} do not fit the selected features {tuple(features.shape)}"
        ) from error


def check_broadcast(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise `ShapeError` unless a tensor broadcasts to a shape.

    Args:
        name: of the tensor, in the error.
        tensor: to check.
        shape: of the activations to edit, or of their features.
    """
    axes = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.dim() > len(shape) or any(own not in (1, wanted) for own, wanted in axes):
        raise ShapeError(f"the {name} of shape {tuple(tensor.shape)} does not broadcast to {tuple(shape)}")

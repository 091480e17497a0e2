"""Which features an operation acts on: ``indices`` in all the forms that a caller may write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from featurizers.errors import FeatureIndexError

Indices: TypeAlias = "None | slice | Sequence[int] | Sequence[Sequence[int]] | Tensor | Selection"
"""``None``: every feature. Numbers, a slice, an integer or a boolean tensor: those features, none if empty.
A list of lists, or a tensor of two axes: other features for each example of the batch (the first axis of x)."""


@dataclass(frozen=True)
class Selection:
    """Checked indices. At most one field is set; neither means every feature.

    Attributes:
        columns: int64 ``(k,)``, in the order given, the same for every example.
        mask: bool ``(n_features,)``, or ``(batch, n_features)`` with one row an example.
    """

    columns: Tensor | None = None
    mask: Tensor | None = None

    @property
    def is_everything(self) -> bool:
        """Whether every feature is selected."""
        return self.columns is None and self.mask is None

    @property
    def differs_by_example(self) -> bool:
        """Whether each example has its own features."""
        return self.mask is not None and self.mask.dim() == 2

    def as_columns(self) -> Tensor | None:
        """The columns, those of a shared mask in ascending order; None for everything or if they differ."""
        if self.mask is not None and self.mask.dim() == 1:
            return self.mask.nonzero().squeeze(-1)
        return self.columns

    def mask_for(self, x: Tensor, n_features: int | None = None) -> Tensor:
        """The selection as booleans that broadcast against n features of x, or against x itself ``(batch, …, n)``."""
        mask = self.mask
        if mask is None:
            mask = torch.zeros(x.shape[-1] if n_features is None else n_features, dtype=torch.bool, device=x.device)
            mask[slice(None) if self.columns is None else self.columns] = True
        if mask.dim() == 1:
            return mask
        if x.dim() < 2 or mask.shape[0] != x.shape[0]:
            raise FeatureIndexError(
                f"indices are given for {mask.shape[0]} examples, but the activations have shape "
                f"{tuple(x.shape)}; give one list of indices for each example of the batch"
            )
        return mask.reshape(mask.shape[0], *(1,) * (x.dim() - 2), mask.shape[1])


def select(indices: Indices, n_features: int, device: torch.device | str | None = None) -> Selection:
    """The checked form of ``indices`` among ``n_features`` features.

    Raises:
        FeatureIndexError: an index is out of range (negative ones too), repeated, or not an integer.
    """
    if isinstance(indices, Selection):
        return indices
    if indices is None:
        return Selection()
    if isinstance(indices, slice):
        return Selection(columns=torch.tensor(range(n_features)[indices], dtype=torch.long, device=device))
    if isinstance(indices, Sequence) and any(isinstance(row, Sequence | Tensor) for row in indices):
        return Selection(mask=_rows(cast("Sequence[Sequence[int]]", indices), n_features).to(device))
    given = _tensor(indices)  # lists are checked before they are moved, which saves a GPU from waiting
    if given.dtype == torch.bool:
        if given.shape[-1:] != (n_features,) or given.dim() > 2:
            raise FeatureIndexError(
                f"a boolean mask of shape {tuple(given.shape)} does not fit {n_features} features; "
                f"give ({n_features},) or (batch, {n_features})"
            )
        return Selection(mask=given.to(device))
    if given.dim() == 2:
        return Selection(mask=_rows(given.tolist(), n_features).to(device))
    return Selection(columns=_checked(given, n_features).to(device))


def positions_of(indices: Indices, numbers: Tensor, whole: int) -> Indices:
    """The columns of a slice that hold the features with these numbers.

    Args:
        indices: in any form but a `Selection`; a boolean mask may be of the slice or of the whole.
        numbers: of the features that the slice holds, ``(k,)``.
        whole: how many features there are in all.

    Raises:
        FeatureIndexError: a feature is not in the slice.
    """
    if isinstance(indices, slice):
        wanted = range(whole)[indices]
        return [column for column, number in enumerate(numbers.tolist()) if number in wanted]
    if indices is None or isinstance(indices, Selection):
        return indices
    if isinstance(indices, Sequence) and any(isinstance(row, Sequence | Tensor) for row in indices):
        return [cast("Sequence[int]", positions_of(row, numbers, whole)) for row in indices]  # type: ignore[arg-type]
    given = _tensor(indices)
    if given.dtype == torch.bool:
        return given[..., numbers.to(given.device)] if given.shape[-1] == whole else given
    if given.dim() == 2:
        return [cast("Sequence[int]", positions_of(row, numbers, whole)) for row in given]
    column_of = {number: column for column, number in enumerate(numbers.tolist())}
    if missing := [number for number in given.tolist() if number not in column_of]:
        raise FeatureIndexError(
            f"feature {missing[0]} is not among the {len(numbers)} of {whole} that were loaded; load it too"
        )
    return [column_of[number] for number in given.tolist()]


def _tensor(indices: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
    try:
        given = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FeatureIndexError(f"indices must be integers, not {indices!r}") from error
    if given.numel() == 0 and not isinstance(indices, Tensor):
        return torch.zeros(0, dtype=torch.long)
    if given.is_floating_point() or given.is_complex() or given.dim() not in (1, 2):
        raise FeatureIndexError(
            f"indices must be a list of integers, a list of such lists, or a boolean mask; got a tensor of "
            f"dtype {given.dtype} and shape {tuple(given.shape)}"
        )
    return given if given.dtype == torch.bool else given.long()


def _checked(columns: Tensor, n_features: int) -> Tensor:
    if columns.numel() == 0:
        return columns
    if (low := int(columns.min())) < 0 or (high := int(columns.max())) >= n_features:
        wrong = low if low < 0 else high
        raise FeatureIndexError(
            f"feature index {wrong} is out of range: there are {n_features} features, 0 to {n_features - 1}"
        )
    # counting is faster than sorting, but takes memory up to the largest index
    repeated = torch.bincount(columns).amax() > 1 if high < 2**20 else len(torch.unique(columns)) < len(columns)
    if repeated:
        raise FeatureIndexError("feature indices are repeated; give each feature once")
    return columns


def _rows(rows: Sequence[Sequence[int]], n_features: int) -> Tensor:
    mask = torch.zeros(len(rows), n_features, dtype=torch.bool)
    for i, row in enumerate(rows):
        if i and type(row) is list and row == rows[i - 1]:
            mask[i] = mask[i - 1]  # lists of thousands of numbers are mostly one list, repeated
            continue
        if not isinstance(row, Sequence | Tensor) or isinstance(row, str):
            raise FeatureIndexError(f"the indices of example {i} must be a list of integers, not {row!r}")
        columns = _tensor(row)
        if columns.dtype == torch.bool or columns.dim() != 1:
            raise FeatureIndexError(f"the indices of example {i} must be a list of integers, not {row!r}")
        mask[i, _checked(columns, n_features)] = True
    return mask

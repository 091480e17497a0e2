"""`Place`: a module's input or output, or a part of one, whose activations belong to a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featurizers.errors import SiteError
from featurizers.format.sites import Side


@dataclass(frozen=True)
class Place:
    """A site in one model.

    Attributes:
        path: name of the module in ``model.named_modules()``.
        module: the module.
        side: ``input`` for its first input, ``output`` for its (first) output.
        columns: part of the last axis that belongs to the site; None for the whole axis.
        groups: number of equal parts of the last axis that each have these columns. It is above 1 only for a projection
            that returns queries, keys and values head by head.
        stream: for ``resid.mid``, which no module returns: the place whose activations are added to those of this one.
        sum_reader: for ``resid.mid``, the place that must have the sum.
        tokens: for ``mlp.router``, the place that has the axes of the batch and the sequence.
        experts: for ``mlp.router``, the place of the experts, which must take what the router returns.
    """

    path: str
    module: nn.Module
    side: Side
    columns: slice | None = None
    groups: int = 1
    stream: Place | None = None
    sum_reader: Place | None = None
    tokens: Place | None = None
    experts: Place | None = None


def edit_columns(place: Place, whole: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Pass the columns of a place through ``edit``, and return all columns.

    Args:
        place: whose columns belong to its site.
        whole: the tensor that the place's module takes or returns.
        edit: gets the activations of the site; it returns those to go on with, or its own argument.

    Returns:
        ``whole`` itself if nothing was changed.
    """
    if place.columns is None:
        return edit(whole)
    grouped = _in_groups(whole, place.groups)
    chosen = grouped[..., place.columns].flatten(-2)
    edited = edit(chosen)
    if edited is chosen:
        return whole
    before, after = grouped[..., : place.columns.start], grouped[..., place.columns.stop :]
    return torch.cat([before, _in_groups(edited, place.groups), after], dim=-1).flatten(-2)


def _in_groups(hidden: Tensor, groups: int) -> Tensor:
    """Split the last axis into groups and their columns."""
    return hidden.reshape(*hidden.shape[:-1], groups, hidden.shape[-1] // groups)


def first_tensor(output: Any) -> Tensor:
    """Return the activations in a module's input or output: the tensor itself, or the first of a tuple.

    Raises:
        SiteError: there is no tensor.
    """
    tensor = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(tensor, Tensor):
        raise SiteError(f"the site carries {type(output).__name__}, not a tensor of activations; choose another module")
    return tensor

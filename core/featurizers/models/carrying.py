"""One operation on the activations of one site in one pass: for hooks, and for adapters that run models otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from featurizers.errors import ShapeError, UsageError
from featurizers.models.operations import Collect, Operation, SourcedOperation
from featurizers.models.positions import Pass, are_tokens, columns


def carry_out(
    operation: Operation, hidden: Tensor, current: Pass, source: Tensor | None = None, *, name: object = "the site"
) -> Tensor:
    """Return activations after an operation at one site.

    Whether an operation concerns the pass is the caller's to decide: one with positions or a source concerns the
    passes that compute the prompt, with ``current.start == 0``.

    Args:
        operation: at one site; any but `Collect`, which changes nothing (see `features_of`).
        hidden: activations of the site, ``(batch, sequence, d)``.
        current: the pass: its mask and tokens tell the columns of the operation's positions.
        source: activations ``(batch, n_positions, d)`` of an operation with a source.
        name: of the site, for errors.

    Returns:
        Activations to go on with; ``hidden`` itself for `Collect`.

    Raises:
        UsageError: the operation is through a map between sites, or a source is missing.
        PositionError: a prompt does not have a position, or its padding is not known.
        ShapeError: the source does not fit.
    """
    featurizer = operation.of_site
    if isinstance(operation, Collect):
        return hidden
    if source is None and isinstance(operation, SourcedOperation):
        raise UsageError(f"{name}: {type(operation).__name__} needs the activations of its source")
    chosen = columns(operation.positions, hidden, current, prompt_only=source is not None)
    base = gather(hidden, chosen)
    edited = operation.apply(base, None if source is None else fit(source, base, name))
    if special := featurizer.special_tokens:
        edited = torch.where(are_tokens(special, hidden, chosen, current), base, edited)
    return edited if chosen is None else scatter(hidden, chosen, edited)


def features_of(operation: Collect, hidden: Tensor, current: Pass) -> Tensor:
    """Return the features ``(batch, n_positions, k)`` that a `Collect` asks for.

    Args:
        operation: at one site.
        hidden: activations of the site, ``(batch, sequence, d)``.
        current: as in `carry_out`.

    Raises:
        PositionError: as in `carry_out`.
    """
    return operation.apply(gather(hidden, columns(operation.positions, hidden, current)), None)


def scatter(hidden: Tensor, chosen: Tensor, edited: Tensor) -> Tensor:
    """Replace columns of activations: the inverse of `gather`.

    Args:
        hidden: activations, ``(batch, sequence, d)``.
        chosen: columns, ``(batch, n)``.
        edited: what to put there, ``(batch, n, d)``.
    """
    return hidden.scatter(1, chosen.unsqueeze(-1).expand_as(edited), edited)


def gather(hidden: Tensor, chosen: Tensor | None) -> Tensor:
    """Return columns of activations, ``(batch, n, d)``.

    Args:
        hidden: activations, ``(batch, sequence, d)``.
        chosen: columns, ``(batch, n)``; None for all of ``hidden``.
    """
    if chosen is None:
        return hidden
    return hidden.gather(1, chosen.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def fit(source: Tensor, base: Tensor, name: object) -> Tensor:
    """Expand a source to the shape of base: a single position or example is repeated.

    Raises:
        ShapeError: the source fits no such shape; ``name`` is the site that the message names.
    """
    if source.dim() == 2 and base.shape[1] == 1:
        source = source.unsqueeze(1)
    try:
        if source.dim() == 2 and source.shape[0] != 1:
            raise RuntimeError("its rows may be examples or positions")
        return source.to(base.device).expand_as(base)
    except RuntimeError as error:
        raise ShapeError(
            f"{name}: the source has shape {tuple(source.shape)}, but the activations to edit have shape "
            f"{tuple(base.shape)} (batch, positions, width); give source_positions, or repeat the source where "
            "generate repeats the prompts"
        ) from error

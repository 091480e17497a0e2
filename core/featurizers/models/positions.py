"""From token positions in prompts to columns of the batch that a model computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from featurizers.errors import PositionError, ShapeError

Positions: TypeAlias = "None | Sequence[int] | Sequence[Sequence[int]] | Tensor"
"""Tokens of each prompt: ``None`` for all; ``[0, -1]`` for the same tokens of every prompt; ``(batch, n)`` for other
tokens of each prompt. Positions count the prompt's own tokens and not its padding: 0 is the first and -1 the last,
whichever side is padded."""

Inputs: TypeAlias = "Mapping[str, Any]"
"""Keyword arguments of a model, such as ``tokenizer(..., return_tensors="pt")``."""


@dataclass(frozen=True)
class Padding:
    """Columns of the tokens of padded prompts.

    Attributes:
        lengths: number of tokens of each prompt, ``(batch, 1)``.
        order: columns ``(batch, columns)``, those of tokens first, in their order.
    """

    lengths: Tensor
    order: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Padding:
        """Return the same of a mask ``(batch, columns)``, True for a token."""
        # a stable sort puts the columns of tokens, in their order, before those of padding
        return cls(mask.sum(-1, keepdim=True), torch.argsort((~mask).int(), dim=-1, stable=True))


@dataclass(frozen=True)
class Pass:
    """State of one forward pass.

    Attributes:
        start: number of tokens that are cached already: 0 for a prompt, more while generating.
        began: event, as `contexts.counter` numbers them, at which the first tokens of the prompt were computed; 0 if
            that was before the model was watched.
        attention_mask: ``(batch, total)``, 1 for a token and 0 for padding; None if nothing is padded.
        opaque_mask: whether the model was given texts, or a mask in a form that does not show the padding.
        prompt_columns: number of columns of the prompt, while ``generate`` runs; else None.
        tokens: ids ``(batch, sequence)`` that this pass computes; None if the model was given embeddings.
        has_position_ids: whether the model was given position ids.
        added_columns: number of columns that the model adds to those of the ids that it was given, as for virtual
            tokens.
        in_chunks: whether ``generate`` was asked to compute the prompt in parts.
        call: outermost module that was called, and its arguments by name.
    """

    start: int = 0
    began: int = 0
    attention_mask: Tensor | None = None
    opaque_mask: bool = False
    prompt_columns: int | None = None
    tokens: Tensor | None = None
    has_position_ids: bool = False
    added_columns: int = 0
    in_chunks: bool = False
    call: tuple[nn.Module, Mapping[str, Any]] | None = field(default=None, repr=False)
    _paddings: dict[int, Padding | None] = field(default_factory=dict, repr=False, compare=False)
    _columns: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def same_columns(self, chosen: tuple[int, ...], hidden: Tensor) -> Tensor:
        """Return the same columns for every example, ``(batch, n)``; made once for all sites of a pass on a device."""
        key = chosen, hidden.shape[0], hidden.device, torch.is_inference_mode_enabled()
        if (found := self._columns.get(key)) is None:
            made = torch.tensor(chosen, dtype=torch.long, device=hidden.device)
            found = self._columns[key] = made.expand(hidden.shape[0], -1)
        return found

    def padding(self, length: int) -> Padding | None:
        """Return where the tokens of each prompt are, if some column is padding; else None.

        Found once for all sites of a pass, on the CPU: a mask on another device is copied once.

        Args:
            length: number of columns of the prompt.
        """
        if self.attention_mask is None:
            return None
        if length not in self._paddings:
            mask = self.attention_mask[:, :length].to("cpu") != 0
            self._paddings[length] = None if mask.all() else Padding.of(mask)
        return self._paddings[length]


def columns(positions: Positions, hidden: Tensor, current: Pass, *, prompt_only: bool = False) -> Tensor | None:
    """Return the columns ``(batch, n)`` of ``hidden`` that hold some positions of the prompt; None for all columns.

    Call it only for passes that compute the prompt.

    Args:
        positions: of an operation.
        hidden: activations of the pass, ``(batch, sequence, d)``.
        current: the pass.
        prompt_only: whether ``positions=None`` means the prompt's columns where the pass also computes generated
            tokens.

    Raises:
        PositionError: a prompt is too short for a position, is computed in parts, or its padding is unknown.
        ShapeError: positions are given for activations that are not ``(batch, sequence, d)``.
    """
    if positions is None and (not prompt_only or current.prompt_columns in (None, *hidden.shape[1:2])):
        return None
    if hidden.dim() != 3:
        raise ShapeError(
            f"the site has activations {tuple(hidden.shape)}, not (batch, sequence, width): it has no positions"
        )
    if current.added_columns:
        raise PositionError(
            f"the model computes {current.added_columns:+} columns beside those of the ids that it was given, as "
            "prompt tuning adds virtual tokens, so that the columns of the prompt are not known; use positions=None, "
            "and in `generate` no source"
        )
    length = hidden.shape[1] if current.prompt_columns is None else current.prompt_columns
    if length > hidden.shape[1]:
        way_out = (
            "generate without prefill_chunk_size"
            if current.in_chunks
            else "call the model itself, or a `generate` that computes the whole prompt in its first pass"
        )
        raise PositionError(
            f"the prompt has {length} tokens, but `generate` computes {hidden.shape[1]} in this pass, so that the "
            f"prompt's end is not known; {way_out}"
        )
    batch = hidden.shape[0]
    if positions is None:
        return torch.arange(length, device=hidden.device).expand(batch, -1)
    if current.opaque_mask:
        raise PositionError(
            "the model was given texts, or an attention mask that is not of shape (batch, sequence), so padding cannot "
            "be told from tokens; pass token ids and a two-dimensional mask, or use positions=None"
        )
    padding = current.padding(length)
    if padding is None and isinstance(positions, list | tuple) and all(type(each) is int for each in positions):
        found: tuple[int, ...] = tuple([each + length if each < 0 else each for each in positions])
        if all(0 <= each < length for each in found):  # the usual case, in plain Python: it is many times as fast
            return current.same_columns(found, hidden)
    indices = _integers(positions, batch)
    lengths = torch.full((1, 1), length) if padding is None else padding.lengths
    from_start = torch.where(indices < 0, indices + lengths, indices)
    bad = (from_start < 0) | (from_start >= lengths)
    if bad.any():
        row, column = bad.expand(batch, -1).nonzero()[0].tolist()
        raise PositionError(
            f"position {int(indices.expand(batch, -1)[row, column])} is not in prompt {row}, which has "
            f"{int(lengths.expand(batch, 1)[row])} tokens"
        )
    chosen = from_start if padding is None else padding.order.gather(-1, from_start.expand(batch, -1))
    return chosen.to(hidden.device, non_blocking=True).expand(batch, -1)


def _integers(positions: Sequence[int] | Sequence[Sequence[int]] | Tensor, batch: int) -> Tensor:
    """Return positions as integers ``(1, n)`` or ``(batch, n)`` on the CPU, where they are checked without waiting.

    Raises:
        PositionError: they are something else.
    """
    try:
        indices = torch.as_tensor(positions, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise PositionError(
            f"positions must be a list of integers or one such list of equal length an example, not {positions!r}"
        ) from error
    if indices.is_floating_point() or indices.dtype == torch.bool or indices.dim() not in (1, 2):
        raise PositionError(f"positions must be a list of integers or one such list an example, not {positions!r}")
    if indices.dim() == 1:
        return indices.unsqueeze(0)
    if indices.shape[0] != batch:
        raise PositionError(f"positions are given for {indices.shape[0]} examples, but the batch has {batch}")
    return indices


def are_tokens(ids: Sequence[int], hidden: Tensor, chosen: Tensor | None, current: Pass) -> Tensor:
    """Return booleans ``(batch, n, 1)``: whether each chosen column of ``hidden`` holds one of some tokens.

    Args:
        ids: of the tokens.
        hidden: activations of the pass, ``(batch, sequence, d)``.
        chosen: columns ``(batch, n)``; None for all columns.
        current: the pass.

    Raises:
        PositionError: the model was not given token ids, or the site has no positions.
    """
    tokens = current.tokens
    if tokens is None or tokens.shape != hidden.shape[:2]:
        raise PositionError(
            "the featurizer does not edit special tokens, and the tokens of these activations are not known: give the "
            "model input_ids, and choose a site with an axis of positions"
        )
    tokens = tokens.to(hidden.device)
    chosen_tokens = tokens if chosen is None else tokens.gather(1, chosen)
    return torch.isin(chosen_tokens, torch.tensor(ids, device=hidden.device)).unsqueeze(-1)

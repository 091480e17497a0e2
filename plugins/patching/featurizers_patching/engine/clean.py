"""`CleanRun`: a run of prompts without edits, and what packed rows need of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from featurizers import Anatomy, Site
from featurizers.models import Place, Wrap, eager, first_tensor, without_cache, wrap_like
from torch import Tensor, nn

from featurizers_patching.engine.attention import Attender, Kernel, attention, weighted
from featurizers_patching.engine.cells import IntArray
from featurizers_patching.engine.ending import narrowed
from featurizers_patching.engine.scope import NotPackableError, entered, standing_in


@dataclass(frozen=True)
class Prompts:
    """Prompts of a sweep, padded on the right.

    Attributes:
        tokens: ids of each prompt.
        at: tokens whose logits are read, from 0, ``(prompts, n)``.
    """

    tokens: Sequence[Sequence[int]]
    at: IntArray

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.tokens)

    @property
    def width(self) -> int:
        """Length of the longest prompt."""
        return max(map(len, self.tokens))

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return the arguments of a model."""
        width = self.width
        ids = [[*row, *[0] * (width - len(row))] for row in self.tokens]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in self.tokens]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }


@dataclass
class Attended:
    """What the attention of one block computed in a clean run.

    Attributes:
        keys: after rotary embeddings, ``(prompts, tokens, heads, width)``.
        values: ``(prompts, tokens, heads, width)``.
        mask: what the model adds to the scores, ``(prompts or 1, tokens, tokens)``.
        weights: ``(prompts, heads, tokens, tokens)``, if they are to be frozen.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    weights: Tensor | None


class CleanRun(Attender):
    """A run of prompts without edits.

    Args:
        model: a decoder of `transformers` with its language-model head, in evaluation mode.
        anatomy: of the model.
        prompts: to run.
        freeze: modules whose outputs are kept: "attn.out", "mlp.out"; "attn.pattern" for attention weights.

    Attributes:
        resid: input of each block and output of the last, ``(prompts * tokens, d)``.
        blocks: by block, what its attention computed.
        frozen: by kind and block, outputs of frozen modules ``(prompts * tokens, d)``.
        logits: at the tokens that are read, ``(prompts, n, vocabulary)``.

    Raises:
        NotPackableError: the model cannot run on packed rows.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, prompts: Prompts, freeze: Sequence[str] = ()) -> None:
        self.model, self.anatomy, self.prompts = model, anatomy, prompts
        self.layers: Sequence[nn.Module] = anatomy.layers  # type: ignore[assignment]
        self.shape = len(prompts), prompts.width
        self.device = next(model.parameters()).device
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise NotPackableError("it is spread over several devices")
        self._patterns = "attn.pattern" in freeze
        self._output: Tensor | None = None  # of the block before
        self.resid: list[Tensor] = []
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.wraps: list[Wrap] = []
        self.blocks: list[Attended] = []
        self.frozen: dict[tuple[str, int], Tensor] = {}
        self.frozen_wraps: dict[tuple[str, int], Wrap] = {}
        self.logits = self._run([kind for kind in freeze if kind != "attn.pattern"])
        self._check()

    def _run(self, freeze: Sequence[str]) -> Tensor:
        config: Any = getattr(self.model, "config", None)
        if not hasattr(config, "get_text_config"):
            raise NotPackableError("it is no model of transformers")
        at = torch.as_tensor(self.prompts.at, device=self.device)
        with eager(), ExitStack() as stack:
            stack.enter_context(entered(self.model, self))
            stack.enter_context(attention(config.get_text_config()))
            for number, block in enumerate(self.layers):
                stack.enter_context(standing_in(block, self, functools.partial(self._noting, number, block.forward)))
                for kind in freeze:
                    place = self.anatomy.place(Site(kind, number))
                    note = functools.partial(self._note_output, (kind, number), place)
                    stack.callback(place.module.register_forward_hook(note).remove)
            stack.enter_context(narrowed(self.model, self, at))
            inputs = self.prompts.inputs(self.device)
            logits: Tensor = self.model(**inputs, **without_cache(self.model)).logits
        return logits[:, : at.shape[1]]

    def _noting(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block, and note what it is given and what it returns."""
        given = dict(kwargs)
        hidden = args[0] if args else given.pop("hidden_states", None)
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != self.shape or number != len(self.arguments):
            raise NotPackableError("its blocks do not take (batch, tokens, width) one after another")
        flat = hidden.reshape(-1, hidden.shape[-1])
        if number and hidden is not self._output and not torch.equal(flat, self.resid[number]):
            raise NotPackableError(f"something changes the residual stream between blocks {number - 1} and {number}")
        if not number:
            self.resid.append(flat.clone())
        self.arguments.append((args[1:], given))
        output = forward(*args, **kwargs)
        if len(self.blocks) != number + 1:
            raise NotPackableError(f"block {number} has no attention that goes through transformers' interface")
        self._output = first_tensor(output)
        self.resid.append(self._output.reshape(-1, hidden.shape[-1]).clone())
        self.wraps.append(wrap_like(output))
        return output

    def _note_output(self, key: tuple[str, int], place: Place, _: nn.Module, __: Any, output: Any) -> None:
        tensor = first_tensor(output)
        self.frozen[key], self.frozen_wraps[key] = tensor.reshape(-1, tensor.shape[-1]).clone(), wrap_like(output)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: Kernel) -> Tensor:
        """Attend as the model does, and keep keys, values and the mask."""
        length = query.shape[2]
        if key.shape[2] != length or len(self.blocks) != len(self.arguments) - 1:
            raise NotPackableError("its attention reads other tokens than those of its block")
        mask = self._additive(mask, query, kernel.causal)
        weights = kernel.weights(query, key, mask.unsqueeze(1)) if self._patterns else None
        out = kernel(query, key, value, mask.unsqueeze(1)) if weights is None else weighted(weights, value)
        keys, values = (x.transpose(1, 2).contiguous() for x in (key, value))
        self.blocks.append(Attended(keys, values, mask, weights))
        return out.transpose(1, 2).contiguous()

    def _additive(self, mask: Tensor | None, query: Tensor, causal: bool) -> Tensor:
        """Return a mask to add to scores, ``(prompts or 1, tokens, tokens)``."""
        length, low = query.shape[2], torch.finfo(query.dtype).min
        if mask is None:
            allowed = torch.ones(1, length, length, dtype=torch.bool, device=query.device)
            mask = allowed.tril() if causal else allowed
        elif mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != length:
            raise NotPackableError("its attention mask differs by head")
        else:
            mask = mask[:, 0, :, :length]
        return query.new_zeros(mask.shape).masked_fill(~mask, low) if mask.dtype == torch.bool else mask

    def _check(self) -> None:
        """Raise NotPackableError unless every block's attention is causal."""
        width = self.shape[1]
        later = torch.ones(width, width, dtype=torch.bool, device=self.device).triu(1)
        masks = {block.mask.data_ptr(): block.mask for block in self.blocks}  # blocks share most masks
        if any(bool((mask.masked_select(later) > torch.finfo(mask.dtype).min / 2).any()) for mask in masks.values()):
            raise NotPackableError("its attention lets tokens see later ones")

    # ------------------------------------------------------------------ for packed rows

    def rows(self, block: int, row: Tensor) -> Tensor:
        """Return clean inputs of a block at some tokens, ``(rows, d)``.

        Args:
            block: number of the block; the number of blocks for the output of the last.
            row: prompt times the width of the prompts, plus the token.
        """
        return self.resid[block].index_select(0, row)

    def packed_arguments(self, block: int, pair: Tensor, token: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a block's arguments beside its input, for packed rows.

        Raises:
            NotPackableError: there is one whose meaning for single tokens is not known.
        """
        args, kwargs = self.arguments[block]
        packed = functools.partial(self._packed, pair, token)
        return tuple(map(packed, args)), {name: packed(value) for name, value in kwargs.items()}

    def _packed(self, pair: Tensor, token: Tensor, value: Any) -> Any:
        batch, width = self.shape
        if isinstance(value, tuple | list):
            return type(value)(self._packed(pair, token, each) for each in value)
        if isinstance(value, dict):
            return {key: self._packed(pair, token, each) for key, each in value.items()}
        if isinstance(value, bool | int | float | str | torch.dtype | None):
            return value
        if not isinstance(value, Tensor):
            raise NotPackableError(f"its blocks take a {type(value).__name__}")
        if value.dim() == 4 and value.shape[1] == 1 and value.shape[2] == width:
            return None  # a mask: attention has its own
        if value.dim() >= 2 and value.shape[1] == width and value.shape[0] in (1, batch):
            return value[pair if value.shape[0] == batch else torch.zeros_like(pair), token].unsqueeze(0)
        if value.dim() == 1 and value.shape[0] == width:
            return value[token]
        if value.numel() == 1:
            return value
        raise NotPackableError(f"its blocks take a tensor {tuple(value.shape)}")

"""Where the activations of each layer come from, and what their energy is: `HiddenStates` and `WholeModel`."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping, Sequence
from typing import final

import torch
from featurizers import Anatomy
from featurizers.errors import ShapeError, UsageError
from featurizers.format import Side
from featurizers.models import Inputs, collect
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_causal_basis.differentiated import DifferentiatedEnergy
from featurizers_causal_basis.energy import Energy, Tokens
from featurizers_causal_basis.exact import ExactEnergy
from featurizers_causal_basis.inputs import inputs_of, mask_of, rows_of
from featurizers_causal_basis.massive import warn_of_massive
from featurizers_causal_basis.readouts import AffineNorm, Readout, hash_of
from featurizers_causal_basis.record import Mode
from featurizers_causal_basis.reduction import Processes
from featurizers_causal_basis.remainder import Remainder

PART = 2**24
"""Logits that autograd works on at a time."""


class Layers(abc.ABC):
    """The layers whose bases are wanted, and the energy at each."""

    readout: str
    mask_rule: str

    @property
    @abc.abstractmethod
    def numbers(self) -> Sequence[int]:
        """The layers that there are."""

    @property
    @abc.abstractmethod
    def sha256(self) -> str | None:
        """Hash of the readout."""

    @property
    @abc.abstractmethod
    def unembedding(self) -> Float[Tensor, "vocabulary d"] | None:
        """The matrix that makes logits, whose singular vectors are places to start from; None if it is not known."""

    @abc.abstractmethod
    def energy(self, layer: int, mode: Mode, processes: Processes, seed: int) -> Energy:
        """The energy at a layer."""


@final
class HiddenStates(Layers):
    """Hidden states of each layer, read by a readout token by token.

    Args:
        readout: what reads them.
        hiddens: activations of each layer ``(..., d)``, or token ids (with what else the readout's model is called
            with), from which they are collected layer by layer.
        mask: which tokens take part ``(...)``.
        side: of the blocks.
        batch_size: prompts that are run together, for token ids.

    Raises:
        UsageError: there are none, or too many; the readout has no model to run token ids through.
        ShapeError: tensors are not what they should be, or of different widths.
    """

    def __init__(
        self, readout: Readout, hiddens: Sequence[Tensor] | Inputs, mask: Tensor | None, side: Side, batch_size: int
    ) -> None:
        self._readout, self.readout, self._side, self._batch_size = readout, readout.name, side, batch_size
        self.mask_rule, self._inputs, self._hiddens = "every token", None, []
        if isinstance(hiddens, Mapping):
            if readout.model is None:
                raise UsageError(
                    f"{readout.name} has no model to run token ids through; give the activations of each layer"
                )
            refuse_training(readout.model)
            self._inputs, self._mask, self.mask_rule = inputs_of(hiddens, mask)
            count: int = Anatomy(readout.model).n_layers
        else:
            self._hiddens = _activations(hiddens, readout, side)
            count = len(self._hiddens)
            self._mask = mask_of(mask, self._hiddens[0].shape[:-1])
            if mask is not None:
                self.mask_rule = "as the mask says"
        self._numbers = range(count)

    @property
    def numbers(self) -> Sequence[int]:
        """See `Layers.numbers`."""
        return self._numbers

    @property
    def sha256(self) -> str | None:
        """See `Layers.sha256`."""
        return self._readout.sha256

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary d"] | None:
        """See `Layers.unembedding`."""
        return self._readout.unembedding

    def energy(self, layer: int, mode: Mode, processes: Processes, seed: int) -> Energy:
        """See `Layers.energy`: by the formula if the readout has one."""
        hidden = self._hidden(layer)
        mask = self._mask.to(hidden.device)
        warn_of_massive(hidden if hidden.dim() > 1 else hidden.unsqueeze(0), mask)
        tokens = Tokens.of(hidden[mask], mode, processes, seed)
        depth = layer + (self._side == "output")
        form = self._readout.affine_norm(depth)
        if form is not None:
            return ExactEnergy(tokens, self._fitting(form, tokens))
        with torch.no_grad():
            vocabulary = self._readout.log_probs(tokens.h[:1], depth).shape[-1] if len(tokens.h) else 1
        step = max(1, PART // vocabulary)
        parts = [slice(i, i + step) for i in range(0, len(tokens.h), step)]
        return DifferentiatedEnergy(tokens, parts, lambda h, _: self._readout.log_probs(h, depth))

    def _hidden(self, layer: int) -> Tensor:
        if self._inputs is None:
            return self._hiddens[layer]
        model, inputs = self._readout.model, self._inputs
        site = f"resid.{'pre' if self._side == 'input' else 'post'}:{layer}"
        n = len(inputs["input_ids"])
        size = self._batch_size
        parts = [rows_of(inputs, slice(i, i + size), n) for i in range(0, n, size)]
        return torch.cat([collect(model, part, [site])[site] for part in parts])  # type: ignore[arg-type]

    @staticmethod
    def _fitting(form: AffineNorm, tokens: Tokens) -> AffineNorm:
        width = form.unembedding.shape[1]
        if width != tokens.h.shape[1]:
            raise ShapeError(f"the readout is of width {width}, the activations are {tokens.h.shape[1]} wide")
        return form


@final
class WholeModel(Layers):
    """A whole model: the energy is of its own output, with the hidden states of a layer ablated.

    Args:
        model: a decoder with its language-model head, in evaluation mode.
        inputs: token ids with what else it is called with.
        mask: which tokens are ablated, and whose divergences are averaged; the attention mask if None.
        side: of the blocks.
        batch_size: prompts that are run together.

    Raises:
        UsageError: the model is in training mode, or has no head.
    """

    readout = "model"

    def __init__(self, model: nn.Module, inputs: Inputs, mask: Tensor | None, side: Side, batch_size: int) -> None:
        refuse_training(model)
        self._model, self._side, self._batch_size = model, side, batch_size
        self._inputs, self._mask, self.mask_rule = inputs_of(inputs, mask)
        self._anatomy = Anatomy(model)

    @property
    def numbers(self) -> Sequence[int]:
        """See `Layers.numbers`."""
        return range(self._anatomy.n_layers)

    @functools.cached_property
    def sha256(self) -> str:
        """See `Layers.sha256`: of the model's parameters and buffers."""
        return hash_of(self._model.state_dict().values())

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary d"] | None:
        """See `Layers.unembedding`."""
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        return head.weight.detach() if isinstance(head, nn.Linear) else None

    def energy(self, layer: int, mode: Mode, processes: Processes, seed: int) -> Energy:
        """See `Layers.energy`: by autograd, through the blocks after the layer alone."""
        n, size = len(self._inputs["input_ids"]), self._batch_size
        depth = layer + (self._side == "output")
        remainders, masks, parts, start = [], [], [], 0
        for i in range(0, n, size):
            mask = self._mask[i : i + size]
            if not mask.any():
                continue
            remainders.append(Remainder(self._model, rows_of(self._inputs, slice(i, i + size), n), depth))
            masks.append(mask.to(remainders[-1].hidden.device))
            parts.append(slice(start, start := start + int(mask.sum())))
            warn_of_massive(remainders[-1].hidden, masks[-1])
        taking_part = [part.hidden[mask] for part, mask in zip(remainders, masks, strict=True)]
        dtype = torch.promote_types(taking_part[0].dtype, torch.float32)

        def log_probs(h: Tensor, number: int) -> Tensor:
            remainder, mask = remainders[number], masks[number]
            hidden = remainder.hidden.index_put((mask,), h.to(remainder.hidden.dtype))
            logits = remainder(hidden)
            return logits[mask.to(logits.device)].to(dtype).log_softmax(dim=-1)

        tokens = Tokens.of(torch.cat(taking_part), mode, processes, seed)
        return DifferentiatedEnergy(tokens, parts, log_probs)


def refuse_training(model: nn.Module) -> None:
    """Raise a `UsageError` if the model is in training mode.

    Raises:
        UsageError: it is.
    """
    if model.training:
        raise UsageError("the model is in training mode, in which dropout changes every run; call model.eval()")


def _activations(hiddens: Sequence[Tensor], readout: Readout, side: Side) -> list[Tensor]:
    """The activations of each layer, checked."""
    found = list(hiddens)
    if not found or not all(isinstance(h, Tensor) and h.is_floating_point() and h.dim() >= 2 for h in found):
        raise ShapeError("the activations are a sequence of real tensors (..., d), one a layer: [h] for one layer")
    if len({h.shape for h in found}) != 1:
        shapes = ", ".join(sorted({str(tuple(h.shape)) for h in found}))
        raise ShapeError(f"the layers' activations have the same shape, got {shapes}")
    if readout.n_layers is not None:
        if side == "input" and len(found) == readout.n_layers + 1:
            found.pop()  # what transformers puts last is no block's input, and is normalised already
        if len(found) > readout.n_layers:
            raise ShapeError(
                f"the model has {readout.n_layers} blocks, and {len(found)} layers' activations are given for their "
                f"{side}"
            )
    return [h.detach() for h in found]

"""`Layers`: the activations of each layer with their readout, as `HiddenStates` or as a `WholeModel`."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping, Sequence
from typing import final

import torch
from featurizers import Anatomy
from featurizers.errors import ShapeError, UsageError
from featurizers.format import Side, fingerprint
from featurizers.models import Inputs, collect, head_of
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_causal_basis.featurizer import SITES
from featurizers_causal_basis.inputs import (
    batches,
    checked_inputs,
    refuse_training,
    selected_tokens,
    warn_of_massive,
)
from featurizers_causal_basis.lens import Readout
from featurizers_causal_basis.solve.differentiated import DifferentiatedEnergy
from featurizers_causal_basis.solve.energy import Energy, Tokens
from featurizers_causal_basis.solve.exact import ExactEnergy
from featurizers_causal_basis.solve.options import ExtractionOptions
from featurizers_causal_basis.solve.processes import Processes
from featurizers_causal_basis.solve.remainder import Remainder

PART = 2**24
"""Number of logits per part, for autograd."""


class Layers(abc.ABC):
    """Layers of a model, and the energy at each.

    Attributes:
        count: number of layers.
        readout: name of the readout.
        mask_rule: the rule that selected the tokens, in words.
        unembedding: matrix that makes logits, whose singular vectors the search starts from; None if unknown.
    """

    count: int
    readout: str
    mask_rule: str
    unembedding: Float[Tensor, "vocabulary d"] | None

    @property
    @abc.abstractmethod
    def sha256(self) -> str | None:
        """Hash of the readout's tensors; None if unknown."""

    @abc.abstractmethod
    def energy(self, layer: int, processes: Processes) -> Energy:
        """Return the energy at a layer."""


@final
class HiddenStates(Layers):
    """Hidden states of each layer, read by a readout token by token.

    Args:
        readout: reads the hidden states.
        hiddens: activations of each layer ``(..., d)``, or inputs of the readout's model, from which they are
            collected layer by layer.
        options: of the extraction.

    Raises:
        UsageError: there is no layer, or more than the model has; the readout has no model to run token ids through.
        ShapeError: the tensors are not activations, or their shapes differ.
    """

    def __init__(self, readout: Readout, hiddens: Sequence[Tensor] | Inputs, options: ExtractionOptions) -> None:
        self._readout, self._options = readout, options
        self.readout, self.unembedding = readout.name, readout.unembedding
        self.mask_rule, self._inputs, self._hiddens = "every token", None, []
        if isinstance(hiddens, Mapping):
            if readout.model is None:
                raise UsageError(
                    f"{readout.name} has no model to run token ids through; give the activations of each layer"
                )
            refuse_training(readout.model)
            self._inputs, self._mask, self.mask_rule = checked_inputs(hiddens, options.mask)
            self.count = Anatomy(readout.model).n_layers
        else:
            self._hiddens = _checked_activations(hiddens, readout, options.side)
            self.count = len(self._hiddens)
            self._mask = selected_tokens(options.mask, self._hiddens[0].shape[:-1])
            if options.mask is not None:
                self.mask_rule = "as the mask says"

    @property
    def sha256(self) -> str | None:
        """See `Layers.sha256`."""
        return self._readout.sha256

    def energy(self, layer: int, processes: Processes) -> Energy:
        """See `Layers.energy`. In closed form if the readout has one."""
        hidden = self._hidden(layer)
        mask = self._mask.to(hidden.device)
        warn_of_massive(hidden, mask)
        tokens = Tokens.of(hidden[mask], self._options.mode, processes, self._options.seed)
        depth = layer + (self._options.side == "output")
        form = self._readout.affine_norm(depth)
        if form is not None:
            width = form.unembedding.shape[1]
            if width != tokens.h.shape[1]:
                raise ShapeError(f"the readout is of width {width}, the activations are {tokens.h.shape[1]} wide")
            return ExactEnergy(tokens, form)
        with torch.no_grad():
            vocabulary = self._readout.log_probs(tokens.h[:1], depth).shape[-1] if len(tokens.h) else 1
        step = max(1, PART // vocabulary)
        parts = [slice(i, i + step) for i in range(0, len(tokens.h), step)]
        return DifferentiatedEnergy(tokens, parts, lambda h, _: self._readout.log_probs(h, depth))

    def _hidden(self, layer: int) -> Tensor:
        model, inputs = self._readout.model, self._inputs
        if model is None or inputs is None:
            return self._hiddens[layer]
        site = f"{SITES[self._options.side]}:{layer}"
        return torch.cat([collect(model, part, [site])[site] for _, part in batches(inputs, self._options.batch_size)])


@final
class WholeModel(Layers):
    """A whole model: the energy of its own output, with the hidden states of a layer ablated.

    Args:
        model: a decoder with its language-model head, in evaluation mode.
        inputs: of the model, with token ids.
        options: of the extraction. The mask selects the tokens that are ablated and whose divergences are averaged.

    Raises:
        UsageError: the model is in training mode.
    """

    readout = "model"

    def __init__(self, model: nn.Module, inputs: Inputs, options: ExtractionOptions) -> None:
        refuse_training(model)
        self._model, self._options = model, options
        self._inputs, self._mask, self.mask_rule = checked_inputs(inputs, options.mask)
        self.count, head = Anatomy(model).n_layers, head_of(model)
        self.unembedding = head.weight.detach() if isinstance(head, nn.Linear) else None

    @functools.cached_property
    def sha256(self) -> str:
        """See `Layers.sha256`. Covers the model's parameters and buffers."""
        return fingerprint(self._model.state_dict().values())

    def energy(self, layer: int, processes: Processes) -> Energy:
        """See `Layers.energy`. By autograd through the blocks after the layer."""
        depth = layer + (self._options.side == "output")
        remainders, masks, parts, start = [], [], [], 0
        for rows, inputs in batches(self._inputs, self._options.batch_size):
            mask = self._mask[rows]
            if not mask.any():
                continue
            remainders.append(Remainder(self._model, inputs, depth))
            masks.append(mask.to(remainders[-1].hidden.device))
            parts.append(slice(start, start := start + int(mask.sum())))
            warn_of_massive(remainders[-1].hidden, masks[-1])
        activations = torch.cat([part.hidden[mask] for part, mask in zip(remainders, masks, strict=True)])
        dtype = torch.promote_types(activations.dtype, torch.float32)

        def log_probs(h: Tensor, number: int) -> Tensor:
            remainder, mask = remainders[number], masks[number]
            hidden = remainder.hidden.index_put((mask,), h.to(remainder.hidden.dtype))
            logits = remainder(hidden)
            return logits[mask.to(logits.device)].to(dtype).log_softmax(dim=-1)

        tokens = Tokens.of(activations, self._options.mode, processes, self._options.seed)
        return DifferentiatedEnergy(tokens, parts, log_probs)


def _checked_activations(hiddens: Sequence[Tensor], readout: Readout, side: Side) -> list[Tensor]:
    """Return the activations of each layer after checking them against each other and the readout."""
    layers = list(hiddens)
    if not layers or not all(isinstance(h, Tensor) and h.is_floating_point() and h.dim() >= 2 for h in layers):
        raise ShapeError("the activations are a sequence of real tensors (..., d), one per layer: [h] for one layer")
    if len({h.shape for h in layers}) != 1:
        shapes = ", ".join(sorted({str(tuple(h.shape)) for h in layers}))
        raise ShapeError(f"the activations of all layers must have the same shape, got {shapes}")
    if readout.n_layers is not None:
        if side == "input" and len(layers) == readout.n_layers + 1:
            layers.pop()  # the last entry of transformers' hidden_states is the normalised output, no block's input
        if len(layers) > readout.n_layers:
            raise ShapeError(
                f"the model has {readout.n_layers} blocks, and {len(layers)} layers' activations are given for their "
                f"{side}"
            )
    return [h.detach() for h in layers]

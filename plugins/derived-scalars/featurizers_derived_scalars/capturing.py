"""`capture`: runs a decoder once a sequence, and keeps the activations and gradients that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.circuit import Circuit
from featurizers_derived_scalars.metrics import LogitFunction, Metric
from featurizers_derived_scalars.places import Need, Place

Inputs: TypeAlias = "Tensor | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Tensor]"


@dataclass(frozen=True)
class Edit:
    """A change to make while the model runs.

    Attributes:
        place: any that a module or the attention function holds: not a scale, a bias, ``attn.logits`` or ``logits``.
        function: from the activations of one sequence to those that replace them, of the same shape.
    """

    place: Place
    function: Callable[[Tensor], Tensor]


def capture(
    model: nn.Module | Circuit,
    inputs: Inputs,
    needs: Iterable[Need],
    *,
    metric: Metric | LogitFunction | None = None,
    freeze_norms: Iterable[str] = ("final",),
    edits: Iterable[Edit] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[RawActivations]:
    """What the needs name, of each sequence (interface; body follows).

    Args:
        model: a decoder of `transformers` with its head, or its `Circuit`, which saves looking at it again.
        inputs: token ids of one sequence or of several; or a tokenizer's output with ``attention_mask``, of which
            the padding is dropped on either side.
        needs: what to keep. Backward needs want a metric.
        metric: scalar whose gradient is taken: a `Metric`, or a function of the logits ``(token, vocab)``.
        freeze_norms: norms whose scale the gradient takes as constant: of ``final``, ``attn``, ``mlp``,
            ``attn.post``, ``mlp.post``.
        edits: changes to make on the way, in order.
        device: where to put what is kept; where the model has it if None.
        dtype: of what is kept; as the model has it if None.
    """
    raise NotImplementedError

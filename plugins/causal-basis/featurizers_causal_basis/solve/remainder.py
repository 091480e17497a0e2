"""`Remainder`: the part of a model after a layer, as a function of the hidden states there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, final

import torch
from featurizers import Anatomy
from featurizers.errors import UsageError
from featurizers.models import Inputs, Wrap, eager, hook, restarted, wrap_like
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_causal_basis.lens import agree


@final
class Remainder:
    """Logits of a model for some prompts as a function of the hidden states at a depth.

    The blocks before the depth are skipped, which is verified once against a full run. A model whose later blocks read
    more of the earlier ones than their output runs as a whole.

    Args:
        model: a decoder with its language-model head, in evaluation mode.
        inputs: of the model.
        depth: number of blocks before the hidden states.

    Attributes:
        hidden: states of the unedited model, ``(batch, sequence, d)``.
        skipping: True if the blocks before the depth are skipped.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, depth: int) -> None:
        anatomy = Anatomy(model)
        self._model, self._depth = model, depth
        self._blocks: nn.ModuleList = anatomy.layers  # type: ignore[assignment]
        self._inputs = {"use_cache": False, **inputs}
        self._place = anatomy.place(f"resid.pre:{depth}" if depth == 0 else f"resid.post:{depth - 1}")
        self._wraps: list[Wrap] = []
        seen: list[Tensor] = []

        def keep_form(_: nn.Module, __: Any, output: Any) -> None:
            self._wraps.append(wrap_like(output, keep_rest=True))

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden.detach().clone())
            return hidden

        with eager(), torch.no_grad(), ExitStack() as hooks:
            for block in self._blocks[:depth]:
                hooks.callback(block.register_forward_hook(keep_form).remove)
            hooks.callback(hook(self._place, keep).remove)
            logits: Tensor = model(**self._inputs).logits
        if len(seen) != 1:
            raise UsageError(f"the model ran {len(seen)} times through the layer in one pass, not once")
        self.hidden = seen[0]
        self.skipping = True
        with torch.no_grad():
            self.skipping = agree(self(self.hidden), logits)

    def __call__(self, hidden: Float[Tensor, "batch sequence d"]) -> Float[Tensor, "batch sequence vocabulary"]:
        """Return the logits for given hidden states."""
        with eager(), ExitStack() as stack:
            if self.skipping:
                stack.enter_context(restarted(self._blocks, self._depth - 1, hidden, self._wraps))
            stack.callback(hook(self._place, lambda _: hidden).remove)
            logits: Tensor = self._model(**self._inputs).logits
        return logits

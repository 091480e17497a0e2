"""`Remainder`: the part of a model after one layer, as a function of the hidden states there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from featurizers import Anatomy
from featurizers.errors import UsageError
from featurizers.models import Inputs, first_tensor, hook
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_causal_basis.lens.norms import AGREES


@final
class Remainder:
    """Logits of a model on some prompts as a function of the hidden states at one depth.

    The blocks before the depth are passed over, which is checked once against a full run; where a model's later blocks
    want more of the earlier ones than their output, the whole model is run each time.

    Args:
        model: a decoder with its language-model head, in evaluation mode.
        inputs: what it is called with.
        depth: how many blocks are before the hidden states.

    Attributes:
        hidden: of the model as it is, ``(batch, sequence, d)``.
        skipping: whether the blocks before the depth are passed over.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, depth: int) -> None:
        self._model = model
        self._anatomy = Anatomy(model)
        self._inputs = {"use_cache": False, **inputs}
        self._depth = depth
        self._place = self._anatomy.place(f"resid.pre:{depth}" if depth == 0 else f"resid.post:{depth - 1}")
        self._outputs: list[Any] = [None] * depth
        kept: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            kept.append(hidden.detach().clone())
            return hidden

        with torch.no_grad(), ExitStack() as hooks:
            for number in range(depth):
                handle = self._block(number).register_forward_hook(functools.partial(self._keep_rest, number))
                hooks.callback(handle.remove)
            hooks.callback(hook(self._place, keep).remove)
            logits: Tensor = model(**self._inputs).logits
        if len(kept) != 1:
            raise UsageError(f"the model ran {len(kept)} times through the layer in one pass, not once")
        self.hidden = kept[0]
        self.skipping = True
        with torch.no_grad():
            again = self(self.hidden)
        allowed = AGREES.get(logits.dtype, 1e-5) * float(logits.abs().max())
        self.skipping = again.shape == logits.shape and float((again - logits).abs().max()) <= allowed

    def __call__(self, hidden: Float[Tensor, "batch sequence d"]) -> Float[Tensor, "batch sequence vocabulary"]:
        """Logits with these hidden states instead."""
        with ExitStack() as hooks:
            hooks.callback(hook(self._place, lambda _: hidden).remove)
            if self.skipping:
                hooks.enter_context(self._passed_over())
            logits: Tensor = self._model(**self._inputs).logits
        return logits

    def _block(self, number: int) -> nn.Module:
        return self._anatomy.layers[number]  # type: ignore[index,no-any-return]

    def _keep_rest(self, number: int, block: nn.Module, args: Any, output: Any) -> None:
        """Remember what a block returns beside the hidden states."""
        first_tensor(output)
        self._outputs[number] = output[1:] if isinstance(output, tuple) else None

    @contextmanager
    def _passed_over(self) -> Iterator[None]:
        """The blocks before the depth return what they are given."""
        before = []
        try:
            for number in range(self._depth):
                block = self._block(number)
                before.append((block, vars(block).get("forward")))
                vars(block)["forward"] = functools.partial(_pass_on, self._outputs[number])
            yield
        finally:
            for block, forward in before:
                del vars(block)["forward"]
                if forward is not None:
                    vars(block)["forward"] = forward


def _pass_on(rest: tuple[Any, ...] | None, *args: Any, **kwargs: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden if rest is None else (hidden, *rest)

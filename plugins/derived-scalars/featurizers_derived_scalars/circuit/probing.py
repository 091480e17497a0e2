"""`Trace`: the tensors of one short run of a model, and the checks that compare them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Final, NoReturn

import torch
from featurizers.errors import FeaturizerError, SiteError, one_line
from featurizers.models import evaluating
from torch import Tensor, nn

from featurizers_derived_scalars.circuit.attention import Listener, Part, implementation
from featurizers_derived_scalars.circuit.running import Point, run

PROMPT_LENGTH: Final = 5
HELP: Final = "Write a plugin with the hook featurizers_circuits."


class Trace(Listener):
    """Inputs and outputs of a model's modules on one short prompt, and the parts of its attention.

    Args:
        model: the model to run.
        points: the inputs and outputs to keep.

    Raises:
        SiteError: the model cannot run the prompt.
    """

    def __init__(self, model: nn.Module, points: Iterable[Point]) -> None:
        self._model = model
        self._tensors: dict[Point, Tensor] = {}
        self._attention: dict[nn.Module, dict[Part, Tensor]] = {}
        taps = {point: functools.partial(self._keep, point) for point in points}
        with torch.no_grad(), evaluating(model):
            try:
                answer = run(model, _prompt(model), taps, listener=self)
            except FeaturizerError:
                raise
            except Exception as error:
                problem = f"it cannot run a prompt of {PROMPT_LENGTH} tokens: {type(error).__name__}: {one_line(error)}"
                raise SiteError(f"{type(model).__name__}: {problem}") from error
        self.logits: Tensor | None = getattr(answer, "logits", None)

    def _keep(self, point: Point, tensor: Tensor) -> Tensor:
        self._tensors[point] = batched(tensor)
        return tensor

    def wants_logits(self, module: nn.Module) -> bool:
        """Return False."""
        return False

    def on_event(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        """Keep the tensor and return it."""
        self._attention.setdefault(module, {})[part] = tensor
        return tensor

    def attention(self, path: str) -> dict[Part, Tensor]:
        """Return the parts of attention in one module; empty if it did not use the attention interface."""
        return self._attention.get(self._model.get_submodule(path), {})

    def input(self, path: str) -> Tensor | None:
        """Return the input of a module; None if its first argument was no tensor, or it was not called."""
        return self._tensors.get((path, "input"))

    def output(self, path: str) -> Tensor | None:
        """Return the output of a module; None if it was not called."""
        return self._tensors.get((path, "output"))


def batched(tensor: Tensor) -> Tensor:
    """Return a tensor with a batch axis; some models drop it inside an MLP."""
    return tensor if tensor.dim() == 3 else tensor[None]


def by_plain_attention(model: nn.Module, last: str) -> Tensor | None:
    """Return the output of the block ``last`` on the same prompt, computed with the model's own eager attention."""
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(batched(tensor))
        return tensor

    with torch.no_grad(), evaluating(model), implementation(model, "eager"):
        run(model, _prompt(model), {(last, "output"): keep}, stop_after=last)
    return seen[-1] if seen else None


def _prompt(model: nn.Module) -> Tensor:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(1, PROMPT_LENGTH + 1, device=embeddings.weight.device)
    return ids % int(embeddings.weight.shape[0])


def same(first: Tensor | None, second: Tensor | None) -> bool:
    """Return True if both tensors are there and equal in every bit."""
    return first is not None and second is not None and first.shape == second.shape and torch.equal(first, second)


def agree(model: nn.Module, first: Tensor, second: Tensor, problem: str) -> None:
    """Refuse a model in which two tensors differ by more than its dtype explains.

    Raises:
        SiteError: they do; ``problem`` says what is wrong.
    """
    tolerance = 1e-3 if second.dtype in (torch.float32, torch.float64) else 5e-2
    first, second = first.double(), second.double().view(first.shape)
    if float((first - second).norm()) > tolerance * float(second.norm()):
        refuse(model, problem)


def refuse(model: nn.Module, problem: str) -> NoReturn:
    """Raise a `SiteError` that names the model, the problem and what to do."""
    raise SiteError(f"{type(model).__name__}: {problem}. {HELP}")

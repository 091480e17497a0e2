"""`Trace`: one short prompt followed through a model, and what does not fit together there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NoReturn

import torch
from featurizers.errors import FeaturizerError, SiteError, one_line
from featurizers.models import evaluating
from torch import Tensor, nn

from featurizers_derived_scalars.attention import Listener, Part, implementation
from featurizers_derived_scalars.running import Point, run

PROMPT_LENGTH: Final = 5
HELP: Final = "Write a plugin with the hook featurizers_circuits."


class Trace(Listener):
    """What the modules of a model took and gave on one short prompt, and its attention.

    Args:
        model: that is run.
        points: that are kept.
    """

    def __init__(self, model: nn.Module, points: Iterable[Point]) -> None:
        self._model = model
        self._seen: dict[Point, Tensor] = {}
        self._heard: dict[nn.Module, dict[Part, Tensor]] = {}
        ids = _prompt(model)

        def keep(point: Point) -> Any:
            def seen(tensor: Tensor) -> Tensor:
                self._seen[point] = tensor if tensor.dim() == 3 else tensor[None]
                return tensor

            return seen

        with torch.no_grad(), evaluating(model):
            try:
                answer = run(model, ids, {point: keep(point) for point in points}, listener=self)
            except FeaturizerError:
                raise
            except Exception as error:
                problem = f"it cannot run a prompt of {PROMPT_LENGTH} tokens: {type(error).__name__}: {one_line(error)}"
                raise SiteError(f"{type(model).__name__}: {problem}") from error
        self.logits: Tensor | None = getattr(answer, "logits", None)

    def wants_logits(self, module: nn.Module) -> bool:
        """Never."""
        return False

    def hear(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        """The tensor, noted."""
        self._heard.setdefault(module, {})[part] = tensor
        return tensor

    def attention(self, path: str) -> dict[Part, Tensor]:
        """The parts of attention in one module; empty if it computed it by itself."""
        return self._heard.get(self._model.get_submodule(path), {})

    def taken(self, path: str) -> Tensor | None:
        """What a module took; None if it was not called with a tensor first."""
        return self._seen.get((path, "input"))

    def given(self, path: str) -> Tensor | None:
        """What a module gave."""
        return self._seen.get((path, "output"))


def by_plain_attention(model: nn.Module, last: str) -> Tensor | None:
    """What the last block, of that path, gives for the same prompt, by the model's own plain attention."""
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor if tensor.dim() == 3 else tensor[None])
        return tensor

    with torch.no_grad(), evaluating(model), implementation(model, "eager"):
        run(model, _prompt(model), {(last, "output"): keep}, stop_after=last)
    return seen[-1] if seen else None


def _prompt(model: nn.Module) -> Tensor:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(1, PROMPT_LENGTH + 1, device=embeddings.weight.device)
    return ids % int(embeddings.weight.shape[0])


def same(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two tensors are there and the same to the last bit."""
    return first is not None and second is not None and first.shape == second.shape and torch.equal(first, second)


def agree(model: nn.Module, first: Tensor, second: Tensor, problem: str) -> None:
    """Refuse a model in which two tensors differ by more than its dtype explains."""
    tolerance = 1e-3 if second.dtype in (torch.float32, torch.float64) else 5e-2
    first, second = first.double(), second.double().view(first.shape)
    if float((first - second).norm()) > tolerance * float(second.norm()):
        refuse(model, problem)


def refuse(model: nn.Module, problem: str) -> NoReturn:
    """Say what is wrong with a model, and what to do.

    Raises:
        SiteError: always.
    """
    raise SiteError(f"{type(model).__name__}: {problem}. {HELP}")

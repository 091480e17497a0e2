"""`Unembedding`: from the output of a decoder's final norm to its logits."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featurizers.errors import FeaturizerError, SiteError, one_line
from featurizers.models.anatomy import Anatomy
from featurizers.models.calling import without_cache
from featurizers.models.compilation import eager
from featurizers.models.hooks import hook
from featurizers.models.modes import evaluating
from featurizers.models.places import Place
from featurizers.models.projections import projection
from featurizers.models.restart import head_of

PROMPT_LENGTH: Final = 5
FACTORS: Final = ("logit_scale", "logits_scaling")
"""Numbers in a config that logits are multiplied with (Cohere) or divided by (Granite)."""


@final
@dataclass(frozen=True, eq=False)
class Unembedding:
    """``logits = softcap * tanh(h / softcap)`` with ``h = scale * (x @ weight + bias)``, or h itself.

    Attributes:
        head: the module of the weight.
        scale: number that the head's output is multiplied by.
        softcap: bound of the logits; None if there is none.
    """

    head: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module, *, head: nn.Module | None = None, final_norm: nn.Module | None = None) -> Unembedding:
        """Find the scale and the soft cap of a model by running one prompt of five tokens, and verify them.

        Numbers of the config are used exactly where they explain the logits; another scale is measured.

        Args:
            model: a decoder of `transformers` with its language-model head; its mode does not matter.
            head: module that makes logits; None for the one that the model names.
            final_norm: module whose output the head reads; None for the final norm, or for the last block if the model
                has no final norm.

        Raises:
            SiteError: the model has no head, or its logits are not final norm, head, factor and soft cap.

        Examples:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> unembedding = Unembedding.of(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)))
            >>> unembedding.scale, unembedding.softcap, unembedding.weight.shape
            (1.0, None, torch.Size([8, 9]))
        """
        name = type(model).__name__
        if (head := head or head_of(model)) is None:
            raise SiteError(f"{name}: it has no language-model head; load it as AutoModelForCausalLM")
        read, output, normed, logits = _run_prompt(model, head, final_norm or _final_norm(model))
        if logits is None:
            raise SiteError(f"{name}: it has no language-model head; load it as AutoModelForCausalLM")
        if read is None or output is None or normed is None or not torch.equal(read, normed.to(read.device)):
            raise SiteError(f"{name}: its head does not read what the final norm gives")
        precise = logits.dtype in (torch.float32, torch.float64)
        output, logits = output.double(), logits.double()
        known = _config_numbers(model)
        for softcap in dict.fromkeys((known.get("final_logit_softcapping"), None)):
            measured = _measured_scale(output, logits, softcap)
            exact = min(_exact_scales(known), key=lambda scale: abs(scale - measured))
            for scale in (exact, measured):
                unembedding = cls(head, scale, softcap)
                error = float((unembedding.after(output) - logits).norm())
                if error <= (1e-5 if precise else 2e-2) * float(logits.norm()):
                    return unembedding
        raise SiteError(f"{name}: its logits are not what the head gives, times a number, under a softcap")

    @property
    def weight(self) -> Float[Tensor, "d_model vocab"]:
        """Weight of the head times the scale, in float32 or better."""
        weight = projection(self.head)[0]
        return weight if self.scale == 1.0 else weight * self.scale

    @property
    def bias(self) -> Float[Tensor, " vocab"] | None:
        """Bias of the head times the scale, in float32 or better; None if it has none."""
        bias = projection(self.head)[1]
        return None if bias is None else bias * self.scale

    def after(self, head_output: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Return the logits for an output of the head."""
        scaled = head_output if self.scale == 1.0 else head_output * self.scale
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Return the logits for an output of the final norm."""
        head_output: Tensor = self.head(x)
        return self.after(head_output)


def _final_norm(model: nn.Module) -> nn.Module:
    """Return the final norm, or the last block of a model that has none."""
    anatomy = Anatomy(model)
    try:
        return anatomy.place("norm.out").module
    except SiteError:
        return anatomy.place(f"resid.post:{anatomy.n_layers - 1}").module


def _run_prompt(model: nn.Module, head: nn.Module, final_norm: nn.Module) -> tuple[Tensor | None, ...]:
    """Return what the head reads and returns, what the final norm returns, and the logits, of one short prompt."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> Tensor:
        # without a batch axis: some models flatten it
        seen[name] = tensor.detach().clone().reshape(-1, tensor.shape[-1])
        return tensor

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(1, PROMPT_LENGTH + 1, device=embedding.weight.device) % len(embedding.weight)
    points = {
        "read": Place("", head, "input"),
        "output": Place("", head, "output"),
        "normed": Place("", final_norm, "output"),
    }
    with eager(), torch.no_grad(), evaluating(model), ExitStack() as hooks:
        for name, place in points.items():
            hooks.callback(hook(place, functools.partial(keep, name)).remove)
        try:
            answer = model(input_ids=ids[None], **without_cache(model))
        except FeaturizerError:
            raise
        except Exception as error:
            problem = f"it cannot run a prompt of {PROMPT_LENGTH} tokens: {type(error).__name__}: {one_line(error)}"
            raise SiteError(f"{type(model).__name__}: {problem}") from error
    logits = getattr(answer, "logits", None)
    return (*(seen.get(name) for name in points), None if logits is None else logits.reshape(-1, logits.shape[-1]))


def _config_numbers(model: nn.Module) -> dict[str, float]:
    """Return the numbers of a model's config that say what it does to its logits."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = {name: getattr(config, name, None) for name in (*FACTORS, "final_logit_softcapping")}
    return {name: float(number) for name, number in numbers.items() if number}


def _measured_scale(output: Tensor, logits: Tensor, softcap: float | None) -> float:
    """Return the factor between a head's output and the logits before their soft cap, by least squares."""
    before = softcap * torch.atanh((logits / softcap).clamp(-1 + 1e-7, 1 - 1e-7)) if softcap else logits
    return float((before * output).sum() / output.square().sum())


def _exact_scales(known: dict[str, float]) -> list[float]:
    """Return the scales that the config suggests: 1, its factors and their inverses."""
    factors = [known[name] for name in FACTORS if name in known]
    return [1.0, *factors, *(1 / factor for factor in factors)]

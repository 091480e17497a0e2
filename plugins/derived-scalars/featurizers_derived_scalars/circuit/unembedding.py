"""`Unembedding`: from the final norm's output to logits, and from token ids to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from featurizers.errors import SiteError
from featurizers.models import evaluating
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_derived_scalars.circuit.layout import Layout, projection
from featurizers_derived_scalars.circuit.probing import Trace
from featurizers_derived_scalars.circuit.running import run


@final
@dataclass(frozen=True, eq=False)
class Unembedding:
    """``logits = softcap * tanh(h / softcap)`` with ``h = scale * (x @ weight + bias)``, or h itself.

    Attributes:
        head: module of the weight.
        scale: number that the head's output is multiplied by.
        softcap: bound of the logits; None if there is none.
    """

    head: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module, layout: Layout, trace: Trace) -> Unembedding | str:
        """The unembedding of a model, or why there is none, in words."""
        if layout.head is None or trace.logits is None:
            return "it has no language-model head"
        taken, given = trace.input(layout.head), trace.output(layout.head)
        final = trace.output(layout.final_norm or layout.blocks[-1].block)
        if taken is None or given is None or final is None or not torch.equal(taken, final):
            return "its head does not read what the final norm gives"
        head, logits, given = model.get_submodule(layout.head), trace.logits.double(), given.double()
        config: Any = getattr(model, "config", None)
        softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
        before = softcap * torch.atanh((logits / softcap).clamp(-1 + 1e-7, 1 - 1e-7)) if softcap else logits
        scale = float((before * given).sum() / given.square().sum())
        scale = 1.0 if abs(scale - 1) < 1e-3 else scale
        found = cls(head, scale, float(softcap) if softcap else None)
        tolerance = 1e-3 if trace.logits.dtype in (torch.float32, torch.float64) else 5e-2
        if float((found.after(given) - logits).norm()) > tolerance * float(logits.norm()):
            return "its logits are not what the head gives, times a number, under a softcap"
        return found

    @property
    def weight(self) -> Float[Tensor, "d_model vocab"]:
        """The head's weight times the scale, in float32 or better."""
        return projection(self.head)[0] * self.scale

    @property
    def bias(self) -> Float[Tensor, " vocab"] | None:
        """The head's bias times the scale; None if it has none."""
        bias = projection(self.head)[1]
        return None if bias is None else bias * self.scale

    def after(self, given: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of what the head gives."""
        scaled = given * self.scale if self.scale != 1.0 else given
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of what the final norm gives."""
        given: Tensor = self.head(x)
        return self.after(given)


def embedding_multiplier(model: nn.Module, layout: Layout) -> Float[Tensor, "vocab d_model"]:
    """Return the embedding's weight times the number that the model multiplies it by, measured on one token."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight: Tensor = embeddings.weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor.detach().clone())
        return tensor

    point = layout.blocks[0].block
    tokens = weight.norm(dim=-1).topk(2).indices  # padding's embedding may be zero
    with torch.no_grad(), evaluating(model):
        for token in tokens:
            run(model, token[None], {(point, "input"): keep}, stop_after=point)
    # positions are the same in both
    shown, known = (seen[0] - seen[1]).flatten().to(weight.dtype), weight[tokens[0]] - weight[tokens[1]]
    if shown.shape != known.shape:
        raise SiteError(f"{type(model).__name__}: its residual stream is not as wide as its embedding")
    multiplier = float((shown * known).sum() / known.square().sum())
    tolerance = 1e-3 if seen[0].dtype in (torch.float32, torch.float64) else 5e-2
    if float((shown - multiplier * known).norm()) > tolerance * float(shown.norm()):
        raise SiteError(f"{type(model).__name__}: its residual stream does not begin with a multiple of its embedding")
    return weight if abs(multiplier - 1) < 1e-3 else weight * multiplier

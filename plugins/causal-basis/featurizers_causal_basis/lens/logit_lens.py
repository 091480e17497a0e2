"""`LogitLens`: the final norm and the unembedding of a model, applied to an earlier layer."""

from __future__ import annotations

import functools
from typing import Any, final

import torch
from featurizers import Anatomy
from featurizers.errors import UsageError
from featurizers.models import Place, hook
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_causal_basis.lens.norms import AGREES
from featurizers_causal_basis.lens.readouts import AffineNorm, Readout, fold, hash_of


@final
class LogitLens(Readout):
    """The final norm and the unembedding of a decoder, applied to the activations of any layer.

    What a model does to its logits, a factor or a soft cap, is done here as well. It is found out once, by running a
    prompt of four tokens. nostalgebraist 2020, "interpreting GPT: the logit lens".

    Args:
        model: a decoder of `transformers` with its language-model head, in evaluation mode.

    Raises:
        SiteError: the model's final norm cannot be found.
        UsageError: the model has no head, or its logits are not made of the final norm and the head alone.
    """

    name = "logit-lens"

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = model
        self._norm = Anatomy(model).place("norm.out").module
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Module):
            raise UsageError(f"{type(model).__name__} has no head that makes logits; load it as AutoModelForCausalLM")
        self._head = head
        self._factor, self._cap = self._find_out()

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return Anatomy(self.model).n_layers

    def log_probs(self, h: Float[Tensor, "n d"], depth: int) -> Float[Tensor, "n vocabulary"]:
        """See `Readout.log_probs`; the same at each depth. A norm of a known form is computed in fp32 at least."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        if self._formula is None:
            logits = self._logits(h.to(self._dtype), self._factor).to(dtype)
        else:
            logits = self._formula.to(h.device, dtype).logits(h.to(dtype))
        return self._capped(logits, self._cap).log_softmax(-1)

    def affine_norm(self, depth: int) -> AffineNorm | None:
        """See `Readout.affine_norm`: None if the model caps its logits."""
        return None if self._cap is not None else self._formula

    @functools.cached_property
    def _formula(self) -> AffineNorm | None:
        """What the norm and the head compute, before any cap."""
        return fold(self._norm, self._head, self._factor)

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary d"]:
        """See `Readout.unembedding`."""
        return next(self._head.parameters()).detach()

    @functools.cached_property
    def sha256(self) -> str:
        """See `Readout.sha256`: of the norm's tensors, the head's, and what is done to the logits."""
        numbers = torch.tensor([self._factor, self._cap or 0.0], dtype=torch.float64)
        return hash_of([*self._norm.state_dict().values(), *self._head.state_dict().values(), numbers])

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._head.parameters()).dtype

    def _logits(self, h: Tensor, factor: float) -> Tensor:
        logits: Tensor = self._head(self._norm(h))
        return logits if factor == 1.0 else logits * factor

    @staticmethod
    def _capped(logits: Tensor, cap: float | None) -> Tensor:
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def _find_out(self) -> tuple[float, float | None]:
        """The factor on the logits and their cap."""
        config: Any = getattr(self.model, "config", None)
        text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale, divisor, cap = (
            getattr(text, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
        )
        ids = torch.arange(4, device=next(self.model.parameters()).device).unsqueeze(0)
        before = Anatomy(self.model).place("norm.out")
        kept: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            kept.append(hidden)
            return hidden

        handle = hook(Place(before.path, before.module, "input"), keep)
        try:
            wanted: Tensor = self.model(input_ids=ids).logits[0].double()
        finally:
            handle.remove()
        h = kept[-1][0]
        for factor in (1.0, float(scale or 1.0), 1.0 / float(divisor or 1.0)):
            for limit in (None, None if not cap else float(cap)):
                found = self._capped(self._logits(h, factor), limit).double()
                if float((found - wanted).abs().max()) <= AGREES.get(h.dtype, 1e-5) * float(wanted.abs().max()):
                    return factor, limit
        raise UsageError(
            f"the logits of {type(self.model).__name__} are not those of its final norm and its head: give a function "
            "from activations to logits instead, or the whole model with token ids"
        )

"""`LogitLens`: the final norm and the unembedding of a model, applied to an earlier layer."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import final

import torch
from featurizers import Anatomy
from featurizers.errors import SiteError, UsageError
from featurizers.format import fingerprint
from featurizers.models import Unembedding, head_of
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_causal_basis.lens.readouts import AffineNorm, Readout, fold


@final
class LogitLens(Readout):
    """Final norm and unembedding of a decoder, applied to the activations of any layer.

    Includes the model's factor on the logits and its soft cap, which are found by running a prompt of five tokens.
    nostalgebraist 2020, "interpreting GPT: the logit lens".

    Args:
        model: a decoder of `transformers` with its language-model head.

    Raises:
        SiteError: the model's final norm cannot be found.
        UsageError: the model has no head, or its logits are not those of its final norm and its head.
    """

    name = "logit-lens"

    def __init__(self, model: nn.Module) -> None:
        anatomy = Anatomy(model)
        self.model, self.n_layers = model, anatomy.n_layers
        self._norm = anatomy.place("norm.out").module
        if head_of(model) is None:
            raise UsageError(f"{type(model).__name__} has no head that makes logits; load it as AutoModelForCausalLM")
        try:
            self._unembedding = Unembedding.of(model, final_norm=self._norm)
        except SiteError as error:
            raise UsageError(
                f"the logits of the model are not those of its final norm and its head: {error}. Give a function from "
                "activations to logits instead, or the whole model with token ids"
            ) from error

    def log_probs(self, h: Float[Tensor, "n d"], depth: int) -> Float[Tensor, "n vocabulary"]:
        """See `Readout.log_probs`. The same at each depth; a norm with a closed form is computed in fp32 at least."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        if self._formula is None:
            normed = self._norm(h.to(self.unembedding.dtype))
            logits = self._unembedding.after(self._unembedding.head(normed).to(dtype))
        else:
            scaled = self._formula.to(h.device, dtype).logits(h.to(dtype))
            logits = replace(self._unembedding, scale=1.0).after(scaled)
        return logits.log_softmax(-1)

    def affine_norm(self, depth: int) -> AffineNorm | None:
        """See `Readout.affine_norm`. None if the model caps its logits."""
        return self._formula if self._unembedding.softcap is None else None

    @functools.cached_property
    def _formula(self) -> AffineNorm | None:
        """Closed form of the logits before any soft cap."""
        return fold(self._norm, self._unembedding.head, self._unembedding.scale)

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary d"]:
        """See `Readout.unembedding`."""
        return next(self._unembedding.head.parameters()).detach()

    @functools.cached_property
    def sha256(self) -> str:
        """See `Readout.sha256`. Covers the norm, the head, the factor and the soft cap."""
        numbers = torch.tensor([self._unembedding.scale, self._unembedding.softcap or 0.0], dtype=torch.float64)
        tensors = [*self._norm.state_dict().values(), *self._unembedding.head.state_dict().values()]
        return fingerprint([*tensors, numbers])

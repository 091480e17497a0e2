"""`ExternalLens`: a lens object of another library, called as ``lens(h, layer)``, as a readout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import final

import torch
from featurizers.format import fingerprint
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_causal_basis.lens.readouts import AffineNorm, Readout, agree, fold, log_probs_by


@final
class ExternalLens(Readout):
    """A callable from activations ``(n, d)`` and a layer number to logits, such as tuned-lens' `Lens`.

    The closed form is used for a lens with the attributes of tuned-lens' class (``transform_hidden``, and ``unembed``
    with its ``final_norm`` and ``unembedding``), if they reproduce what the lens computes.

    Args:
        lens: the callable. Gradients of its parameters are never computed, and their flags are left as they are.
    """

    name = "lens"

    def __init__(self, lens: Callable[[Tensor, int], Tensor]) -> None:
        self._lens = lens

    def log_probs(self, h: Float[Tensor, "n d"], depth: int) -> Float[Tensor, "n vocabulary"]:
        """See `Readout.log_probs`. The lens is called in its own dtype."""
        return log_probs_by(self._lens, "lens", h, depth)

    @torch.no_grad()
    def affine_norm(self, depth: int) -> AffineNorm | None:
        """See `Readout.affine_norm`. Derived from the lens' output for zero and the unit vectors, then verified."""
        unembed = getattr(self._lens, "unembed", None)
        norm, linear = getattr(unembed, "final_norm", None), getattr(unembed, "unembedding", None)
        transform = getattr(self._lens, "transform_hidden", None)
        if not isinstance(norm, nn.Module) or not isinstance(linear, nn.Module) or transform is None:
            return None
        if (plain := fold(norm, linear)) is None:
            return None
        d, like = plain.unembedding.shape[1], next(linear.parameters())
        zero = torch.zeros(1, d, dtype=like.dtype, device=like.device)
        offset = transform(zero, depth)[0]
        translator = (transform(torch.eye(d, dtype=like.dtype, device=like.device), depth) - offset).mT
        form = replace(plain, translator=translator.to(plain.unembedding), offset=offset.to(plain.unembedding))
        probe = torch.randn(4, d, generator=torch.Generator().manual_seed(0)).to(plain.unembedding)
        return form if agree(form.logits(probe), self._lens(probe.to(like.dtype), depth)) else None

    @property
    def sha256(self) -> str | None:
        """See `Readout.sha256`. Covers a module's parameters and buffers."""
        return fingerprint(self._lens.state_dict().values()) if isinstance(self._lens, nn.Module) else None

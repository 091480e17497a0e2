"""`ForeignLens`: a lens object of another library, called as ``lens(h, layer)``, as a readout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import final

import torch
from featurizers.errors import ShapeError
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_causal_basis.norms import AGREES
from featurizers_causal_basis.readouts import AffineNorm, Readout, fold, hash_of


@final
class ForeignLens(Readout):
    """A callable from activations ``(n, d)`` and a layer's number to logits, such as tuned-lens' `Lens`.

    If it has what that class has, ``transform_hidden`` and ``unembed`` with its ``final_norm`` and ``unembedding``, and
    what they say is what the lens computes, it takes the exact road.

    Args:
        lens: the callable. Its parameters' gradients are never computed, nor their flags changed.
    """

    name = "lens"

    def __init__(self, lens: Callable[[Tensor, int], Tensor]) -> None:
        self._lens = lens

    def log_probs(self, h: Float[Tensor, "n d"], depth: int) -> Float[Tensor, "n vocabulary"]:
        """See `Readout.log_probs`; the lens is given its own dtype."""
        own = next(iter(self._lens.parameters()), h) if isinstance(self._lens, nn.Module) else h
        logits = self._lens(h.to(own.dtype), depth)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(h):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeError(f"the lens was given activations {tuple(h.shape)} and returns {got}, not a row each")
        return logits.to(torch.promote_types(logits.dtype, torch.promote_types(h.dtype, torch.float32))).log_softmax(-1)

    @torch.no_grad()
    def affine_norm(self, depth: int) -> AffineNorm | None:
        """See `Readout.affine_norm`: found from what the lens does to zero and to the unit vectors, and checked."""
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
        found = replace(plain, translator=translator.to(plain.unembedding), offset=offset.to(plain.unembedding))
        probe = torch.randn(4, d, generator=torch.Generator().manual_seed(0)).to(plain.unembedding)
        expected, got = self._lens(probe.to(like.dtype), depth).double(), found.logits(probe).double()
        allowed = AGREES.get(like.dtype, 1e-5) * float(expected.abs().max())
        return found if float((got - expected).abs().max()) <= allowed else None

    @property
    def sha256(self) -> str | None:
        """See `Readout.sha256`: of a module's parameters and buffers."""
        return hash_of(self._lens.state_dict().values()) if isinstance(self._lens, nn.Module) else None

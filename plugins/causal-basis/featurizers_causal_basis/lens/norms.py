"""Final norms of decoders, recognised by what they compute: LayerNorm and RMSNorm, whatever their class is called."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

EPSILONS = ("eps", "variance_epsilon", "epsilon", "norm_eps")
"""What the classes of transformers and torch call the number that is added to the variance."""

AGREES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far, relative to the greatest element, a norm may be from the formula that is taken for it."""


@dataclass(frozen=True, eq=False)
class Norm:
    """n(z) = c(z) / sqrt(|c(z)|²/d + eps) * gain + shift, where c takes the mean away or does nothing.

    Attributes:
        centred: whether the mean over the width is taken away: LayerNorm does, RMSNorm does not.
        eps: as in the formula.
        gain: one number a column, None for ones.
        shift: one number a column, None for zeros.
    """

    centred: bool
    eps: float
    gain: Float[Tensor, " d"] | None
    shift: Float[Tensor, " d"] | None

    def __call__(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the normalised rows, in the dtype of the input."""
        z = z - z.mean(dim=-1, keepdim=True) if self.centred else z
        z = z * (z.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        z = z if self.gain is None else z * self.gain.to(z)
        return z if self.shift is None else z + self.shift.to(z)


@torch.no_grad()
def recognise(module: nn.Module, d: int) -> Norm | None:
    """The formula that a module computes, None if it is neither LayerNorm nor RMSNorm.

    Every formula that fits its parameters is tried against the module itself, on rows of several lengths, of which the
    short ones tell by how much ``eps`` is added.
    """
    weight, bias = (dict(module.named_parameters(recurse=False)).get(name) for name in ("weight", "bias"))
    if any(tensor is not None and tensor.shape != (d,) for tensor in (weight, bias)):
        return None
    numbers = [vars(module)[name] for name in EPSILONS if isinstance(vars(module).get(name), float)]
    anchor = next(iter(module.parameters()), torch.zeros(()))
    rows = torch.randn(8, d, generator=torch.Generator().manual_seed(0)) + 0.5
    rows = (rows * torch.logspace(-4, 2, 8).unsqueeze(-1)).to(anchor)
    computed = module(rows).double()
    wide = None if weight is None else weight.detach().double()
    for centred in (True, False):
        for eps in numbers or [torch.finfo(anchor.dtype).eps]:  # what torch's RMSNorm adds if it is given none
            for gain in (wide,) if wide is None else (wide, 1 + wide):  # Gemma keeps the gain less one
                norm = Norm(centred, float(eps), gain, None if bias is None else bias.detach().double())
                error = (norm(rows.double()) - computed).abs().amax(dim=-1) / computed.abs().amax(dim=-1)
                if float(error.max()) <= AGREES.get(anchor.dtype, 1e-5):
                    return norm
    return None

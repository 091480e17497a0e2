"""`Norm`: a normalisation layer as a formula, so that its scale can be held constant."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import final

import torch
from featurizers.errors import SiteError
from jaxtyping import Float
from torch import Tensor, nn


@final
@dataclass(frozen=True, eq=False)
class Norm:
    """``y = c(x) / s(x) * gain + bias`` with ``s(x) = sqrt(mean(c(x)²) + epsilon)``.

    ``c`` takes the mean off, or leaves x as it is: LayerNorm, RMSNorm, and those of Gemma (gain ``1 + w``) and Cohere.
    With s held constant it is affine, which is what "norm frozen" means everywhere in this package.

    Attributes:
        gain: ``(d_model,)``, float32 or better.
        bias: ``(d_model,)``; None if there is none.
        epsilon: beside the variance.
        centred: whether the mean is taken off.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    epsilon: float
    centred: bool

    @classmethod
    def of(cls, module: nn.Module, width: int, name: str, device: torch.device) -> Norm:
        """The formula of a module, found by asking a copy of it in float64.

        Args:
            module: any layer that computes such a norm of the last axis.
            width: of its last axis.
            name: of the module, for the error.
            device: where the formula is to be.

        Raises:
            SiteError: what it computes is no such norm.
        """
        layer = copy.deepcopy(module).double().eval()
        with torch.no_grad():
            # a generator of our own leaves the random state of the program alone
            noise = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            first, small, second, ramp = noise.to(device)
            up, down = layer(100 * first).double(), layer(-100 * first).double()
            bias = (up + down) / 2
            centred = torch.allclose(layer(first + 3).double(), layer(first).double(), rtol=1e-4, atol=1e-5)
            large = 100 * (first - first.mean() if centred else first)
            # Where an entry is near zero its ratio says little, so that a second direction fills in.
            other = 100 * (ramp - ramp.mean() if centred else ramp)
            answers = up - bias, layer(100 * ramp).double() - bias
            gain = _ratio(answers, (large, other))
            tiny = 1e-3 * (small - small.mean() if centred else small)
            answer = layer(1e-3 * small).double() - bias
            squared = ((tiny * gain).square().sum() / (tiny * gain * answer).sum()).square()
            epsilon = max(float(squared - tiny.square().mean()), 0.0)
            found = cls(gain, bias if bias.abs().max() > 1e-6 else None, epsilon, centred)
            for probe in (second, 1e-2 * second + 0.1, 30 * ramp):
                if not torch.allclose(found(probe), layer(probe).double(), rtol=1e-3, atol=1e-4):
                    raise SiteError(
                        f"{name} ({type(module).__name__}) is not a norm of the form (x - mean) / scale * gain + bias, "
                        "so its scale cannot be held constant. Write a plugin with the hook featurizers_circuits."
                    )
        dtype = torch.float64 if _is_double(module) else torch.float32
        return cls(gain.to(dtype), None if found.bias is None else found.bias.to(dtype), epsilon, centred)

    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """``c(x)``; it is its own adjoint."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """``s(x)``."""
        x = x.to(torch.promote_types(x.dtype, self.gain.dtype))
        return (self.centre(x).square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def linear(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """``c(x) * gain``: what the frozen norm adds for x, times its scale."""
        gain = self.gain.to(x.device)
        return self.centre(x.to(torch.promote_types(x.dtype, gain.dtype))) * gain

    def pullback(self, direction: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The adjoint of `linear`."""
        gain = self.gain.to(direction.device)
        return self.centre(direction.to(torch.promote_types(direction.dtype, gain.dtype)) * gain)

    def frozen(
        self, x: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*batch d_model"]:
        """The norm with its scale given."""
        y = self.linear(x) / scale.to(x.device)
        return y if self.bias is None else y + self.bias.to(x.device)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm."""
        return self.frozen(x, self.scale(x))


def _ratio(answers: tuple[Tensor, Tensor], probes: tuple[Tensor, Tensor]) -> Tensor:
    """The gain that takes probes to answers, each entry from the probe that is larger there."""
    first, second = (probe / probe.square().mean().sqrt() for probe in probes)
    by_first = first.abs() >= second.abs()
    return torch.where(by_first, answers[0], answers[1]) / torch.where(by_first, first, second)


def _is_double(module: nn.Module) -> bool:
    return any(parameter.dtype == torch.float64 for parameter in module.parameters())

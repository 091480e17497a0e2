"""`Norm`: a LayerNorm or RMSNorm as a formula, recognised by what the module computes and not by its class."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

EXACT = 1e-5
"""Largest relative error of a formula that is made of the module's own parameters; modules compute in float32."""

_Layer: TypeAlias = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Norm:
    """``y = c(x) / s(x) * gain + bias`` with ``s(x) = sqrt(mean(c(x)²) + epsilon)``.

    ``c`` subtracts the mean (LayerNorm) or returns x (RMSNorm). This covers Gemma, whose gain is ``1 + weight``,
    Cohere, and norms without parameters. With s held constant the norm is affine. Results are in the dtype of x, but
    float32 at least, on the device of x.

    Attributes:
        gain: ``(d_model,)``, float64 as `of` finds it; None for ones.
        bias: ``(d_model,)``, likewise; None for zeros.
        epsilon: added to the variance.
        centred: whether the mean is subtracted.

    Examples:
        >>> norm = Norm.of(nn.LayerNorm(4, eps=1e-3), 4)
        >>> norm.centred, norm.epsilon
        (True, 0.001)
        >>> Norm.of(nn.GELU(), 4) is None
        True
    """

    gain: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    epsilon: float
    centred: bool

    @classmethod
    def of(cls, module: nn.Module, width: int, *, measured: bool = True) -> Norm | None:
        """Return the formula that a module computes, or None if it is no such norm.

        The module's own parameters and epsilon are used where they explain what it computes. Otherwise gain, bias and
        epsilon are measured. Either way the formula is compared with a float64 copy of the module, on rows of several
        lengths: short rows show epsilon.

        Args:
            module: any layer that acts on the last axis.
            width: of the last axis.
            measured: whether to measure gain, bias and epsilon where the module's own numbers do not explain it. The
                formula then agrees with the module to about 1e-3; otherwise to rounding.
        """
        try:
            layer = copy.deepcopy(module).double().eval()
            with torch.no_grad():
                norm = _from_parameters(module, layer, width)
                return _measured(layer, width, _device(module)) if norm is None and measured else norm
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            return None  # it does not map rows of this width to rows

    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return ``c(x)``, in the dtype of x. This map is its own adjoint."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """Return ``s(x)``."""
        return (self.centre(_wide(x)).square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def linear(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return ``c(x) * gain``: the linear part of the norm, times its scale."""
        x = self.centre(_wide(x))
        return x if self.gain is None else x * self.gain.to(x)

    def pullback(self, direction: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Apply the adjoint of `linear`."""
        direction = _wide(direction)
        return self.centre(direction if self.gain is None else direction * self.gain.to(direction))

    def frozen(
        self, x: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the output for x with the scale held at a given value."""
        y = self.linear(x) / scale.to(x.device)
        return y if self.bias is None else y + self.bias.to(y)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the output for x."""
        return self.frozen(x, self.scale(x))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Norm:
        """Return the same norm with its tensors on another device or in another dtype; None changes nothing."""
        gain, bias = (
            None if tensor is None else tensor.to(device=device, dtype=dtype) for tensor in (self.gain, self.bias)
        )
        return replace(self, gain=gain, bias=bias)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _device(module: nn.Module) -> torch.device:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _noise(rows: int, width: int, device: torch.device) -> Tensor:
    """Return random rows in float64, without touching the program's random state."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(device)


def _from_parameters(module: nn.Module, layer: _Layer, width: int) -> Norm | None:
    """Return the formula made of the module's own numbers that explains it, or None.

    Args:
        module: as the model holds it.
        layer: a copy in float64.
        width: of the last axis.
    """
    vectors = [p.detach().double() for p in module.parameters(recurse=False) if p.shape == (width,)]
    epsilons = [value for value in vars(module).values() if isinstance(value, float)]
    device = _device(module)
    lengths = torch.logspace(-4, 2, 8, dtype=torch.float64, device=device)
    rows = (_noise(8, width, device) + 0.5) * lengths.unsqueeze(-1)
    output = layer(rows).double()
    allowed = EXACT * output.abs().amax(dim=-1)
    gains = [gain for vector in vectors for gain in (vector, 1 + vector)]  # Gemma's gain is 1 + weight
    for gain, bias, epsilon, centred in itertools.product(
        [*gains, None],
        [*vectors, None],
        epsilons or [torch.finfo(torch.float64).eps],
        (True, False),
    ):
        norm = Norm(gain, bias, epsilon, centred)
        if bool(((norm(rows) - output).abs().amax(dim=-1) <= allowed).all()):
            if epsilons:
                return norm
            # torch's norms without an epsilon add that of the dtype that they compute in
            own = next((p.dtype for p in module.parameters()), torch.float32)
            return replace(norm, epsilon=torch.finfo(torch.promote_types(own, torch.float32)).eps)
    return None


def _measured(layer: _Layer, width: int, device: torch.device) -> Norm | None:
    """Return the formula that explains what a layer does to a few probes, or None."""
    first, small, second, ramp = _noise(4, width, device)
    up, down = layer(100 * first).double(), layer(-100 * first).double()
    bias = (up + down) / 2
    centred = torch.allclose(layer(first + 3).double(), layer(first).double(), rtol=1e-4, atol=1e-5)
    large = 100 * (first - first.mean() if centred else first)
    # where an entry is near zero its ratio says little, so that a second direction fills in
    other = 100 * (ramp - ramp.mean() if centred else ramp)
    gain = _ratio((up - bias, layer(100 * ramp).double() - bias), (large, other))
    tiny = 1e-3 * (small - small.mean() if centred else small)
    output = layer(1e-3 * small).double() - bias
    squared = ((tiny * gain).square().sum() / (tiny * gain * output).sum()).square()
    epsilon = max(float(squared - tiny.square().mean()), 0.0)
    norm = Norm(gain, bias if bias.abs().max() > 1e-6 else None, epsilon, centred)
    for probe in (second, 1e-2 * second + 0.1, 30 * ramp):
        if not torch.allclose(norm(probe), layer(probe).double(), rtol=1e-3, atol=1e-4):
            return None
    return norm


def _ratio(outputs: tuple[Tensor, Tensor], probes: tuple[Tensor, Tensor]) -> Tensor:
    """Return the gain that maps probes to outputs, each entry from the probe that is larger there."""
    first, second = (probe / probe.square().mean().sqrt() for probe in probes)
    by_first = first.abs() >= second.abs()
    return torch.where(by_first, outputs[0], outputs[1]) / torch.where(by_first, first, second)

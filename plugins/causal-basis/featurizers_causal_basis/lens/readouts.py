"""`Readout`, what every lens implements; `AffineNorm`, its closed form; and `Decoder`, any callable as a readout."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from featurizers.errors import ShapeError, UsageError
from featurizers.format import fingerprint
from featurizers.models import Norm
from jaxtyping import Float
from torch import Tensor, nn

AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference that rounding explains, relative to the largest element."""


@dataclass(frozen=True, eq=False)
class AffineNorm:
    """log p(h) = log_softmax(G n(T h + t) + bias), where n(z) = c(z) / sqrt(|c(z)|²/d + eps) and G = W diag(gain).

    The energy of a direction through a readout of this form needs no product of all tokens with the unembedding; see
    `featurizers_causal_basis.solve.exact`.

    Attributes:
        unembedding: W, which may be the model's own tensor.
        bias: on the logits, with the norm's bias folded in; None for zero.
        eps: added to the variance.
        centred: True if c subtracts the mean over the width (LayerNorm), False if c is the identity (RMSNorm).
        translator: T; None for the identity.
        offset: t; None for zero.
        gain: the norm's, with any factor on the logits; None for ones.
    """

    unembedding: Float[Tensor, "vocabulary d"]
    bias: Float[Tensor, " vocabulary"] | None
    eps: float
    centred: bool
    translator: Float[Tensor, "d d"] | None = None
    offset: Float[Tensor, " d"] | None = None
    gain: Float[Tensor, " d"] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> AffineNorm:
        """Return the same form with its tensors moved and cast."""
        tensors = ((name, value) for name, value in vars(self).items() if isinstance(value, Tensor))
        moved: dict[str, Any] = {name: tensor.to(device, dtype) for name, tensor in tensors}
        return replace(self, **moved)

    def centre(self, z: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return c(z)."""
        return z - z.mean(dim=-1, keepdim=True) if self.centred else z

    def scaled(self, z: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return z times the gain, column by column."""
        return z if self.gain is None else z * self.gain

    def translated(self, h: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return c(T h + t)."""
        z = h if self.translator is None else h @ self.translator.mT
        return self.centre(z if self.offset is None else z + self.offset)

    def logits(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n vocabulary"]:
        """Return the logits, in the dtype of the tensors."""
        z = self.translated(h)
        z = self.scaled(z * (z.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt())
        return z @ self.unembedding.mT if self.bias is None else torch.addmm(self.bias, z, self.unembedding.mT)

    def log_probs(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n vocabulary"]:
        """Return the log-probabilities, in the dtype of the tensors."""
        return self.logits(h).log_softmax(dim=-1)


class Readout(abc.ABC):
    """Function from the activations of a layer to a distribution over the vocabulary, token by token.

    A layer is identified by its depth, the number of blocks before it: the input of block i has depth i, its output
    i + 1.

    Attributes:
        name: in records, such as ``logit-lens``.
        model: decoder that the readout belongs to, which hidden states can be collected from; None if unknown.
        n_layers: number of blocks; None if unknown.
    """

    name: str
    model: nn.Module | None = None
    n_layers: int | None = None

    @abc.abstractmethod
    def log_probs(self, h: Float[Tensor, "n d"], depth: int) -> Float[Tensor, "n vocabulary"]:
        """Return the log-probabilities of each row, differentiable in it, in fp32 at least."""

    @abc.abstractmethod
    def affine_norm(self, depth: int) -> AffineNorm | None:
        """Return the closed form of `log_probs`, None if it is not an `AffineNorm`."""

    @property
    @abc.abstractmethod
    def sha256(self) -> str | None:
        """Hash of the readout's tensors; None if unknown."""

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary d"] | None:
        """Matrix that makes logits, without the norm's gain; None if unknown."""
        return None


@final
class Decoder(Readout):
    """Any callable from activations ``(n, d)`` to logits ``(n, vocabulary)``, the same at each layer.

    The closed form is used for an `nn.Sequential` of a LayerNorm or RMSNorm and an `nn.Linear`.

    Args:
        decode: the callable. Gradients of a module's parameters are never computed, and their flags are left as they
            are.

    Examples:
        >>> decoder = Decoder(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 10)))
        >>> decoder.log_probs(torch.ones(2, 4), 0).shape
        torch.Size([2, 10])
        >>> decoder.affine_norm(0).centred
        True
    """

    name = "decoder"

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        if not callable(decode):
            raise UsageError(
                "a decoder is a module or a function from activations to logits, a Readout, or a model of transformers "
                f"called with token ids; got {type(decode).__name__}"
            )
        self._decode = decode

    def log_probs(self, h: Float[Tensor, "n d"], depth: int) -> Float[Tensor, "n vocabulary"]:
        """See `Readout.log_probs`. The same at each depth; a module is called in its own dtype."""
        return log_probs_by(self._decode, "decoder", h)

    def affine_norm(self, depth: int) -> AffineNorm | None:
        """See `Readout.affine_norm`. For a norm followed by a linear map."""
        return self._affine

    @functools.cached_property
    def _affine(self) -> AffineNorm | None:
        if not isinstance(self._decode, nn.Sequential) or len(self._decode) != 2:
            return None
        norm, linear = self._decode
        return fold(norm, linear) if type(linear) is nn.Linear else None

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary d"] | None:
        """See `Readout.unembedding`. For a linear map, alone or last in a sequence."""
        last = self._decode[-1] if isinstance(self._decode, nn.Sequential) and len(self._decode) else self._decode
        return last.weight.detach() if isinstance(last, nn.Linear) else None

    @functools.cached_property
    def sha256(self) -> str | None:
        """See `Readout.sha256`. Covers a module's parameters and buffers."""
        return fingerprint(self._decode.state_dict().values()) if isinstance(self._decode, nn.Module) else None


def log_probs_by(
    function: Callable[..., Tensor], name: str, h: Float[Tensor, "n d"], *arguments: int
) -> Float[Tensor, "n vocabulary"]:
    """Return log-probabilities from the logits of a callable, in fp32 at least. A module is called in its own dtype.

    Raises:
        ShapeError: the result does not have one row of logits for each row of ``h``; the message has ``name``.
    """
    own = next(function.parameters(), h) if isinstance(function, nn.Module) else h
    logits = function(h.to(own.dtype), *arguments)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(h):
        result = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ShapeError(
            f"the {name} must return one row of logits for each activation {tuple(h.shape)}, but returns {result}"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.promote_types(h.dtype, torch.float32))).log_softmax(-1)


def agree(actual: Float[Tensor, "*shape"], expected: Float[Tensor, "*shape"]) -> bool:
    """Return whether two results differ by no more than rounding in the dtype of the expected one."""
    if actual.shape != expected.shape:
        return False
    allowed = AGREEMENT.get(expected.dtype, 1e-5) * float(expected.abs().max())
    return float((actual.double() - expected.double()).abs().max()) <= allowed


def fold(norm: nn.Module, linear: nn.Module, factor: float = 1.0) -> AffineNorm | None:
    """Return a norm and the linear map after it as one formula, with a factor on the logits; None for other norms."""
    weight, bias = (dict(linear.named_parameters(recurse=False)).get(name) for name in ("weight", "bias"))
    if weight is None or weight.dim() != 2 or (formula := Norm.of(norm, weight.shape[1], measured=False)) is None:
        return None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    unembedding = weight.detach().to(dtype)
    shift = None if bias is None else bias.detach().to(dtype)
    if formula.bias is not None:
        moved = unembedding @ formula.bias.to(unembedding)
        shift = moved if shift is None else shift + moved
    gain = None if formula.gain is None else formula.gain.to(unembedding)
    if factor != 1.0:
        gain = (torch.ones_like(unembedding[0]) if gain is None else gain) * factor
        shift = None if shift is None else shift * factor
    return AffineNorm(unembedding, shift, formula.epsilon, formula.centred, gain=gain)

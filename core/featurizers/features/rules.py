"""Activation rules of dictionaries: functions from pre-activations to features.

A rule acts on each feature alone, or selects which features of a token may fire. Like a kind, it is looked up by its
name among the installed plugins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featurizers.features.programs import Gate


@dataclass(frozen=True, eq=False)
class Rule:
    """Activation rule of a dictionary; made by `activation_rule`.

    Attributes:
        name: its name in configs: the plugin that registers it, optionally followed by a dot and a word.
        function: ``(pre, **tensors, **options) → features`` of the same shape. A rule with ``select`` applies it to
            the selected features, without the options.
        tensors: names of its parameters, each ``(n_features,)``, stored with the weights.
        options: names of its numbers, stored in the config.
        select: ``(pre, **options) → int64 (*batch, k)``, the features of each token that may fire; None for all.
        elementwise: True if a feature depends on its own pre-activation alone, so that a slice of a dictionary has
            the same features as the whole.
        sparse: True if the gradient of a zero feature is zero, as with every kind of ReLU.
        encoder_bias: True if the encoder has a bias, False if the rule brings its own.
        gate: ``(pre, **tensors) → Gate`` with the same features as an elementwise rule, for `featurizers.lower`; None
            if it has no such form.
        scaled: names of the tensors to multiply by the same factor as the features when the unit changes; None if
            the features cannot be rescaled through the rule's tensors.
    """

    name: str
    function: Callable[..., Tensor]
    tensors: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    select: Callable[..., Tensor] | None = None
    elementwise: bool = True
    sparse: bool = True
    encoder_bias: bool = True
    gate: Callable[..., Gate] | None = None
    scaled: tuple[str, ...] | None = None

    @property
    def separable(self) -> bool:
        """True if a feature follows from its own pre-activation, once it is known which features may fire."""
        return self.elementwise or self.select is not None

    def __call__(self, pre: Tensor, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """Return features ``(*batch, n)`` of pre-activations ``(*batch, n)``; ``tensors`` are ``(n,)`` each."""
        if self.select is None:
            return self.function(pre, **tensors, **options)
        chosen = self.select(pre.detach(), **options)
        features = self.function(pre.gather(-1, chosen), **{name: tensor[chosen] for name, tensor in tensors.items()})
        return torch.zeros_like(pre).scatter(-1, chosen, features)


def activation_rule(
    name: str,
    *,
    tensors: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    select: Callable[..., Tensor] | None = None,
    elementwise: bool = True,
    sparse: bool = False,
    encoder_bias: bool = True,
    gate: Callable[..., Gate] | None = None,
    scaled: tuple[str, ...] | None = None,
) -> Callable[[Callable[..., Tensor]], Rule]:
    """Turn a function into an activation rule; the arguments are the fields of `Rule`.

    A plugin registers the rule with the hook ``featurizers_rules``.

    Examples:
        >>> import torch
        >>> @activation_rule("capped", options=("cap",))
        ... def capped(pre, cap):
        ...     return pre.clamp(0, cap)
        >>> capped(torch.tensor([-1.0, 2.0, 9.0]), {}, {"cap": 3.0})
        tensor([0., 2., 3.])
    """

    def decorate(function: Callable[..., Tensor]) -> Rule:
        return Rule(
            name, function, tensors, options, select, elementwise and select is None, sparse, encoder_bias, gate, scaled
        )

    return decorate


def _relu_gate(pre: Tensor) -> Gate:
    return Gate.of(pre, threshold=0.0)


def _jumprelu_gate(pre: Tensor, threshold: Tensor) -> Gate:
    return Gate.of(pre, threshold=threshold.clamp(min=0))


def _jump_gate(pre: Tensor, jump: Tensor) -> Gate:
    return Gate.of(pre, threshold=0.0, offset=jump)


def _gated_gate(pre: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Gate:
    return Gate.of(pre, threshold=-b_gate, slope=r_mag.exp(), offset=b_mag, floor=0.0)


@activation_rule("relu", sparse=True, scaled=(), gate=_relu_gate)
def relu(pre: Tensor) -> Tensor:
    """Return f = max(h, 0)."""
    return torch.relu(pre)


@activation_rule("jumprelu", tensors=("threshold",), sparse=True, scaled=("threshold",), gate=_jumprelu_gate)
def jumprelu(pre: Tensor, threshold: Tensor) -> Tensor:
    """Return f = h where h exceeds both its threshold and zero, else 0 (JumpReLU, arXiv:2407.14435)."""
    return torch.where(pre > threshold.detach().clamp(min=0), pre, 0.0)


@activation_rule("jump", tensors=("jump",), sparse=True, scaled=("jump",), gate=_jump_gate)
def jump(pre: Tensor, jump: Tensor) -> Tensor:
    """Return f = h + jump where h is positive, else 0: dictionary_learning's JumpAutoEncoder. It has no threshold."""
    return torch.where(pre > 0, pre + jump, 0.0)


@activation_rule(
    "gated",
    tensors=("b_gate", "r_mag", "b_mag"),
    sparse=True,
    encoder_bias=False,
    scaled=("b_gate", "b_mag"),
    gate=_gated_gate,
)
def gated(pre: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    """Return f = max(exp(r_mag) h + b_mag, 0) where h + b_gate is positive, else 0.

    Rajamanoharan et al. 2024 (arXiv:2404.16014): gate and magnitude share the encoder, so it is one matrix product.
    """
    return torch.where(pre + b_gate > 0, torch.relu(r_mag.exp() * pre + b_mag), 0.0)


def _largest(pre: Tensor, k: int) -> Tensor:
    return pre.topk(k, dim=-1, sorted=False).indices


def _largest_magnitude(pre: Tensor, k: int) -> Tensor:
    return _largest(pre.abs(), k)


def _largest_of_groups(pre: Tensor, k: int) -> Tensor:
    size = pre.shape[-1] // k
    start = torch.arange(0, k * size, size, device=pre.device)
    return pre.reshape(*pre.shape[:-1], k, size).argmax(dim=-1) + start


@activation_rule("topk", options=("k",), select=_largest, sparse=True)
def topk(pre: Tensor) -> Tensor:
    """Return f = max(h, 0) for the k largest h of a token, else 0 (Gao et al. 2024, arXiv:2406.04093)."""
    return torch.relu(pre)


@activation_rule("abstopk", options=("k",), select=_largest_magnitude, sparse=True)
def abstopk(pre: Tensor) -> Tensor:
    """Return f = h, with its sign, for the k largest magnitudes of a token, else 0."""
    return pre.clone()


@activation_rule("groupmax", options=("k",), select=_largest_of_groups, sparse=True)
def groupmax(pre: Tensor) -> Tensor:
    """Return f = max(h, 0) for the largest h in each of k equal groups of neighbouring features, else 0 (sparsify)."""
    return torch.relu(pre)


@activation_rule("identity", scaled=(), gate=Gate.of)
def identity(pre: Tensor) -> Tensor:
    """Return f = h."""
    return pre.clone()


BUILT_IN = (relu, jumprelu, jump, gated, topk, abstopk, groupmax, identity)

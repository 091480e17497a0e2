"""Activation rules of dictionaries: from pre-activations to features. A new one is one function.

A rule acts on each feature alone, or selects which features of a token may fire. It is looked up by its name among
the installed plugins, as a kind is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rule:
    """An activation rule; made by `activation_rule`.

    Attributes:
        name: what a config calls it: the name of the plugin that registers it, or that and a dot and a word.
        function: ``(pre, **tensors, **options) → features`` of the same shape. For a rule that selects, what becomes
            of the selected.
        tensors: names of its parameters, each ``(n_features,)``, stored with the weights.
        options: names of its numbers, stored in the config.
        select: ``(pre, **options) → int64 (*batch, k)``, which features of each token may fire; None for all.
        elementwise: whether a feature depends on its own pre-activation alone, so that a part of a dictionary gives
            the features that the whole would.
        sparse: whether a feature that is zero has the gradient zero, as with every kind of ReLU.
        encoder_bias: whether the encoder has a bias; False where the rule brings its own.
        scaled: the tensors that are multiplied with the features when their unit changes; None if the features
            cannot be rescaled inside of the rule.
    """

    name: str
    function: Callable[..., Tensor]
    tensors: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    select: Callable[..., Tensor] | None = None
    elementwise: bool = True
    sparse: bool = True
    encoder_bias: bool = True
    scaled: tuple[str, ...] | None = None

    def __call__(self, pre: Tensor, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """Features ``(*batch, n)`` of pre-activations ``(*batch, n)``; ``tensors`` are those of the same features."""
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
    scaled: tuple[str, ...] | None = None,
) -> Callable[[Callable[..., Tensor]], Rule]:
    """Make a function an activation rule; the arguments are the fields of `Rule`.

    A plugin registers it with the hook ``featurizers_rules``.

    Example:
        >>> import torch
        >>> @activation_rule("capped", options=("cap",))
        ... def capped(pre, cap):
        ...     return pre.clamp(0, cap)
        >>> capped(torch.tensor([-1.0, 2.0, 9.0]), {}, {"cap": 3.0})
        tensor([0., 2., 3.])
    """

    def decorate(function: Callable[..., Tensor]) -> Rule:
        return Rule(
            name, function, tensors, options, select, elementwise and select is None, sparse, encoder_bias, scaled
        )

    return decorate


@activation_rule("relu", sparse=True, scaled=())
def relu(pre: Tensor) -> Tensor:
    """f = max(h, 0)."""
    return torch.relu(pre)


@activation_rule("jumprelu", tensors=("threshold",), sparse=True, scaled=("threshold",))
def jumprelu(pre: Tensor, threshold: Tensor) -> Tensor:
    """f = h where h exceeds both its threshold and zero, else 0 (Rajamanoharan et al. 2024, arXiv:2407.14435)."""
    return torch.where(pre > threshold.detach().clamp(min=0), pre, 0.0)


@activation_rule("jump", tensors=("jump",), sparse=True, scaled=("jump",))
def jump(pre: Tensor, jump: Tensor) -> Tensor:
    """f = h + jump where h is positive, else 0: dictionary_learning's JumpAutoEncoder, which has no threshold."""
    return torch.where(pre > 0, pre + jump, 0.0)


@activation_rule(
    "gated",
    tensors=("b_gate", "r_mag", "b_mag"),
    sparse=True,
    encoder_bias=False,
    scaled=("b_gate", "b_mag"),
)
def gated(pre: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    """f = max(exp(r_mag) h + b_mag, 0) where h + b_gate is positive, else 0 (arXiv:2404.16014): one matrix product."""
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
    """f = max(h, 0) of the k largest h of a token, else 0 (Gao et al. 2024, arXiv:2406.04093)."""
    return torch.relu(pre)


@activation_rule("abstopk", options=("k",), select=_largest_magnitude, sparse=True)
def abstopk(pre: Tensor) -> Tensor:
    """f = h of the k largest magnitudes of a token, with their sign, else 0."""
    return pre.clone()


@activation_rule("groupmax", options=("k",), select=_largest_of_groups, sparse=True)
def groupmax(pre: Tensor) -> Tensor:
    """f = max(h, 0) of the largest h in each of k equal groups of neighbouring features, else 0 (sparsify)."""
    return torch.relu(pre)


@activation_rule("identity", scaled=())
def identity(pre: Tensor) -> Tensor:
    """f = h."""
    return pre.clone()


BUILT_IN = (relu, jumprelu, jump, gated, topk, abstopk, groupmax, identity)

"""Captures of tiny decoders, and dictionaries to see them through."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from featurizers import DictionaryFeaturizer
from featurizers_derived_scalars.capturing import LogitDifference, RawActivations, capture, logit_difference
from featurizers_derived_scalars.circuit import KINDS, Circuit, Need, Pass, Place
from torch import Tensor

from tests.support.decoders import shared_decoder, tokens

METRIC: LogitDifference = logit_difference([5, 9], [11])
POST_NORMS = ("final", "attn.post", "mlp.post")
BLOCK_NORMS = (*POST_NORMS, "attn", "mlp")


@functools.cache
def captured(name: str, freeze: tuple[str, ...] = POST_NORMS) -> RawActivations:
    """Everything of one prompt, both passes, in float64."""
    circuit = Circuit(shared_decoder(name))
    passes: tuple[Pass, ...] = ("forward", "backward")
    needs = [Need(kind, pass_) for kind in KINDS if circuit.places(kind) for pass_ in passes]
    return capture(circuit, tokens(), needs, metric=METRIC, freeze_norms=freeze)[0]


def made_by_hand() -> RawActivations:
    """Neurons of three layers counted through, and one embedding, of two tokens: nothing of a model."""
    values = {
        (Place("mlp.neurons", layer), "forward"): 6.0 * layer + torch.arange(6.0).reshape(2, 3) for layer in range(3)
    }
    values[Place("resid.embed"), "forward"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    circuit = SimpleNamespace(n_layers=3, check=lambda place: None, has=lambda place: True)
    return RawActivations(circuit, torch.tensor([5, 6]), values)


def forward(raw: RawActivations, kind: str, layer: int | None = None) -> Tensor:
    """Activations of a place."""
    return raw[Place(kind, layer), "forward"]


def backward(raw: RawActivations, kind: str, layer: int | None = None) -> Tensor:
    """The gradient in a place."""
    return raw[Place(kind, layer), "backward"]


def close(first: Tensor, second: Tensor, tolerance: float = 2e-6) -> None:
    """Equal to rounding, and not by being zero. Some architectures compute norms and softmax in float32 always."""
    assert first.shape == second.shape, (first.shape, second.shape)
    assert float(second.norm()) > 0
    assert float((first - second).norm()) <= tolerance * float(second.norm())


def dictionary(
    width: int, rule: str = "relu", *, n_features: int = 24, seed: int = 0, **options: Any
) -> DictionaryFeaturizer:
    """A dictionary of random weights in float64, none of which is zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if rule == "topk":
        options["rule_options"] = {"k": 5}
    if rule == "jumprelu":
        options["threshold"] = 0.2
    return DictionaryFeaturizer.from_tensors(
        normal(n_features, width) * width**-0.5,
        normal(n_features, width),
        normal(n_features) * 0.2,
        normal(width) * 0.5,
        rule=rule,
        **options,
    )

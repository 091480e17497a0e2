"""Dictionaries with random weights, and their formulas, written out by hand."""

from __future__ import annotations

from typing import Any

import torch
from featurizers import DictionaryFeaturizer
from torch import Tensor

RULES = ("relu", "jumprelu", "jump", "gated", "topk", "abstopk", "groupmax", "identity")


def weights(rule: str, d_in: int = 8, n_features: int = 64, *, bias: float = -0.5, seed: int = 0) -> dict[str, Any]:
    """Return the tensors of a rule; a lower bias makes fewer features fire. Feature 0 fires at nearly every token."""
    g = torch.Generator().manual_seed(seed)
    w_enc, w_dec = torch.randn(2, n_features, d_in, generator=g)
    always = torch.zeros(n_features)
    always[0] = 20.0
    tensors = {
        "W_enc": w_enc,
        "W_dec": w_dec / 4,
        "b_enc": torch.randn(n_features, generator=g) + bias + always,
        "b_dec": torch.randn(d_in, generator=g),
    }
    if rule == "jumprelu":
        tensors["threshold"] = torch.rand(n_features, generator=g) - 0.1  # some are negative, so that ReLU decides
    if rule == "jump":
        tensors["jump"] = torch.randn(n_features, generator=g)
    if rule == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
        tensors["r_mag"] = torch.randn(n_features, generator=g) * 0.3
        tensors["b_mag"] = torch.randn(n_features, generator=g) + always
    return tensors


def dictionary(rule: str = "relu", *, k: int = 8, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return the featurizer of `weights`; k is for the rules that select."""
    sizes = {name: options.pop(name) for name in ("d_in", "n_features", "bias", "seed") if name in options}
    if rule in ("topk", "abstopk", "groupmax"):
        options["rule_options"] = {"k": k}
    tensors = {name: tensor.to(dtype) for name, tensor in weights(rule, **sizes).items()}
    return DictionaryFeaturizer.from_tensors(**tensors, rule=rule, **options)


def features_by_hand(rule: str, t: dict[str, Tensor], z: Tensor, k: int = 8) -> Tensor:
    """Return features of normalised activations, computed token by token if the rule selects."""
    if rule == "gated":
        u = z @ t["W_enc"].T
        return (u + t["b_gate"] > 0).to(z.dtype) * torch.relu(t["r_mag"].exp() * u + t["b_mag"])
    h = z @ t["W_enc"].T + t["b_enc"]
    if rule == "identity":
        return h
    if rule == "relu":
        return h.clamp(min=0)
    if rule == "jumprelu":
        return h.clamp(min=0) * (h > t["threshold"]).to(h.dtype)
    if rule == "jump":
        return h.clamp(min=0) + t["jump"] * (h > 0).to(h.dtype)
    rows = []
    for row in h.reshape(-1, h.shape[-1]):
        kept = torch.zeros_like(row)
        if rule == "groupmax":
            for group in torch.arange(len(row)).chunk(k):
                best = group[int(row[group].argmax())]
                kept[best] = row[best].clamp(min=0)
        else:
            size = row.abs() if rule == "abstopk" else row
            for best in size.argsort(descending=True)[:k].tolist():
                kept[best] = row[best] if rule == "abstopk" else row[best].clamp(min=0)
        rows.append(kept)
    return torch.stack(rows).reshape(h.shape)


def normalized_by_hand(how: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised activations, and the factor and the offset that undo the normalisation."""
    if how == "layer-norm":
        mean = x.mean(-1, keepdim=True)
        std = ((x - mean).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
        return (x - mean) / (std + 1e-5), std, mean
    if how == "constant-norm":
        norm = x.square().sum(-1, keepdim=True).sqrt() / x.shape[-1] ** 0.5
        return x / norm, norm, torch.zeros_like(norm)
    one = torch.ones_like(x[..., :1])
    if how == "scale":
        return x * 2.5, one / 2.5, one * 0
    return x, one, one * 0

"""The autoencoders that later versions of dictionary_learning have: JumpReLU, and top k of three kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from featurizers import DictionaryFeaturizer, Featurizer
from featurizers.errors import ConfigError
from torch import Tensor, nn

from featurizers_dictionary_learning.classes import Dictionary, _Linear, positive_k


class _Rows(Dictionary):
    """What the autoencoders of two matrices share: ``W_enc (activation_dim, dict_size)`` and ``W_dec``."""

    def __init__(self, activation_dim: int, dict_size: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        rows = nn.functional.normalize(torch.randn(dict_size, activation_dim, device=device), dim=1)
        self.W_enc = nn.Parameter(rows.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(dict_size, device=device))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(activation_dim, device=device))

    def decode(self, f: Tensor) -> Tensor:
        """Activations."""
        return f @ self.W_dec + self.b_dec

    def _featurizer(self, rule: str, pre_bias: bool, **tensors: Any) -> DictionaryFeaturizer:
        weights = (self.W_enc.T, self.W_dec, self.b_enc, self.b_dec)
        return DictionaryFeaturizer.from_tensors(
            *(w.detach() for w in weights), rule=rule, pre_bias=pre_bias, **tensors
        )


class JumpReluAutoEncoder(_Rows):
    """h = x W_enc + b_enc, f = h [h > threshold] where positive, x̂ = f W_dec + b_dec (arXiv:2407.14435).

    Attributes:
        apply_b_dec_to_input: whether b_dec is taken off x first; no file says so.
    """

    def __init__(self, activation_dim: int, dict_size: int, device: torch.device | str | None = None) -> None:
        super().__init__(activation_dim, dict_size, device)
        self.threshold = nn.Parameter(torch.full((dict_size,), 0.001, device=device))
        self.apply_b_dec_to_input = False

    @classmethod
    def _of_state(cls, state: dict[str, Tensor]) -> Self:
        return cls(*state["W_enc"].shape)

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        """Features; with ``output_pre_jump`` the pair of them and the pre-activations."""
        pre_jump = (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        f = torch.relu(pre_jump * (pre_jump > self.threshold))
        return (f, pre_jump) if output_pre_jump else f

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Fit biases and thresholds to activations that are ``scale`` times as large."""
        for tensor in (self.b_dec, self.b_enc, self.threshold):
            tensor.mul_(scale)

    def as_featurizer(self) -> Featurizer[Any]:
        """The same map."""
        return self._featurizer("jumprelu", self.apply_b_dec_to_input, threshold=self.threshold.detach())


def _batch_top(features: Tensor, k: int) -> Tensor:
    """The k largest features for each token, of all tokens together: ``(*batch, dict_size)``."""
    flat = features.flatten()
    tokens = features.shape[:-1].numel()
    top = flat.topk(min(k * tokens, len(flat)), sorted=False)
    return torch.zeros_like(flat).scatter(0, top.indices, top.values).reshape(features.shape)


class AutoEncoderTopK(_Linear):
    """p = max(W_e (x - b_dec) + b_e, 0), f = the k largest p of each token, x̂ = W_d f + b_dec (arXiv:2406.04093)."""

    k: Tensor
    threshold: Tensor

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.register_buffer("k", torch.tensor(positive_k(k), dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))
        self._unit_columns()
        self.encoder.weight.data = self.decoder.weight.data.T.clone()
        nn.init.zeros_(self.encoder.bias)
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))

    @classmethod
    def _of_state(cls, state: dict[str, Tensor]) -> Self:
        dict_size, activation_dim = state["encoder.weight"].shape
        return cls(activation_dim, dict_size, int(state["k"]))

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """Features, of the k largest or, with ``use_threshold``, of those above the threshold.

        Returns:
            ``f``, or ``(f, values, indices, p)`` with ``return_topk``.
        """
        p = torch.relu(self.encoder(x - self.b_dec))
        top = p.topk(int(self.k), sorted=False, dim=-1)
        f = p * (p > self.threshold) if use_threshold else torch.zeros_like(p).scatter(-1, top.indices, top.values)
        return (f, top.values, top.indices, p) if return_topk else f

    def decode(self, f: Tensor) -> Tensor:
        """Activations."""
        return self.decoder(f) + self.b_dec  # type: ignore[no-any-return]

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Fit biases and threshold to activations that are ``scale`` times as large."""
        self.encoder.bias.mul_(scale)
        self.b_dec.mul_(scale)
        if self.threshold >= 0:
            self.threshold.mul_(scale)

    def as_featurizer(self) -> Featurizer[Any]:
        """The same map, with the k largest of each token."""
        return self._featurizer("topk", self.b_dec, pre_bias=True, rule_options={"k": int(self.k)})


class BatchTopKSAE(AutoEncoderTopK):
    """As `AutoEncoderTopK`, with the k largest per token of all tokens together, or a threshold (arXiv:2412.06410).

    The batch form makes a token's features depend on its neighbours; it is for training. Features of three axes count
    every token, where upstream counts the first axis alone.
    """

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """Features above the threshold or, without it, the largest of the batch.

        Returns:
            ``f``, or ``(f, which features fire, p)`` with ``return_active``.
        """
        p = torch.relu(self.encoder(x - self.b_dec))
        f = p * (p > self.threshold) if use_threshold else _batch_top(p, int(self.k))
        return (f, f.flatten(0, -2).sum(0) > 0, p) if return_active else f

    def as_featurizer(self) -> Featurizer[Any]:
        """The same map by threshold: JumpReLU, and ReLU where no threshold was set."""
        return self._featurizer("jumprelu", self.b_dec, pre_bias=True, threshold=float(self.threshold))


class MatryoshkaBatchTopKSAE(_Rows):
    """A `BatchTopKSAE` whose first features are dictionaries by themselves, in groups (arXiv:2503.17547).

    Attributes:
        active_groups: how many of the groups are used, from the first.
    """

    k: Tensor
    threshold: Tensor
    group_sizes: Tensor

    def __init__(self, activation_dim: int, dict_size: int, k: int, group_sizes: Sequence[int]) -> None:
        super().__init__(activation_dim, dict_size)
        sizes = list(group_sizes)
        if not sizes or sum(sizes) != dict_size or min(sizes) < 1:
            raise ConfigError(f"group_sizes are positive and sum to dict_size {dict_size}, got {sizes!r}")
        self.register_buffer("k", torch.tensor(positive_k(k), dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.register_buffer("group_sizes", torch.tensor(sizes))
        self.active_groups = len(sizes)

    @classmethod
    def _of_state(cls, state: dict[str, Tensor]) -> Self:
        activation_dim, dict_size = state["W_enc"].shape
        return cls(activation_dim, dict_size, int(state["k"]), state["group_sizes"].tolist())

    def _used(self) -> int:
        return int(self.group_sizes[: self.active_groups].sum())

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """As `BatchTopKSAE.encode`; features of groups that are not active are zero, whatever the axes of x."""
        p = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        f = p * (p > self.threshold) if use_threshold else _batch_top(p, int(self.k))
        f = f * (torch.arange(self.dict_size, device=f.device) < self._used())
        return (f, f.flatten(0, -2).sum(0) > 0, p) if return_active else f

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Fit biases and threshold to activations that are ``scale`` times as large."""
        for tensor in (self.b_enc, self.b_dec, self.threshold):
            if tensor is not self.threshold or self.threshold >= 0:
                tensor.mul_(scale)

    def as_featurizer(self) -> Featurizer[Any]:
        """The same map by threshold: JumpReLU of the active groups."""
        whole = self._featurizer("jumprelu", True, threshold=float(self.threshold))
        return whole if self._used() == self.dict_size else whole.take(range(self._used()))

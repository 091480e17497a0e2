"""Autoencoders of later versions of dictionary_learning: JumpReLU, and three kinds of top k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, final

import torch
from featurizers import DictionaryFeaturizer, Featurizer
from featurizers.errors import ConfigError, UsageError
from torch import Tensor, nn

from featurizers_dictionary_learning.base import Dictionary, Linear, canonical


class _Rows(Dictionary):
    """Base of the autoencoders that are made of two matrices: ``W_enc (activation_dim, dict_size)`` and ``W_dec``."""

    def __init__(self, activation_dim: int, dict_size: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        rows = nn.functional.normalize(torch.randn(dict_size, activation_dim, device=device), dim=1)
        self.W_enc = nn.Parameter(rows.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(dict_size, device=device))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(activation_dim, device=device))

    def decode(self, f: Tensor) -> Tensor:
        """Return activations."""
        return f @ self.W_dec + self.b_dec

    @final
    def in_rows(self, columns: Tensor | None, pre_bias: bool, threshold: Tensor) -> DictionaryFeaturizer:
        """Return the canonical form of these weights; see `canonical`."""
        weights = self.W_enc.T, self.W_dec, self.b_enc, self.b_dec
        return canonical(*weights, columns, rule="jumprelu", pre_bias=pre_bias, threshold=threshold)


class JumpReluAutoEncoder(_Rows):
    """JumpReLU autoencoder (arXiv:2407.14435).

    h = x W_enc + b_enc, f = h [h > threshold] where positive, x̂ = f W_dec + b_dec.

    Attributes:
        apply_b_dec_to_input: if True b_dec is subtracted from x first; files do not store this.
    """

    def __init__(self, activation_dim: int, dict_size: int, device: torch.device | str | None = None) -> None:
        super().__init__(activation_dim, dict_size, device)
        self.threshold = nn.Parameter(torch.full((dict_size,), 0.001, device=device))
        self.apply_b_dec_to_input = False

    @classmethod
    def sized(cls, state: dict[str, Tensor]) -> Self:
        """See `Dictionary.sized`."""
        activation_dim, dict_size = state["W_enc"].shape
        return cls(activation_dim, dict_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        load_from_sae_lens: bool = False,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """Load the autoencoder whose state dict is in a file; see `FromFile.from_pretrained`.

        Raises:
            WeightsError: the file holds anything but the tensors of this class.
            UsageError: ``load_from_sae_lens`` is set, there is no path, or there are other options.
        """
        if load_from_sae_lens:
            raise UsageError(
                "load_from_sae_lens is not supported; load SAELens' files by featurizers.load('sae-lens:RELEASE/ID')"
            )
        if path is None or options:
            raise UsageError(f"give the path of a state dict, and no options but dtype and device; got {options!r}")
        return cls.read(path, device, dtype)

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        """Return features; with ``output_pre_jump`` the pair of features and pre-activations."""
        pre_jump = (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        f = torch.relu(pre_jump * (pre_jump > self.threshold))
        return (f, pre_jump) if output_pre_jump else f

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Fit biases and thresholds to activations that are ``scale`` times as large."""
        for tensor in (self.b_dec, self.b_enc, self.threshold):
            tensor.mul_(scale)

    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """See `Dictionary.map`."""
        return self.in_rows(columns, self.apply_b_dec_to_input, self.threshold)


class _TopK(Dictionary):
    """Base of the autoencoders with a k and a threshold. The threshold is -1 until training sets it."""

    k: Tensor
    threshold: Tensor

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        k: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> Self:
        """Load the autoencoder whose state dict is in a file; see `FromFile.from_pretrained`.

        Args:
            path: of the file.
            k: the k that the file must have, None for any.
            device: device of the autoencoder.
            dtype: dtype of the autoencoder.

        Raises:
            WeightsError: the file holds anything but the tensors of this class.
            UsageError: the file has another k.
        """
        self = cls.read(path, device, dtype)
        if k not in (None, int(self.k)):
            raise UsageError(f"{path}: its k is {int(self.k)}, not {k!r}")
        return self

    @final
    def buffers_of(self, k: Any) -> None:
        """Register ``k``, and a threshold that is not set.

        Raises:
            ConfigError: k is not a positive integer.
        """
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ConfigError(f"k must be a positive integer, not {k!r}")
        self.register_buffer("k", torch.tensor(k, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Fit biases and threshold to activations that are ``scale`` times as large."""
        for name, tensor in self.state_dict().items():
            if name in ("encoder.bias", "b_enc", "b_dec") or (name == "threshold" and self.threshold >= 0):
                tensor.mul_(scale)


class _LinearTopK(Linear, _TopK):
    """Base of the autoencoders with a k that are made of two `torch.nn.Linear`."""

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.buffers_of(k)
        self.unit_columns()
        self.encoder.weight.data = self.decoder.weight.data.T.clone()
        nn.init.zeros_(self.encoder.bias)
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))

    @classmethod
    def sized(cls, state: dict[str, Tensor]) -> Self:
        """See `Dictionary.sized`."""
        dict_size, activation_dim = state["encoder.weight"].shape
        return cls(activation_dim, dict_size, state["k"].item())  # type: ignore[arg-type]  # checked there

    def decode(self, f: Tensor) -> Tensor:
        """Return activations."""
        return self.decoder(f) + self.b_dec  # type: ignore[no-any-return]


class AutoEncoderTopK(_LinearTopK):
    """TopK autoencoder (arXiv:2406.04093).

    p = max(W_e (x - b_dec) + b_e, 0), f = the k largest p of each token, x̂ = W_d f + b_dec.
    """

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """Return features: the k largest or, with ``use_threshold``, those above the threshold.

        Returns:
            ``f``, or ``(f, values, indices, p)`` with ``return_topk``.
        """
        p = torch.relu(self.encoder(x - self.b_dec))
        top = p.topk(int(self.k), sorted=False, dim=-1)
        f = p * (p > self.threshold) if use_threshold else torch.zeros_like(p).scatter(-1, top.indices, top.values)
        return (f, top.values, top.indices, p) if return_topk else f

    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """See `Dictionary.map`; the rule takes the k largest of each token."""
        if columns is not None:
            raise UsageError("the rule 'topk' compares all features of a token; load it whole")
        return self.in_rows("topk", self.b_dec, None, pre_bias=True, rule_options={"k": int(self.k)})


def _of_batch(p: Tensor, threshold: Tensor, k: Tensor, use_threshold: bool) -> Tensor:
    """Return features ``(*batch, dict_size)`` above the threshold, or the k times n largest of all n tokens."""
    if use_threshold:
        return p * (p > threshold)
    flat = p.flatten()
    top = flat.topk(min(int(k) * p.shape[:-1].numel(), len(flat)), sorted=False)
    return torch.zeros_like(flat).scatter(0, top.indices, top.values).reshape(p.shape)


def _active(f: Tensor) -> Tensor:
    """Return booleans, True for features that fire at any token, ``(dict_size,)``."""
    return (f > 0).reshape(-1, f.shape[-1]).any(0)


class BatchTopKSAE(_LinearTopK):
    """BatchTopK autoencoder: p as in `AutoEncoderTopK`, f = p [p > threshold], x̂ = W_d f + b_dec (arXiv:2412.06410).

    In training, f are the k times n largest p of all n tokens of a batch, so that a token's features depend on the
    other tokens. In a batch of three axes n counts all tokens; dictionary_learning counts the first axis alone.
    """

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """Return features above the threshold or, without it, the largest of the batch.

        Returns:
            ``f``, or with ``return_active`` ``(f, active, p)``, where ``active`` is True for features that fire.
        """
        p = torch.relu(self.encoder(x - self.b_dec))
        f = _of_batch(p, self.threshold, self.k, use_threshold)
        return (f, _active(f), p) if return_active else f

    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """See `Dictionary.map`; the rule is JumpReLU by the threshold, or ReLU if no threshold was set."""
        return self.in_rows("jumprelu", self.b_dec, columns, pre_bias=True, threshold=self.threshold)


class MatryoshkaBatchTopKSAE(_Rows, _TopK):
    """`BatchTopKSAE` whose first features are dictionaries by themselves, in nested groups (arXiv:2503.17547).

    Attributes:
        active_groups: number of groups in use, counted from the first.
    """

    group_sizes: Tensor

    def __init__(self, activation_dim: int, dict_size: int, k: int, group_sizes: Sequence[int]) -> None:
        super().__init__(activation_dim, dict_size)
        sizes = list(group_sizes)
        if not sizes or sum(sizes) != dict_size or min(sizes) < 1:
            raise ConfigError(f"group_sizes must be positive and sum to dict_size {dict_size}, got {sizes!r}")
        self.buffers_of(k)
        self.register_buffer("group_sizes", torch.tensor(sizes))
        self.active_groups = len(sizes)

    @classmethod
    def sized(cls, state: dict[str, Tensor]) -> Self:
        """See `Dictionary.sized`."""
        activation_dim, dict_size = state["W_enc"].shape
        sizes = state["group_sizes"].tolist()
        return cls(activation_dim, dict_size, state["k"].item(), sizes)  # type: ignore[arg-type]  # checked there

    def _used(self) -> int:
        return int(self.group_sizes[: self.active_groups].sum())

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        """Return as `BatchTopKSAE.encode`; features of groups that are not active are zero, for any axes of x."""
        p = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        f = _of_batch(p, self.threshold, self.k, use_threshold)
        f = f * (torch.arange(self.dict_size, device=f.device) < self._used())
        return (f, _active(f), p) if return_active else f

    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """See `Dictionary.map`; the rule is JumpReLU. If some groups are not active, the map is a slice."""
        if columns is None and self._used() < self.dict_size:
            columns = torch.arange(self._used(), device=self.W_enc.device)
        return self.in_rows(columns, True, self.threshold)

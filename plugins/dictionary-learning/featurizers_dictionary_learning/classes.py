"""dictionary_learning's first autoencoders as torch modules, with its classes, methods, arguments and tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import featurizers
import torch
from featurizers import Featurizer
from featurizers.errors import UsageError
from torch import Tensor, nn

from featurizers_dictionary_learning.base import Dictionary, FromFile, Linear


class AutoEncoder(Linear):
    """ReLU autoencoder: f = max(W_e (x - bias) + b_e, 0), x̂ = W_d f + bias."""

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.bias = nn.Parameter(torch.zeros(activation_dim))
        self.unit_columns()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = torch.float32,
        normalize_decoder: bool = False,
    ) -> Self:
        """Load the autoencoder whose state dict is in a file.

        Args:
            path: see `FromFile.from_pretrained`, as for the next two.
            device: see there.
            dtype: see there.
            normalize_decoder: if True multiply each feature by the norm of its decoder column, as versions of
                dictionary_learning from 2025 on do by default; if False keep the features that the file holds.
        """
        self = cls.read(path, device, dtype)
        if normalize_decoder:
            self.normalize_decoder()
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Return features."""
        return torch.relu(self.encoder(x - self.bias))

    def decode(self, f: Tensor) -> Tensor:
        """Return activations."""
        return self.decoder(f) + self.bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor, output_features: bool = False, ghost_mask: Tensor | None = None) -> Any:
        """Return the reconstruction; with a ghost mask also that of the masked features' exponentials, without bias.

        Returns:
            ``x_hat``; ``(x_hat, f)``; ``(x_hat, x_ghost)``; or ``(x_hat, x_ghost, f)``.
        """
        if ghost_mask is None:
            return super().forward(x, output_features)
        pre = self.encoder(x - self.bias)
        x_ghost = self.decoder(pre.exp() * ghost_mask.to(pre))
        f = torch.relu(pre)
        x_hat = self.decode(f)
        return (x_hat, x_ghost, f) if output_features else (x_hat, x_ghost)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Make the decoder's columns unit vectors; their norms multiply the features, and x̂ does not change.

        Raises:
            UsageError: a column is zero.
        """
        norms = self.norms()
        if not (norms > 0).all():
            feature = int((norms <= 0).nonzero()[0])
            raise UsageError(f"the decoder column of feature {feature} is zero, so it cannot have length 1")
        if torch.allclose(norms, torch.ones_like(norms)):
            return
        self.decoder.weight.div_(norms)
        self.encoder.weight.mul_(norms[:, None])
        self.encoder.bias.mul_(norms)

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Fit the biases to activations that are ``scale`` times as large."""
        self.encoder.bias.mul_(scale)
        self.bias.mul_(scale)

    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """See `Dictionary.map`."""
        return self.in_rows("relu", self.bias, columns, pre_bias=True)


class IdentityDict(Dictionary):
    """Identity function; if a device or a dtype is given, x is moved to it."""

    def __init__(
        self,
        activation_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.activation_dim = self.dict_size = activation_dim  # type: ignore[assignment]  # None is any width
        self.dtype, self.device = dtype, device

    @classmethod
    def sized(cls, state: dict[str, Tensor]) -> Self:
        """See `Dictionary.sized`; a state dict without tensors does not tell the width."""
        return cls()

    @classmethod
    def from_pretrained(
        cls,
        activation_dim: int | None = None,
        path: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return a new instance; no file is read."""
        return cls(activation_dim, dtype, device)

    def encode(self, x: Tensor) -> Tensor:
        """Return x itself."""
        return x.to(device=self.device, dtype=self.dtype)

    def decode(self, f: Tensor) -> Tensor:
        """Return f itself."""
        return f.to(device=self.device, dtype=self.dtype)

    def forward(self, x: Tensor, output_features: bool = False, ghost_mask: Tensor | None = None) -> Any:
        """Return x itself; with ``output_features`` twice."""
        x = self.encode(x)
        return (x, x) if output_features else x

    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """Return the identity featurizer."""
        if columns is not None:
            raise UsageError("an IdentityDict is loaded whole; give the indices to the operation")
        identity: Featurizer[Any] = featurizers.create("identity", d_in=self.activation_dim)
        return identity


class GatedAutoEncoder(Linear, FromFile):
    """Gated autoencoder (arXiv:2404.16014).

    u = W_e (x - b), f = [u + gate_bias > 0] max(exp(r_mag) u + mag_bias, 0), x̂ = W_d f + b.
    """

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        initialization: str | Callable[[Any], object] = "default",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(activation_dim, dict_size, encoder_bias=False)
        self.decoder_bias = nn.Parameter(torch.zeros(activation_dim))
        for name in ("r_mag", "gate_bias", "mag_bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(dict_size)))
        self.to(device=device)
        if initialization == "default":
            self.unit_columns()
        elif callable(initialization):
            initialization(self)
        else:
            raise UsageError(f"initialization must be 'default' or a function of the module, not {initialization!r}")

    def encode(self, x: Tensor, return_gate: bool = False, normalize_decoder: bool = False) -> Any:
        """Return features.

        Args:
            x: activations.
            return_gate: if True return the pair of features and rectified pre-activations of the gate.
            normalize_decoder: if True multiply the features by the norms of their decoder columns.
        """
        u = self.encoder(x - self.decoder_bias)
        gate = u + self.get_parameter("gate_bias")
        magnitude = torch.relu(self.get_parameter("r_mag").exp() * u + self.get_parameter("mag_bias"))
        f = (gate > 0).to(magnitude.dtype) * magnitude
        f = f * self.norms() if normalize_decoder else f
        return (f, torch.relu(gate)) if return_gate else f

    def decode(self, f: Tensor, normalize_decoder: bool = False) -> Tensor:
        """Return activations of features; ``normalize_decoder`` says that they are multiplied by the norms."""
        f = f / self.norms() if normalize_decoder else f
        return self.decoder(f) + self.decoder_bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor, output_features: bool = False, normalize_decoder: bool = True) -> Any:
        """Return the reconstruction; with ``output_features`` also the features.

        Args:
            x: activations.
            output_features: if True return the pair.
            normalize_decoder: if True those features are multiplied by the norms of their decoder columns. Versions of
                dictionary_learning from 2025 on have the default False.
        """
        x_hat, f = super().forward(x, output_features=True)
        f = f * self.norms() if normalize_decoder else f
        return (x_hat, f) if output_features else x_hat

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Fit the biases to activations that are ``scale`` times as large."""
        for name in ("decoder_bias", "mag_bias", "gate_bias"):
            self.get_parameter(name).mul_(scale)

    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """See `Dictionary.map`; its ``in_units("decoder-norm")`` has the features of `forward`."""
        names = {"b_gate": "gate_bias", "r_mag": "r_mag", "b_mag": "mag_bias"}
        tensors = {name: self.get_parameter(parameter) for name, parameter in names.items()}
        return self.in_rows("gated", self.decoder_bias, columns, pre_bias=True, **tensors)


class JumpAutoEncoder(Linear, FromFile):
    """Autoencoder with an offset of active features, which is not JumpReLU.

    p = max(W_e (x - bias) + b_e, 0), f = p + jump [p > 0], x̂ = W_d f + bias.
    """

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.bias = nn.Parameter(torch.zeros(activation_dim))
        self.jump = nn.Parameter(torch.zeros(dict_size))
        self.unit_columns()

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        """Return features; with ``output_pre_jump`` the pair of features and features without the jump."""
        pre_jump = torch.relu(self.encoder(x - self.bias))
        f = pre_jump + self.jump * (pre_jump > 0)
        return (f, pre_jump) if output_pre_jump else f

    def decode(self, f: Tensor) -> Tensor:
        """Return activations."""
        return self.decoder(f) + self.bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor, output_features: bool = False, output_pre_jump: bool = False) -> Any:
        """Return ``x_hat``; ``(x_hat, f)``; or ``(x_hat, f, pre_jump)``."""
        f, pre_jump = self.encode(x, output_pre_jump=True)
        x_hat = self.decode(f)
        if output_pre_jump:
            return x_hat, f, pre_jump
        return (x_hat, f) if output_features else x_hat

    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """See `Dictionary.map`."""
        return self.in_rows("jump", self.bias, columns, pre_bias=True, jump=self.jump)


class AutoEncoderNew(Linear, FromFile):
    """ReLU autoencoder without pre-bias: f = max(W_e x + b_e, 0), x̂ = W_d f + b_d (Anthropic, April 2024 update)."""

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__(activation_dim, dict_size, decoder_bias=True)
        w = nn.functional.normalize(torch.randn(activation_dim, dict_size), dim=0) * 0.1
        self.encoder.weight = nn.Parameter(w.T.clone())
        self.decoder.weight = nn.Parameter(w)
        nn.init.zeros_(self.encoder.bias)
        nn.init.zeros_(self.decoder.bias)

    def encode(self, x: Tensor) -> Tensor:
        """Return features."""
        return torch.relu(self.encoder(x))

    def decode(self, f: Tensor) -> Tensor:
        """Return activations."""
        return self.decoder(f)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        """Return the reconstruction; with ``output_features`` also the features, times the norms of their columns."""
        x_hat, f = super().forward(x, output_features=True)
        return (x_hat, f * self.norms()) if output_features else x_hat

    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """See `Dictionary.map`; its ``in_units("decoder-norm")`` has the features of `forward`."""
        return self.in_rows("relu", self.decoder.bias, columns, pre_bias=False)

"""dictionary_learning's autoencoders as torch modules: its names of classes, methods, arguments and tensors.

Loading is safe (tensors and nothing else, whatever device they were saved on), and `Dictionary.as_featurizer` gives the
same map as a featurizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import featurizers
import torch
from featurizers import DictionaryFeaturizer, Featurizer
from featurizers.errors import ConfigError, UsageError, WeightsError
from featurizers.foreign import load_torch
from torch import Tensor, nn


class Dictionary(nn.Module, ABC):
    """Base of the autoencoders.

    Attributes:
        activation_dim: width of the activations.
        dict_size: number of features.
    """

    activation_dim: int
    dict_size: int

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Features ``(*batch, dict_size)`` of activations ``(*batch, activation_dim)``."""

    @abstractmethod
    def decode(self, f: Tensor) -> Tensor:
        """Activations of features."""

    @abstractmethod
    def as_featurizer(self) -> Featurizer[Any]:
        """The same map as a featurizer, with the weights as they are now; the features are those of `encode`."""

    @classmethod
    @abstractmethod
    def _of_state(cls, state: dict[str, Tensor]) -> Self:
        """A new one of the sizes of a state dict."""

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str | None = None) -> Self:
        """The autoencoder whose state dict is in a file, in its raw units.

        Raises:
            WeightsError: the file holds something else than the tensors of this class.
        """
        return cls.from_state(load_torch(Path(path), str(path)), str(path), device)

    @classmethod
    def from_state(cls, state: Any, where: str, device: torch.device | str | None = None) -> Self:
        """The autoencoder of a state dict.

        Raises:
            WeightsError: it is not that of this class.
        """
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise WeightsError(where, f"it holds no state dict of a {cls.__name__}")
        try:
            self = cls._of_state(state)
            self.load_state_dict(state)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise WeightsError(where, f"it is not the state dict of a {cls.__name__}: {reason[:300]}") from error
        return self if device is None else self.to(device)

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        """The reconstruction; with ``output_features`` the features too."""
        f = self.encode(x)
        x_hat = self.decode(f)
        return (x_hat, f) if output_features else x_hat


class _Linear(Dictionary):
    """What the autoencoders of two `torch.nn.Linear` share."""

    encoder: nn.Linear
    decoder: nn.Linear

    def __init__(
        self, activation_dim: int, dict_size: int, encoder_bias: bool = True, decoder_bias: bool = False
    ) -> None:
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.encoder = nn.Linear(activation_dim, dict_size, bias=encoder_bias)
        self.decoder = nn.Linear(dict_size, activation_dim, bias=decoder_bias)

    def _norms(self) -> Tensor:
        """Norms of the decoder's columns, ``(dict_size,)``."""
        norms: Tensor = self.decoder.weight.norm(dim=0)
        return norms

    def _unit_columns(self) -> None:
        self.decoder.weight.data = nn.functional.normalize(torch.randn_like(self.decoder.weight), dim=0)

    @classmethod
    def _of_state(cls, state: dict[str, Tensor]) -> Self:
        dict_size, activation_dim = state["encoder.weight"].shape
        return cls(activation_dim, dict_size)

    def _featurizer(self, rule: str, b_dec: Tensor, pre_bias: bool, **tensors: Any) -> DictionaryFeaturizer:
        return DictionaryFeaturizer.from_tensors(
            self.encoder.weight.detach(),
            self.decoder.weight.detach().T,
            None if rule == "gated" else self.encoder.bias.detach(),
            b_dec.detach(),
            rule=rule,
            pre_bias=pre_bias,
            **tensors,
        )


class AutoEncoder(_Linear):
    """f = max(W_e (x - bias) + b_e, 0), x̂ = W_d f + bias."""

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.bias = nn.Parameter(torch.zeros(activation_dim))
        self._unit_columns()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str | None = None, normalize_decoder: bool = False
    ) -> Self:
        """As `Dictionary.from_pretrained`.

        Args:
            path: of the state dict.
            device: where to put it.
            normalize_decoder: whether to multiply each feature by the norm of its decoder column, which later versions
                of dictionary_learning do unasked; False is what the file holds.
        """
        self = super().from_pretrained(path, device)
        if normalize_decoder:
            self.normalize_decoder()
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Features."""
        return torch.relu(self.encoder(x - self.bias))

    def decode(self, f: Tensor) -> Tensor:
        """Activations."""
        return self.decoder(f) + self.bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor, output_features: bool = False, ghost_mask: Tensor | None = None) -> Any:
        """The reconstruction; with a ghost mask that of the masked features too, as exponentials and without bias.

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
        """Make the decoder's columns unit vectors; their norms multiply the features, and x̂ stays."""
        norms = self._norms()
        self.decoder.weight.div_(norms)
        self.encoder.weight.mul_(norms[:, None])
        self.encoder.bias.mul_(norms)

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Fit the biases to activations that are ``scale`` times as large."""
        self.encoder.bias.mul_(scale)
        self.bias.mul_(scale)

    def as_featurizer(self) -> Featurizer[Any]:
        """The same map."""
        return self._featurizer("relu", self.bias, pre_bias=True)


class IdentityDict(Dictionary):
    """The identity function."""

    def __init__(self, activation_dim: int | None = None) -> None:
        super().__init__()
        self.activation_dim = self.dict_size = activation_dim  # type: ignore[assignment]  # None is any width

    @classmethod
    def _of_state(cls, state: dict[str, Tensor]) -> Self:
        return cls()

    def encode(self, x: Tensor) -> Tensor:
        """X itself."""
        return x

    def decode(self, f: Tensor) -> Tensor:
        """F itself."""
        return f

    def forward(self, x: Tensor, output_features: bool = False, ghost_mask: Tensor | None = None) -> Any:
        """X itself; twice with ``output_features``."""
        return (x, x) if output_features else x

    def as_featurizer(self) -> Featurizer[Any]:
        """The identity featurizer."""
        return featurizers.create("identity", d_in=self.activation_dim)


class GatedAutoEncoder(_Linear):
    """u = W_e (x - b), f = [u + gate_bias > 0] max(exp(r_mag) u + mag_bias, 0), x̂ = W_d f + b (arXiv:2404.16014)."""

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        initialization: Any = "default",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(activation_dim, dict_size, encoder_bias=False)
        self.decoder_bias = nn.Parameter(torch.zeros(activation_dim))
        for name in ("r_mag", "gate_bias", "mag_bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(dict_size)))
        if initialization == "default":
            self._unit_columns()
        elif callable(initialization):
            initialization(self)
        else:
            raise UsageError(f"initialization is 'default' or a function of the module, not {initialization!r}")
        self.to(device)

    def encode(self, x: Tensor, return_gate: bool = False) -> Any:
        """Features; with ``return_gate`` the pair of them and the rectified pre-activations of the gate."""
        u = self.encoder(x - self.decoder_bias)
        gate = u + self.get_parameter("gate_bias")
        magnitude = torch.relu(self.get_parameter("r_mag").exp() * u + self.get_parameter("mag_bias"))
        f = (gate > 0).to(magnitude.dtype) * magnitude
        return (f, torch.relu(gate)) if return_gate else f

    def decode(self, f: Tensor) -> Tensor:
        """Activations."""
        return self.decoder(f) + self.decoder_bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        """The reconstruction; the features beside it are multiplied by the norms of their decoder columns."""
        x_hat, f = super().forward(x, output_features=True)
        return (x_hat, f * self._norms()) if output_features else x_hat

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Fit the biases to activations that are ``scale`` times as large."""
        for name in ("decoder_bias", "mag_bias", "gate_bias"):
            self.get_parameter(name).mul_(scale)

    def as_featurizer(self) -> Featurizer[Any]:
        """The same map; ``in_units("decoder-norm")`` of it has the features of `forward`."""
        names = {"b_gate": "gate_bias", "r_mag": "r_mag", "b_mag": "mag_bias"}
        tensors = {ours: self.get_parameter(theirs).detach() for ours, theirs in names.items()}
        return self._featurizer("gated", self.decoder_bias, pre_bias=True, **tensors)


class JumpAutoEncoder(_Linear):
    """p = max(W_e (x - bias) + b_e, 0), f = p + jump [p > 0], x̂ = W_d f + bias: an offset, and not JumpReLU."""

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.bias = nn.Parameter(torch.zeros(activation_dim))
        self.jump = nn.Parameter(torch.zeros(dict_size))
        self._unit_columns()

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        """Features; with ``output_pre_jump`` the pair of them and those without the jump."""
        pre_jump = torch.relu(self.encoder(x - self.bias))
        f = pre_jump + self.jump * (pre_jump > 0)
        return (f, pre_jump) if output_pre_jump else f

    def decode(self, f: Tensor) -> Tensor:
        """Activations."""
        return self.decoder(f) + self.bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor, output_features: bool = False, output_pre_jump: bool = False) -> Any:
        """``x_hat``; ``(x_hat, f)``; or ``(x_hat, f, pre_jump)``."""
        f, pre_jump = self.encode(x, output_pre_jump=True)
        x_hat = self.decode(f)
        if output_pre_jump:
            return x_hat, f, pre_jump
        return (x_hat, f) if output_features else x_hat

    def as_featurizer(self) -> Featurizer[Any]:
        """The same map."""
        return self._featurizer("jump", self.bias, pre_bias=True, jump=self.jump.detach())


class AutoEncoderNew(_Linear):
    """f = max(W_e x + b_e, 0), x̂ = W_d f + b_d (Anthropic, April 2024 update)."""

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__(activation_dim, dict_size, decoder_bias=True)
        w = nn.functional.normalize(torch.randn(activation_dim, dict_size), dim=0) * 0.1
        self.encoder.weight = nn.Parameter(w.T.clone())
        self.decoder.weight = nn.Parameter(w)
        nn.init.zeros_(self.encoder.bias)
        nn.init.zeros_(self.decoder.bias)

    def encode(self, x: Tensor) -> Tensor:
        """Features."""
        return torch.relu(self.encoder(x))

    def decode(self, f: Tensor) -> Tensor:
        """Activations."""
        return self.decoder(f)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        """The reconstruction; the features beside it are multiplied by the norms of their decoder columns."""
        x_hat, f = super().forward(x, output_features=True)
        return (x_hat, f * self._norms()) if output_features else x_hat

    def as_featurizer(self) -> Featurizer[Any]:
        """The same map; ``in_units("decoder-norm")`` of it has the features of `forward`."""
        return self._featurizer("relu", self.decoder.bias, pre_bias=False)


def positive_k(k: Any) -> int:
    """k, if it is a positive integer.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ConfigError(f"k is a positive integer, not {k!r}")
    return k

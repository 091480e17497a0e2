"""Autoencoders as torch modules, with pyvene's names of classes and tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from featurizers import DictionaryFeaturizer
from featurizers.errors import UsageError
from torch import Tensor, nn


class AutoencoderLayerBase(nn.Module, ABC):
    """Base of the autoencoders: a subclass defines `encode` and `decode`.

    `AutoencoderIntervention` works with any subclass. Only the classes of this module are saved, because a file never
    names a class to import; to save another, make it a kind of featurizer, as docs/plugins.md says.
    """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Map activations ``(*batch, input_dim)`` to latents ``(*batch, latent_dim)``."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Map latents to activations."""


class SizedLayer(AutoencoderLayerBase):
    """Autoencoder that its two sizes and its tensors define, so that it can be saved.

    Attributes:
        input_dim: width of the activations.
        latent_dim: number of latents.
        name: name of the class in files.
    """

    name: ClassVar[str]

    def __init__(self, input_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.input_dim, self.latent_dim = int(input_dim), int(latent_dim)

    def forward(self, base: Tensor, return_latent: bool = False) -> Any:
        """Reconstruct activations, in their dtype.

        With ``return_latent`` return a dict of ``latent`` and ``output`` instead, both in the dtype of the weights.
        """
        latent = self.encode(base)
        output = self.decode(latent)
        return {"latent": latent, "output": output} if return_latent else output.to(base.dtype)

    @abstractmethod
    def as_featurizer(self) -> DictionaryFeaturizer:
        """Return the same map as a dictionary, with the current weights."""

    @classmethod
    @abstractmethod
    def of_featurizer(cls, featurizer: DictionaryFeaturizer) -> Self:
        """Build an autoencoder with the weights of a dictionary.

        Raises:
            UsageError: the dictionary computes another map.
        """


class AutoencoderLayer(SizedLayer):
    """Linear encoder with a ReLU and linear decoder: latent = max(W_e (x - b_d) + b_e, 0), x̂ = W_d latent + b_d."""

    name: ClassVar[str] = "autoencoder-layer"

    def __init__(self, input_dim: int, latent_dim: int, **_: Any) -> None:
        super().__init__(input_dim, latent_dim)
        self.encoder = nn.Sequential(nn.Linear(self.input_dim, self.latent_dim), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(self.latent_dim, self.input_dim))

    def encode(self, x: Tensor) -> Tensor:
        """Map activations to latents, in the dtype of the weights."""
        bias: Any = self.decoder[0].bias
        return self.encoder(x.to(bias.dtype) - bias)  # type: ignore[no-any-return]

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents to activations."""
        return self.decoder(latent)  # type: ignore[no-any-return]

    def as_featurizer(self) -> DictionaryFeaturizer:
        """Return the same map as a dictionary of the rule relu with a pre-bias."""
        encoder: Any = self.encoder[0]
        decoder: Any = self.decoder[0]
        return DictionaryFeaturizer.from_tensors(
            encoder.weight.detach(),
            decoder.weight.detach().T,
            encoder.bias.detach(),
            decoder.bias.detach(),
            pre_bias=True,
        )

    @classmethod
    def of_featurizer(cls, featurizer: DictionaryFeaturizer) -> Self:
        """Build an autoencoder with the weights of a dictionary of the rule relu.

        This layer has a pre-bias, so that of a dictionary without one is undone in the encoder's bias.

        Raises:
            UsageError: the dictionary computes another map.
        """
        state = _plain(featurizer, "relu")
        self = cls(featurizer.d_in, featurizer.n_features)
        bias = state["b_enc"]
        if not featurizer.config.pre_bias:
            bias = bias + state["W_enc"] @ state["b_dec"]
        names = {
            "encoder.0.weight": state["W_enc"],
            "encoder.0.bias": bias,
            "decoder.0.weight": state["W_dec"].T,
            "decoder.0.bias": state["b_dec"],
        }
        self.load_state_dict({name: _contiguous(tensor) for name, tensor in names.items()}, assign=True)
        return self


class JumpReLUAutoencoderLayer(SizedLayer):
    """JumpReLU layers: h = x W_enc + b_enc, latent = h if h > max(threshold, 0), else 0; x̂ = latent W_dec + b_dec."""

    name: ClassVar[str] = "jumprelu-autoencoder-layer"

    def __init__(self, input_dim: int, latent_dim: int, **_: Any) -> None:
        super().__init__(input_dim, latent_dim)
        self.W_enc = nn.Parameter(torch.zeros(self.input_dim, self.latent_dim))
        self.W_dec = nn.Parameter(torch.zeros(self.latent_dim, self.input_dim))
        self.threshold = nn.Parameter(torch.zeros(self.latent_dim))
        self.b_enc = nn.Parameter(torch.zeros(self.latent_dim))
        self.b_dec = nn.Parameter(torch.zeros(self.input_dim))

    def encode(self, x: Tensor) -> Tensor:
        """Map activations to latents, in the dtype of the weights."""
        pre = x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc
        return torch.relu(pre) * (pre > self.threshold)

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents to activations."""
        return latent @ self.W_dec + self.b_dec

    def as_featurizer(self) -> DictionaryFeaturizer:
        """Return the same map as a dictionary of the rule jumprelu."""
        weights = (self.W_enc.T, self.W_dec, self.b_enc, self.b_dec)
        return DictionaryFeaturizer.from_tensors(
            *(weight.detach() for weight in weights), rule="jumprelu", threshold=self.threshold.detach()
        )

    @classmethod
    def of_featurizer(cls, featurizer: DictionaryFeaturizer) -> Self:
        """Build an autoencoder with the weights of a dictionary of the rule jumprelu.

        This layer has no pre-bias, so that of a dictionary is moved into the encoder's bias.

        Raises:
            UsageError: the dictionary computes another map.
        """
        state = _plain(featurizer, "jumprelu")
        self = cls(featurizer.d_in, featurizer.n_features)
        if featurizer.config.pre_bias:
            state["b_enc"] = state["b_enc"] - state["W_enc"] @ state["b_dec"]
        state["W_enc"] = state["W_enc"].T
        self.load_state_dict({name: _contiguous(state[name]) for name in self.state_dict()}, assign=True)
        return self


SAVED: dict[str, type[SizedLayer]] = {cls.name: cls for cls in (AutoencoderLayer, JumpReLUAutoencoderLayer)}
"""Classes that files may name, by name."""


def layer_of(featurizer: DictionaryFeaturizer) -> SizedLayer:
    """Build the autoencoder with the weights of a dictionary of the rule relu or jumprelu.

    Raises:
        UsageError: the dictionary computes another map.
    """
    cls = JumpReLUAutoencoderLayer if featurizer.config.rule == "jumprelu" else AutoencoderLayer
    return cls.of_featurizer(featurizer)


def _contiguous(tensor: Tensor) -> Tensor:
    """Copy a tensor to contiguous memory, like the layer's own parameters: matmul rounding depends on the layout."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _plain(featurizer: DictionaryFeaturizer, rule: str) -> dict[str, Tensor]:
    """Return the state dict of a dictionary in raw units.

    Raises:
        UsageError: the dictionary is of another rule, normalises its input or is a slice.
    """
    config = featurizer.config
    if config.rule != rule or config.normalize != "none" or config.slice_of is not None:
        raise UsageError(
            f"{featurizer.id!r} has the rule {config.rule!r}, normalize={config.normalize!r} and slice_of="
            f"{config.slice_of!r}; this layer takes whole dictionaries of the rule {rule!r} without normalisation. "
            "Use featurizer.get_interchange_intervention() for others"
        )
    return dict(featurizer.in_units("raw").state_dict())

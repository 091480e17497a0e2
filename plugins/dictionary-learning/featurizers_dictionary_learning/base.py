"""Base classes of the autoencoders: safe loading from any device, and conversion to a featurizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self, final

import torch
from featurizers import DictionaryFeaturizer, Featurizer
from featurizers.errors import UsageError, WeightsError
from featurizers.files import load_torch
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
    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return features ``(*batch, dict_size)`` of activations ``(*batch, activation_dim)``."""

    @abstractmethod
    def decode(self, f: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return activations of features."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """Load the autoencoder whose state dict is in a file."""

    @classmethod
    @abstractmethod
    def sized(cls, state: dict[str, Tensor]) -> Self:
        """Return a new autoencoder of the sizes of a state dict."""

    @abstractmethod
    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """Return the same map as a featurizer, which shares the weights that already have its layout.

        Args:
            columns: int64 ``(k,)``, the features to keep; only their rows of the weights are read. None for all.

        Raises:
            UsageError: the features depend on each other, so that a part of them would be another map.
        """

    @final
    def as_featurizer(self) -> Featurizer[Any]:
        """Return the same map as a featurizer, with a copy of the weights; the features are those of `encode`."""
        featurizer = self.map()
        shared = {tensor.data_ptr() for tensor in self.state_dict().values()}
        state = featurizer.state_dict().items()
        copied = {name: tensor.clone() if tensor.data_ptr() in shared else tensor for name, tensor in state}
        featurizer.load_state_dict(copied, assign=True)
        return featurizer

    @classmethod
    @final
    def from_state(cls, state: Any, where: str) -> Self:
        """Return the autoencoder that has the tensors of a state dict, in their dtypes.

        Args:
            state: as from `torch.nn.Module.state_dict`.
            where: name of the state dict in errors.

        Raises:
            WeightsError: it is not a state dict of this class.
        """
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise WeightsError(where, f"it holds no state dict of a {cls.__name__}")
        try:
            with torch.device("meta"):
                self = cls.sized(state)
            self.load_state_dict(state, assign=True)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            lacks = f"it lacks {error}, and has {sorted(map(str, state))!r}"
            reason = lacks if isinstance(error, KeyError) else " ".join(str(error).split())
            raise WeightsError(where, f"it is not the state dict of a {cls.__name__}: {reason[:400]}") from error
        return self

    @classmethod
    @final
    def read(cls, path: str | Path, device: torch.device | str | None, dtype: torch.dtype | None) -> Self:
        """Load the autoencoder whose state dict is in a file, copied into memory.

        Raises:
            WeightsError: the file holds anything but the tensors of this class.
            UsageError: the device is a dtype.
        """
        if isinstance(device, torch.dtype):
            raise UsageError(f"the device is {device}, which is a dtype; write dtype={device}")
        self = cls.from_state(load_torch(Path(path), str(path)), str(path))
        own = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict(own, assign=True)  # not mapped from the file, which may be overwritten
        return self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        """Return the reconstruction; with ``output_features`` also the features."""
        f = self.encode(x)
        x_hat = self.decode(f)
        return (x_hat, f) if output_features else x_hat


class FromFile(Dictionary):
    """Autoencoder whose ``from_pretrained`` takes a path, a device and a dtype."""

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = torch.float32
    ) -> Self:
        """Load the autoencoder whose state dict is in a file, in raw units.

        Args:
            path: of the file.
            device: device of the autoencoder, None for the CPU.
            dtype: dtype of the autoencoder, None for that of the file.

        Raises:
            WeightsError: the file holds anything but the tensors of this class.
        """
        return cls.read(path, device, dtype)


def canonical(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor | None, b_dec: Tensor, columns: Tensor | None, **rule: Any
) -> DictionaryFeaturizer:
    """Return the featurizer of weights that have a row for each feature, or of some of those rows.

    Args:
        W_enc: ``(n_features, d_in)``.
        W_dec: ``(n_features, d_in)``.
        b_enc: ``(n_features,)``.
        b_dec: ``(d_in,)``.
        columns: features to keep, None for all.
        rule: options of `DictionaryFeaturizer.from_tensors`, and the tensors of the rule.
    """

    def rows(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value if columns is None or not value.dim() else value[columns]

    part: dict[str, Any] = {} if columns is None else {"numbers": columns, "slice_of": len(W_enc)}
    arguments: dict[str, Any] = {
        name: rows(value) for name, value in {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, **rule}.items()
    }
    return DictionaryFeaturizer.from_tensors(**arguments, b_dec=b_dec.detach(), **part)


class Linear(Dictionary):
    """Base of the autoencoders that are made of two `torch.nn.Linear`."""

    encoder: nn.Linear
    decoder: nn.Linear

    def __init__(
        self, activation_dim: int, dict_size: int, encoder_bias: bool = True, decoder_bias: bool = False
    ) -> None:
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.encoder = nn.Linear(activation_dim, dict_size, bias=encoder_bias)
        self.decoder = nn.Linear(dict_size, activation_dim, bias=decoder_bias)

    @final
    def norms(self) -> Tensor:
        """Return the norms of the decoder's columns, ``(dict_size,)``."""
        norms: Tensor = self.decoder.weight.norm(dim=0)
        return norms

    @final
    def unit_columns(self) -> None:
        """Make the decoder's columns random unit vectors."""
        self.decoder.weight.data = nn.functional.normalize(torch.randn_like(self.decoder.weight), dim=0)

    @classmethod
    def sized(cls, state: dict[str, Tensor]) -> Self:
        """See `Dictionary.sized`."""
        dict_size, activation_dim = state["encoder.weight"].shape
        return cls(activation_dim, dict_size)

    @final
    def in_rows(
        self, rule: str, b_dec: Tensor, columns: Tensor | None, pre_bias: bool, **tensors: Any
    ) -> Featurizer[Any]:
        """Return the canonical form of these weights; see `canonical`."""
        weights = self.encoder.weight, self.decoder.weight.T, self.encoder.bias, b_dec
        return canonical(*weights, columns, rule=rule, pre_bias=pre_bias, **tensors)

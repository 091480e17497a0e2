"""What all autoencoders share: safe loading, whatever device they were saved on, and the same map as a featurizer."""

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
        """Features ``(*batch, dict_size)`` of activations ``(*batch, activation_dim)``."""

    @abstractmethod
    def decode(self, f: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Activations of features."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """The autoencoder whose state dict is in a file."""

    @classmethod
    @abstractmethod
    def sized(cls, state: dict[str, Tensor]) -> Self:
        """A new one of the sizes of a state dict."""

    @abstractmethod
    def map(self, columns: Tensor | None = None) -> Featurizer[Any]:
        """The same map as a featurizer, which shares the weights where their layout is its own.

        Args:
            columns: int64 ``(k,)``, for these features alone; of no others is a row of the weights read.

        Raises:
            UsageError: the features depend on each other, so that some alone are another map.
        """

    @final
    def as_featurizer(self) -> Featurizer[Any]:
        """The same map as a featurizer, with a copy of the weights; the features are those of `encode`."""
        featurizer = self.map()
        shared = {tensor.data_ptr() for tensor in self.state_dict().values()}
        state = featurizer.state_dict().items()
        copied = {name: tensor.clone() if tensor.data_ptr() in shared else tensor for name, tensor in state}
        featurizer.load_state_dict(copied, assign=True)
        return featurizer

    @classmethod
    @final
    def from_state(cls, state: Any, where: str) -> Self:
        """The autoencoder whose tensors are those of a state dict, in their dtypes.

        Args:
            state: of `torch.nn.Module.state_dict`.
            where: what to call it in an error.

        Raises:
            WeightsError: it is not that of this class.
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
        """The autoencoder whose state dict is in a file, in memory of its own.

        Raises:
            WeightsError: the file holds something else than the tensors of this class.
            UsageError: the device is none.
        """
        if isinstance(device, torch.dtype):
            raise UsageError(f"the device is {device}, which is a dtype; write dtype={device}")
        self = cls.from_state(load_torch(Path(path), str(path)), str(path))
        own = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict(own, assign=True)  # not mapped from the file, which may be written anew
        return self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        """The reconstruction; with ``output_features`` the features too."""
        f = self.encode(x)
        x_hat = self.decode(f)
        return (x_hat, f) if output_features else x_hat


class FromFile(Dictionary):
    """What is loaded with a path, a device and a dtype."""

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = torch.float32
    ) -> Self:
        """The autoencoder whose state dict is in a file, as the file has it: in raw units.

        Args:
            path: of the file.
            device: where to put it, None for the CPU.
            dtype: what to convert it to, None for the dtype of the file.

        Raises:
            WeightsError: the file holds something else than the tensors of this class.
        """
        return cls.read(path, device, dtype)


def canonical(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor | None, b_dec: Tensor, columns: Tensor | None, **rule: Any
) -> DictionaryFeaturizer:
    """The featurizer of weights with a feature a row, or of some of those rows.

    Args:
        W_enc: ``(n_features, d_in)``.
        W_dec: likewise.
        b_enc: ``(n_features,)``.
        b_dec: ``(d_in,)``.
        columns: which features, None for all.
        rule: options of `DictionaryFeaturizer.from_tensors`, and the tensors of the rule.
    """

    def rows(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value if columns is None or not value.dim() else value[columns]

    part: dict[str, Any] = {} if columns is None else {"numbers": columns, "slice_of": len(W_enc)}
    given: dict[str, Any] = {
        name: rows(value) for name, value in {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, **rule}.items()
    }
    return DictionaryFeaturizer.from_tensors(**given, b_dec=b_dec.detach(), **part)


class Linear(Dictionary):
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

    @final
    def norms(self) -> Tensor:
        """Norms of the decoder's columns, ``(dict_size,)``."""
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
        """The canonical form of these weights; see `canonical`."""
        weights = self.encoder.weight, self.decoder.weight.T, self.encoder.bias, b_dec
        return canonical(*weights, columns, rule=rule, pre_bias=pre_bias, **tensors)

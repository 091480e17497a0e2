"""Weights of llamascopium in safetensors files, in float32, in which it computes by default."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from featurizers.errors import ManifestError, UsageError, WeightsError, shown
from featurizers.features import select
from featurizers.format import ExternalFiles
from torch import Tensor

from featurizers_llamascopium.config import Base

FILES = ("sae_weights.safetensors", "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
"""Names of the file, in the order in which llamascopium looks for them."""
NORM = "dataset_average_activation_norm."
THRESHOLD = "activation_function.log_jumprelu_threshold"


class Gate(NamedTuple):
    """Activation function as a rule of this library.

    Attributes:
        rule: name of the activation rule.
        options: its numbers.
        tensors: its parameters, ``(n,)`` each.
    """

    rule: str
    options: dict[str, int | float]
    tensors: dict[str, Tensor]


class Weights:
    """Tensors of a folder's file.

    Attributes:
        where: name of the folder in errors.
        config: of the folder.
    """

    def __init__(self, source: ExternalFiles, config: Base) -> None:
        self.where, self.config = source.where, config
        name = next((name for name in FILES if name in source.names), None)
        if name is None:
            raise ManifestError(
                self.where,
                f"there is no file {FILES[0]}; llamascopium's other formats, .pt and .dcp, are not read: load the "
                "model there, and save it again with save_pretrained",
            )
        self._file = source.safetensors(name)

    def check(self, shapes: Mapping[str, tuple[int, ...]], others: Iterable[str] = ()) -> None:
        """Raise WeightsError unless the file has these floating-point tensors, and no unknown ones.

        Args:
            shapes: of the tensors that must be there.
            others: names of tensors that are not read.
        """
        specs = self._file.specs
        unread = {name for name in specs if name.startswith(NORM)} | set(others)
        if wrong := sorted((specs.keys() - unread) ^ shapes.keys()):
            raise WeightsError(self.where, f"missing or unknown tensors {shown(wrong, 300)}")
        for name, shape in shapes.items():
            spec = specs[name]
            if spec.shape != shape or not spec.dtype.startswith(("float", "bfloat")):
                raise WeightsError(
                    self.where, f"{name} is {spec.dtype} of shape {spec.shape}, it must be floats of shape {shape}"
                )

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, None if it is not there."""
        return self._file.shapes.get(name)

    def read(
        self, name: str, rows: Tensor | None = None, columns: Tensor | None = None, plane: int | None = None
    ) -> Tensor:
        """Read a tensor, or some of its rows or columns, in float32; see `featurizers.format.TensorFile`."""
        return self._file.read(name, rows, columns, plane=plane).float()

    def factor(self, hook: str) -> float:
        """Return the factor by which llamascopium multiplies the activations of a hook.

        Raises:
            WeightsError: the norm that it follows from is missing, or is no positive number.
        """
        if self.config.norm_activation != "dataset-wise":
            return 1.0
        name = NORM + hook
        norm = self.read(name) if self.shape(name) == () else torch.tensor(0.0)
        if not (norm.isfinite() and norm > 0):
            raise WeightsError(
                self.where,
                f"the activations are normalised by their average norm in a data set, and {shown(name, 200)} is "
                f"{norm.item() if self.shape(name) == () else 'missing'}; it must be a positive number",
            )
        return math.sqrt(self.config.d_model) / norm.item()

    def columns(self, indices: Tensor | None) -> Tensor | None:
        """Check the numbers of features to read.

        Raises:
            FeatureIndexError: one is out of range.
            UsageError: the activation function compares all features.
        """
        if indices is None:
            return None
        if self.config.act_fn == "topk":
            raise UsageError(
                f"{self.where}: topk compares all features of a token; load it whole, and give the indices to the "
                "operation"
            )
        return select(indices, self.config.n_features).as_columns()

    def gate(self, norms: Tensor, threshold: Tensor | None) -> Gate:
        """Return the rule that an activation function is.

        Args:
            norms: of the decoder rows of each feature, in the units of the file.
            threshold: logarithms of the thresholds of jumprelu.

        Raises:
            WeightsError: a row that the activation function divides by is zero.
        """
        config, tensors = self.config, {}
        normed = config.sparsity_include_decoder_norm
        if normed and not bool((norms > 0).all()):
            raise WeightsError(
                self.where,
                f"{int((norms <= 0).sum())} features have a decoder of zeros, for which llamascopium divides 0 by 0",
            )
        if threshold is not None:
            value = threshold.exp() / norms if normed else threshold.exp()
            tensors["threshold"] = value.clamp(max=torch.finfo(value.dtype).max)
            return Gate("jumprelu", {}, tensors)
        if config.act_fn == "topk":
            named = ("llamascopium.topk", {"norm": norms}) if normed else ("topk", {})
            return Gate(named[0], {"k": config.top_k}, named[1])
        return Gate("relu", {}, {})

    @property
    def has_threshold(self) -> bool:
        """Whether features have thresholds."""
        return self.config.act_fn == "jumprelu"

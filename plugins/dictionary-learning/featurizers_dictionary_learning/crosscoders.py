"""Crosscoders of a fork of dictionary_learning: one group of features, read from and written to all layers.

    u_l = (x_l - mean_l) g        f = relu(Σ_l u_l W_l + b)        x̂_l = (f D_l + b_l) / (g + 1e-8) + mean_l

A BatchTopKCrossCoder keeps a feature whose value times the norms of its decoder rows exceeds its threshold. The files
tell neither the model nor the sites. Source: https://github.com/jkminder/dictionary_learning at 48debb2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from featurizers.errors import FeaturizerError, ManifestError, WeightsError, shown
from featurizers.features import select
from featurizers.format import ExternalFiles, TensorFile
from featurizers_transcoder import Crosscoder
from torch import Tensor

NORMALIZATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
"""What the values of features are multiplied by before they are compared with a threshold, by their id from 1."""
WEIGHTS = {"encoder.weight": 3, "encoder.bias": 1, "decoder.weight": 3, "decoder.bias": 2}
"""Number of axes of each weight."""
BUFFERS = {
    "activation_mean",
    "activation_std",
    "activation_global_scale",
    "target_rms",
    "code_normalization_id",
    "k",
    "threshold",
}
COMPILED = "_orig_mod."
"""Prefix of the names of tensors in a compiled module."""


class _Weights:
    """Tensors of a crosscoder, of some features or all, in float32 as the fork computes.

    Attributes:
        where: name of the folder in errors.
        shapes: of the tensors, by name.
    """

    def __init__(self, where: str, stored: TensorFile | Mapping[str, Tensor], rows: Tensor | None) -> None:
        self.where, self._stored, self._rows = where, stored, rows
        shapes = stored.shapes if isinstance(stored, TensorFile) else {n: tuple(t.shape) for n, t in stored.items()}
        self._prefix = COMPILED if all(name.startswith(COMPILED) for name in shapes) else ""
        self.shapes = {name.removeprefix(self._prefix): shape for name, shape in shapes.items()}
        if unknown := sorted(self.shapes.keys() - WEIGHTS.keys() - BUFFERS):
            raise WeightsError(where, f"the tensor {shown(unknown[0])} is not a crosscoder's")
        for name, axes in WEIGHTS.items():
            if len(self.shapes.get(name, ())) != axes or 0 in self.shapes[name]:
                raise WeightsError(where, f"{name} must have {axes} axes, it has shape {self.shapes.get(name)}")
        self.n_layers, self.width, n = self.shapes["decoder.weight"][0], *self.shapes["encoder.weight"][1:]
        expected = {
            "encoder.weight": (self.shapes["encoder.weight"][0], self.width, n),
            "encoder.bias": (n,),
            "decoder.weight": (self.n_layers, n, self.width),
            "decoder.bias": (self.n_layers, self.width),
        }
        if wrong := [name for name, shape in expected.items() if self.shapes[name] != shape]:
            raise WeightsError(where, f"{wrong[0]} has shape {self.shapes[wrong[0]]}, it must be {expected[wrong[0]]}")
        self.n = n
        self.columns = None if rows is None else select(rows, n).as_columns()

    def __getitem__(self, name: str) -> Tensor:
        """Read a whole tensor."""
        if name not in self.shapes:
            raise WeightsError(self.where, f"the tensor {name!r} is missing")
        stored = self._stored
        tensor = stored.read(self._prefix + name) if isinstance(stored, TensorFile) else stored[self._prefix + name]
        return tensor.float()

    def layer(self, name: str, layer: int) -> Tensor:
        """Read one layer of the encoder or decoder as rows ``(n_features, width)``; memory is that of a layer."""
        stored = self._stored
        if isinstance(stored, TensorFile):
            matrix = stored.read(self._prefix + name, torch.tensor([layer]))[0]
        else:
            matrix = stored[self._prefix + name][layer]
        matrix = matrix.T if name == "encoder.weight" else matrix
        return (matrix if self.columns is None else matrix[self.columns]).float()


def read(source: ExternalFiles, stored: TensorFile | Mapping[str, Tensor], options: Mapping[str, Any]) -> Crosscoder:
    """Read a crosscoder, or some of its features, without sites.

    Args:
        source: its folder.
        stored: its tensors.
        options: arguments of the class, or those of them that a trainer records.

    Raises:
        ManifestError: an option contradicts the weights, or is not known.
        WeightsError: the weights are not a crosscoder's.
    """
    where = source.where
    rows = source.indices
    if source.group_indices is not None:
        if source.group_indices.keys() != {"features"}:
            raise ManifestError(where, "a crosscoder has the group 'features' alone; give its features as a list")
        rows = source.group_indices["features"]
    weights = _Weights(where, stored, rows)
    _check(weights, options)
    names = [f"layer-{layer}" for layer in range(weights.n_layers)]
    mean, scale = _normalization(weights)
    encoded = [names[layer] for layer in _encoder_layers(weights, options)]
    W_enc = {f"W_enc.features.{name}": weights.layer("encoder.weight", i) for i, name in enumerate(encoded)}
    raw = [weights.layer("decoder.weight", layer) for layer in range(weights.n_layers)]
    threshold = _threshold(weights, raw, options)
    bias = weights["decoder.bias"]
    if mean is not None:
        raw, bias = [rows / (scale + 1e-8) for rows in raw], bias / (scale + 1e-8) + mean
    columns = weights.columns
    b_enc = weights["encoder.bias"]
    tensors = {
        **W_enc,
        "b_enc.features": b_enc if columns is None else b_enc[columns],
        **{f"W_dec.features.{name}": rows for name, rows in zip(names, raw, strict=True)},
        **{f"b_dec.{name}": own for name, own in zip(names, bias, strict=True)},
    }
    if mean is not None:
        tensors |= {f"centre.{name}": own for name, own in zip(names, mean, strict=True)}
    if threshold is not None:
        tensors["rule_tensors.threshold.features"] = threshold
    if columns is not None:
        tensors["numbers-features"] = columns
    normalize = "none" if mean is None else "scale"
    read_config = {"width": weights.width, "normalize": normalize, "input_scale": scale, "centre": mean is not None}
    group = {
        "reads": encoded,
        "writes": names,
        "n_features": weights.n if columns is None else len(columns),
        "rule": "relu" if threshold is None else "jumprelu",
        "slice_of": None if columns is None else weights.n,
    }
    config = {
        "reads": dict.fromkeys(names, read_config),
        "writes": dict.fromkeys(names, weights.width),
        "groups": {"features": group},
    }
    try:
        return Crosscoder.from_tensors(config, tensors)
    except FeaturizerError as error:
        raise WeightsError(where, str(error)) from error


def _check(weights: _Weights, options: Mapping[str, Any]) -> None:
    """Raise ManifestError if the options contradict the weights."""
    sizes = {"activation_dim": weights.width, "dict_size": weights.n, "num_layers": weights.n_layers}
    for name, size in sizes.items():
        if options.get(name) not in (None, size) or isinstance(options.get(name), bool):
            raise ManifestError(weights.where, f"{name} is {shown(options[name])}, but the weights have {size}")
    if options.get("num_decoder_layers") not in (None, weights.n_layers):
        raise ManifestError(weights.where, "num_decoder_layers contradicts the weights")


def _encoder_layers(weights: _Weights, options: Mapping[str, Any]) -> list[int]:
    """Return the layers that the encoder reads, in its order.

    Raises:
        ManifestError: it does not say which.
    """
    count, layers = weights.shapes["encoder.weight"][0], options.get("encoder_layers")
    if layers is None and count == weights.n_layers:
        return list(range(count))
    valid = isinstance(layers, list) and all(type(layer) is int and 0 <= layer < weights.n_layers for layer in layers)
    if not valid or len(set(layers or ())) != count or len(layers or ()) != count:
        raise ManifestError(
            weights.where,
            f"the encoder reads {count} of {weights.n_layers} layers, and encoder_layers is {shown(layers)}",
        )
    return list(layers or ())


def _normalization(weights: _Weights) -> tuple[Tensor | None, float]:
    """Return the mean and the scale of the activations; None and 1 if they are not normalised."""
    names = ("activation_mean", "activation_std")
    if not all(name in weights.shapes for name in names):
        return None, 1.0
    shape = (weights.n_layers, weights.width)
    if wrong := [name for name in names if weights.shapes[name] != shape]:
        raise WeightsError(weights.where, f"{wrong[0]} has shape {weights.shapes[wrong[0]]}, it must be {shape}")
    if any(weights[name].isnan().any() for name in names):
        return None, 1.0
    scale = weights["activation_global_scale"]
    if scale.shape or not 0 < float(scale) < float("inf"):
        raise WeightsError(weights.where, "activation_global_scale must be a positive number")
    return weights["activation_mean"], float(scale)


def _threshold(weights: _Weights, decoders: list[Tensor], options: Mapping[str, Any]) -> Tensor | None:
    """Return the threshold of each feature in units of `encode`, None without thresholds.

    Raises:
        ManifestError: what the values are multiplied by is not known, or the features differ by layer.
    """
    if "threshold" not in weights.shapes:
        return None
    norms = torch.stack([rows.norm(dim=-1) for rows in decoders])  # (layers, features)
    match _code_normalization(weights, options):
        case "CROSSCODER":
            scale = norms.sum(dim=0)
        case "SAE":
            scale = norms.norm(dim=0)
        case "NONE":
            scale = torch.ones_like(norms[0])
        case other:
            raise ManifestError(
                weights.where, f"a BatchTopKCrossCoder with the code normalization {other} cannot be read"
            )
    threshold = weights["threshold"]
    if threshold.shape or threshold.isnan():
        raise WeightsError(weights.where, "the threshold must be one number")
    if threshold < 0:  # it is not known yet: every positive value passes
        return torch.zeros_like(scale)
    never = torch.full_like(scale, torch.finfo(scale.dtype).max)
    return torch.where(scale > 0, threshold / scale, never).clamp(max=torch.finfo(scale.dtype).max)


def _code_normalization(weights: _Weights, options: Mapping[str, Any]) -> str:
    """Return the name of the normalisation of codes, which the weights and the options may give."""
    given = options.get("code_normalization")
    if "code_normalization_id" not in weights.shapes:
        name = "CROSSCODER" if given is None else str(given).upper()
    else:
        number = weights["code_normalization_id"]
        if number.numel() != 1 or float(number) not in range(1, len(NORMALIZATIONS) + 1):
            raise WeightsError(weights.where, "code_normalization_id is not known")
        name = NORMALIZATIONS[int(number) - 1]
        if isinstance(given, str) and given.upper() != name:
            raise ManifestError(weights.where, f"code_normalization is {shown(given)}, but the weights have {name}")
    if name not in NORMALIZATIONS:
        raise ManifestError(weights.where, f"code_normalization {shown(given)} is not known")
    return name

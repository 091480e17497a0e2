"""Helpers of all readers: from arrays to a featurizer, whole or in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from featurizers import Featurizer
from featurizers.errors import WeightsError, shown
from featurizers.features import select
from featurizers.format import ExternalFiles, TensorFile
from torch import Tensor

from featurizers_sae_lens.assembly import assemble, number

LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
"""SAELens' names, and the names in the state dict of two `torch.nn.Linear`."""


def finish(
    source: ExternalFiles,
    cfg: dict[str, Any],
    tensors: dict[str, Tensor],
    n_features: int,
    scale: float | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Featurizer[Any]:
    """Check sizes against the configuration, and build the featurizer.

    Args:
        source: the files.
        cfg: see `assemble`.
        tensors: see `assemble`; of the requested features only.
        n_features: number of features of the whole dictionary.
        scale: factor of the activations, to fold into the weights.
        dtype: see `assemble`; whatever a release holds, ``SAE.from_pretrained`` computes in float32 unless told
            otherwise.

    Raises:
        ManifestError, WeightsError: see `assemble`; or the sizes differ.
    """
    check_sizes(source, cfg, {"d_in": tensors["W_dec"].shape[1], "d_sae": n_features})
    part = source.indices is not None
    return assemble(
        cfg,
        tensors,
        source.where,
        numbers=source.indices,
        n_features=n_features if part else None,
        input_scale=scale,
        dtype=dtype,
    )


def check_sizes(source: ExternalFiles, cfg: dict[str, Any], sizes: dict[str, int]) -> None:
    """Raise `WeightsError` if the configuration has one of these names with another size than the tensors have."""
    for name, size in sizes.items():
        if name in cfg and number(cfg, name, source.where) != size:
            raise WeightsError(source.where, f"the tensors have {name} {size}, but the configuration says {cfg[name]}")


def count_features(file: TensorFile, name: str, source: ExternalFiles, axis: int) -> int:
    """Return the number of features, which a matrix has on this axis, and check the requested indices against it."""
    if name not in file.shapes or len(file.shapes[name]) != 2:
        raise WeightsError(
            source.where, f"{file.path.name} lacks the matrix {name!r}; it has {shown(sorted(file.shapes), 300)}"
        )
    return check_indices(source, file.shapes[name][axis])


def check_indices(source: ExternalFiles, n_features: int) -> int:
    """Return the number of features, after a check of the requested indices against it.

    Raises:
        FeatureIndexError: an index is out of range.
    """
    if source.indices is not None:
        select(source.indices, n_features)
    return n_features


def of_arrays(
    source: ExternalFiles, get: Callable[[str], Any], names: dict[str, str], file_name: str, *, wide: tuple[str, ...]
) -> tuple[dict[str, Tensor], int]:
    """Return tensors by SAELens' names, with rows for the requested features, and the number of all features.

    Args:
        source: the files.
        get: returns the array that has a name in the file.
        names: SAELens' name of each tensor, and its name in the file.
        file_name: for errors.
        wide: SAELens' names of the tensors whose features are columns in the file.

    Raises:
        WeightsError: a tensor is missing or has another shape.
    """
    tensors: dict[str, Tensor] = {}
    for name, external in names.items():
        tensor = get(external)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise WeightsError(source.where, f"{file_name} lacks the floating-point tensor {external!r}")
        tensors[name] = tensor.T if name in wide and tensor.dim() == 2 else tensor
    if any(tensors[name].dim() != 2 for name in ("W_enc", "W_dec")):
        raise WeightsError(source.where, f"{file_name}: W_enc and W_dec must be matrices")
    n_features = check_indices(source, tensors["W_dec"].shape[0])
    for name, tensor in tensors.items():
        if name != "b_dec" and tensor.dim() and len(tensor) != n_features:
            raise WeightsError(
                source.where, f"{file_name}: {names[name]!r} has {len(tensor)} features, but W_dec has {n_features}"
            )
        if source.indices is not None and name != "b_dec" and tensor.dim():
            tensors[name] = tensor[source.indices]
    return tensors, n_features


def jumprelu_config(overrides: dict[str, Any], hook: str | None, model: Any = None) -> dict[str, Any]:
    """Return SAELens' configuration for a JumpReLU autoencoder that was released in another format."""
    return {
        "architecture": "jumprelu",
        "apply_b_dec_to_input": False,
        "reshape_activations": "hook_z" if hook and hook.endswith("hook_z") else "none",
        "metadata": {"hook_name": hook, "model_name": model, **overrides},
    }

"""Chooses the reader for a folder by its files, and reads SAELens' own folders."""

from __future__ import annotations

import re
from typing import Any

import torch
from featurizers import FeatureSpace
from featurizers.errors import ManifestError, WeightsError
from featurizers.format import ExternalFiles

from featurizers_sae_lens import multi_layer, scopes, temporal_files, torch_files, transcoders
from featurizers_sae_lens.assembly import dtype_of, refuse_unknown
from featurizers_sae_lens.legacy import modern
from featurizers_sae_lens.reading import count_features, finish

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
MOST_TENSORS = 32
"""Largest number of tensors in a file of an autoencoder, because each is looked up by itself."""


def read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read the featurizer in a folder whose files alone identify their format; None for any other folder."""
    names = set(source.names)
    if {CONFIG, WEIGHTS} <= names:
        return folder(source)
    if "params.npz" in names:
        return scopes.gemma_scope(source, {})
    if {"params.safetensors", "config.json"} <= names:
        return scopes.gemma_scope_2(source, {})
    if multi_layer.is_multi_layer(names):
        return multi_layer.multi_layer(source)
    if {"hyperparams.json", "checkpoints/final.safetensors"} <= names:
        return scopes.llama_scope(source, {})
    files = [name for name in source.names if name.endswith((".pt", ".pth"))]
    if len(files) == 1 and "config.json" not in names:
        return torch_files.single_file(source, files[0])
    if layers := [name for name in files if re.fullmatch(r"layer\d+\.sae\.pt", name)]:
        raise ManifestError(
            source.where,
            f"it holds the autoencoders of {len(layers)} layers of Qwen Scope; name one of them in SAELens' catalogue, "
            "as in 'sae-lens:qwen-scope-3-1.7b-base-w32k-l50/layer0', or load a folder with a single layer's file",
        )
    return None


def folder(
    source: ExternalFiles, overrides: dict[str, Any] | None = None, scale: float | None = None
) -> FeatureSpace[Any]:
    """Read ``cfg.json`` and ``sae_weights.safetensors`` of any version of SAELens.

    Args:
        source: the files.
        overrides: keys that a catalogue sets instead of the file; None outside the catalogue, where the tensors are
            converted to the dtype of the file's configuration, as ``SAE.load_from_disk`` does.
        scale: factor that the catalogue gives for ``expected_average_only_in``.

    Raises:
        ManifestError: the configuration is not known.
        WeightsError: the tensors do not fit the configuration.
    """
    cfg = modern({**source.json(CONFIG), **(overrides or {})}, source.where)
    architecture = cfg.get("architecture")
    refuse_unknown(architecture, source.where, known=(*transcoders.RULES, "temporal"))
    if maps := architecture in transcoders.RULES:
        source = transcoders.of_group(source, transcoders.GROUP)
    dtype = dtype_of(cfg, source.where) if overrides is None else torch.float32
    if architecture == "temporal":
        return temporal_files.folder(source, cfg, WEIGHTS, dtype)
    file = source.safetensors(WEIGHTS)
    if len(file.shapes) > MOST_TENSORS:
        raise WeightsError(
            source.where, f"{WEIGHTS} has {len(file.shapes)} tensors; an autoencoder has at most {MOST_TENSORS}"
        )
    n_features = count_features(file, "W_dec", source, axis=0)
    tensors = {
        name: file.read(name, columns=source.indices)
        if name == "W_enc" and len(file.shapes[name]) == 2
        else file.read(name, rows=None if name in ("b_dec", "W_skip") else source.indices)
        for name in file.shapes
    }
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise WeightsError(source.where, "scaling_factor is not 1; neither SAELens nor this plugin applies it")
    folded = scale if cfg.get("normalize_activations") == "expected_average_only_in" else None
    if maps:
        return transcoders.finish(source, cfg, tensors, n_features, dtype)
    return finish(source, cfg, tensors, n_features, folded, dtype)

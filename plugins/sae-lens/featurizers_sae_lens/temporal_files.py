"""Reads temporal autoencoders, from SAELens' folders and from the repository that its catalogue names."""

from __future__ import annotations

import re
from typing import Any

import torch
from featurizers.errors import FeaturizerError, ManifestError, UsageError, WeightsError, explain, shown
from featurizers.format import ExternalFiles
from featurizers_transcoder.hooks import site_of
from pydantic import ValidationError
from torch import Tensor

from featurizers_sae_lens.assembly import describe, flag, notes_on, number, of_one_dtype, special_tokens
from featurizers_sae_lens.temporal import TemporalConfig, TemporalMap
from featurizers_sae_lens.yaml_files import read_yaml

CHECKPOINT = "latest_ckpt.safetensors"


def temporal(
    cfg: dict[str, Any], tensors: dict[str, Tensor], where: str, *, dtype: torch.dtype | None = None
) -> TemporalMap:
    """Build the map of a configuration and its tensors, which have SAELens' names and shapes.

    Raises:
        ManifestError: an option is not supported.
        WeightsError: the tensors do not fit the configuration.
    """
    normalize = cfg.get("normalize_activations") or "none"
    scales = {"none": 1.0, "expected_average_only_in": 1.0, "constant_scalar_rescale": None}
    if not isinstance(normalize, str) or normalize not in scales:
        raise ManifestError(
            where,
            f"normalize_activations is {shown(normalize)}; known are {', '.join(scales)}",
        )
    scale = scales[normalize]
    if scale is None:
        factor = {"activation_normalization_factor": 1.0, **cfg}
        scale = float(number(factor, "activation_normalization_factor", where, (int, float)))
    if (kind := cfg.get("sae_diff_type", "topk")) not in ("relu", "topk"):
        raise ManifestError(where, f"sae_diff_type is {shown(kind)}; known are relu, topk")
    if (reshape := cfg.get("reshape_activations") or "none") != "none":
        raise ManifestError(
            where, f"reshape_activations is {shown(reshape)}; a temporal autoencoder knows 'none' alone"
        )
    metadata: dict[str, Any] = cfg.get("metadata") or {}
    defaults = {"n_heads": 8, "n_attn_layers": 1, "bottleneck_factor": 64, **cfg}
    try:
        config = TemporalConfig(
            d_in=number(cfg, "d_in", where),
            n_features=number(cfg, "d_sae", where),
            n_heads=number(defaults, "n_heads", where),
            n_attn_layers=number(defaults, "n_attn_layers", where),
            bottleneck_factor=number(defaults, "bottleneck_factor", where),
            k=cfg.get("kval_topk") if kind == "topk" else None,
            tied=flag(cfg, "tied_weights", True, where),
            pre_bias=flag(cfg, "apply_b_dec_to_input", True, where),
            input_scale=scale,
            special_tokens=special_tokens(cfg),
        )
        with torch.device("meta"):
            featurizer = TemporalMap(config)
    except ValidationError as error:
        raise ManifestError(where, explain(error)) from error
    except FeaturizerError as error:
        raise ManifestError(where, str(error)) from error
    tensors = of_one_dtype(tensors, dtype, where)
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T
    expected = featurizer.state_dict()
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise WeightsError(where, f"a temporal autoencoder of this configuration lacks or has more: {shown(wrong)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise WeightsError(
                where, f"{name} has shape {tuple(tensor.shape)}, it must be {tuple(expected[name].shape)}"
            )
    featurizer.load_state_dict({name: t.detach().contiguous() for name, t in tensors.items()}, assign=True)
    site = site_of(metadata.get("hook_name"), metadata.get("model_name"))
    if site is not None:
        featurizer.reads, featurizer.writes = {"in": site}, {"out": site}
    describe(featurizer, cfg, notes_on(normalize, None, metadata.get("model_from_pretrained_kwargs")))
    return featurizer.requires_grad_(False).eval()


def folder(source: ExternalFiles, cfg: dict[str, Any], weights: str, dtype: torch.dtype | None) -> TemporalMap:
    """Read a folder of SAELens whose configuration is known to be temporal.

    Raises:
        UsageError: some features alone are asked for.
        ManifestError, WeightsError: see `temporal`.
    """
    _refuse_slices(source)
    return temporal(cfg, _read(source, weights), source.where, dtype=dtype)


def checkpoint(source: ExternalFiles, path: str, overrides: dict[str, Any]) -> TemporalMap:
    """Read ``conf.yaml`` and ``latest_ckpt.safetensors`` of canrager/temporalSAEs, in float32.

    Args:
        source: the folder.
        path: of the folder, which has the number of the layer.
        overrides: metadata that the catalogue adds.

    Raises:
        UsageError: some features alone are asked for.
        ManifestError: ``conf.yaml`` lacks a value, or the path has no layer.
        WeightsError: see `temporal`.
    """
    _refuse_slices(source)
    where, raw = source.where, read_yaml(source, "conf.yaml")
    layer = re.search(r"layer_(\d{1,5})(?!\d)", path)
    sae, llm = raw.get("sae"), raw.get("llm")
    if layer is None or not isinstance(sae, dict) or not isinstance(llm, dict):
        raise ManifestError(where, "conf.yaml lacks the mappings sae and llm, or the path has no layer")
    try:
        d_in = int(llm["dimin"])
        cfg = {
            "architecture": "temporal",
            "d_in": d_in,
            "d_sae": int(d_in * float(sae["exp_factor"])),
            **{name: int(sae[name]) for name in ("n_heads", "n_attn_layers", "bottleneck_factor")},
            "sae_diff_type": sae["sae_diff_type"],
            "kval_topk": None if sae["kval_topk"].lower() in ("null", "~", "") else int(sae["kval_topk"]),
            "tied_weights": {"true": True, "false": False}[sae["tied_weights"].lower()],
            "normalize_activations": "constant_scalar_rescale",
            "activation_normalization_factor": float(sae["scaling_factor"]),
            "apply_b_dec_to_input": True,
            "metadata": {"hook_name": f"blocks.{layer[1]}.hook_resid_post", **overrides},
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ManifestError(where, f"conf.yaml lacks a value, or has another form: {shown(str(error))}") from error
    names = {"D": "W_dec", "b": "b_dec", "E": "W_enc"}
    tensors = {names.get(name, name): tensor for name, tensor in _read(source, CHECKPOINT).items()}
    return temporal(cfg, tensors, where, dtype=torch.float32)


def _read(source: ExternalFiles, name: str) -> dict[str, Tensor]:
    file = source.safetensors(name)
    if len(file.shapes) > 8200:
        raise WeightsError(source.where, f"{name} has {len(file.shapes)} tensors, more than 1,000 layers have")
    return {key: file.read(key) for key in file.shapes}


def _refuse_slices(source: ExternalFiles) -> None:
    if source.indices is not None or source.group_indices is not None:
        raise UsageError(
            f"{source.where}: in a temporal autoencoder each feature depends on all others; load it whole, and "
            "give the indices to the operation"
        )

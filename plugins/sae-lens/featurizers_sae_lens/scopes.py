"""Gemma Scope and Llama Scope, as they were released."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from featurizers import Featurizer
from featurizers.errors import ManifestError, WeightsError
from featurizers.format import ExternalFiles, TensorFile
from torch import Tensor

from featurizers_sae_lens.assembly import number, positive, refuse_other_sites
from featurizers_sae_lens.reading import LINEAR, check_sizes, count_features, finish, jumprelu_config, of_arrays

EMBEDDING = re.compile(r"(?:^|/)embedding/width_[^/]+(?:/[^/]+)?/?$")
"""Where Gemma Scope keeps the autoencoders of token embeddings."""
OTHER_PLACE = re.compile(r"(?:^|/|gemma-scope[^/]*-)(transcoder|crosscoder|clt)s?(?:[_@][^/]*)?(?:/|$)")
"""Where Gemma Scope keeps what is not of one site: a file does not say it by itself."""


def refuse_other_places(place: str) -> None:
    """Raise `ManifestError` if Gemma Scope keeps what is no featurizer of one site in this place."""
    if match := OTHER_PLACE.search(place):
        refuse_other_sites(match[1], place)


def gemma_scope(source: ExternalFiles, overrides: dict[str, Any]) -> Featurizer[Any]:
    """Gemma Scope 1 (arXiv:2408.05147): ``params.npz``, JumpReLU.

    The file says neither the model nor the site. They are taken from the names of the folders, and so is it whether
    this is an autoencoder of embeddings, or a transcoder.

    Raises:
        ManifestError: it is a transcoder.
        WeightsError: the file is damaged, or has other arrays.
    """
    place = source.where
    refuse_other_places(place)
    arrays = source.npz("params.npz")
    arrays = {f"W_{name[2:]}" if name.startswith("w_") else name: array for name, array in arrays.items()}
    scale = arrays.pop("scaling_factor", None)
    if scale is not None and not torch.allclose(scale.float(), torch.ones_like(scale, dtype=torch.float32)):
        raise WeightsError(place, "params.npz has a scaling_factor that is not 1, which is not applied here")
    wanted = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    if unknown := sorted(arrays.keys() - set(wanted)):
        raise WeightsError(place, f"params.npz has unknown arrays {unknown!r}")
    tensors, n_features = of_arrays(source, arrays.get, {name: name for name in wanted}, "params.npz", wide=("W_enc",))
    if tensors["W_enc"].shape[1] != tensors["W_dec"].shape[1]:
        raise WeightsError(place, "W_enc and W_dec are of different widths: a transcoder, which is not one site's")
    if EMBEDDING.search(place):  # trained on embeddings that the model multiplies by √d afterwards
        root = math.sqrt(tensors["W_dec"].shape[1])
        tensors["W_enc"], tensors["W_dec"] = tensors["W_enc"] / root, tensors["W_dec"] * root
    return finish(source, jumprelu_config(overrides, _gemma_hook(place), _gemma_model(place)), tensors, n_features)


def _gemma_hook(place: str) -> str | None:
    if EMBEDDING.search(place):
        return "hook_embed"
    layer = re.search(r"layer_(\d{1,5})(?!\d)", place)
    kinds = {"-res": "hook_resid_post", "-mlp": "hook_mlp_out", "-att": "attn.hook_z"}
    kind = next((hook for part, hook in kinds.items() if re.search(part + r"\b", place)), None)
    return f"blocks.{layer[1]}.{kind}" if layer and kind else None


def _gemma_model(place: str) -> str | None:
    match = re.search(r"gemma-scope-(\d+b)-(pt|it)", place)
    return f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}" if match else None


def gemma_scope_2(source: ExternalFiles, overrides: dict[str, Any]) -> Featurizer[Any]:
    """Gemma Scope 2: ``params.safetensors`` and, in most folders, ``config.json``; JumpReLU.

    Raises:
        ManifestError: it is a transcoder, a crosscoder, or of another architecture.
        WeightsError: the file is damaged, or has other tensors.
    """
    raw = source.json("config.json") if "config.json" in source.names else {}
    place = source.where
    if (architecture := raw.get("architecture", "jump_relu")) != "jump_relu":
        raise ManifestError(place, f"the architecture {architecture!r} of Gemma Scope 2 is not known, only 'jump_relu'")
    refuse_other_places(place)
    if raw.get("hf_hook_point_out") not in (None, raw.get("hf_hook_point_in")):
        raise ManifestError(place, "it writes another site than it reads: a transcoder is no featurizer of one site")
    file = source.safetensors("params.safetensors")
    if "affine_skip_connection" in file.shapes:
        refuse_other_sites("skip_transcoder", place)
    n_features = count_features(file, "w_dec", source, axis=0)
    wanted = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
    if unknown := sorted(file.shapes.keys() - wanted):
        raise WeightsError(place, f"params.safetensors has unknown tensors {unknown!r}")
    rows = source.indices
    tensors = {
        "W_enc": file.read("w_enc", columns=rows).T,
        "W_dec": file.read("w_dec", rows=rows),
        "b_dec": file.read("b_dec"),
        **{name: file.read(name, rows=rows) for name in ("b_enc", "threshold")},
    }
    cfg = jumprelu_config(overrides, _gemma_2_hook(place, raw), _gemma_2_model(place, raw.get("model_name")))
    cfg["metadata"]["gemma_scope_2"] = raw
    return finish(source, cfg, tensors, n_features)


def _gemma_2_hook(place: str, raw: dict[str, Any]) -> str | None:
    """TransformerLens' name of the hook, by the folder or by the module that the configuration names."""
    point = str(raw.get("hf_hook_point_in", ""))
    layer = re.search(r"layer_(\d{1,5})(?!\d)", place) or re.search(r"layers\.(\d{1,5})(?!\d)", point)
    folders = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
    modules = {
        "output": "hook_resid_post",
        "self_attn.o_proj.input": "attn.hook_z",
        "post_feedforward_layernorm.output": "hook_mlp_out",
    }
    kind = modules.get(re.sub(r"^.*layers\.\d+\.", "", point)) or next(
        (hook for part, hook in folders.items() if re.search(rf"(?:^|/){part}(?:_all)?/", place)), None
    )
    return f"blocks.{layer[1]}.{kind}" if layer and kind else None


def _gemma_2_model(place: str, name: Any) -> str | None:
    if not isinstance(name, str):
        repository = re.search(r"(?:^|/)gemma-scope-2-(\w+-(?:pt|it))", place)
        if repository is None:
            return None
        name = f"gemma-3-{repository[1]}"
    owned: str = (name if "/" in name else f"google/{name}").replace("-v3", "-3")
    return owned.removesuffix("-pt") if "270m" in owned else owned  # the smallest is published without the suffix


def llama_scope(source: ExternalFiles, overrides: dict[str, Any], scale: float | None = None) -> Featurizer[Any]:
    """Llama Scope (arXiv:2410.20526): one threshold, and activations scaled to the norm √d, which is folded in.

    Raises:
        ManifestError: ``hyperparams.json`` lacks a number, or names two sites.
        WeightsError: the tensors do not fit it.
    """
    raw = source.json("hyperparams.json")
    norms = raw.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise ManifestError(source.where, "hyperparams.json lacks dataset_average_activation_norm")
    if raw.get("hook_point_out") not in (None, raw.get("hook_point_in")):
        refuse_other_sites("transcoder", source.where)
    root = math.sqrt(positive(raw, "d_model", source.where))
    own = root / positive(norms, "in", source.where, (int, float))
    file = source.safetensors("checkpoints/final.safetensors")
    tensors, n_features = _linear(source, file)
    check_sizes(source, raw, {"d_model": tensors["W_dec"].shape[1], "d_sae": n_features})
    level = number(raw, "jump_relu_threshold", source.where, (int, float)) * own
    tensors["threshold"] = torch.full_like(tensors["b_enc"], level)
    cfg = jumprelu_config(overrides, raw.get("hook_point_in"), "meta-llama/Llama-3.1-8B")
    cfg |= {"normalize_activations": "expected_average_only_in"}
    cfg["metadata"]["llama_scope"] = raw
    return finish(source, cfg, tensors, n_features, own if scale is None else scale)


def llama_scope_r1(source: ExternalFiles, overrides: dict[str, Any], scale: float | None) -> Featurizer[Any]:
    """Llama Scope of the distilled R1: thresholds as logarithms; the scale is the catalogue's.

    Raises:
        ManifestError: the catalogue gives no scale.
        WeightsError: the tensors do not fit.
    """
    raw = source.json("config.json")
    if scale is None:
        raise ManifestError(source.where, "its activations were scaled by a factor that only SAELens' catalogue tells")
    file = source.safetensors("sae_weights.safetensors")
    tensors, n_features = _linear(source, file)
    check_sizes(source, raw, {"d_model": tensors["W_dec"].shape[1]})
    tensors["threshold"] = file.read("log_jumprelu_threshold", rows=source.indices).exp()
    cfg = jumprelu_config(overrides, raw.get("hook_point_in"), "deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    cfg |= {"normalize_activations": "expected_average_only_in"}
    cfg["metadata"]["llama_scope"] = raw
    return finish(source, cfg, tensors, n_features, scale)


def _linear(source: ExternalFiles, file: TensorFile) -> tuple[dict[str, Tensor], int]:
    rows = source.indices
    n_features = count_features(file, LINEAR["W_dec"], source, axis=1)
    return {
        "W_enc": file.read(LINEAR["W_enc"], rows=rows),
        "b_enc": file.read(LINEAR["b_enc"], rows=rows),
        "W_dec": file.read(LINEAR["W_dec"], columns=rows).T,
        "b_dec": file.read(LINEAR["b_dec"]),
    }, n_features

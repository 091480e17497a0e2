"""Readers of Gemma Scope and Llama Scope in the formats of their releases."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from featurizers import FeatureSpace, Featurizer
from featurizers.errors import ManifestError, WeightsError
from featurizers.format import ExternalFiles, TensorFile
from torch import Tensor

from featurizers_sae_lens import transcoders
from featurizers_sae_lens.assembly import number, positive, refuse_unknown
from featurizers_sae_lens.reading import LINEAR, check_sizes, count_features, finish, jumprelu_config, of_arrays

# Paths and configurations come from outside. So these patterns take time in proportion to the text: what repeats is
# bounded, or possessive, as in [^/]++, which gives nothing back.
EMBEDDING = re.compile(r"(?:^|/)embedding/width_[^/]++(?:/[^/]++)?/?$")
"""Folders of Gemma Scope with autoencoders of token embeddings."""
OTHER_FOLDER = re.compile(r"(?:^|-)(transcoder|crosscoder|clt)s?(?:[_@]|$)")
"""Names of Gemma Scope's architectures that are no autoencoders; the files of Gemma Scope 1 do not show it."""


SKIP = "affine_skip_connection"
POINT_LAYER = re.compile(r"layers\.(\d{1,5})(?!\d)")


def is_transcoder(path: str) -> bool:
    """Return whether Gemma Scope's folder of this name is a transcoder's, and not an autoencoder's.

    Raises:
        ManifestError: it is a crosscoder or a cross-layer transcoder.
    """
    for folder in path.split("/"):
        _, known, rest = folder.partition("gemma-scope")  # a repository's name has the architecture after a hyphen
        if match := OTHER_FOLDER.match(folder) or (known and OTHER_FOLDER.search(rest)):
            refuse_unknown(match[1], path, known=("transcoder",))
            return True
    return False


def gemma_scope(source: ExternalFiles, overrides: dict[str, Any]) -> FeatureSpace[Any]:
    """Read Gemma Scope 1 (arXiv:2408.05147): ``params.npz``, JumpReLU.

    The file names neither the model nor the site, nor does it tell autoencoders of embeddings and transcoders from the
    others. All that is taken from the names of its folders. A transcoder reads the stream after attention, normalised
    as before the MLP but without the norm's gain, and writes the output of the norm after the MLP.

    Raises:
        ManifestError: it is a crosscoder.
        WeightsError: the file is damaged, or has other arrays.
    """
    where = source.where
    if maps := is_transcoder(where):
        source = transcoders.of_group(source, transcoders.GROUP)
    arrays = source.npz("params.npz")
    arrays = {f"W_{name[2:]}" if name.startswith("w_") else name: array for name, array in arrays.items()}
    scale = arrays.pop("scaling_factor", None)
    if scale is not None and not torch.allclose(scale.float(), torch.ones_like(scale, dtype=torch.float32)):
        raise WeightsError(where, "params.npz has a scaling_factor that is not 1, which is not supported")
    expected = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    if unknown := sorted(arrays.keys() - set(expected)):
        raise WeightsError(where, f"params.npz has unknown arrays {unknown!r}")
    tensors, n_features = of_arrays(
        source, arrays.get, {name: name for name in expected}, "params.npz", wide=("W_enc",)
    )
    if maps:
        layer = _layer(where)
        hooks = {"hook_name": layer and f"blocks.{layer}.ln2.hook_normalized"}
        hooks["hook_name_out"] = layer and f"blocks.{layer}.hook_mlp_out"
        cfg = jumprelu_config({**hooks, **overrides}, None, _gemma_model(where))
        return transcoders.finish(source, {**cfg, "architecture": "jumprelu_transcoder"}, tensors, n_features)
    if tensors["W_enc"].shape[1] != tensors["W_dec"].shape[1]:
        raise WeightsError(
            where, "W_enc and W_dec have different widths: a transcoder reads one site and writes another"
        )
    if EMBEDDING.search(where):  # trained on embeddings before the model multiplies them by √d
        root = math.sqrt(tensors["W_dec"].shape[1])
        tensors["W_enc"], tensors["W_dec"] = tensors["W_enc"] / root, tensors["W_dec"] * root
    cfg = jumprelu_config(overrides, _gemma_hook(where), _gemma_model(where))
    return finish(source, cfg, tensors, n_features)


def _gemma_hook(path: str) -> str | None:
    if EMBEDDING.search(path):
        return "hook_embed"
    layer = _layer(path)
    kinds = {"-res": "hook_resid_post", "-mlp": "hook_mlp_out", "-att": "attn.hook_z"}
    kind = next((hook for part, hook in kinds.items() if re.search(part + r"\b", path)), None)
    return f"blocks.{layer}.{kind}" if layer and kind else None


def _layer(path: str) -> str | None:
    match = re.search(r"layer_(\d{1,5})(?!\d)", path)
    return match and match[1]


def _gemma_model(path: str) -> str | None:
    match = re.search(r"gemma-scope-(\d{1,5}b)-(pt|it)", path)
    return f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}" if match else None


def gemma_scope_2(source: ExternalFiles, overrides: dict[str, Any]) -> FeatureSpace[Any]:
    """Read Gemma Scope 2: ``params.safetensors`` and, in most folders, ``config.json``; JumpReLU.

    A transcoder reads the input of the MLP, with the gain of the norm before it, and writes the output of the norm
    after the MLP. It has a skip connection if the file has one.

    Raises:
        ManifestError: it is a crosscoder, a cross-layer transcoder, or another architecture.
        WeightsError: the file is damaged, or has other tensors.
    """
    raw = source.json("config.json") if "config.json" in source.names else {}
    where = source.where
    if (architecture := raw.get("architecture", "jump_relu")) != "jump_relu":
        raise ManifestError(where, f"the architecture {architecture!r} of Gemma Scope 2 is not known, only 'jump_relu'")
    maps = is_transcoder(where) or raw.get("hf_hook_point_out") not in (None, raw.get("hf_hook_point_in"))
    if isinstance(kind := raw.get("type"), str):  # the folder may have been renamed
        maps = is_transcoder(kind) or maps
    file = source.safetensors("params.safetensors")
    if maps or SKIP in file.shapes:
        return _gemma_scope_2_transcoder(transcoders.of_group(source, transcoders.GROUP), file, raw, overrides)
    n_features = count_features(file, "w_dec", source, axis=0)
    tensors = _gemma_scope_2_tensors(source, file)
    cfg = jumprelu_config(overrides, _gemma_2_hook(where, raw), gemma_2_model(where, raw.get("model_name")))
    cfg["metadata"]["gemma_scope_2"] = raw
    return finish(source, cfg, tensors, n_features)


def _gemma_scope_2_tensors(source: ExternalFiles, file: TensorFile, more: tuple[str, ...] = ()) -> dict[str, Tensor]:
    expected = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold", *more}
    if unknown := sorted(file.shapes.keys() - expected):
        raise WeightsError(source.where, f"params.safetensors has unknown tensors {unknown!r}")
    rows = source.indices
    return {
        "W_enc": file.read("w_enc", columns=rows).T,
        "W_dec": file.read("w_dec", rows=rows),
        "b_dec": file.read("b_dec"),
        **{name: file.read(name, rows=rows) for name in ("b_enc", "threshold")},
    }


def _gemma_scope_2_transcoder(
    source: ExternalFiles, file: TensorFile, raw: dict[str, Any], overrides: dict[str, Any]
) -> FeatureSpace[Any]:
    n_features = count_features(file, "w_dec", source, axis=0)
    skip = SKIP in file.shapes
    if raw.get("affine_connection") is True and not skip:
        raise WeightsError(source.where, f"config.json says affine_connection, but the file lacks {SKIP!r}")
    tensors = _gemma_scope_2_tensors(source, file, (SKIP,))
    if skip:
        tensors["W_skip"] = file.read(SKIP).T  # the file has (d_in, d_out), SAELens (d_out, d_in)
    points = [raw.get("hf_hook_point_in"), raw.get("hf_hook_point_out")]
    layer = _layer(source.where) or next((match[1] for match in map(POINT_LAYER.search, map(str, points)) if match), "")
    if points == [None, None] and layer:
        block = f"model.layers.{layer}"
        points = [f"{block}.pre_feedforward_layernorm.output", f"{block}.post_feedforward_layernorm.output"]
    hooks = {
        "hook_name": layer and f"blocks.{layer}.hook_mlp_in",
        "hook_name_out": layer and f"blocks.{layer}.hook_mlp_out",
        "hf_hook_name": points[0],
        "hf_hook_name_out": points[1],
    }
    cfg = jumprelu_config({**hooks, **overrides}, None, gemma_2_model(source.where, raw.get("model_name")))
    cfg["architecture"] = "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder"
    cfg["metadata"]["gemma_scope_2"] = raw
    return transcoders.finish(source, cfg, tensors, n_features)


def _gemma_2_hook(path: str, raw: dict[str, Any]) -> str | None:
    """Return TransformerLens' name of the hook, from the folder or from the module that the configuration names."""
    point = str(raw.get("hf_hook_point_in", ""))
    layer = re.search(r"layer_(\d{1,5})(?!\d)", path) or re.search(r"layers\.(\d{1,5})(?!\d)", point)
    folders = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
    modules = {
        "output": "hook_resid_post",
        "self_attn.o_proj.input": "attn.hook_z",
        "post_feedforward_layernorm.output": "hook_mlp_out",
    }
    kind = modules.get(re.sub(r"^.*layers\.\d{1,5}\.", "", point)) or next(
        (folders[name] for folder in path.split("/")[:-1] if (name := folder.removesuffix("_all")) in folders), None
    )
    return f"blocks.{layer[1]}.{kind}" if layer and kind else None


def gemma_2_model(path: str, name: Any) -> str | None:
    """Return the Hub id of the model of Gemma Scope 2, from its name or from that of the repository."""
    if not isinstance(name, str):
        repository = re.search(r"(?:^|/)gemma-scope-2-(\w++-(?:pt|it))", path)
        if repository is None:
            return None
        name = f"gemma-3-{repository[1]}"
    owned: str = (name if "/" in name else f"google/{name}").replace("-v3", "-3")
    return owned.removesuffix("-pt") if "270m" in owned else owned  # the 270m model is published without the suffix


def llama_scope(source: ExternalFiles, overrides: dict[str, Any], scale: float | None = None) -> Featurizer[Any]:
    """Read Llama Scope (arXiv:2410.20526): a common threshold, and a scale of activations to the norm √d, folded in.

    Raises:
        ManifestError: ``hyperparams.json`` lacks a number, or names two sites.
        WeightsError: the tensors do not fit ``hyperparams.json``.
    """
    raw = source.json("hyperparams.json")
    norms = raw.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise ManifestError(source.where, "hyperparams.json lacks the object dataset_average_activation_norm")
    if raw.get("hook_point_out") not in (None, raw.get("hook_point_in")):
        raise ManifestError(
            source.where, "it reads one site and writes another; transcoders of Llama Scope are not read"
        )
    root = math.sqrt(positive(raw, "d_model", source.where))
    factor = root / positive(norms, "in", source.where, (int, float))
    file = source.safetensors("checkpoints/final.safetensors")
    tensors, n_features = _linear(source, file)
    check_sizes(source, raw, {"d_model": tensors["W_dec"].shape[1], "d_sae": n_features})
    threshold = number(raw, "jump_relu_threshold", source.where, (int, float)) * factor
    tensors["threshold"] = torch.full_like(tensors["b_enc"], threshold)
    cfg = jumprelu_config(overrides, raw.get("hook_point_in"), "meta-llama/Llama-3.1-8B")
    cfg |= {"normalize_activations": "expected_average_only_in"}
    cfg["metadata"]["llama_scope"] = raw
    return finish(source, cfg, tensors, n_features, factor if scale is None else scale)


def llama_scope_r1(source: ExternalFiles, overrides: dict[str, Any], scale: float | None) -> Featurizer[Any]:
    """Read Llama Scope of the distilled R1: thresholds as logarithms, and the scale of SAELens' catalogue.

    Raises:
        ManifestError: there is no scale.
        WeightsError: the tensors do not fit ``config.json``.
    """
    raw = source.json("config.json")
    if scale is None:
        raise ManifestError(
            source.where,
            "its activations were scaled by a factor that only SAELens' catalogue has; load it as "
            "'sae-lens:llama_scope_r1_distill/ID'",
        )
    file = source.safetensors("sae_weights.safetensors")
    tensors, n_features = _linear(source, file)
    check_sizes(source, raw, {"d_model": tensors["W_dec"].shape[1]})
    tensors["threshold"] = file.read("log_jumprelu_threshold", rows=source.indices).float().exp()
    cfg = jumprelu_config(overrides, raw.get("hook_point_in"), "deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    cfg |= {"normalize_activations": "expected_average_only_in"}
    cfg["metadata"]["llama_scope"] = raw
    return finish(source, cfg, tensors, n_features, scale)


def _linear(source: ExternalFiles, file: TensorFile) -> tuple[dict[str, Tensor], int]:
    rows = source.indices
    n_features = count_features(file, LINEAR["W_dec"], source, axis=1)
    tensors = {
        "W_enc": file.read(LINEAR["W_enc"], rows=rows),
        "b_enc": file.read(LINEAR["b_enc"], rows=rows),
        "W_dec": file.read(LINEAR["W_dec"], columns=rows).T,
        "b_dec": file.read(LINEAR["b_dec"]),
    }
    return {name: tensor.float() for name, tensor in tensors.items()}, n_features

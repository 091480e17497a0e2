"""Readers: SAELens' own folders, and the raw formats of the releases in its catalogue."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from featurizers import Featurizer
from featurizers.errors import FeatureIndexError, ManifestError, WeightsError
from featurizers.foreign import Foreign, TensorFile
from torch import Tensor

from featurizers_sae_lens.assembly import assemble, number, refuse_other_sites
from featurizers_sae_lens.legacy import modern

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
"""Names of two `torch.nn.Linear`."""


def read(source: Foreign) -> Featurizer[Any] | None:
    """The featurizer in a folder, if it holds one of the formats that say by themselves what they are."""
    names = set(source.names)
    if {CONFIG, WEIGHTS} <= names:
        return folder(source)
    if "params.npz" in names:
        return gemma_scope(source, {})
    if {"params.safetensors", "config.json"} <= names:
        return gemma_scope_2(source, {})
    if {"hyperparams.json", "checkpoints/final.safetensors"} <= names:
        return llama_scope(source, {})
    single = [name for name in source.names if name.endswith((".pt", ".pth"))]
    if len(single) == 1 and "config.json" not in names:
        return one_file(source, single[0])
    return None


# ---------------------------------------------------------------------- SAELens' own


def folder(source: Foreign, overrides: dict[str, Any] | None = None, scale: float | None = None) -> Featurizer[Any]:
    """``cfg.json`` and ``sae_weights.safetensors``, of any version of SAELens."""
    cfg = modern({**source.json(CONFIG), **(overrides or {})}, source.where)
    refuse_other_sites(cfg.get("architecture"), source.where)
    file = source.safetensors(WEIGHTS)
    n_features = _count(file, "W_dec", source, axis=0)
    tensors = {
        name: file.read(name, columns=source.indices)
        if name == "W_enc"
        else file.read(name, rows=None if name == "b_dec" else source.indices)
        for name in file.shapes
    }
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not (scaling == 1).all():
        raise WeightsError(
            source.where, "scaling_factor is not 1; SAELens no longer applies it, and neither is it here"
        )
    folded = scale if cfg.get("normalize_activations") == "expected_average_only_in" else None
    return _placed(source, cfg, tensors, n_features, folded)


def _placed(
    source: Foreign, cfg: dict[str, Any], tensors: dict[str, Tensor], n_features: int, scale: float | None = None
) -> Featurizer[Any]:
    for name in ("d_in", "d_sae"):
        found = tensors["W_dec"].shape[1] if name == "d_in" else n_features
        if name in cfg and number(cfg, name, source.where) != found:
            raise WeightsError(source.where, f"W_dec is of {found} for {name}, but the configuration says {cfg[name]}")
    part = source.indices is not None
    return assemble(
        cfg,
        tensors,
        source.where,
        numbers=source.indices,
        n_features=n_features if part else None,
        input_scale=scale,
    )


def _count(file: TensorFile, name: str, source: Foreign, axis: int) -> int:
    if name not in file.shapes or len(file.shapes[name]) != 2:
        raise WeightsError(source.where, f"{file.path.name} has no matrix {name!r}; it has {sorted(file.shapes)!r}")
    return _checked(source, file.shapes[name][axis])


def _checked(source: Foreign, n_features: int) -> int:
    if source.indices is not None and int(source.indices.max()) >= n_features:
        raise FeatureIndexError(
            f"feature {int(source.indices.max())} is out of range: there are {n_features}, 0 to {n_features - 1}"
        )
    return n_features


def _of_arrays(
    source: Foreign, get: Callable[[str], Any], names: dict[str, str], file_name: str, *, wide: tuple[str, ...]
) -> tuple[dict[str, Tensor], int]:
    """Tensors by our names, the features wanted of each.

    Args:
        source: the files.
        get: the array of a name in the file.
        names: ours, and that in the file.
        file_name: for errors.
        wide: which of ours have a feature a column.
    """
    tensors: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        tensor = get(theirs)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise WeightsError(source.where, f"{file_name} lacks the tensor {theirs!r}")
        tensors[ours] = tensor.T if ours in wide and tensor.dim() == 2 else tensor
    if any(tensors[name].dim() != 2 for name in ("W_enc", "W_dec")):
        raise WeightsError(source.where, f"{file_name}: W_enc and W_dec are no matrices")
    n_features = _checked(source, tensors["W_dec"].shape[0])
    if source.indices is not None:
        rows = source.indices
        tensors = {n: t if n == "b_dec" or not t.dim() else t[rows] for n, t in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise WeightsError(source.where, f"{file_name}: the tensor {name!r} holds NaN or infinity")
    return tensors, n_features


def _state(source: Foreign, name: str) -> dict[str, Any]:
    state = source.torch(name)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise WeightsError(source.where, f"{name} holds a {type(state).__name__}, not a dict of tensors")
    return state


def _jumprelu(overrides: dict[str, Any], hook: str | None, model: Any = None) -> dict[str, Any]:
    return {
        "architecture": "jumprelu",
        "apply_b_dec_to_input": False,
        "reshape_activations": "hook_z" if hook and hook.endswith("hook_z") else "none",
        **{key: value for key, value in overrides.items() if key == "normalize_activations"},
        "metadata": {"hook_name": hook, "model_name": model, **overrides},
    }


# ---------------------------------------------------------------------- Gemma Scope


def gemma_scope(source: Foreign, overrides: dict[str, Any]) -> Featurizer[Any]:
    """Gemma Scope 1 (arXiv:2408.05147): ``params.npz``, JumpReLU."""
    import numpy as np

    path = source.path("params.npz")
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: torch.from_numpy(data[name]) for name in data.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError) as error:
        raise WeightsError(source.where, f"params.npz cannot be read: {type(error).__name__}: {error}") from error
    except Exception as error:  # zipfile and zlib raise their own
        raise WeightsError(source.where, f"params.npz is damaged: {type(error).__name__}: {error}") from error
    arrays = {f"W_{name[2:]}" if name.startswith("w_") else name: array for name, array in arrays.items()}
    if (scale := arrays.pop("scaling_factor", None)) is not None and not (scale == 1).all():
        raise WeightsError(source.where, "params.npz has a scaling_factor that is not 1, which is not applied here")
    wanted = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    if unknown := sorted(arrays.keys() - set(wanted)):
        raise WeightsError(source.where, f"params.npz has unknown arrays {unknown!r}")
    tensors, n_features = _of_arrays(source, arrays.get, {name: name for name in wanted}, "params.npz", wide=("W_enc",))
    place = source.where
    if "transcoder" in place:
        refuse_other_sites("jumprelu_transcoder", place)
    if tensors["W_enc"].shape[1] != tensors["W_dec"].shape[1]:
        raise WeightsError(place, "W_enc and W_dec are of different widths: a transcoder, which is not one site's")
    if "embedding" in place:  # trained on embeddings that the model multiplies by √d afterwards
        root = math.sqrt(tensors["W_dec"].shape[1])
        tensors["W_enc"], tensors["W_dec"] = tensors["W_enc"] / root, tensors["W_dec"] * root
    return _placed(source, _jumprelu(overrides, _gemma_hook(place), _gemma_model(place)), tensors, n_features)


def _gemma_hook(place: str) -> str | None:
    if "embedding" in place:
        return "hook_embed"
    layer = re.search(r"layer_(\d+)", place)
    kinds = {"-res": "hook_resid_post", "-mlp": "hook_mlp_out", "-att": "attn.hook_z"}
    kind = next((hook for part, hook in kinds.items() if re.search(part + r"\b", place)), None)
    return f"blocks.{layer[1]}.{kind}" if layer and kind else None


def _gemma_model(place: str) -> str | None:
    match = re.search(r"gemma-scope-(\d+b)-(pt|it)", place)
    return f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}" if match else None


def gemma_scope_2(source: Foreign, overrides: dict[str, Any]) -> Featurizer[Any]:
    """Gemma Scope 2: ``params.safetensors`` and ``config.json``, JumpReLU."""
    raw = source.json("config.json") if "config.json" in source.names else {}
    place = source.where
    if (architecture := raw.get("architecture", "jump_relu")) != "jump_relu":
        raise ManifestError(place, f"the architecture {architecture!r} of Gemma Scope 2 is not known, only 'jump_relu'")
    for other in ("transcoder", "crosscoder", "clt"):
        if other in place:
            refuse_other_sites(other, place)
    if raw.get("hf_hook_point_out") not in (None, raw.get("hf_hook_point_in")):
        raise ManifestError(place, "it writes another site than it reads: a transcoder is no featurizer of one site")
    file = source.safetensors("params.safetensors")
    if "affine_skip_connection" in file.shapes:
        refuse_other_sites("skip_transcoder", place)
    n_features = _count(file, "w_dec", source, axis=0)
    rows = source.indices
    tensors = {
        "W_enc": file.read("w_enc", columns=rows).T,
        "W_dec": file.read("w_dec", rows=rows),
        "b_dec": file.read("b_dec"),
        **{name: file.read(name, rows=rows) for name in ("b_enc", "threshold")},
    }
    layer = re.search(r"layer_(\d+)", place) or re.search(r"layers\.(\d+)", str(raw.get("hf_hook_point_in")))
    point = str(raw.get("hf_hook_point_in", ""))
    hooks = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
    kind: str | None = next((hook for part, hook in hooks.items() if part in place), None)
    if kind is None and re.fullmatch(r"model\.layers\.\d+\.output", point):
        kind = "hook_resid_post"
    model = raw.get("model_name")
    if isinstance(model, str):
        model = (model if "/" in model else f"google/{model}").replace("-v3", "-3")
    cfg = _jumprelu(overrides, f"blocks.{layer[1]}.{kind}" if layer and kind else None, model)
    cfg["metadata"]["gemma_scope_2"] = raw
    return _placed(source, cfg, tensors, n_features)


# ---------------------------------------------------------------------- Llama Scope


def llama_scope(source: Foreign, overrides: dict[str, Any], scale: float | None = None) -> Featurizer[Any]:
    """Llama Scope (arXiv:2410.20526): one threshold, and activations scaled to the norm √d, which is folded in."""
    raw = source.json("hyperparams.json")
    norms = raw.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise ManifestError(source.where, "hyperparams.json lacks dataset_average_activation_norm")
    if raw.get("hook_point_out") not in (None, raw.get("hook_point_in")):
        refuse_other_sites("transcoder", source.where)
    d = number(raw, "d_model", source.where)
    own = math.sqrt(d) / number(norms, "in", source.where, (int, float))
    file = source.safetensors("checkpoints/final.safetensors")
    tensors, n_features = _linear(source, file)
    level = number(raw, "jump_relu_threshold", source.where, (int, float)) * own
    tensors["threshold"] = torch.full_like(tensors["b_enc"], level)
    cfg = _jumprelu(overrides, raw.get("hook_point_in"), "meta-llama/Llama-3.1-8B")
    cfg |= {"normalize_activations": "expected_average_only_in"}
    cfg["metadata"]["llama_scope"] = raw
    return _placed(source, cfg, tensors, n_features, own if scale is None else scale)


def llama_scope_r1(source: Foreign, overrides: dict[str, Any], scale: float | None) -> Featurizer[Any]:
    """Llama Scope of the distilled R1: thresholds as logarithms; the scale is the catalogue's."""
    raw = source.json("config.json")
    if scale is None:
        raise ManifestError(source.where, "its activations were scaled by a factor that only SAELens' catalogue tells")
    file = source.safetensors(WEIGHTS)
    tensors, n_features = _linear(source, file)
    tensors["threshold"] = file.read("log_jumprelu_threshold", rows=source.indices).exp()
    cfg = _jumprelu(overrides, raw.get("hook_point_in"), "deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    cfg |= {"normalize_activations": "expected_average_only_in"}
    cfg["metadata"]["llama_scope"] = raw
    return _placed(source, cfg, tensors, n_features, scale)


def _linear(source: Foreign, file: TensorFile) -> tuple[dict[str, Tensor], int]:
    rows = source.indices
    n_features = _count(file, "encoder.weight", source, axis=0)
    return {
        "W_enc": file.read("encoder.weight", rows=rows),
        "b_enc": file.read("encoder.bias", rows=rows),
        "W_dec": file.read("decoder.weight", columns=rows).T,
        "b_dec": file.read("decoder.bias"),
    }, n_features


# ---------------------------------------------------------------------- one file of torch.save


def one_file(
    source: Foreign, name: str, overrides: dict[str, Any] | None = None, place: str | None = None
) -> Featurizer[Any] | None:
    """A single ``.pt``: Goodfire's, OpenAI's, Qwen Scope's, or DeepSeek's by the names of its tensors; None else.

    Args:
        source: the folder.
        name: of the file.
        overrides: metadata that the catalogue adds.
        place: repository and path, in which names say what the file does not.
    """
    place = place or f"{source.where}/{name}"
    state = _state(source, name)
    metadata: dict[str, Any] = dict(overrides or {})
    layer = re.search(r"(?:layer|[Ll])_?(\d+)", name) or re.search(r"-l(\d+)", place)
    metadata.setdefault("hook_name", f"blocks.{layer[1]}.hook_resid_post" if layer else None)
    cfg: dict[str, Any] = {"architecture": "standard", "apply_b_dec_to_input": False, "metadata": metadata}
    if "encoder_linear.weight" in state:
        metadata.setdefault("model_name", _goodfire_model(place))
        names = {key: value.replace(".", "_linear.") for key, value in LINEAR.items()}
        tensors, n_features = _of_arrays(source, state.get, names, name, wide=("W_dec",))
    elif "latent_bias" in state:
        return _openai(source, state, name, metadata)
    elif state.keys() >= {"W_enc", "W_dec", "b_enc", "b_dec"}:
        match = re.search(r"SAE-Res-(.+)-W\d+K-L0_(\d+)", place)
        if not match:
            raise ManifestError(
                source.where,
                f"{name} does not say how many features of a token may fire; Qwen Scope says it in the name of the "
                "repository, …-L0_50: load it by that name",
            )
        metadata.setdefault("model_name", f"Qwen/{match[1]}")
        cfg |= {"architecture": "topk", "k": int(match[2])}
        tensors, n_features = _of_arrays(source, state.get, {k: k for k in LINEAR}, name, wide=("W_dec",))
    elif state.keys() >= set(LINEAR.values()) and "bias" not in state:
        tensors, n_features = _of_arrays(source, state.get, LINEAR, name, wide=("W_dec",))
    else:
        return None
    return _placed(source, cfg, tensors, n_features)


def _goodfire_model(place: str) -> str | None:
    match = re.search(r"(Llama-3\.\d-\d+B-Instruct)", place)
    return f"meta-llama/{match[1]}" if match else None


def _openai(source: Foreign, state: dict[str, Any], name: str, metadata: dict[str, Any]) -> Featurizer[Any]:
    """OpenAI's GPT-2 autoencoders (arXiv:2406.04093): ReLU, or TopK of layer-normed activations."""
    names = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "latent_bias", "b_dec": "pre_bias"}
    tensors, n_features = _of_arrays(source, state.get, names, name, wide=("W_dec",))
    kind = state.get("activation", "ReLU")
    cfg: dict[str, Any] = {"architecture": "standard", "apply_b_dec_to_input": True, "metadata": metadata}
    if kind == "TopK":
        options = state.get("activation_state_dict")
        k = options.get("k") if isinstance(options, dict) else None
        k = int(k) if isinstance(k, int | Tensor) and not isinstance(k, bool) else None
        cfg |= {"architecture": "topk", "k": k, "normalize_activations": "layer_norm"}
    elif kind != "ReLU":
        raise ManifestError(source.where, f"{name} has the activation {kind!r}; known are 'ReLU' and 'TopK'")
    metadata.setdefault("model_name", "gpt2-small")
    return _placed(source, cfg, tensors, n_features)


def hook_z(source: Foreign, name: str, overrides: dict[str, Any]) -> Featurizer[Any]:
    """Attention autoencoders of Kissane and others: ``NAME.pt`` and ``NAME_cfg.json``."""
    raw = source.json(name.removesuffix(".pt") + "_cfg.json")
    tensors, n_features = _of_arrays(
        source, _state(source, name).get, {key: key for key in LINEAR}, name, wide=("W_enc",)
    )
    metadata = {"hook_name": raw.get("act_name"), "model_name": "gpt2-small", **overrides}
    cfg = {"architecture": "standard", "reshape_activations": "hook_z", "metadata": metadata}
    return _placed(source, cfg, tensors, n_features)


def dictionary_learning(source: Foreign, overrides: dict[str, Any]) -> Featurizer[Any]:
    """``ae.pt`` and ``config.json`` of dictionary_learning, as its releases in the catalogue are read."""
    trainer = source.json("config.json").get("trainer")
    if not isinstance(trainer, dict):
        raise ManifestError(source.where, "config.json lacks the object 'trainer'")
    state = _state(source, "ae.pt")
    kind = trainer.get("dict_class")
    alike = {
        "AutoEncoder": ("standard", True),
        "GatedAutoEncoder": ("gated", True),
        "AutoEncoderTopK": ("topk", True),
        "BatchTopKSAE": ("jumprelu", True),
        "MatryoshkaBatchTopKSAE": ("jumprelu", True),
        "JumpReluAutoEncoder": ("jumprelu", False),
        "AutoEncoderNew": ("standard", False),
    }
    if kind not in alike:
        raise ManifestError(source.where, f"the dict_class {kind!r} is not known; known are {', '.join(alike)}")
    architecture, pre_bias = alike[kind]
    spelled = {
        "W_enc": ("W_enc", "encoder.weight"),
        "W_dec": ("W_dec", "decoder.weight"),
        "b_enc": ("b_enc", "encoder.bias"),
        "b_dec": ("b_dec", "bias", "decoder_bias", "decoder.bias"),
        "b_gate": ("gate_bias",),
        "b_mag": ("mag_bias",),
        "r_mag": ("r_mag",),
        "threshold": ("threshold",),
    }
    skipped = {"gated": ("b_enc", "threshold"), "jumprelu": ("b_gate", "b_mag", "r_mag")}
    skip = skipped.get(architecture, ("b_gate", "b_mag", "r_mag", "threshold"))
    names = {
        ours: next((name for name in theirs if name in state), theirs[0])
        for ours, theirs in spelled.items()
        if ours not in skip
    }
    wide = tuple(ours for ours in ("W_enc", "W_dec") if names[ours] in ("W_enc", "decoder.weight"))
    tensors, n_features = _of_arrays(source, state.get, names, "ae.pt", wide=wide)
    layer = trainer.get("layer")
    metadata = {"hook_name": f"blocks.{layer}.hook_resid_post", "model_name": trainer.get("lm_name"), **overrides}
    cfg = {
        "architecture": architecture,
        "apply_b_dec_to_input": pre_bias,
        "metadata": metadata,
        **({"k": trainer.get("k")} if architecture == "topk" else {}),
    }
    return _placed(source, cfg, tensors, n_features)

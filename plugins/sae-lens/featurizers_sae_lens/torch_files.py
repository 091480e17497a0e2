"""Readers of autoencoders that ``torch.save`` wrote; only tensors, numbers and strings are read."""

from __future__ import annotations

import re
from typing import Any

from featurizers import Featurizer
from featurizers.errors import ManifestError, WeightsError, shown
from featurizers.format import ExternalFiles
from torch import Tensor

from featurizers_sae_lens.reading import LINEAR, finish, of_arrays

# Paths come from outside, so whatever repeats in these patterns is bounded: a search takes time in proportion to them.


def _state_dict(source: ExternalFiles, name: str) -> dict[str, Any]:
    state = source.torch(name)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        if state.get("norm_factor") not in (None, 1):
            raise WeightsError(
                source.where,
                f"{name} is a checkpoint whose norm_factor is not in its weights; only final weights are read",
            )
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise WeightsError(source.where, f"{name} holds a {type(state).__name__}, not a dict of tensors")
    return state


def single_file(
    source: ExternalFiles, name: str, overrides: dict[str, Any] | None = None, path: str | None = None
) -> Featurizer[Any] | None:
    """Read a single ``.pt`` of Goodfire, OpenAI, Qwen Scope or DeepSeek, by the names of its tensors; None for others.

    Args:
        source: the folder.
        name: of the file.
        overrides: metadata that the catalogue adds.
        path: repository and path in the catalogue, whose names identify model and layer; None outside the catalogue.

    Raises:
        ManifestError: the number of features that may fire is not known, or the activation is not.
        WeightsError: the file is damaged, or has other tensors.
    """
    listed, path = path is not None, path or f"{source.where}/{name}"
    state = _state_dict(source, name)
    metadata: dict[str, Any] = {}
    cfg: dict[str, Any] = {"architecture": "standard", "apply_b_dec_to_input": False, "metadata": metadata}
    if "latent_bias" in state:
        return _openai(source, state, name, path, overrides or {})
    if "encoder_linear.weight" in state:
        match = re.search(r"(Llama-3\.\d-\d{1,4}B-Instruct)-SAE-l(\d{1,5})(?!\d)", path)
        metadata |= _residual(match and match[2], match and f"meta-llama/{match[1]}")
        names, wide = {key: value.replace(".", "_linear.") for key, value in LINEAR.items()}, ("W_dec",)
    elif state.keys() >= LINEAR.keys():
        match = re.search(r"SAE-Res-([^/]{1,100})-W\d{1,6}K-L0_(\d{1,6})(?!\d)", path)
        if not match:
            raise ManifestError(
                source.where,
                f"{name} does not say how many features of a token may fire; the name of Qwen Scope's repository does: "
                "load it from a folder of that name, SAE-Res-…-L0_50, or from SAELens' catalogue",
            )
        layer = re.search(r"layer(\d{1,5})\.sae\.pt$", name)
        metadata |= _residual(layer and layer[1], f"Qwen/{match[1]}")
        cfg |= {"architecture": "topk", "k": int(match[2])}
        names, wide = {key: key for key in LINEAR}, ("W_dec",)
    elif state.keys() == set(LINEAR.values()) or (listed and state.keys() >= set(LINEAR.values())):
        match = re.search(r"(DeepSeek-R1-Distill-[^/]{1,100})-SAE-l(\d{1,5})(?!\d)", path)
        metadata |= _residual(match and match[2], match and f"deepseek-ai/{match[1]}")
        names, wide = LINEAR, ("W_dec",)
    else:
        return None
    metadata |= overrides or {}
    tensors, n_features = of_arrays(source, state.get, names, name, wide=wide)
    return finish(source, cfg, tensors, n_features)


def _residual(layer: str | None, model: str | None) -> dict[str, Any]:
    return {"hook_name": layer and f"blocks.{layer}.hook_resid_post", "model_name": model}


def _openai(
    source: ExternalFiles, state: dict[str, Any], name: str, path: str, overrides: dict[str, Any]
) -> Featurizer[Any]:
    """Read OpenAI's GPT-2 autoencoders (arXiv:2406.04093): ReLU, or TopK of layer-normed activations."""
    names = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "latent_bias", "b_dec": "pre_bias"}
    tensors, n_features = of_arrays(source, state.get, names, name, wide=("W_dec",))
    kind, options = state.get("activation", "ReLU"), state.get("activation_state_dict")
    cfg: dict[str, Any] = {"architecture": "standard", "apply_b_dec_to_input": True}
    if kind == "TopK":
        options = options if isinstance(options, dict) else {}
        if (after := options.get("postact_fn", "ReLU")) != "ReLU":
            raise ManifestError(source.where, f"{name} has {shown(after)} after its TopK; known is 'ReLU'")
        k = options.get("k")
        k = int(k) if isinstance(k, Tensor) and k.numel() == 1 else k
        cfg |= {"architecture": "topk", "k": k, "normalize_activations": "layer_norm"}
    elif kind != "ReLU":
        raise ManifestError(source.where, f"{name} has the activation {shown(kind)}; known are 'ReLU' and 'TopK'")
    hooks = {
        "resid_delta_attn": "hook_attn_out",
        "resid_post_attn": "hook_resid_mid",
        "resid_delta_mlp": "hook_mlp_out",
        "resid_post_mlp": "hook_resid_post",
        "mlp_post_act": "mlp.hook_post",
    }
    match = re.search(rf"({'|'.join(hooks)})[^/]{{0,100}}/autoencoders/(\d{{1,5}})\.pt$", path)
    hook = match and f"blocks.{match[2]}.{hooks[match[1]]}"
    cfg["metadata"] = {"hook_name": hook, "model_name": "gpt2-small", **overrides}
    return finish(source, cfg, tensors, n_features)


def hook_z(source: ExternalFiles, name: str, overrides: dict[str, Any]) -> Featurizer[Any]:
    """Read attention autoencoders of Kissane and others: ``NAME.pt`` and ``NAME_cfg.json``.

    Raises:
        ManifestError, WeightsError: a file is missing or damaged, or the files do not fit each other.
    """
    raw = source.json(name.removesuffix(".pt") + "_cfg.json")
    tensors, n_features = of_arrays(
        source, _state_dict(source, name).get, {key: key for key in LINEAR}, name, wide=("W_enc",)
    )
    metadata = {"hook_name": raw.get("act_name"), "model_name": "gpt2-small", **overrides}
    cfg = {"architecture": "standard", "reshape_activations": "hook_z", "metadata": metadata}
    sizes = {size: raw[key] for size, key in {"d_in": "act_size", "d_sae": "dict_size"}.items() if key in raw}
    return finish(source, {**cfg, **sizes}, tensors, n_features)


def dictionary_learning(source: ExternalFiles, overrides: dict[str, Any]) -> Featurizer[Any]:
    """Read ``ae.pt`` and ``config.json`` of dictionary_learning as SAELens reads its releases.

    Raises:
        ManifestError: the configuration has another form, or its class is not known.
        WeightsError: the tensors do not fit the configuration.
    """
    trainer = source.json("config.json").get("trainer")
    if not isinstance(trainer, dict):
        raise ManifestError(source.where, "config.json lacks the object 'trainer'")
    state = _state_dict(source, "ae.pt")
    kind = trainer.get("dict_class")
    classes = {
        "AutoEncoder": ("standard", True),
        "GatedAutoEncoder": ("gated", True),
        "AutoEncoderTopK": ("topk", True),
        "BatchTopKSAE": ("jumprelu", True),
        "MatryoshkaBatchTopKSAE": ("jumprelu", True),
        "JumpReluAutoEncoder": ("jumprelu", False),
        "AutoEncoderNew": ("standard", False),
    }
    if not isinstance(kind, str) or kind not in classes:
        raise ManifestError(source.where, f"the dict_class {shown(kind)} is not known; known are {', '.join(classes)}")
    architecture, pre_bias = classes[kind]
    spellings = {
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
        name: next((spelling for spelling in known if spelling in state), known[0])
        for name, known in spellings.items()
        if name not in skip
    }
    wide = tuple(name for name in ("W_enc", "W_dec") if names[name] in ("W_enc", "decoder.weight"))
    tensors, n_features = of_arrays(source, state.get, names, "ae.pt", wide=wide)
    layer, model = trainer.get("layer"), trainer.get("lm_name")
    hook = f"blocks.{layer}.hook_resid_post" if type(layer) is int else None
    cfg = {
        "architecture": architecture,
        "apply_b_dec_to_input": pre_bias,
        "metadata": {"hook_name": hook, "model_name": model, "dictionary_learning": trainer, **overrides},
        **({"k": trainer.get("k")} if architecture == "topk" else {}),
    }
    return finish(source, cfg, tensors, n_features)

"""Writes a dictionary as a folder ``{ae.pt, config.json}`` of the class that has the same features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from featurizers import DictionaryFeaturizer
from featurizers.builtin import lost_settings, plain_weights
from featurizers.errors import ConversionError
from featurizers.features import FeatureSpace
from torch import Tensor

from featurizers_dictionary_learning.reading import CONFIG, SITES, WEIGHTS

READ = ("dictionary_learning", "units", "buffers")
"""Metadata that reading sets; the first and the last of them are written back."""


def write(featurizer: FeatureSpace[Any], folder: Path) -> list[str]:
    """Write a dictionary, and return a sentence for each thing that dictionary_learning's files cannot hold.

    Raises:
        ConversionError: dictionary_learning has no class for its map.
    """
    where = str(folder)
    if not isinstance(featurizer, DictionaryFeaturizer):
        raise ConversionError(where, f"dictionary_learning has dictionaries only, not the kind {featurizer.kind!r}")
    config, site = featurizer.config, featurizer.site
    if config.normalize not in ("none", "scale"):
        raise ConversionError(where, f"dictionary_learning does not normalise activations by {config.normalize!r}")
    weights, lost = plain_weights(featurizer)
    name, tensors, numbers = _class_of(featurizer, weights, where, lost)
    lost += lost_settings(featurizer, READ)
    submodules = {kind: submodule for submodule, kind in SITES.items()}
    if site is not None and site.kind not in submodules:
        lost.append(f"The site {str(site)!r} is not kept.")
    elif site is not None and site.model_revision is not None:
        lost.append(f"The model's revision {site.model_revision!r} is not kept.")
    old_config = featurizer.metadata.get("dictionary_learning", {})
    trainer = {n: v for n, v in old_config.get("trainer", {}).items() if n not in ("k", "group_sizes")}
    if (old_name := trainer.get("dict_class", name)) != name:
        lost.append(f"The class is {name}, not {old_name} as before; the features are the same.")
    trainer |= {"dict_class": name, "activation_dim": config.d_in, "dict_size": featurizer.n_features, **numbers}
    trainer["wandb_name"] = featurizer.id
    if site is not None and site.kind in submodules:
        submodule = f"{submodules[site.kind]}_layer_{site.layer}"
        trainer |= {"layer": site.layer, "lm_name": site.model or trainer.get("lm_name"), "submodule_name": submodule}
    torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, folder / WEIGHTS)
    text = json.dumps({**old_config, "trainer": trainer}, indent=4)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return lost


def _class_of(
    featurizer: DictionaryFeaturizer, state: dict[str, Tensor], where: str, lost: list[str]
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Return the class for a dictionary, its state dict, and its numbers that the configuration repeats."""
    config, b_dec = featurizer.config, state["b_dec"]
    if config.rule == "jumprelu":
        return _jumprelu(featurizer, state, lost)
    linear = {"encoder.weight": state["W_enc"], "decoder.weight": state["W_dec"].T}
    if config.rule == "relu" and not config.pre_bias:
        return "AutoEncoderNew", {**linear, "encoder.bias": state["b_enc"], "decoder.bias": b_dec}, {}
    if config.rule not in ("relu", "jump", "gated", "topk"):
        raise ConversionError(where, f"dictionary_learning has no class for the rule {config.rule!r}")
    undone = 0.0 if config.pre_bias else state["W_enc"] @ b_dec  # all of these classes subtract b_dec first
    if not config.pre_bias:
        lost.append("The encoder's biases undo the pre-bias of the class; features are equal to rounding.")
    if config.rule == "gated":
        gates = {"gate_bias": state["b_gate"] + undone, "mag_bias": state["b_mag"] + state["r_mag"].exp() * undone}
        return "GatedAutoEncoder", {**linear, "decoder_bias": b_dec, "r_mag": state["r_mag"], **gates}, {}
    biased = {**linear, "encoder.bias": state["b_enc"] + undone}
    if config.rule == "relu":
        return "AutoEncoder", {**biased, "bias": b_dec}, {}
    if config.rule == "jump":
        return "JumpAutoEncoder", {**biased, "bias": b_dec, "jump": state["jump"]}, {}
    k = int(config.rule_options["k"])
    threshold = _buffers(featurizer, "AutoEncoderTopK").get("threshold", -1.0)
    return "AutoEncoderTopK", {**biased, "b_dec": b_dec, **_of_k(k, threshold)}, {"k": k}


def _of_k(k: int, threshold: Any) -> dict[str, Tensor]:
    return {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.as_tensor(threshold, dtype=torch.float32)}


def _buffers(featurizer: DictionaryFeaturizer, *names: str) -> dict[str, Any]:
    """Return the buffers of the class that a dictionary was read from, if it is among ``names`` and still whole."""
    config, metadata = featurizer.config, featurizer.metadata
    name = metadata.get("dictionary_learning", {}).get("trainer", {}).get("dict_class")
    same = name in names and config.slice_of is None and config.normalize == "none" and config.pre_bias
    return dict(metadata.get("buffers", {})) if same else {}


def _jumprelu(
    featurizer: DictionaryFeaturizer, state: dict[str, Tensor], lost: list[str]
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Return the class that the dictionary was read from or, if its thresholds differ, JumpReluAutoEncoder."""
    bias, threshold = state["b_enc"], state["threshold"]
    rows = {"W_enc": state["W_enc"].T, "W_dec": state["W_dec"], "b_dec": state["b_dec"]}
    buffers = _buffers(featurizer, "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
    if buffers and (threshold == threshold[0]).all():
        common, numbers = _of_k(buffers["k"], threshold[0]), {"k": buffers["k"]}
        if sizes := buffers.get("group_sizes"):
            tensors = {**rows, "b_enc": bias, **common, "group_sizes": torch.tensor(sizes)}
            return "MatryoshkaBatchTopKSAE", tensors, {**numbers, "group_sizes": sizes}
        linear = {"encoder.weight": state["W_enc"], "encoder.bias": bias, "decoder.weight": state["W_dec"].T}
        return "BatchTopKSAE", {**linear, "b_dec": state["b_dec"], **common}, numbers
    if featurizer.config.pre_bias:  # files of a JumpReluAutoEncoder do not store whether it subtracts b_dec
        bias = bias - state["W_enc"] @ state["b_dec"]
        lost.append("The pre-bias is in the encoder's bias; features are the same to rounding.")
    return "JumpReluAutoEncoder", {**rows, "b_enc": bias, "threshold": threshold}, {}

"""dictionary_learning's autoencoders: its classes, its files, and both as featurizers. Needs none of its packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from featurizers import DictionaryFeaturizer, Featurizer, Site, hookimpl
from featurizers.errors import ConversionError, ManifestError, UsageError, WeightsError
from featurizers.foreign import Foreign

from featurizers_dictionary_learning.classes import (
    AutoEncoder,
    AutoEncoderNew,
    Dictionary,
    GatedAutoEncoder,
    IdentityDict,
    JumpAutoEncoder,
)
from featurizers_dictionary_learning.later import (
    AutoEncoderTopK,
    BatchTopKSAE,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
)

__all__ = [
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "Dictionary",
    "GatedAutoEncoder",
    "IdentityDict",
    "JumpAutoEncoder",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
]

WEIGHTS, CONFIG = "ae.pt", "config.json"
CLASSES: dict[str, type[Dictionary]] = {
    cls.__name__: cls
    for cls in (
        AutoEncoder,
        AutoEncoderNew,
        AutoEncoderTopK,
        BatchTopKSAE,
        GatedAutoEncoder,
        IdentityDict,
        JumpAutoEncoder,
        JumpReluAutoEncoder,
        MatryoshkaBatchTopKSAE,
    )
}
SITES = {"resid_post": "resid.post", "mlp_out": "mlp.out", "attn_out": "attn.out"}


@hookimpl
def featurizers_read(source: Foreign) -> Featurizer[Any] | None:
    """The featurizer in a folder ``{ae.pt, config.json}``, in raw units; None for any other.

    Raises:
        ManifestError: the class is not known, or is no featurizer of one site.
        WeightsError: the weights are not those of the class.
    """
    if CONFIG not in source.names or not ({WEIGHTS, "model.safetensors"} & set(source.names)):
        return None
    config, where = source.json(CONFIG), source.where
    trainer = config.get("trainer")
    if "CrossCoder" in json.dumps(trainer if isinstance(trainer, dict) else config):
        raise ManifestError(where, "a CrossCoder reads and writes several layers at once: no featurizer of one site")
    if not isinstance(trainer, dict) or WEIGHTS not in source.names:
        return None
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise ManifestError(where, f"the dict_class {kind!r} is not known; known are {', '.join(CLASSES)}")
    state = source.torch(WEIGHTS)
    factor = None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # what a training that broke off leaves
        factor = state.get("norm_factor")
        state = state["state_dict"]
    autoencoder = CLASSES[kind].from_state(state, where)
    _check(autoencoder, trainer, where)
    if factor is not None:
        scale = getattr(autoencoder, "scale_biases", None)
        if not isinstance(factor, int | float) or scale is None:
            raise WeightsError(where, f"{WEIGHTS} has the norm_factor {factor!r}, which a {kind} cannot undo")
        scale(float(factor))
    featurizer = autoencoder.as_featurizer()
    if source.indices is not None:
        if not isinstance(featurizer, DictionaryFeaturizer):
            raise UsageError(f"{where}: an {kind} is loaded whole")
        featurizer = featurizer.take(source.indices)
    layer, model = trainer.get("layer"), trainer.get("lm_name")
    if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0:
        name = str(trainer.get("submodule_name") or "resid_post")
        site = next((site for part, site in SITES.items() if part in name), None)
        if site is not None:
            featurizer.site = Site(site, layer).at(model=model if isinstance(model, str) and "/" in model else None)
    featurizer.id = str(trainer.get("wandb_name") or kind)
    featurizer.metadata = {"dictionary_learning": config, "units": "raw: decoder columns as the file has them"}
    return featurizer


def _check(autoencoder: Dictionary, trainer: dict[str, Any], where: str) -> None:
    """Raise `WeightsError` if the weights contradict their config, or are not finite."""
    for name in ("activation_dim", "dict_size"):
        if trainer.get(name) not in (None, getattr(autoencoder, name)):
            raise WeightsError(
                where, f"{WEIGHTS} has {name} {getattr(autoencoder, name)}, but {CONFIG} says {trainer[name]!r}"
            )
    k = getattr(autoencoder, "k", None)
    if k is not None and trainer.get("k") not in (None, int(k)):
        raise WeightsError(where, f"{WEIGHTS} has k {int(k)}, but {CONFIG} says {trainer['k']!r}")
    for name, tensor in autoencoder.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsError(where, f"{WEIGHTS}: the tensor {name!r} holds NaN or infinity")


@hookimpl
def featurizers_write(featurizer: Featurizer[Any], folder: Path) -> list[str] | None:
    """Write a dictionary as ``{ae.pt, config.json}``, and say what they cannot hold.

    Raises:
        ConversionError: dictionary_learning has no class for it.
    """
    where, lost = str(folder), list[str]()
    if not isinstance(featurizer, DictionaryFeaturizer):
        raise ConversionError(where, f"dictionary_learning has dictionaries only, not the kind {featurizer.kind!r}")
    config = featurizer.config
    if config.normalize not in ("none", "scale"):
        raise ConversionError(where, f"dictionary_learning does not normalise activations by {config.normalize!r}")
    if config.units == "decoder-norm" and featurizer.rule.scaled is not None:
        featurizer = featurizer.in_units("folded")
        lost.append("The norms of the raw decoder columns are not kept; they are in the weights.")
    state = dict(featurizer.state_dict())
    if config.normalize == "scale":
        a = config.input_scale
        state |= {"W_enc": state["W_enc"] * a, "W_dec": state["W_dec"] / a, "b_dec": state["b_dec"] / a}
        lost.append(f"The factor {a} of the activations is in the weights.")
    kind, tensors = _class_of(featurizer, state, where, lost)
    if config.slice_of is not None:
        lost.append("The numbers that the features have in the whole dictionary are not kept; they count from 0.")
    if config.n_heads is not None:
        lost.append("The heads are side by side.")
    if featurizer.special_tokens:
        lost.append(f"The special tokens {list(featurizer.special_tokens)} are not kept.")
    site = featurizer.site
    names = {ours: theirs for theirs, ours in SITES.items()}
    if site is not None and site.kind not in names:
        lost.append(f"The site {str(site)!r} is not kept.")
    if other := sorted(featurizer.metadata.keys() - {"dictionary_learning", "units"}):
        lost.append(f"The metadata {', '.join(map(repr, other))} are not kept.")
    trainer: dict[str, Any] = {"dict_class": kind, "activation_dim": config.d_in, "dict_size": featurizer.n_features}
    trainer |= dict(config.rule_options)
    if site is not None and site.kind in names:
        trainer |= {
            "layer": site.layer,
            "lm_name": site.model,
            "submodule_name": f"{names[site.kind]}_layer_{site.layer}",
        }
    given = featurizer.metadata.get("dictionary_learning", {})
    merged = {**given, "trainer": {**given.get("trainer", {}), **trainer}}
    torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
    return lost


def _class_of(
    featurizer: DictionaryFeaturizer, state: dict[str, Any], where: str, lost: list[str]
) -> tuple[str, dict[str, Any]]:
    """The class for a dictionary, and its state dict."""
    config = featurizer.config
    linear = {"encoder.weight": state["W_enc"], "decoder.weight": state["W_dec"].T}
    biased = {**linear, "encoder.bias": state.get("b_enc")}
    if config.rule == "relu" and not config.pre_bias:
        return "AutoEncoderNew", {**biased, "decoder.bias": state["b_dec"]}
    if config.rule == "jumprelu":
        bias = state["b_enc"]
        if config.pre_bias:  # of a JumpReluAutoEncoder no file says whether it takes b_dec off
            bias = bias - state["W_enc"] @ state["b_dec"]
            lost.append("The pre-bias is in the encoder's bias; features are the same to rounding.")
        rows = {"W_enc": state["W_enc"].T, "W_dec": state["W_dec"], "b_enc": bias, "b_dec": state["b_dec"]}
        return "JumpReluAutoEncoder", {**rows, "threshold": state["threshold"]}
    if not config.pre_bias:
        raise ConversionError(where, f"dictionary_learning's class for the rule {config.rule!r} has a pre-bias")
    if config.rule == "relu":
        return "AutoEncoder", {**biased, "bias": state["b_dec"]}
    if config.rule == "jump":
        return "JumpAutoEncoder", {**biased, "bias": state["b_dec"], "jump": state["jump"]}
    if config.rule == "gated":
        gates = {"gate_bias": state["b_gate"], "r_mag": state["r_mag"], "mag_bias": state["b_mag"]}
        return "GatedAutoEncoder", {**linear, "decoder_bias": state["b_dec"], **gates}
    if config.rule == "topk":
        k = torch.tensor(int(config.rule_options["k"]), dtype=torch.int)
        return "AutoEncoderTopK", {**biased, "b_dec": state["b_dec"], "k": k, "threshold": torch.tensor(-1.0)}
    raise ConversionError(where, f"dictionary_learning has no class for the rule {config.rule!r}")

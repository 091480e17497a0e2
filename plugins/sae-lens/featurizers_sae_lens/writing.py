"""Writes ``cfg.json`` and ``sae_weights.safetensors`` as SAELens loads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from featurizers import DictionaryFeaturizer, FeatureSpace, Site
from featurizers.builtin import plain_weights
from featurizers.errors import ConversionError
from featurizers.format import write_tensors
from featurizers_transcoder import Transcoder
from featurizers_transcoder.hooks import Read, hook_of, hook_of_read, read_of, site_of
from torch import Tensor

from featurizers_sae_lens import transcoders
from featurizers_sae_lens.assembly import NORMALIZATIONS, RULES
from featurizers_sae_lens.formats import CONFIG, WEIGHTS
from featurizers_sae_lens.matching_pursuit import MatchingPursuitFeaturizer

VERSION = "6.0.0"
"""Version of the keys that are written. SAELens drops the metadata of a file that names an older version or none."""


def write(featurizer: FeatureSpace[Any], folder: Path) -> list[str]:
    """Write a featurizer as an SAE or a transcoder of SAELens, and return a sentence for each thing that is lost.

    Raises:
        ConversionError: SAELens has no architecture for it.
    """
    lost: list[str] = []
    if isinstance(featurizer, DictionaryFeaturizer):
        cfg = _dictionary(featurizer, str(folder))
        tensors, lost = plain_weights(featurizer)
        tensors["W_enc"] = tensors["W_enc"].T
    elif isinstance(featurizer, MatchingPursuitFeaturizer):
        cfg, tensors = _matching_pursuit(featurizer), featurizer.state_dict()
    elif isinstance(featurizer, Transcoder):
        cfg, tensors, lost = _transcoder(featurizer, str(folder))
    else:
        raise ConversionError(
            str(folder),
            f"SAELens has no architecture for the kind {featurizer.kind!r}; dictionaries and transcoders are written",
        )
    old_cfg = featurizer.metadata.get("sae_lens")
    old_metadata = old_cfg.get("metadata") if isinstance(old_cfg, dict) else None
    metadata: dict[str, Any] = dict(old_metadata) if isinstance(old_metadata, dict) else {}
    for end, (site, hook) in _hooks(featurizer).items():
        if hook is None:
            lost.append(f"The site {str(site)!r} has no hook in TransformerLens.")
        if metadata.get(f"hook_name{end}") != hook:
            metadata.pop(f"hf_hook_name{end}", None)  # the module of the former hook
        metadata[f"hook_name{end}"] = hook
        metadata |= {f"hook_head_index{end}": site.head} if site.head is not None else {}
        known = site_of(hook, metadata.get("model_name")) or read_of(hook, metadata.get("model_name")).site
        if site.model is not None and (known is None or known.model != site.model):
            metadata["model_name"] = site.model
    if featurizer.special_tokens:
        metadata["exclude_special_tokens"] = list(featurizer.special_tokens)
    if other := {key: value for key, value in featurizer.metadata.items() if key != "sae_lens"}:
        metadata["featurizers"] = other  # SAELens keeps unknown keys of the metadata
    if not re.match(r"[6-9]|\d\d", str(metadata.get("sae_lens_version"))):
        metadata["sae_lens_version"] = VERSION
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    cfg = {**cfg, "dtype": dtype, "device": "cpu", "metadata": metadata}
    write_tensors(tensors, folder / WEIGHTS, str(folder))
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
    return lost


def _hooks(featurizer: FeatureSpace[Any]) -> dict[str, tuple[Site, str | None]]:
    """Return each site and its hook, by the end of the keys that hold the hook."""
    if isinstance(featurizer, Transcoder):
        if not featurizer.reads or not featurizer.writes:
            return {}
        site = featurizer.writes["out"]
        return {"": (featurizer.reads["in"], hook_of_read(_read(featurizer))), "_out": (site, hook_of(site))}
    site_of_one = next(iter(featurizer.sites.values()), None)
    return {} if site_of_one is None else {"": (site_of_one, hook_of(site_of_one))}


def _read(featurizer: Transcoder) -> Read:
    """Return what a transcoder reads, with the part of its normalisation that only a hook can hold."""
    config = featurizer.config.reads["in"]
    normalize = config.normalize if config.normalize in ("rms", "standard") else "none"
    return Read(featurizer.reads.get("in"), normalize, config.eps)


def _transcoder(featurizer: Transcoder, where: str) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return the configuration and the tensors of a transcoder, and what is lost.

    Raises:
        ConversionError: no architecture has its rule, or no normalisation or hook of SAELens is its own.
    """
    group, read, lost = featurizer.config.groups[transcoders.GROUP], featurizer.config.reads["in"], []
    skip = "out" in featurizer.config.skips
    architecture = next(
        (name for name, rule in transcoders.RULES.items() if rule == group.rule and ("skip" in name) == skip), None
    )
    if architecture is None:
        known = ", ".join(dict.fromkeys(transcoders.RULES.values()))
        raise ConversionError(where, f"SAELens has no transcoder with the rule {group.rule!r}; it has those of {known}")
    own = _read(featurizer)
    if own.normalize != "none" and (skip or hook_of_read(own) is None):
        raise ConversionError(
            where,
            f"its input is normalised by {own.normalize!r}, which SAELens has only as the hook ln2.hook_normalized, "
            "for models whose norm is known here, and without a skip connection",
        )
    if read.centre and read.normalize not in ("none", "scale"):
        raise ConversionError(where, f"SAELens subtracts nothing before the normalisation {read.normalize!r}")
    state = featurizer.state_dict()
    tensors = {
        "W_enc": state["W_enc.features.in"],
        "b_enc": state["b_enc.features"],
        "W_dec": state["W_dec.features.out"],
        "b_dec": state["b_dec.out"],
    }
    if read.normalize == "scale":
        tensors["W_enc"] = tensors["W_enc"] * read.input_scale
        lost.append(f"The factor {read.input_scale} of the activations is in the weights.")
    if read.centre:
        tensors["b_enc"] = tensors["b_enc"] - tensors["W_enc"] @ state["centre.in"]
        lost.append("The centre of the activations is in the bias of the encoder.")
    if group.slice_of is not None:
        lost.append("The numbers that the features have in the whole transcoder are not kept; they count from 0.")
    tensors["W_enc"] = tensors["W_enc"].T
    if group.rule == "jumprelu":
        tensors["threshold"] = state["rule_tensors.threshold.features"]
    if skip:
        tensors["W_skip"] = state["W_skip.out.in"].T
    plain = "none" if read.normalize in ("rms", "standard", "scale") else read.normalize
    cfg = {
        "architecture": architecture,
        "d_in": read.width,
        "d_out": featurizer.config.writes["out"],
        "d_sae": group.n_features,
        "apply_b_dec_to_input": False,
        "normalize_activations": _normalization(plain),
        "reshape_activations": "none",
    }
    return cfg, tensors, lost


def _normalization(normalize: str) -> str:
    return next(name for name, known in NORMALIZATIONS.items() if known == normalize)


def _common(config: Any) -> dict[str, Any]:
    """Return the keys that all architectures have; a scale of the activations is in the weights already."""
    normalize = "none" if config.normalize == "scale" else config.normalize
    return {
        "d_in": config.d_in,
        "d_sae": config.n_features,
        "apply_b_dec_to_input": config.pre_bias,
        "normalize_activations": _normalization(normalize),
        "reshape_activations": "none" if config.n_heads is None else "hook_z",
    }


def _dictionary(featurizer: DictionaryFeaturizer, where: str) -> dict[str, Any]:
    config = featurizer.config
    architectures = {rule: architecture for architecture, rule in RULES.items()}
    if config.rule not in architectures:
        raise ConversionError(
            where,
            f"SAELens has no architecture for the rule {config.rule!r}; it has those of {', '.join(architectures)}",
        )
    return {"architecture": architectures[config.rule], **_common(config), **config.rule_options}


def _matching_pursuit(featurizer: MatchingPursuitFeaturizer) -> dict[str, Any]:
    config = featurizer.config
    own = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
    return {"architecture": "matching_pursuit", **_common(config), **{name: getattr(config, name) for name in own}}

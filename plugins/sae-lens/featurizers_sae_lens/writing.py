"""Writes ``cfg.json`` and ``sae_weights.safetensors`` as SAELens loads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from featurizers import DictionaryFeaturizer, Featurizer
from featurizers.builtin import plain_weights
from featurizers.errors import ConversionError
from featurizers.format import write_tensors

from featurizers_sae_lens.assembly import NORMALIZATIONS, RULES
from featurizers_sae_lens.formats import CONFIG, WEIGHTS
from featurizers_sae_lens.matching_pursuit import MatchingPursuitFeaturizer
from featurizers_sae_lens.sites import hook_of, site_of

VERSION = "6.0.0"
"""Version of the keys that are written. SAELens drops the metadata of a file that names an older version or none."""


def write(featurizer: Featurizer[Any], folder: Path) -> list[str]:
    """Write a featurizer as an SAE of SAELens, and return a sentence for each thing that is lost.

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
    else:
        raise ConversionError(
            str(folder), f"SAELens has no architecture for the kind {featurizer.kind!r}; only dictionaries are written"
        )
    old_cfg = featurizer.metadata.get("sae_lens")
    old_metadata = old_cfg.get("metadata") if isinstance(old_cfg, dict) else None
    metadata: dict[str, Any] = dict(old_metadata) if isinstance(old_metadata, dict) else {}
    if (site := featurizer.site) is not None:
        if (hook := hook_of(site)) is None:
            lost.append(f"The site {str(site)!r} has no hook in TransformerLens.")
        metadata["hook_name"] = hook
        metadata |= {"hook_head_index": site.head} if site.head is not None else {}
        known = site_of(hook, metadata.get("model_name"))
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


def _common(config: Any) -> dict[str, Any]:
    """Return the keys that all architectures have; a scale of the activations is in the weights already."""
    normalize = "none" if config.normalize == "scale" else config.normalize
    return {
        "d_in": config.d_in,
        "d_sae": config.n_features,
        "apply_b_dec_to_input": config.pre_bias,
        "normalize_activations": next(name for name, known in NORMALIZATIONS.items() if known == normalize),
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

"""Writes ``cfg.json`` and ``sae_weights.safetensors`` that SAELens loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from featurizers import DictionaryFeaturizer, Featurizer
from featurizers.errors import ConversionError
from featurizers.format import write_tensors

from featurizers_sae_lens.assembly import NORMALIZATIONS, RULES
from featurizers_sae_lens.formats import CONFIG, WEIGHTS
from featurizers_sae_lens.matching_pursuit import MatchingPursuitFeaturizer
from featurizers_sae_lens.sites import hook_of, site_of

WORDS = "6.0.0"
"""The version whose words are written; SAELens drops the metadata of a file that does not name it, or an older one."""


def write(featurizer: Featurizer[Any], folder: Path) -> list[str]:
    """Write a featurizer as an SAE of SAELens, and say what that cannot hold.

    Raises:
        ConversionError: SAELens has no architecture for it.
    """
    lost: list[str] = []
    if isinstance(featurizer, DictionaryFeaturizer):
        cfg, tensors = _dictionary(featurizer, str(folder), lost)
    elif isinstance(featurizer, MatchingPursuitFeaturizer):
        cfg, tensors = _matching_pursuit(featurizer)
    else:
        raise ConversionError(
            str(folder), f"SAELens has no architecture for the kind {featurizer.kind!r}; only dictionaries are written"
        )
    before = featurizer.metadata.get("sae_lens")
    given = before.get("metadata") if isinstance(before, dict) else None
    metadata: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    if (site := featurizer.site) is not None:
        if (hook := hook_of(site)) is None:
            lost.append(f"The site {str(site)!r} has no hook of TransformerLens' naming.")
        metadata["hook_name"] = hook
        metadata |= {"hook_head_index": site.head} if site.head is not None else {}
        known = site_of(hook, metadata.get("model_name"))
        if site.model is not None and (known is None or known.model != site.model):
            metadata["model_name"] = site.model
    if featurizer.special_tokens:
        metadata["exclude_special_tokens"] = list(featurizer.special_tokens)
    if other := {key: value for key, value in featurizer.metadata.items() if key != "sae_lens"}:
        metadata["featurizers"] = other  # SAELens keeps what it does not know
    if not re.match(r"[6-9]|\d\d", str(metadata.get("sae_lens_version"))):
        metadata["sae_lens_version"] = WORDS
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    cfg = {**cfg, "dtype": dtype, "device": "cpu", "metadata": metadata}
    write_tensors(tensors, folder / WEIGHTS, str(folder))
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
    return lost


def _common(config: Any) -> dict[str, Any]:
    how = next(theirs for theirs, ours in NORMALIZATIONS.items() if ours == config.normalize)
    return {
        "d_in": config.d_in,
        "d_sae": config.n_features,
        "apply_b_dec_to_input": config.pre_bias,
        "normalize_activations": how,
        "reshape_activations": "none" if config.n_heads is None else "hook_z",
    }


def _dictionary(featurizer: DictionaryFeaturizer, where: str, lost: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    config = featurizer.config
    architectures = {rule: architecture for architecture, rule in RULES.items()}
    if config.rule not in architectures:
        raise ConversionError(
            where,
            f"SAELens has no architecture for the rule {config.rule!r}; it has those of {', '.join(architectures)}",
        )
    if config.slice_of is not None:
        lost.append("The numbers that the features have in the whole dictionary are not kept; they count from 0.")
    folded = config.units == "decoder-norm" and featurizer.rule.scaled is not None
    if folded:
        featurizer = featurizer.in_units("folded")
    elif config.units == "decoder-norm":
        lost.append("The features are in raw units, without the norms of their decoder rows.")
    state = {
        name: tensor for name, tensor in featurizer.state_dict().items() if name not in ("numbers", "decoder_norm")
    }
    if config.units != "raw" and featurizer.rule.scaled is not None:
        lost.append("The norms of the raw decoder rows are not kept; they are in the weights.")
    common = config.model_copy(update={"normalize": "none"}) if config.normalize == "scale" else config
    cfg = {"architecture": architectures[config.rule], **_common(common), **config.rule_options}
    if config.normalize == "scale":
        a = config.input_scale
        state |= {"W_enc": state["W_enc"] * a, "W_dec": state["W_dec"] / a, "b_dec": state["b_dec"] / a}
        lost.append(f"The factor {a} of the activations is in the weights.")
    state["W_enc"] = state["W_enc"].T
    return cfg, state


def _matching_pursuit(featurizer: MatchingPursuitFeaturizer) -> tuple[dict[str, Any], dict[str, Any]]:
    config = featurizer.config
    own = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
    cfg = {"architecture": "matching_pursuit", **_common(config), **{name: getattr(config, name) for name in own}}
    return cfg, featurizer.state_dict()

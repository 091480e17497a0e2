"""Translates ``cfg.json`` of SAELens before version 6 into the keys of version 6."""

from __future__ import annotations

from typing import Any

from featurizers.errors import ManifestError, shown

MAP = {
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "k",
    "rescale_acts_by_decoder_norm",
    "residual_threshold",
    "max_iterations",
    "stop_on_duplicate_support",
    "d_out",
    "metadata",
}
"""Keys of version 6. Any other key is an error in version 6, and metadata in earlier versions."""
TEMPORAL = {
    "n_heads",
    "n_attn_layers",
    "bottleneck_factor",
    "sae_diff_type",
    "kval_topk",
    "tied_weights",
    "activation_normalization_factor",
}
"""Further keys of a temporal autoencoder."""
OVERRIDDEN = (
    "hook_name",
    "hook_name_out",
    "hf_hook_name",
    "hf_hook_name_out",
    "model_name",
    "dataset_path",
    "neuronpedia_id",
    "model_from_pretrained_kwargs",
)
"""Metadata that a catalogue, or a file, adds to those keys."""
RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}


def modern(cfg: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a configuration of any version with the keys of version 6.

    Raises:
        ManifestError: it has a key or an activation that is not known.
    """
    if "metadata" in cfg or ("architecture" in cfg and not cfg.keys() - MAP):
        metadata = cfg.get("metadata")
        if metadata is not None and not isinstance(metadata, dict):
            raise ManifestError(where, f"metadata is {shown(metadata)}, not an object")
        other = {key: cfg[key] for key in OVERRIDDEN if key in cfg}
        own = TEMPORAL if cfg.get("architecture") == "temporal" else set()
        if unknown := sorted(cfg.keys() - MAP - other.keys() - own):
            raise ManifestError(
                where,
                f"cfg.json has unknown keys {unknown!r}, which might change the features; upgrade featurizers-sae-lens",
            )
        return {
            **{key: value for key, value in cfg.items() if key not in other},
            "metadata": {**(metadata or {}), **other},
        }
    old = {RENAMED.get(key, key): value for key, value in cfg.items()}
    new = {key: value for key, value in old.items() if key in MAP}
    new.setdefault("architecture", "standard")
    activation = old.get("activation_fn", "relu")
    options = old.get("activation_fn_kwargs") or {}
    if activation == "topk":
        if not isinstance(options, dict) or "k" not in options:
            raise ManifestError(where, "activation_fn is 'topk', but activation_fn_kwargs lacks k")
        new |= {"architecture": "topk", "k": options["k"]}
    elif activation != "relu":
        raise ManifestError(where, f"activation_fn is {activation!r}; known are relu and topk")
    if isinstance(normalize := new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    if "hook_z" in str(old.get("hook_name", "")):
        new.setdefault("reshape_activations", "hook_z")
    new["metadata"] = {key: value for key, value in old.items() if key not in new}
    return new

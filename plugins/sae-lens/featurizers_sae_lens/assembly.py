"""Builds a featurizer from SAELens' configuration and tensors; every reader of this plugin ends here."""

from __future__ import annotations

import functools
from typing import Any

import torch
from featurizers import DictionaryFeaturizer, FeatureSpace, Featurizer
from featurizers.builtin import fold_input_scale
from featurizers.errors import FeaturizerError, ManifestError, UsageError, WeightsError, explain, shown
from featurizers_transcoder.hooks import site_of
from pydantic import ValidationError
from torch import Tensor

from featurizers_sae_lens.matching_pursuit import MatchingPursuitConfig, MatchingPursuitFeaturizer

RULES = {"standard": "relu", "gated": "gated", "topk": "topk", "abstopk": "abstopk", "jumprelu": "jumprelu"}
"""Rule of each architecture that is a dictionary."""
VECTORS = {"relu": (), "jumprelu": ("threshold",), "topk": (), "abstopk": (), "gated": ("b_gate", "r_mag", "b_mag")}
"""Tensors of each rule besides the weights and biases."""
NORMALIZATIONS = {
    "none": "none",
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
    "layer_norm": "layer-norm",
    "constant_norm_rescale": "constant-norm",
}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Dtypes by SAELens' names, which may have the prefix ``torch.``."""
FOLDED = ("expected_average_only_in", "covariance_whitening")
"""Normalisations that SAELens applies only in training, and expects in the weights afterwards."""
WHOLE = {
    "topk": "topk compares all features of a token",
    "abstopk": "abstopk compares all features of a token",
    "matching_pursuit": "in matching pursuit each feature depends on those found before",
}
"""Architectures that cannot be sliced, because a part would have other features, and why."""

OTHER = {
    "crosscoder": "crosscoders are read only in the files of Gemma Scope 2, one for each layer",
    "clt": "cross-layer transcoders are read only in the files of Gemma Scope 2, one for each layer, and by the ids of "
    "SAELens' catalogue",
}
"""Architectures that are known, but not read, and why."""


def refuse_unknown(architecture: object, where: str, known: tuple[str, ...] = ()) -> None:
    """Raise `ManifestError` unless an architecture is a dictionary's, matching pursuit, or one of ``known``."""
    if isinstance(architecture, str) and architecture in OTHER:
        raise ManifestError(where, f"the architecture {shown(architecture)} is not supported: {OTHER[architecture]}")
    allowed = (*RULES, "matching_pursuit", *known)
    if architecture not in allowed:
        raise ManifestError(
            where, f"the architecture {shown(architecture)} is not known; known are {', '.join(allowed)}"
        )


def number(cfg: dict[str, Any], name: str, where: str, kinds: type | tuple[type, ...] = int) -> Any:
    """Return a number of a configuration.

    Raises:
        ManifestError: it is missing, or not a finite number of these kinds.
    """
    value: Any = cfg.get(name)
    wrong = isinstance(value, bool) or not isinstance(value, kinds)
    if wrong or not -1e300 < value < 1e300:
        raise ManifestError(where, f"{name!r} must be a number, got {shown(value)}")
    return value


def positive(cfg: dict[str, Any], name: str, where: str, kinds: type | tuple[type, ...] = int) -> Any:
    """Return a positive number of a configuration.

    Raises:
        ManifestError: it is missing, or not a positive number of these kinds.
    """
    if (value := number(cfg, name, where, kinds)) <= 0:
        raise ManifestError(where, f"{name!r} must be positive, got {shown(value)}")
    return value


def flag(cfg: dict[str, Any], name: str, default: bool, where: str) -> bool:
    """Return a boolean of a configuration, or the default if it is missing.

    Raises:
        ManifestError: it is not a boolean.
    """
    if not isinstance(value := cfg.get(name, default), bool):
        raise ManifestError(where, f"{name} is {shown(value)}; it must be true or false")
    return value


def normalization(cfg: dict[str, Any], where: str) -> str:
    """Return SAELens' name of the normalisation.

    Raises:
        ManifestError: it is not known.
    """
    normalize = cfg.get("normalize_activations") or "none"
    if not isinstance(normalize, str) or normalize not in NORMALIZATIONS:
        raise ManifestError(
            where, f"normalize_activations is {shown(normalize)}; known are {', '.join(NORMALIZATIONS)}"
        )
    return normalize


def assemble(
    cfg: dict[str, Any],
    tensors: dict[str, Tensor],
    where: str,
    *,
    numbers: Tensor | None = None,
    n_features: int | None = None,
    input_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> Featurizer[Any]:
    """Build the featurizer of a configuration and its tensors.

    Args:
        cfg: configuration of SAELens version 6; it is also kept as metadata.
        tensors: by SAELens' names; ``W_enc`` and ``W_dec`` have a row for each feature.
        where: name of the source in errors.
        numbers: numbers of the features if they are a slice.
        n_features: number of features of the whole dictionary if this is a slice.
        input_scale: factor that the activations were multiplied by in training; it is folded into the weights, as
            SAELens does.
        dtype: dtype that SAELens converts the tensors to when it loads them; None for the widest of theirs.

    Raises:
        ManifestError: an architecture, a normalisation or a number is not supported.
        UsageError: a slice of an autoencoder whose features depend on each other.
        WeightsError: the tensors do not fit the configuration.
    """
    architecture = cfg.get("architecture", "standard")
    refuse_unknown(architecture, where)
    if numbers is not None and architecture in WHOLE:
        raise UsageError(f"{where}: {WHOLE[architecture]}; load it whole, and give the indices to the operation")
    normalize = normalization(cfg, where)
    reshape = cfg.get("reshape_activations") or "none"
    if reshape not in ("none", "hook_z"):
        raise ManifestError(where, f"reshape_activations is {shown(reshape)}; known are none, hook_z")
    metadata: dict[str, Any] = cfg.get("metadata") or {}
    tensors = of_one_dtype(tensors, dtype, where)
    if input_scale is not None:
        positive({"the factor of the activations": input_scale}, "the factor of the activations", where, (int, float))
        tensors = fold_input_scale(tensors, input_scale)
    common: dict[str, Any] = {
        "pre_bias": flag(cfg, "apply_b_dec_to_input", True, where),
        "normalize": NORMALIZATIONS[normalize],
        "n_heads": 0 if reshape == "hook_z" else None,
        "special_tokens": special_tokens(cfg),
    }
    try:
        if architecture == "matching_pursuit":
            featurizer: Featurizer[Any] = _matching_pursuit(cfg, tensors, common, where, input_scale or 1.0)
        else:
            featurizer = _dictionary(cfg, tensors, RULES[architecture], common, where, numbers, n_features)
    except ManifestError:
        raise
    except ValidationError as error:
        raise ManifestError(where, explain(error)) from error
    except FeaturizerError as error:
        raise WeightsError(where, str(error)) from error
    featurizer.site = site_of(metadata.get("hook_name"), metadata.get("model_name"), metadata.get("hook_head_index"))
    describe(featurizer, cfg, notes_on(normalize, input_scale, metadata.get("model_from_pretrained_kwargs")))
    return featurizer


def special_tokens(cfg: dict[str, Any]) -> list[Any]:
    """Return the ids of the tokens that a configuration leaves out."""
    special = (cfg.get("metadata") or {}).get("exclude_special_tokens")
    return special if isinstance(special, list) else []


def describe(featurizer: FeatureSpace[Any], cfg: dict[str, Any], notes: list[str]) -> None:
    """Set the id and the metadata of a featurizer from its configuration; metadata that this plugin wrote are kept."""
    metadata: dict[str, Any] = cfg.get("metadata") or {}
    name = metadata.get("neuronpedia_id") or metadata.get("hook_name") or cfg.get("architecture", "standard")
    featurizer.id = str(name)
    own = metadata.get("featurizers")
    featurizer.metadata = {**(own if isinstance(own, dict) else {}), "sae_lens": cfg}
    if notes:
        featurizer.metadata["notes"] = notes


def notes_on(normalize: str, input_scale: float | None, model_options: Any) -> list[str]:
    """Return notes on the activations that the autoencoder was trained on."""
    notes = []
    if input_scale is not None:
        notes.append(f"The factor {input_scale} of the activations is in the weights.")
    elif normalize in FOLDED:
        notes.append(f"{normalize} is taken to be in the weights already, as SAELens takes it.")
    if isinstance(model_options, dict) and model_options.get("center_writing_weights"):
        notes.append("Trained on TransformerLens' model with center_writing_weights: activations have the mean 0.")
    return notes


def dtype_of(cfg: dict[str, Any], where: str) -> torch.dtype | None:
    """Return the dtype that a configuration names, as SAELens reads it; None if it names no dtype.

    Raises:
        ManifestError: SAELens does not know the dtype.
    """
    name = cfg.get("dtype")
    if name is None:
        return None
    if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
        raise ManifestError(where, f"dtype is {shown(name)}; known are {', '.join(DTYPES)}")
    return DTYPES[name.removeprefix("torch.")]


def of_one_dtype(tensors: dict[str, Tensor], dtype: torch.dtype | None, where: str) -> dict[str, Tensor]:
    """Return the tensors in one dtype: the given one, or the widest of theirs, which loses nothing."""
    if other := sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point()):
        raise WeightsError(where, f"{other!r} must be floating-point tensors")
    if not tensors:
        return {}
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _dictionary(
    cfg: dict[str, Any],
    tensors: dict[str, Tensor],
    rule: str,
    common: dict[str, Any],
    where: str,
    numbers: Tensor | None,
    n_features: int | None,
) -> DictionaryFeaturizer:
    expected = {"W_enc", "W_dec", "b_dec", *([] if rule == "gated" else ["b_enc"]), *VECTORS[rule]}
    if wrong := sorted(expected ^ tensors.keys()):
        raise WeightsError(
            where,
            f"the architecture {shown(cfg.get('architecture'))} has the tensors {sorted(expected)!r}; "
            f"missing or unknown: {shown(wrong)}",
        )
    if rule in ("topk", "abstopk"):
        common["rule_options"] = {"k": number(cfg, "k", where)}
        # norms that SAELens multiplies at run time are exact in the weights, and the features are the same
        if flag(cfg, "rescale_acts_by_decoder_norm", False, where):
            tensors = fold_decoder_norms(tensors)
    arguments: dict[str, Any] = {**tensors, **common}
    return DictionaryFeaturizer.from_tensors(**arguments, rule=rule, numbers=numbers, slice_of=n_features)


def fold_decoder_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same autoencoder with decoder rows of length 1, whose norms multiply the encoder instead."""
    norm = tensors["W_dec"].norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return {
        **tensors,
        "W_enc": tensors["W_enc"] * norm,
        "b_enc": tensors["b_enc"] * norm[:, 0],
        "W_dec": tensors["W_dec"] / norm,
    }


def _matching_pursuit(
    cfg: dict[str, Any], tensors: dict[str, Tensor], common: dict[str, Any], where: str, scale: float
) -> MatchingPursuitFeaturizer:
    if wrong := sorted({"W_dec", "b_dec"} ^ tensors.keys()):
        raise WeightsError(
            where, f"matching pursuit has the tensors 'W_dec' and 'b_dec' alone; missing or unknown: {shown(wrong)}"
        )
    limit = cfg.get("max_iterations")
    threshold = number({"residual_threshold": 1e-2, **cfg}, "residual_threshold", where, (int, float))
    config = MatchingPursuitConfig(
        d_in=tensors["W_dec"].shape[1],
        n_features=tensors["W_dec"].shape[0],
        residual_threshold=float(threshold) / scale,
        max_iterations=None if limit is None else number(cfg, "max_iterations", where),
        stop_on_duplicate_support=flag(cfg, "stop_on_duplicate_support", True, where),
        **common,
    )
    with torch.device("meta"):
        featurizer = MatchingPursuitFeaturizer(config)
    state = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if state["b_dec"].shape != featurizer.b_dec.shape:
        raise WeightsError(where, f"b_dec has shape {tuple(state['b_dec'].shape)}, it must be ({config.d_in},)")
    featurizer.load_state_dict(state, assign=True)
    return featurizer

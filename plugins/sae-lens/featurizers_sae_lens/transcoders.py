"""Builds transcoders from SAELens' configuration and tensors, and reads those of mwhanna's releases."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from featurizers import Site
from featurizers.errors import FeaturizerError, ManifestError, UsageError, WeightsError, shown
from featurizers.format import ExternalFiles
from featurizers_transcoder import Transcoder
from featurizers_transcoder.hooks import Read, hookless, read_of, site_of, site_of_point
from torch import Tensor

from featurizers_sae_lens.assembly import (
    NORMALIZATIONS,
    describe,
    flag,
    normalization,
    notes_on,
    of_one_dtype,
    special_tokens,
)
from featurizers_sae_lens.reading import check_sizes, count_features
from featurizers_sae_lens.yaml_files import read_yaml

RULES = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""Rule of each architecture that is a transcoder; those with ``skip`` in the name have a skip connection."""
GROUP = "features"
"""Name of the group of features of a transcoder."""


def of_group(source: ExternalFiles, group: str) -> ExternalFiles:
    """Return the files with the indices that were asked for in the only group.

    Raises:
        UsageError: indices of another group were asked for.
    """
    asked = source.group_indices
    if asked is None:
        return source
    if asked.keys() != {group}:
        raise UsageError(f"{source.where} has the group {group!r}; there is no {shown(sorted(asked.keys() - {group}))}")
    return dataclasses.replace(source, indices=asked[group], group_indices=None)


def finish(
    source: ExternalFiles,
    cfg: dict[str, Any],
    tensors: dict[str, Tensor],
    n_features: int,
    dtype: torch.dtype | None = torch.float32,
) -> Transcoder:
    """Check sizes against the configuration, and build the transcoder; see `featurizers_sae_lens.reading.finish`."""
    slice_of = None if source.indices is None else n_features
    result = transcoder(cfg, tensors, source.where, numbers=source.indices, n_features=slice_of, dtype=dtype)
    widths = {"d_in": result.read_widths["in"], "d_out": result.write_widths["out"]}
    check_sizes(source, cfg, {**widths, "d_sae": n_features})
    return result


def transcoder(
    cfg: dict[str, Any],
    tensors: dict[str, Tensor],
    where: str,
    *,
    numbers: Tensor | None = None,
    n_features: int | None = None,
    dtype: torch.dtype | None = None,
) -> Transcoder:
    """Build a transcoder; the arguments are those of `featurizers_sae_lens.assembly.assemble`.

    The normalisation of SAELens acts on the input of the encoder alone, and the skip connection, ``W_skip`` of shape
    ``(d_out, d_in)``, takes the activations as they are.

    Raises:
        ManifestError: a normalisation or an option is not supported.
        WeightsError: the tensors do not fit the architecture or each other.
    """
    architecture = cfg["architecture"]
    rule, skip = RULES[architecture], "skip" in architecture
    if flag(cfg, "apply_b_dec_to_input", True, where):
        raise ManifestError(where, "apply_b_dec_to_input must be false: a transcoder's b_dec is of what it writes")
    if (reshape := cfg.get("reshape_activations") or "none") != "none":
        raise ManifestError(where, f"reshape_activations is {shown(reshape)}; a transcoder knows 'none' alone")
    expected = {"W_enc", "W_dec", "b_enc", "b_dec"}
    expected |= {"threshold"} if rule == "jumprelu" else set()
    expected |= {"W_skip"} if skip else set()
    if wrong := sorted(expected ^ tensors.keys()):
        raise WeightsError(
            where,
            f"the architecture {architecture!r} has the tensors {sorted(expected)!r}; "
            f"missing or unknown: {shown(wrong)}",
        )
    tensors = of_one_dtype(tensors, dtype, where)
    if skip and tensors["W_skip"].dim() == 2:
        tensors["W_skip"] = tensors["W_skip"].T
    metadata: dict[str, Any] = cfg.get("metadata") or {}
    normalize = normalization(cfg, where)
    read, write = _read(metadata), _write(metadata)
    if write is None:  # without sites it takes the hook's own activations
        read = Read(None)
    plain = NORMALIZATIONS[normalize] == "none" and not skip
    if read.normalize != "none" and not plain:  # the hook's normalisation comes before these
        read = Read(None)
    own = NORMALIZATIONS[normalize] if read.normalize == "none" else read.normalize
    arguments: dict[str, Any] = {
        **tensors,
        "rule": rule,
        "normalize": own,
        "eps": read.eps,
        "special_tokens": special_tokens(cfg),
    }
    try:
        featurizer = Transcoder.from_weights(**arguments, numbers=numbers, slice_of=n_features)
    except FeaturizerError as error:
        raise WeightsError(where, str(error)) from error
    notes = notes_on(normalize, None, metadata.get("model_from_pretrained_kwargs"))
    if read.site is not None and write is not None:
        featurizer.reads, featurizer.writes = {"in": read.site}, {"out": write}
    else:
        notes.append(hookless(metadata.get("hook_name"), metadata.get("hook_name_out")))
    describe(featurizer, cfg, notes)
    return featurizer


def _read(metadata: dict[str, Any]) -> Read:
    hook, model = metadata.get("hook_name"), metadata.get("model_name")
    # SAELens calls the input of Gemma 3's MLP hook_mlp_in, which in TransformerLens is the stream before the norm
    if str(hook).endswith(".hook_mlp_in") and (site := site_of_point(metadata.get("hf_hook_name"), model)) is not None:
        return Read(site)
    return read_of(hook, model, metadata.get("hook_head_index"))


def _write(metadata: dict[str, Any]) -> Site | None:
    site = site_of(metadata.get("hook_name_out"), metadata.get("model_name"), metadata.get("hook_head_index_out"))
    return site or site_of_point(metadata.get("hf_hook_name_out"), metadata.get("model_name"))


def mwhanna(source: ExternalFiles, name: str, overrides: dict[str, Any]) -> Transcoder:
    """Read a layer of mwhanna's transcoders of Qwen 3: ``layer_i.safetensors``, and ``config.yaml`` where there is one.

    Raises:
        ManifestError: the file is not named after a layer, or neither ``config.yaml`` nor the repository names the
            model.
        WeightsError: the file is damaged, or has other tensors.
    """
    source = of_group(source, GROUP)
    layer = re.fullmatch(r"layer_(\d{1,5})\.safetensors", name)
    if layer is None:
        raise ManifestError(source.where, f"{shown(name)} is not named layer_NUMBER.safetensors")
    raw = read_yaml(source, "config.yaml") if "config.yaml" in source.names else {}
    model = raw.get("model_name") or _qwen(source.where)
    if not isinstance(model, str):
        raise ManifestError(source.where, "neither config.yaml nor the name of the repository says the model")
    file = source.safetensors(name)
    n_features = count_features(file, "W_dec", source, axis=0)
    if unknown := sorted(file.shapes.keys() - {"W_enc", "W_dec", "b_enc", "b_dec"}):
        raise WeightsError(source.where, f"{name} has unknown tensors {shown(unknown)}")
    rows = source.indices
    tensors = {key: file.read(key, rows=rows) for key in ("W_enc", "W_dec", "b_enc")}
    cfg = {
        "architecture": "transcoder",
        "apply_b_dec_to_input": False,
        "metadata": {
            "hook_name": f"blocks.{layer[1]}.{raw.get('feature_input_hook', 'mlp.hook_in')}",
            "hook_name_out": f"blocks.{layer[1]}.{raw.get('feature_output_hook', 'hook_mlp_out')}",
            "model_name": model,
            **overrides,
        },
    }
    return finish(source, cfg, {**tensors, "b_dec": file.read("b_dec")}, n_features)


def _qwen(where: str) -> str | None:
    size = re.search(r"qwen3-(\d{1,3}(?:\.\d{1,3})?)b", where)
    return size and f"Qwen/Qwen3-{size[1]}B"

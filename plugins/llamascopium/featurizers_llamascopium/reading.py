"""Reads the folders of llamascopium: ``config.json``, ``sae_weights.safetensors`` and maybe ``lm_config.json``.

llamascopium encodes normalised activations s x and gives back y / s', with s and s' of the hooks; both factors are in
the weights here, so that maps take and give the model's own activations and features keep their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from featurizers import DictionaryFeaturizer, FeatureSpace
from featurizers.builtin import fold_input_scale
from featurizers.errors import FeaturizerError, UsageError, WeightsError, shown
from featurizers.format import ExternalFiles
from featurizers_transcoder import ReadConfig, Transcoder
from featurizers_transcoder.hooks import Read, hookless
from torch import Tensor

from featurizers_llamascopium import lorsa_files, many_sites
from featurizers_llamascopium.config import Attention, CrossLayer, ManySites, OneSite, parse
from featurizers_llamascopium.glu import GluConfig, GluMap
from featurizers_llamascopium.sites import Places
from featurizers_llamascopium.weights import THRESHOLD, Weights

CONFIG = "config.json"
GROUP = "features"


def read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read the model of a folder, or some of its features; None for a folder of another library.

    Raises:
        ManifestError: the config is not valid, or the model cannot be read exactly.
        WeightsError: the weights do not fit the config.
        UsageError: features are requested without their group, or of a model that must be read whole.
        FeatureIndexError: a feature is out of range.
    """
    if CONFIG not in source.names:
        return None
    raw = source.json(CONFIG)
    if "sae_type" not in raw:
        return None
    config = parse(raw, source.where)
    weights, places = Weights(source, config), Places(source)
    with _weights_errors(source.where):
        result: FeatureSpace[Any]
        match config:
            case OneSite():
                result = _one_site(config, weights, places, _rows(source, GROUP))
            case CrossLayer():
                result = many_sites.cross_layer(config, weights, places, _chosen(source))
            case ManySites():
                result = many_sites.crosscoder(config, weights, places, _chosen(source))
            case Attention():
                result = lorsa_files.lorsa(config, weights, places, _rows(source, GROUP))
    result.id = source.where.rstrip("/").rpartition("/")[2]
    notes = result.metadata.get("notes", [])
    result.metadata = {"llamascopium": raw}
    if places.lm_config:
        result.metadata["lm_config"] = places.lm_config
    if notes := [*notes, *places.notes(config.hooks)]:
        result.metadata["notes"] = notes
    return result


def _rows(source: ExternalFiles, group: str) -> Tensor | None:
    """Return the features to read of the only group."""
    asked = source.group_indices
    if asked is None:
        return source.indices
    if asked.keys() != {group}:
        raise UsageError(f"{source.where} has the group {group!r}; there is no {shown(sorted(asked.keys() - {group}))}")
    return asked[group]


def _chosen(source: ExternalFiles) -> Callable[[list[str]], dict[str, Tensor | None]]:
    """Return a function that gives the features to read, given the names of all groups."""

    def of(names: list[str]) -> dict[str, Tensor | None]:
        asked = source.group_indices
        if asked is None:
            if source.indices is None:
                return dict.fromkeys(names)
            if len(names) == 1:
                return {names[0]: source.indices}
            raise UsageError(f"{source.where}: give features by group, such as indices={{{names[0]!r}: [0, 1]}}")
        if unknown := sorted(asked.keys() - set(names)):
            raise UsageError(f"{source.where} has the groups {', '.join(names)}; there is no {shown(unknown[0])}")
        return {name: asked[name] for name in names if name in asked}

    return of


def _one_site(
    config: OneSite, weights: Weights, places: Places, indices: Tensor | None
) -> DictionaryFeaturizer | Transcoder | GluMap:
    """Read an autoencoder, or a transcoder if it writes another hook than it reads, or has a gated encoder."""
    d, n = config.d_model, config.n_features
    bias: dict[str, tuple[int, ...]] = {"b_D": (d,)} if config.use_decoder_bias else {}
    threshold: dict[str, tuple[int, ...]] = {THRESHOLD: (n,)} if weights.has_threshold else {}
    glu: dict[str, tuple[int, ...]] = {"W_E_glu": (d, n), "b_E_glu": (n,)} if config.use_glu_encoder else {}
    weights.check({"W_E": (d, n), "b_E": (n,), "W_D": (n, d), **bias, **threshold, **glu})
    rows = weights.columns(indices)
    if glu and rows is not None:
        raise UsageError(f"{weights.where}: a gated encoder is loaded whole; give the indices to the operation")
    W_dec = weights.read("W_D", rows=rows)
    gate = weights.gate(W_dec.norm(dim=-1), weights.read(THRESHOLD, rows=rows) if threshold else None)
    s_in, s_out = weights.factor(config.hook_point_in), weights.factor(config.hook_point_out)
    W_enc, b_enc = weights.read("W_E", columns=rows).T, weights.read("b_E", rows=rows)
    b_dec = weights.read("b_D") if bias else W_dec.new_zeros(d)
    common: dict[str, Any] = {
        "rule": gate.rule,
        "rule_options": gate.options,
        "numbers": rows,
        "slice_of": None if rows is None else n,
        **gate.tensors,
    }
    if config.hook_point_in == config.hook_point_out and not glu:
        folded = fold_input_scale({"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}, s_in)
        common["normalize"] = "constant-norm" if config.norm_activation == "token-wise" else "none"
        dictionary = DictionaryFeaturizer.from_tensors(**{**folded, **common})
        dictionary.site = places.write(config.hook_point_in)
        if dictionary.site is None:
            hook = shown(config.hook_point_in)
            dictionary.metadata = {"notes": [f"The site of the hook {hook} in this model is not known; set f.site."]}
        return dictionary
    read, write = places.read(config.hook_point_in), places.write(config.hook_point_out)
    if write is None:  # without sites the map takes what the hook has, which is normalised already
        read = Read(None)
    result: Transcoder | GluMap
    if glu:
        tensors = {"W_enc": W_enc * s_in, "W_dec": W_dec / s_out, "b_enc": b_enc, "b_dec": b_dec / s_out}
        tensors |= {"W_gate": weights.read("W_E_glu").T * s_in, "b_gate": weights.read("b_E_glu")}
        own = ReadConfig(width=d, normalize=read.normalize, eps=read.eps)
        cfg = GluConfig(read=own, d_out=d, n_features=n, rule=gate.rule, rule_options=gate.options)
        of_rule = {f"rule_tensors.{name}": tensor for name, tensor in gate.tensors.items()}
        result = GluMap.from_tensors(cfg, {**tensors, **of_rule})
    else:
        result = Transcoder.from_weights(
            W_enc * s_in, W_dec / s_out, b_enc, b_dec / s_out, normalize=read.normalize, eps=read.eps, **common
        )
    if read.site is not None and write is not None:
        result.reads, result.writes = {"in": read.site}, {"out": write}
    else:
        result.metadata = {"notes": [hookless(config.hook_point_in, config.hook_point_out)]}
    return result


@contextmanager
def _weights_errors(where: str) -> Iterator[None]:
    """Raise errors of tensors that do not fit each other as WeightsError with the name of the folder."""
    try:
        yield
    except (WeightsError, UsageError, LookupError):
        raise
    except FeaturizerError as error:
        raise WeightsError(where, str(error)) from error

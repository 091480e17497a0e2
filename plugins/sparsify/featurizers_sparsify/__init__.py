"""Sparse autoencoders and transcoders of sparsify, read from and written to folders of its own format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurizers import DictionaryFeaturizer, Site, hookimpl
from featurizers.builtin import lost_settings, plain_weights
from featurizers.errors import ConversionError, FeaturizerError, ManifestError, SourceError, UsageError, WeightsError
from featurizers.features import FeatureSpace
from featurizers.format import ExternalFiles, write_tensors
from featurizers_transcoder import Transcoder
from pydantic import ValidationError
from torch import Tensor

from featurizers_sparsify import transcoders
from featurizers_sparsify.config import BLOCK, CONFIG, MODULES, ROOT, WEIGHTS, SparsifyConfig

__all__ = ["SparsifyConfig"]


@hookimpl
def featurizers_read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read the autoencoder or transcoder in a folder of sparsify, None for any other folder.

    Raises:
        ManifestError: the configuration is not known.
        WeightsError: the weights do not fit the configuration, or there is no decoder.
        UsageError: only some features are requested, which topk and groupmax do not allow.
    """
    if not {CONFIG, WEIGHTS} <= set(source.names):
        return None
    return _read(source, False)


def _read(source: ExternalFiles, of_transcoders: bool) -> FeatureSpace[Any]:
    """Read a folder of sparsify.

    Args:
        source: the folder.
        of_transcoders: True if the repository says that its folders are transcoders.
    """
    where, raw = source.where, source.json(CONFIG)
    try:
        config = SparsifyConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ManifestError(where, f"{CONFIG}: {key!r}: {first['msg']}, got {first['input']!r}") from error
    _refuse(config, where)
    if source.indices is not None or source.group_indices is not None:
        raise UsageError(f"{where}: {config.activation} compares all features of a token; load it whole")
    file = source.safetensors(WEIGHTS)
    n_features = config.num_latents or config.d_in * config.expansion_factor
    f, d = n_features, config.d_in
    expected = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    if config.skip_connection:
        expected["W_skip"] = (d, d)
    if "W_dec" not in file.shapes and "encoder.weight" in file.shapes:
        raise WeightsError(where, f"{WEIGHTS} holds an encoder alone; a featurizer needs the decoder W_dec too")
    if file.shapes != expected:
        raise WeightsError(where, f"{WEIGHTS} has {file.shapes!r}, but its config implies {expected!r}")
    weights = {name: file.read(name) for name in expected}
    # sparsify converts all tensors to the dtype of the first, in the order of names
    weights = {name: tensor.to(weights["W_dec"].dtype) for name, tensor in weights.items()}
    hookpoint = _hookpoint(where)
    featurizer: FeatureSpace[Any]
    try:
        if config.skip_connection or config.transcode or (of_transcoders and "transcode" not in raw):
            featurizer = transcoders.build(config, weights, hookpoint)
        else:
            featurizer = _dictionary(config, weights)
            featurizer.site = _site(hookpoint)
    except WeightsError:
        raise
    except FeaturizerError as error:
        raise ManifestError(where, str(error)) from error
    featurizer.id = hookpoint or "sparsify"
    featurizer.metadata = {"sparsify": raw}
    return featurizer


def _dictionary(config: SparsifyConfig, weights: dict[str, Tensor]) -> DictionaryFeaturizer:
    return DictionaryFeaturizer.from_tensors(
        weights["encoder.weight"],
        weights["W_dec"],
        weights["encoder.bias"],
        weights["b_dec"],
        rule="abstopk" if config.signed else config.activation,
        rule_options={"k": config.k},
        pre_bias=True,
    )


def _refuse(config: SparsifyConfig, where: str) -> None:
    if config.activation not in ("topk", "groupmax"):
        raise ManifestError(where, f"the activation {config.activation!r} is not known; known are topk, groupmax")
    if config.signed and config.activation != "topk":
        raise ManifestError(where, f"signed belongs to the activation 'topk', not to {config.activation!r}")


def _hookpoint(where: str) -> str:
    """Return the name of the folder, or of its parent if the folder is a seed (``seed0``, ``seed1``, …)."""
    path = Path(where)
    return path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name


def _site(hookpoint: str) -> Site | None:
    """Return the site of a hookpoint such as ``layers.10`` or ``layers.10.mlp``: the output of a block or a module."""
    match = BLOCK.fullmatch(hookpoint)
    if match is None:
        return None
    layer, module = int(match[1]), match[2]
    if module is None:
        return Site("resid.post", layer)
    return Site(MODULES[module], layer) if module in MODULES else None


@hookimpl
def featurizers_resolve(reference: str, repository: Callable[..., ExternalFiles]) -> FeatureSpace[Any] | None:
    """Read the featurizer of ``owner/name/hookpoint``, as in ``sparsify:EleutherAI/sae-llama-3-8b-32x/layers.10``.

    Raises:
        SourceError: the reference has another form, or the repository has no such hookpoint.
    """
    owner, _, rest = reference.partition("/")
    name, _, hookpoint = rest.partition("/")
    if not (owner and name):
        raise SourceError(f"cannot read 'sparsify:{reference}'; write 'sparsify:owner/name/hookpoint'")
    source = repository(f"{owner}/{name}", hookpoint or None)
    if not {CONFIG, WEIGHTS} <= set(source.names):
        known = sorted(
            {name.rpartition("/")[0] for name in repository(f"{owner}/{name}").names if name.endswith(WEIGHTS)}
        )
        raise SourceError(
            f"{owner}/{name} has no {CONFIG} and {WEIGHTS} at the hookpoint {hookpoint!r}; it has "
            f"{', '.join(map(repr, known[:10])) or 'none'}{', …' if len(known) > 10 else ''}"
        )
    if "transcode" in source.json(CONFIG):
        return _read(source, False)
    root = repository(f"{owner}/{name}")  # before February 2025 the key was in the configuration of the training
    of_transcoders = ROOT in root.names and root.json(ROOT).get("transcode") is True
    return _read(repository(f"{owner}/{name}", hookpoint or None), of_transcoders)


@hookimpl
def featurizers_write(featurizer: FeatureSpace[Any], folder: Path) -> list[str] | None:
    """Write a map for sparsify's ``SparseCoder.load_from_disk``, and return a sentence for each thing lost.

    Raises:
        ConversionError: its rule is not topk or groupmax, it normalises, or sparsify has no such map.
    """
    where = str(folder)
    if isinstance(featurizer, Transcoder):
        return transcoders.write(featurizer, folder)
    if not isinstance(featurizer, DictionaryFeaturizer):
        raise ConversionError(where, f"sparsify has dictionaries and transcoders, not the kind {featurizer.kind!r}")
    config = featurizer.config
    if config.rule not in ("topk", "groupmax"):
        raise ConversionError(where, f"sparsify has the rules topk and groupmax, not {config.rule!r}")
    if config.normalize != "none":
        raise ConversionError(where, f"sparsify normalises no activations; this dictionary does: {config.normalize!r}")
    weights, lost = plain_weights(featurizer)
    bias = weights["b_enc"]
    if not config.pre_bias:  # sparsify encodes x - b_dec, and this bias adds b_dec again
        bias = bias + weights["W_enc"] @ weights["b_dec"]
        lost.append("The encoder's bias undoes sparsify's pre-bias; features are the same to rounding.")
    lost += lost_settings(featurizer, ["sparsify"])
    if featurizer.site is not None and _site(folder.name) != featurizer.site:
        lost.append(
            f"The site {str(featurizer.site)!r} is kept by the folder's name alone: name it layers.10.mlp or the like."
        )
    W_dec = weights["W_dec"]
    tensors = {"encoder.weight": weights["W_enc"], "encoder.bias": bias, "W_dec": W_dec, "b_dec": weights["b_dec"]}
    write_tensors(tensors, folder / WEIGHTS, where)
    norms, old_cfg = W_dec.float().norm(dim=-1), featurizer.metadata.get("sparsify")
    cfg = SparsifyConfig(
        d_in=config.d_in,
        activation=config.rule,
        num_latents=config.n_features,
        k=int(config.rule_options["k"]),
        expansion_factor=max(config.n_features // config.d_in, 1),
        normalize_decoder=bool(((norms - 1).abs() < 1e-3).all()),
        multi_topk=isinstance(old_cfg, dict) and old_cfg.get("multi_topk") is True,
    )
    (folder / CONFIG).write_text(json.dumps(cfg.model_dump(exclude={"signed"})) + "\n", encoding="utf-8")
    return lost

"""Sparse autoencoders of sparsify, read from and written to its folders ``{cfg.json, sae.safetensors}``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurizers import DictionaryFeaturizer, Featurizer, Site, hookimpl
from featurizers.builtin import lost_settings, plain_weights
from featurizers.errors import ConversionError, FeaturizerError, ManifestError, SourceError, UsageError, WeightsError
from featurizers.format import ExternalFiles, write_tensors
from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["SparsifyConfig"]

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
MODULES = {"mlp": "mlp.out", "self_attn": "attn.out", "attn": "attn.out", "attention": "attn.out"}
"""Site of each module of a block whose output is a site, by its name in a hookpoint."""
DECODERS = "model|transformer|gpt_neox|decoder|language_model"
"""Names of modules that may stand before the blocks in a hookpoint; blocks of an image tower are not sites."""
BLOCK = re.compile(rf"(?:(?:{DECODERS})\.)*(?:layers|h)\.(\d{{1,5}})(?:\.(\w+))?")


class SparsifyConfig(BaseModel):
    """Contents of ``cfg.json``.

    Attributes:
        d_in: width of the activations.
        activation: ``topk`` or ``groupmax``.
        expansion_factor: features for each coordinate, if ``num_latents`` is 0.
        normalize_decoder: True if decoder rows were kept at length 1 in training; reading ignores it.
        num_latents: number of features, 0 for ``d_in * expansion_factor``.
        k: number of features of a token that may fire.
        multi_topk: True if training used that loss; reading ignores it.
        skip_connection: True if the input is added to the output through a matrix; not supported.
        transcode: True if another site is predicted; not supported.
        signed: option of versions before 1.0: if True the k largest magnitudes fire, with their sign.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: int = Field(gt=0, le=2**24)
    activation: str = "topk"
    expansion_factor: int = Field(32, gt=0)
    normalize_decoder: bool = True
    num_latents: int = Field(0, ge=0)
    k: int = Field(32, gt=0)
    multi_topk: bool = False
    skip_connection: bool = False
    transcode: bool = False
    signed: bool = False


@hookimpl
def featurizers_read(source: ExternalFiles) -> Featurizer[Any] | None:
    """Read the featurizer in a folder of sparsify, None for any other folder.

    Raises:
        ManifestError: the configuration is not known, or is not of a single site, such as a transcoder's.
        WeightsError: the weights do not fit the configuration, or there is no decoder.
        UsageError: only some features are requested, which topk and groupmax do not allow.
    """
    if not {CONFIG, WEIGHTS} <= set(source.names):
        return None
    where, raw = source.where, source.json(CONFIG)
    try:
        config = SparsifyConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ManifestError(where, f"{CONFIG}: {key!r}: {first['msg']}, got {first['input']!r}") from error
    _refuse(config, where)
    if source.indices is not None:
        raise UsageError(f"{where}: {config.activation} compares all features of a token; load it whole")
    file = source.safetensors(WEIGHTS)
    n_features = config.num_latents or config.d_in * config.expansion_factor
    f, d = n_features, config.d_in
    expected = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    if "W_dec" not in file.shapes and "encoder.weight" in file.shapes:
        raise WeightsError(where, f"{WEIGHTS} holds an encoder alone; a featurizer needs the decoder W_dec too")
    if "W_skip" in file.shapes:
        raise ManifestError(where, "it has a skip connection, W_skip, so it is not a featurizer of a single site")
    if file.shapes != expected:
        raise WeightsError(where, f"{WEIGHTS} has {file.shapes!r}, but its config implies {expected!r}")
    weights = {name: file.read(name) for name in expected}
    dtype = weights["W_dec"].dtype  # sparsify converts all tensors to the dtype of the first, in the order of names
    try:
        featurizer = DictionaryFeaturizer.from_tensors(
            weights["encoder.weight"].to(dtype),
            weights["W_dec"],
            weights["encoder.bias"].to(dtype),
            weights["b_dec"].to(dtype),
            rule="abstopk" if config.signed else config.activation,
            rule_options={"k": config.k},
            pre_bias=True,
        )
    except WeightsError:
        raise
    except FeaturizerError as error:
        raise ManifestError(where, str(error)) from error
    hookpoint = _hookpoint(where)
    featurizer.site = _site(hookpoint)
    featurizer.id = hookpoint or "sparsify"
    featurizer.metadata = {"sparsify": raw}
    return featurizer


def _refuse(config: SparsifyConfig, where: str) -> None:
    if config.activation not in ("topk", "groupmax"):
        raise ManifestError(where, f"the activation {config.activation!r} is not known; known are topk, groupmax")
    if config.transcode:
        raise ManifestError(
            where, "a transcoder reads one site and writes another: it is not a featurizer of a single site"
        )
    if config.skip_connection:
        raise ManifestError(where, "it has a skip connection, so it is not a featurizer of a single site")
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
def featurizers_resolve(reference: str, repository: Callable[..., ExternalFiles]) -> Featurizer[Any] | None:
    """Read the featurizer of ``owner/name/hookpoint``, as in ``sparsify:EleutherAI/sae-llama-3-8b-32x/layers.10``.

    Raises:
        SourceError: the reference has another form, or the repository has no such hookpoint.
    """
    owner, _, rest = reference.partition("/")
    name, _, hookpoint = rest.partition("/")
    if not (owner and name):
        raise SourceError(f"cannot read 'sparsify:{reference}'; write 'sparsify:owner/name/hookpoint'")
    source = repository(f"{owner}/{name}", hookpoint or None)
    featurizer = featurizers_read(source)
    if featurizer is None:
        known = sorted(
            {name.rpartition("/")[0] for name in repository(f"{owner}/{name}").names if name.endswith(WEIGHTS)}
        )
        raise SourceError(
            f"{owner}/{name} has no {CONFIG} and {WEIGHTS} at the hookpoint {hookpoint!r}; it has "
            f"{', '.join(map(repr, known[:10])) or 'none'}{', …' if len(known) > 10 else ''}"
        )
    return featurizer


@hookimpl
def featurizers_write(featurizer: Featurizer[Any], folder: Path) -> list[str] | None:
    """Write a dictionary for sparsify's ``SparseCoder.load_from_disk``, and return a sentence for each thing lost.

    Raises:
        ConversionError: it is not a dictionary of the rule topk or groupmax without normalisation.
    """
    where = str(folder)
    if not isinstance(featurizer, DictionaryFeaturizer):
        raise ConversionError(where, f"sparsify has dictionaries only, not the kind {featurizer.kind!r}")
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

"""Transcoders of sparsify: read from the weights of a folder, and written.

    f = top k of relu(W_e (x - c) + b_e)        ŷ = W_dᵀ f + b_dec + W_skip x

c is 0 if ``transcode`` is set, else b_dec: transcoders of before February 2025 were trained with it and lack the key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from featurizers import Site
from featurizers.errors import ConversionError
from featurizers.format import write_tensors
from featurizers_transcoder import Transcoder
from torch import Tensor

from featurizers_sparsify.config import BLOCK, CONFIG, WEIGHTS, SparsifyConfig


def build(config: SparsifyConfig, weights: dict[str, Tensor], hookpoint: str) -> Transcoder:
    """Return the transcoder of the weights of a folder, which have one dtype, at the module that a hookpoint names."""
    skip = weights.get("W_skip")
    featurizer = Transcoder.from_weights(
        weights["encoder.weight"],
        weights["W_dec"],
        weights["encoder.bias"],
        weights["b_dec"],
        None if skip is None else skip.T,
        rule="abstopk" if config.signed else config.activation,
        rule_options={"k": config.k},
        centre=None if config.transcode else weights["b_dec"].clone(),
    )
    sites = _sites(hookpoint)
    if sites is not None:
        featurizer.reads, featurizer.writes = {"in": sites[0]}, {"out": sites[1]}
    return featurizer


def _sites(hookpoint: str) -> tuple[Site, Site] | None:
    """Return the input and output of the block or MLP that a hookpoint names; None for other modules."""
    match = BLOCK.fullmatch(hookpoint)
    if match is None or match[2] not in (None, "mlp"):
        return None
    kinds = ("resid.pre", "resid.post") if match[2] is None else ("mlp.in", "mlp.out")
    return Site(kinds[0], int(match[1])), Site(kinds[1], int(match[1]))


def write(featurizer: Transcoder, folder: Path) -> list[str]:
    """Write a transcoder for ``SparseCoder.load_from_disk``, and return a sentence for each thing that is lost.

    Raises:
        ConversionError: sparsify has no such map.
    """
    where, config = str(folder), featurizer.config
    group, read = config.groups["features"], config.reads["in"]
    if group.rule not in ("topk", "groupmax"):
        raise ConversionError(where, f"sparsify has the rules topk and groupmax, not {group.rule!r}")
    if read.normalize != "none":
        raise ConversionError(where, f"sparsify normalises no activations; this transcoder does: {read.normalize!r}")
    if read.width != config.writes["out"]:
        raise ConversionError(where, "a transcoder of sparsify reads and writes activations of one width")
    lost = _lost(featurizer, folder.name)
    b_dec = featurizer.b_dec["out"]
    W_enc, W_dec = _tensor(featurizer.W_enc, "features", "in"), _tensor(featurizer.W_dec, "features", "out")
    b_enc: Tensor = featurizer.b_enc["features"]
    transcode = not (config.skips and read.centre and torch.equal(featurizer.centre["in"], b_dec))
    if transcode and read.centre:
        b_enc = b_enc - W_enc @ featurizer.centre["in"]
        lost.append("What is subtracted from the input is in the encoder's bias; features are the same to rounding.")
    tensors = {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    if config.skips:
        tensors["W_skip"] = _tensor(featurizer.W_skip, "out", "in").T
    write_tensors(tensors, folder / WEIGHTS, where)
    old = featurizer.metadata.get("sparsify")
    norms = W_dec.float().norm(dim=-1)
    cfg = SparsifyConfig(
        d_in=read.width,
        activation=group.rule,
        num_latents=group.n_features,
        k=int(group.rule_options["k"]),
        expansion_factor=max(group.n_features // read.width, 1),
        normalize_decoder=bool(((norms - 1).abs() < 1e-3).all()),
        multi_topk=isinstance(old, dict) and old.get("multi_topk") is True,
        skip_connection=bool(config.skips),
        transcode=transcode,
    )
    (folder / CONFIG).write_text(json.dumps(cfg.model_dump(exclude={"signed"})) + "\n", encoding="utf-8")
    return lost


def _lost(featurizer: Transcoder, name: str) -> list[str]:
    lost = []
    if featurizer.config.special_tokens:
        lost.append(f"The special tokens {list(featurizer.config.special_tokens)} are not kept.")
    if other := sorted(featurizer.metadata.keys() - {"sparsify"}):
        lost.append(f"The metadata {', '.join(map(repr, other))} are not kept.")
    if featurizer.sites_text is not None and _sites(name) != (featurizer.reads["in"], featurizer.writes["out"]):
        lost.append(
            f"The sites {featurizer.sites_text!r} are kept by the folder's name alone: "
            "name it layers.10.mlp or the like."
        )
    return lost


def _tensor(tensors: Any, outer: str, inner: str) -> Tensor:
    result: Tensor = tensors[outer][inner]
    return result

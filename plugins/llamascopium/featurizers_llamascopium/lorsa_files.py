"""Reads low-rank sparse attention (Lorsa) of llamascopium."""

from __future__ import annotations

import math

from featurizers.errors import UsageError, WeightsError
from featurizers_transcoder import ReadConfig
from featurizers_transcoder.hooks import Read, hookless
from torch import Tensor

from featurizers_llamascopium.config import Attention
from featurizers_llamascopium.lorsa import LorsaConfig, LorsaMap
from featurizers_llamascopium.sites import Places
from featurizers_llamascopium.weights import THRESHOLD, Weights


def lorsa(config: Attention, weights: Weights, places: Places, indices: Tensor | None) -> LorsaMap:
    """Read the map of a folder.

    The tables of the rotation are those of the file, whatever scaling of frequencies they follow from.

    Raises:
        UsageError: some features alone are asked for.
        WeightsError: the tensors do not fit the config.
    """
    if indices is not None:
        raise UsageError(f"{weights.where}: a sparse attention is loaded whole; give the indices to the operation")
    d, n, width = config.d_model, config.n_features, config.d_qk_head
    patterns = (weights.shape("W_Q") or (config.n_qk_heads,))[0]
    if not patterns or config.n_qk_heads % patterns:
        raise WeightsError(weights.where, f"W_Q has {patterns} patterns, and n_qk_heads is {config.n_qk_heads}")
    rotates = config.positional_embedding_type == "rotary"
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("W_Q", "W_K"), (patterns, d, width)),
        **dict.fromkeys(("b_Q", "b_K"), (patterns, width)),
        **dict.fromkeys(("W_V", "W_O"), (n, d)),
        "b_V": (n,),
        **({"b_D": (d,)} if config.use_decoder_bias else {}),
        **(dict.fromkeys(("ln_q.w", "ln_k.w"), (patterns, width)) if config.use_post_qk_ln else {}),
        **(dict.fromkeys(("rotary_cos", "rotary_sin"), (config.n_ctx, config.rotary_dim)) if rotates else {}),
        **({THRESHOLD: (n,)} if weights.has_threshold else {}),
    }
    weights.check(shapes, others=("mask", "IGNORE"))
    read, write = places.read(config.hook_point_in), places.write(config.hook_point_out)
    if write is None:  # without sites the map takes what the hook has, which is normalised already
        read = Read(None)
    s_in, s_out = weights.factor(config.hook_point_in), weights.factor(config.hook_point_out)
    W_O = weights.read("W_O")
    gate = weights.gate(W_O.norm(dim=-1), weights.read(THRESHOLD) if weights.has_threshold else None)
    tensors = {
        **{name: weights.read(name) * s_in for name in ("W_Q", "W_K", "W_V")},
        **{name: weights.read(name) for name in ("b_Q", "b_K", "b_V")},
        "W_O": W_O / s_out,
        "b_D": weights.read("b_D") / s_out if config.use_decoder_bias else W_O.new_zeros(d),
        **({f"norm_{x.upper()}": weights.read(f"ln_{x}.w") for x in "qk"} if config.use_post_qk_ln else {}),
        **({name: weights.read(f"rotary_{name}") for name in ("cos", "sin")} if rotates else {}),
        **{f"rule_tensors.{name}": tensor for name, tensor in gate.tensors.items()},
    }
    rotary = "adjacent" if config.rotary_adjacent_pairs else "halves"
    result = LorsaMap.from_tensors(
        LorsaConfig(
            read=ReadConfig(width=d, normalize=read.normalize, eps=read.eps),
            d_out=d,
            n_features=n,
            n_patterns=patterns,
            d_head=width,
            scale=math.sqrt(width) if config.attn_scale is None else config.attn_scale,
            rotary=rotary if rotates else "none",  # type: ignore[arg-type]  # one of the literals
            rotary_dim=config.rotary_dim if rotates else 0,
            n_positions=config.n_ctx if rotates else 0,
            norm_eps=config.eps if config.use_post_qk_ln else None,
            rule=gate.rule,
            rule_options=gate.options,
        ),
        tensors,
    )
    if read.site is not None and write is not None:
        result.reads, result.writes = {"in": read.site}, {"out": write}
    else:
        result.metadata = {"notes": [hookless(config.hook_point_in, config.hook_point_out)]}
    return result

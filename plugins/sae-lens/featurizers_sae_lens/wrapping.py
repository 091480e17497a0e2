"""`wrap`: turns a live SAE of SAELens into a featurizer."""

from __future__ import annotations

from typing import Any

from featurizers.errors import UsageError
from torch import nn

from featurizers_sae_lens import transcoders
from featurizers_sae_lens.assembly import assemble, fold_decoder_norms, refuse_unknown
from featurizers_sae_lens.legacy import MAP, TEMPORAL
from featurizers_sae_lens.temporal_files import temporal

TRAINED_AS = {"batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu"}
"""Architectures of training, and the architecture that SAELens saves each of them as."""


def wrap(sae: Any) -> Any:
    """Return the featurizer of a `sae_lens.SAE` or `sae_lens.TrainingSAE`, with its present weights.

    The decoder and the biases are shared; the encoder is copied into rows. The SAE itself is not called. Statistics
    that SAELens keeps on the module between ``encode`` and ``decode`` are in the error term here.

    Returns:
        A `Featurizer`, or a `SiteMap` for a transcoder: the object decides, so that the type is not declared.

    Raises:
        UsageError: the object is not an SAE of SAELens.
        ManifestError: its architecture is not known, or an option is not supported.
    """
    config: Any = getattr(sae, "cfg", None)
    if not isinstance(sae, nn.Module) or not hasattr(config, "to_dict") or not hasattr(config, "architecture"):
        raise UsageError(f"wrap takes a sae_lens.SAE, not a {type(sae).__name__}")
    architecture = config.architecture()
    where = f"{type(sae).__name__} ({architecture})"
    cfg = {key: value for key, value in config.to_dict().items() if key in MAP | TEMPORAL}
    cfg["architecture"] = TRAINED_AS.get(architecture, architecture)
    refuse_unknown(cfg["architecture"], where, known=(*transcoders.RULES, "temporal"))
    state = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    if architecture == "temporal":
        return temporal(cfg, state, where)
    if architecture in TRAINED_AS:
        state["threshold"] = state.pop("topk_threshold").expand(len(state["W_dec"]))
    if "threshold" in state:  # always float32 in training, but compared in the dtype of the weights
        state["threshold"] = state["threshold"].to(state["W_dec"].dtype)
    if "W_enc" in state:
        state["W_enc"] = state["W_enc"].T
    if architecture in TRAINED_AS and getattr(config, "rescale_acts_by_decoder_norm", False):
        state = fold_decoder_norms(state)
    if cfg["architecture"] == "matching_pursuit":
        state.pop("W_enc", None)
    known = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold", "b_gate", "r_mag", "b_mag", "W_skip"}
    build = transcoders.transcoder if cfg["architecture"] in transcoders.RULES else assemble
    return build(cfg, {name: tensor for name, tensor in state.items() if name in known}, where).eval()

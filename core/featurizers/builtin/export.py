"""Helpers for plugins that write a dictionary in another library's format, and report what the format cannot hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from featurizers.builtin.dictionary import DictionaryFeaturizer


def fold_input_scale(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return weights for unscaled activations, given weights for activations that are multiplied by ``scale``."""
    folded = {**tensors, "W_dec": tensors["W_dec"] / scale, "b_dec": tensors["b_dec"] / scale}
    return {**folded, "W_enc": tensors["W_enc"] * scale} if "W_enc" in tensors else folded


def plain_weights(featurizer: DictionaryFeaturizer) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of a dictionary for a format that has neither slices nor units nor an input scale.

    The norms of the decoder rows, where the rule allows it, and the input scale are moved into the weights.

    Returns:
        The tensors, and a sentence for each thing that is lost.
    """
    config, lost = featurizer.config, []
    if config.slice_of is not None:
        lost.append("The numbers that the features have in the whole dictionary are not kept; they count from 0.")
    if config.units == "decoder-norm" and featurizer.rule.scaled is None:
        lost.append(f"The features are in raw units: the weights of the rule {config.rule!r} cannot hold the norms.")
    elif config.units != "raw":
        featurizer = featurizer if config.units == "folded" else featurizer.in_units("folded")
        lost.append("The norms of the raw decoder rows are not kept; they are in the weights.")
    state = featurizer.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if name not in ("numbers", "decoder_norm")}
    if config.normalize == "scale":
        tensors = fold_input_scale(tensors, config.input_scale)
        lost.append(f"The factor {config.input_scale} of the activations is in the weights.")
    return tensors, lost


def lost_settings(featurizer: DictionaryFeaturizer, metadata: Collection[str]) -> list[str]:
    """Report the loss of heads, special tokens and metadata in a format that keeps only these keys of ``metadata``."""
    lost = []
    if featurizer.config.n_heads is not None:
        lost.append("The heads are side by side.")
    if featurizer.special_tokens:
        lost.append(f"The special tokens {list(featurizer.special_tokens)} are not kept.")
    if other := sorted(featurizer.metadata.keys() - set(metadata)):
        lost.append(f"The metadata {', '.join(map(repr, other))} are not kept.")
    return lost

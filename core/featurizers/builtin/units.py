"""Units of a dictionary's features: the weights that measure them in other units."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from featurizers.builtin.dictionary_config import Units
from featurizers.errors import UsageError
from featurizers.features.rules import Rule


def convert(state: Mapping[str, Tensor], rule: Rule, before: Units, after: Units) -> dict[str, Tensor]:
    """Return the state dict of the same dictionary with its features in other units.

    Unless the units are raw it holds ``decoder_norm``, the norms of the raw decoder rows, so that the conversion can be
    undone up to rounding.

    Raises:
        UsageError: the rule would select other features, or a decoder row is zero.
    """
    raw = dict(state)
    norm = raw.pop("decoder_norm", None)
    if before == "folded" and norm is not None:
        raw = _rescaled(raw, rule, 1 / norm)
    if after == "raw":
        return raw
    if norm is None:
        norm = raw["W_dec"].norm(dim=-1)
        if not (norm > 0).all():
            feature = int((norm <= 0).nonzero()[0])
            raise UsageError(f"feature {feature} has a decoder row of zeros, so its norm cannot be its unit")
    converted = raw if after == "decoder-norm" else _rescaled(raw, rule, norm)
    return {**converted, "decoder_norm": norm}


def _rescaled(state: dict[str, Tensor], rule: Rule, factor: Tensor) -> dict[str, Tensor]:
    """Return weights that multiply each feature by its factor, with the same x̂."""
    if rule.scaled is None:
        raise UsageError(
            f"the features of the rule {rule.name!r} cannot be rescaled in the weights without changing which of "
            "them fire; use the units 'decoder-norm'"
        )
    rescaled = dict(state)
    rescaled["W_enc"], rescaled["W_dec"] = state["W_enc"] * factor[:, None], state["W_dec"] / factor[:, None]
    for name in {"b_enc", *rule.scaled} & state.keys():
        rescaled[name] = state[name] * factor
    return rescaled

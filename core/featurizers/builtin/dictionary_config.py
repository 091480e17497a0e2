"""Configuration of a `DictionaryFeaturizer`, and the check that its rule and its numbers fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from featurizers.builtin.normalization import Normalization
from featurizers.errors import ConfigError
from featurizers.features.rules import Rule
from featurizers.registry.plugin_host import host

Units: TypeAlias = Literal["raw", "decoder-norm", "folded"]


class DictionaryConfig(BaseModel):
    """Configuration of a `DictionaryFeaturizer`.

    Attributes:
        d_in: width of the activations.
        n_features: number of features held.
        rule: name of the activation rule.
        rule_options: numbers of the rule, such as ``{"k": 64}``.
        pre_bias: if True the decoder's bias is subtracted before encoding.
        normalize: normalisation of each token's activations before encoding, undone after decoding.
        input_scale: factor of ``normalize="scale"``.
        n_heads: number of heads whose outputs, side by side, are the activations, 0 for any number; if it is not None,
            ``(*batch, n_heads, d_head)`` is accepted too.
        units: units of the features: ``raw``, as the encoder computes them; ``decoder-norm``, multiplied by the norms
            of their decoder rows; ``folded``, the same with the norms moved into the weights.
        special_tokens: ids of tokens that interventions do not change, such as the first token of a sequence.
        slice_of: number of features of the whole dictionary if this is a slice, None if it is whole.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: Annotated[int, Field(gt=0, le=2**24)]
    n_features: Annotated[int, Field(gt=0, le=2**31)]
    rule: Annotated[str, Field(min_length=1, max_length=128)] = "relu"
    rule_options: dict[str, int | float] = {}
    pre_bias: bool = False
    normalize: Normalization = "none"
    input_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    n_heads: Annotated[int, Field(ge=0, le=2**16)] | None = None
    units: Units = "raw"
    special_tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=10_000)] = []
    slice_of: Annotated[int, Field(gt=0, le=2**31)] | None = None


def rule_with_options(name: str, options: Mapping[str, int | float], n_features: int) -> Rule:
    """Return the rule of a name, once its options are known to fit it and the number of features.

    Raises:
        ConfigError: no plugin has the rule, or the options do not fit.
    """
    rule = host().rule(name)
    if set(options) != set(rule.options):
        raise ConfigError(f"the rule {name!r} takes the options {sorted(rule.options)!r}, got {sorted(options)!r}")
    k = options.get("k", 1)
    if rule.select is not None and not (type(k) is int and 1 <= k <= n_features):
        raise ConfigError(f"k must be between 1 and the {n_features} features, got {k!r}")
    if name == "groupmax" and n_features % k:
        raise ConfigError(f"{n_features} features do not make {k} equal groups")
    return rule


def validate_rule(config: DictionaryConfig) -> Rule:
    """Return the rule of a config, once the fields of the config are known to fit it.

    Raises:
        ConfigError: no plugin has the rule, or the fields do not fit each other.
    """
    rule = rule_with_options(config.rule, config.rule_options, config.n_features)
    if config.normalize != "scale" and config.input_scale != 1:
        raise ConfigError(f"input_scale belongs to normalize='scale', not to {config.normalize!r}")
    if config.slice_of is not None and (config.slice_of < config.n_features or not rule.elementwise):
        raise ConfigError(
            f"{config.n_features} features cannot be a slice of {config.slice_of} with the rule {config.rule!r}"
        )
    return rule

"""Configuration of a `LinearMap`, and the check that its parts fit each other."""

from __future__ import annotations

from typing import Annotated, Literal

from featurizers.errors import ConfigError, shown
from pydantic import BaseModel, ConfigDict, Field

MAX_SITES = 10_000
"""Most reads, writes or groups of a map."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Width = Annotated[int, Field(gt=0, le=2**24)]
Normalization = Literal["none", "scale", "constant-norm", "layer-norm", "rms", "standard"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ReadConfig(_Strict):
    """Preprocessing of the activations at a read before they are encoded; it does not change the outputs.

    Attributes:
        width: of the activations.
        normalize: ``rms``: x / sqrt(mean(x²) + eps), RMSNorm without its gain; ``standard``: (x - mean) /
            sqrt(var + eps) with the biased variance, LayerNorm without gain and bias; ``layer-norm``, ``constant-norm``
            and ``scale`` as in `featurizers.DictionaryFeaturizer`.
        eps: of ``rms`` and ``standard``.
        input_scale: factor of ``scale``.
        centre: whether the tensor ``centre`` of the read, ``(width,)``, is subtracted first.
    """

    width: Width
    normalize: Normalization = "none"
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    input_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    centre: bool = False


class GroupConfig(_Strict):
    """Features that are encoded together.

    Attributes:
        reads: names of the reads that the encoder sums over.
        writes: names of the writes that have a decoder of these features.
        n_features: number of features held.
        rule: name of the activation rule.
        rule_options: numbers of the rule, such as ``{"k": 64}``.
        slice_of: number of features of the whole group if this is a slice, None if it is whole.
    """

    reads: Annotated[list[Name], Field(min_length=1, max_length=MAX_SITES)]
    writes: Annotated[list[Name], Field(min_length=1, max_length=MAX_SITES)]
    n_features: Annotated[int, Field(gt=0, le=2**31)]
    rule: Annotated[str, Field(min_length=1, max_length=128)] = "relu"
    rule_options: dict[str, int | float] = {}
    slice_of: Annotated[int, Field(gt=0, le=2**31)] | None = None


class LinearMapConfig(_Strict):
    """Configuration of a `LinearMap`.

    Attributes:
        reads: by name.
        writes: width of the activations at each write, by name.
        groups: by name, in the order in which the model computes their reads.
        skips: reads that a skip connection adds to each write, by the write's name.
        special_tokens: ids of tokens that interventions do not change, such as the first token of a sequence.
    """

    reads: Annotated[dict[Name, ReadConfig], Field(min_length=1, max_length=MAX_SITES)]
    writes: Annotated[dict[Name, Width], Field(min_length=1, max_length=MAX_SITES)]
    groups: Annotated[dict[Name, GroupConfig], Field(min_length=1, max_length=MAX_SITES)]
    skips: dict[Name, list[Name]] = {}
    special_tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=10_000)] = []


def check_names(config: LinearMapConfig) -> None:
    """Raise ConfigError if a group or a skip names a read or write that is not there, or one twice."""
    for name, group in config.groups.items():
        _check(f"the group {name!r}", "read", group.reads, config.reads)
        _check(f"the group {name!r}", "write", group.writes, config.writes)
        if group.slice_of is not None and group.slice_of < group.n_features:
            raise ConfigError(
                f"the group {name!r} has {group.n_features} features, more than the {group.slice_of} it is of"
            )
    for write, reads in config.skips.items():
        _check("the skips", "write", [write], config.writes)
        _check(f"the skip to {write!r}", "read", reads, config.reads)
    for name, read in config.reads.items():
        if read.normalize != "scale" and read.input_scale != 1:
            raise ConfigError(f"the read {name!r}: input_scale belongs to normalize='scale', not to {read.normalize!r}")
        if read.normalize == "layer-norm" and read.width < 2:
            raise ConfigError("layer-norm needs a width of at least 2: one coordinate has no standard deviation")


def _check(what: str, part: str, names: list[str], known: object) -> None:
    for name in names:
        if name not in known:  # type: ignore[operator]
            raise ConfigError(f"{what} names the {part} {shown(name)}, which is not in the config")
    if len(set(names)) < len(names):
        raise ConfigError(f"{what} names a {part} twice")

"""`Options`: the arguments of a measurement, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from featurizers.errors import UsageError, did_you_mean, shown

from featurizers_evaluate.definitions import ABLATIONS, GROUPS, ON_REQUEST

SPECIAL = ("bos", "eos", "pad", "sep", "decoder_start")
"""Special tokens of a tokenizer that SAELens leaves out."""
NUMBERS = {"mask_first": 0, "context": 1, "max_tokens": 1, "batch_size": 1, "resamples": 0, "seed": 0}
"""Options that are whole numbers, with the least of each."""


@dataclass(frozen=True)
class Options:
    """Arguments of `featurizers_evaluate.evaluate`, which describes them.

    Raises:
        UsageError: one is invalid.
    """

    metrics: Iterable[str] | None = None
    ablations: Iterable[str] = ABLATIONS
    pairs: Any = None
    tokenizer: Any = None
    exclude_special_tokens: bool | Iterable[int] = False
    mask_first: int = 0
    context: int | None = None
    max_tokens: int | None = None
    batch_size: int = 8
    resamples: int = 1000
    seed: int = 0
    data: str | None = None
    group: Any = None
    progress: bool = True
    harvest: Any = None
    asked: tuple[str, ...] = field(init=False, default=())
    """Groups of metrics that were named, and not taken because they are the default."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return the options of keyword arguments.

        Raises:
            UsageError: one is not known, or is invalid.
        """
        known = [each.name for each in fields(cls) if each.init]
        if unknown := [name for name in given if name not in known]:
            raise UsageError(f"there is no argument {shown(unknown[0])}. {did_you_mean(unknown[0], known)}")
        return cls(**given)

    def __post_init__(self) -> None:
        """Check the options, and put the names into their order."""
        names = _names(GROUPS if self.metrics is None else self.metrics, (*GROUPS, *ON_REQUEST), "metrics")
        object.__setattr__(self, "asked", () if self.metrics is None else names)
        object.__setattr__(self, "metrics", names)
        object.__setattr__(self, "ablations", _names(self.ablations, ABLATIONS, "ablations"))
        for name, least in NUMBERS.items():
            number = getattr(self, name)
            optional = name in ("context", "max_tokens")
            if not (optional and number is None) and (type(number) is not int or number < least):
                raise UsageError(f"{name} is a whole number of at least {least}, not {shown(number)}")
        if self.context is not None and self.mask_first >= self.context:
            raise UsageError(
                f"mask_first={self.mask_first} leaves nothing of rows of {self.context} tokens; leave out fewer"
            )

    def special_tokens(self) -> set[int]:
        """Return the token ids that are not measured.

        Raises:
            UsageError: they are those of a tokenizer that is not given, or are no numbers.
        """
        return special_tokens(self.exclude_special_tokens, self.tokenizer)


def special_tokens(given: bool | Iterable[int], tokenizer: Any) -> set[int]:
    """Return the token ids that an argument ``exclude_special_tokens`` stands for.

    Args:
        given: True for bos, eos, pad, sep and decoder start of the tokenizer, as SAELens has them; or token ids.
        tokenizer: of the model; None if there is none.

    Raises:
        UsageError: they are those of a tokenizer that is not given, or are no numbers.
    """
    if given is False:
        return set()
    if given is True:
        if tokenizer is None:
            raise UsageError("exclude_special_tokens=True needs the tokenizer of the model; or give the token ids")
        found = (getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL)
        return {each for each in found if each is not None}
    ids = list(given)
    if not all(type(each) is int for each in ids):
        raise UsageError(f"special tokens are token ids, not {shown(ids)}")
    return set(ids)


def _names(given: Iterable[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in known:
            raise UsageError(f"{what} are some of {', '.join(map(repr, known))}, not {shown(name)}")
    return tuple(name for name in known if name in names)

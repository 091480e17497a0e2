"""Columns of a grid: which tokens of each pair are patched together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from featurizers.errors import UsageError, did_you_mean, shown

from featurizers_patching.pairs import Pair, Tokens, span

PatchPositions: TypeAlias = "None | str | Sequence[int | str | Sequence[int]] | Mapping[str, Any]"
"""None for each token in a column of its own; a list of columns, each a number, a name, or several numbers at once;
``"all"`` for all tokens at once; a mapping from labels to numbers, to several, or to a list of lists, one a pair."""

ALL = "all"


@dataclass(frozen=True)
class Column:
    """Tokens that are patched together.

    Attributes:
        label: of the column.
        base: tokens of each base; None for a pair that has no such token.
        source: the tokens of each source that they are patched with.
    """

    label: str
    base: tuple[Tokens | None, ...]
    source: tuple[Tokens | None, ...]


def columns_of(positions: PatchPositions, pairs: Sequence[Pair]) -> list[Column]:
    """Return the columns of a grid.

    Raises:
        UsageError: a prompt does not have a position, or base and source cannot be aligned.
    """
    if positions is None:
        _check_aligned(pairs, "each token")
        width = max(len(pair.base) for pair in pairs)
        each = [tuple((token,) if token < len(pair.base) else None for pair in pairs) for token in range(width)]
        return [Column(str(token), column, column) for token, column in enumerate(each)]
    if isinstance(positions, str):
        return [_column(positions, positions, pairs)]
    if isinstance(positions, Mapping):
        items = [(str(label), value) for label, value in positions.items()]
    elif isinstance(positions, Sequence):
        items = [(_label(value), value) for value in positions]
    else:
        raise UsageError(f"positions are None, a list or a mapping, not {shown(positions)}")
    if not items:
        raise UsageError("positions are empty; give None for each token, or a list such as [-1]")
    labels = [label for label, _ in items]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise UsageError(f"the position {shown(repeated[0])} is there twice")
    return [_column(label, value, pairs) for label, value in items]


def read_tokens(at: Any, pairs: Sequence[Pair]) -> list[tuple[Tokens, Tokens]]:
    """Return the tokens of each base and each source whose logits are read.

    Raises:
        UsageError: a prompt does not have one, or the pairs have different numbers of them.
    """
    column = _column(_label(at), at, pairs)
    found = list(zip(column.base, column.source, strict=True))
    counts = sorted({len(base or ()) for base, _ in found})
    if len(counts) > 1:
        raise UsageError(f"at={shown(at)} has {counts[0]} tokens in one pair and {counts[-1]} in another")
    return [(base or (), source or ()) for base, source in found]


def _label(value: Any) -> str:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return "+".join(map(str, value)) if several else str(value)


def _column(label: str, value: Any, pairs: Sequence[Pair]) -> Column:
    if isinstance(value, str):
        return _all(label, pairs) if value == ALL and not _named(value, pairs) else _of_name(value, pairs)
    nested = isinstance(value, Sequence) and bool(value) and isinstance(value[0], Sequence)
    if nested and len(value) != len(pairs):
        raise UsageError(f"the position {shown(label)} is given for {len(value)} pairs, and there are {len(pairs)}")
    of_pair = list(value) if nested else [value] * len(pairs)
    if any(number >= 0 for each in of_pair for number in _numbers(each)):
        _check_aligned(pairs, f"the position {shown(value)}")
    base, source = [], []
    for number, (pair, each) in enumerate(zip(pairs, of_pair, strict=True)):
        base.append(span(each, len(pair.base), f"pair {number}, position {shown(label)} of the base"))
        source.append(span(each, len(pair.source), f"pair {number}, position {shown(label)} of the source"))
    return Column(label, tuple(base), tuple(source))


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, Sequence) else [value]
    return [each for each in values if type(each) is int]


def _all(label: str, pairs: Sequence[Pair]) -> Column:
    _check_aligned(pairs, "all tokens")
    tokens = tuple(tuple(range(len(pair.base))) for pair in pairs)
    return Column(label, tokens, tokens)


def _named(name: str, pairs: Sequence[Pair]) -> bool:
    return any(name in pair.base_names for pair in pairs)


def _of_name(name: str, pairs: Sequence[Pair]) -> Column:
    for number, pair in enumerate(pairs):
        for part, names in (("base", pair.base_names), ("source", pair.source_names)):
            if name not in names:
                near = did_you_mean(name, names, "Records give names in base_position and source_position.")
                raise UsageError(f"pair {number}: its {part} has no position named {shown(name)}. {near}")
        if len(pair.base_names[name]) != len(pair.source_names[name]):
            raise UsageError(
                f"pair {number}: {shown(name)} has {len(pair.base_names[name])} tokens in the base and "
                f"{len(pair.source_names[name])} in the source; name as many of each"
            )
    return Column(
        name, tuple(pair.base_names[name] for pair in pairs), tuple(pair.source_names[name] for pair in pairs)
    )


def _check_aligned(pairs: Sequence[Pair], what: str) -> None:
    """Raise UsageError unless base and source of each pair have the same number of tokens."""
    for number, pair in enumerate(pairs):
        if len(pair.base) != len(pair.source):
            raise UsageError(
                f"pair {number}: the base has {len(pair.base)} tokens and the source {len(pair.source)}, so that "
                f"{what} is not the same in both; give prompts of equal length, positions from the end such as -1, or "
                "names"
            )

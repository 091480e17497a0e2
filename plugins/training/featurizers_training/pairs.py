"""Counterfactual pairs: a base prompt, the prompts that features are taken from, and the answer that follows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from featurizers.errors import FeaturizerError, UsageError, shown

Tokens: TypeAlias = tuple[int, ...]
Position: TypeAlias = int | str | Sequence[int]
"""A token of a prompt, -1 the last; several of them; or the name that the records give to one or several."""

KEYS: Final = ("base", "source", "label", "base_label", "base_position", "source_position")
LAST: Final = ((-1,),)


class PairError(FeaturizerError, ValueError):
    """A record is not a counterfactual pair.

    Attributes:
        where: which record.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where


@dataclass(frozen=True)
class Pair:
    """One counterfactual pair, as token ids.

    Attributes:
        base: the prompt that the model runs on.
        sources: the prompts that features are taken from: one, or one for each site.
        label: what the model should answer once the features are the source's; one token or several.
        base_label: what it answers without, where that is known.
        base_positions: tokens of the base for each site, or once for all sites; from 0.
        source_positions: likewise, of the source of each site.
    """

    base: Tokens
    sources: tuple[Tokens, ...]
    label: Tokens
    base_label: Tokens | None
    base_positions: tuple[Tokens, ...]
    source_positions: tuple[Tokens, ...]

    @property
    def run(self) -> Tokens:
        """The tokens that the model runs on: the base, and the answer but for its last token."""
        return self.base + self.label[:-1]

    def base_at(self, site: int) -> tuple[Tokens, Tokens]:
        """The base, and its tokens at a site, by its number."""
        return self.base, _of_site(self.base_positions, site)

    def source_at(self, site: int) -> tuple[Tokens, Tokens]:
        """The source of a site, by its number, and its tokens there."""
        return _of_site(self.sources, site), _of_site(self.source_positions, site)


@dataclass(frozen=True)
class Pairs(Sequence[Pair]):
    """Counterfactual pairs.

    Attributes:
        records: the pairs, as they were given but for the tokenizer: token ids, and named positions.
        pairs: at the positions that were chosen.
    """

    records: tuple[Mapping[str, Any], ...]
    pairs: tuple[Pair, ...]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        """One pair, or a slice of them."""
        if isinstance(index, slice):
            return Pairs(self.records[index], self.pairs[index])
        return self.pairs[index]

    def take(self, rows: Iterable[int]) -> Pairs:
        """Some of the pairs, in the order given."""
        rows = list(rows)
        return Pairs(tuple(self.records[row] for row in rows), tuple(self.pairs[row] for row in rows))

    def split(self, share: float, seed: int = 0) -> tuple[Pairs, Pairs]:
        """The pairs in two parts, at random; ``share`` of them, one at least, are in the second.

        Raises:
            UsageError: a part would be empty.
        """
        held_out = max(1, round(share * len(self)))
        if not 0 < share < 1 or held_out >= len(self):
            raise UsageError(f"a share of {share} of {len(self)} pairs leaves one part empty")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.take(sorted(order[held_out:])), self.take(sorted(order[:held_out]))

    def at(self, *positions: Position) -> Pairs:
        """The same pairs at other positions of base and source: one for all sites, or one for each.

        Raises:
            PairError: a prompt does not have them.
        """
        return Pairs(
            self.records, tuple(_pair(record, f"pair {i}", positions) for i, record in enumerate(self.records))
        )

    def with_shuffled_labels(self, seed: int = 0) -> Pairs:
        """A control: each pair with the answer of another one, so that nothing but noise is left to find."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        labels = [self.records[row]["label"] for row in order]
        records = [{**record, "label": label} for record, label in zip(self.records, labels, strict=True)]
        pairs = [replace(pair, label=label) for pair, label in zip(self.pairs, labels, strict=True)]
        return Pairs(tuple(records), tuple(pairs))

    def digest(self) -> str:
        """The sha256 of the pairs, as token ids and positions."""
        rows = [
            [pair.base, pair.sources, pair.label, pair.base_label, pair.base_positions, pair.source_positions]
            for pair in self.pairs
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def common_position(self, site: int) -> Tokens | None:
        """The positions of all bases at a site, by its number, if they are the same from one end of the prompt."""
        positions = [pair.base_positions[min(site, len(pair.base_positions) - 1)] for pair in self.pairs]
        from_end = {tuple(p - len(pair.base) for p in at) for at, pair in zip(positions, self.pairs, strict=True)}
        if len(from_end) == 1 and max(next(iter(from_end))) == -1:
            return from_end.pop()
        if len(set(positions)) == 1:
            return positions[0]
        return from_end.pop() if len(from_end) == 1 else None

    @classmethod
    def of(
        cls, records: Iterable[Mapping[str, Any]], tokenizer: Any = None, *, position: Position | None = None
    ) -> Pairs:
        """Pairs of records, such as the rows of a `datasets.Dataset`.

        A record has ``base``, ``source`` and ``label``, each a text or token ids; ``source`` may be a list of
        prompts, one for each site. ``base_label`` is what the model answers without an intervention, for the
        objectives that need it. ``base_position`` and ``source_position`` say which tokens (-1, the last, if not
        given): a number, several, a list of several for each site, or an object of such with names to choose from.
        A label in text follows the base as it is written: it begins with a blank if a blank is meant.

        Args:
            records: one a pair.
            tokenizer: of the model, for records in text.
            position: a name, or other tokens than those of the records; see `at`.

        Raises:
            PairError: a record is not like this.
        """
        return cls._of(((f"pair {i}", record) for i, record in enumerate(records)), tokenizer, position)

    @classmethod
    def read(cls, path: str | Path, tokenizer: Any = None, *, position: Position | None = None) -> Pairs:
        """Pairs of a file of JSON lines; see `of`.

        Raises:
            UsageError: the file cannot be read, or holds none.
            PairError: a line is not a record.
        """
        path = Path(path).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read pairs from {str(path)!r}: {error}") from error
        named = ((f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())
        return cls._of(((where, _parsed(line, where)) for where, line in named), tokenizer, position)

    @classmethod
    def _of(cls, records: Iterable[tuple[str, Any]], tokenizer: Any, position: Position | None) -> Pairs:
        read = tuple(_tokens(record, where, tokenizer) for where, record in records)
        if not read:
            raise UsageError("there are no counterfactual pairs; a file holds no pairs unless there is one a line")
        chosen = () if position is None else (position,)
        return cls(read, tuple(_pair(record, record["where"], chosen) for record in read))


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PairError(where, f"it is not JSON: {error}") from error


def _tokens(record: Any, where: str, tokenizer: Any) -> dict[str, Any]:
    """A record with token ids in place of texts."""
    if not isinstance(record, Mapping):
        raise PairError(where, f"a pair is an object with base, source and label, not {shown(record)}")
    if unknown := [key for key in record if key not in KEYS and record[key] is not None]:
        raise PairError(where, f"the key {shown(unknown[0])} is not one of {', '.join(KEYS)}")
    if missing := [key for key in KEYS[:3] if record.get(key) is None]:
        raise PairError(where, f"{missing[0]!r} is missing")
    source = record["source"]
    several = isinstance(source, Sequence) and not isinstance(source, str) and not all(map(_is_id, source))
    base = _prompt(record["base"], "base", where, tokenizer)
    sources = tuple(_prompt(prompt, "source", where, tokenizer) for prompt in (source if several else [source]))
    labels = {
        key: None if record.get(key) is None else _label(record["base"], base, record[key], key, where, tokenizer)
        for key in ("label", "base_label")
    }
    positions = {key: record[key] for key in KEYS[4:] if record.get(key) is not None}
    return {"where": where, "base": base, "source": sources, **labels, **positions}


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _prompt(value: Any, key: str, where: str, tokenizer: Any) -> Tokens:
    if isinstance(value, str):
        ids = _encode(value, key, where, tokenizer)
    else:
        ids = value.tolist() if isinstance(value, torch.Tensor) else value
    if not isinstance(ids, Sequence) or not ids or not all(map(_is_id, ids)):
        raise PairError(where, f"{key!r} is a text or a list of token ids, not {shown(value)}")
    return tuple(ids)


def _encode(text: str, key: str, where: str, tokenizer: Any, **options: Any) -> list[int]:
    if tokenizer is None:
        raise PairError(where, f"{key!r} is a text, {shown(text)}; give the tokenizer of the model, or token ids")
    ids: list[int] = list(tokenizer(text, **options)["input_ids"])
    return ids


def _label(base: Any, ids: Tokens, value: Any, key: str, where: str, tokenizer: Any) -> Tokens:
    """An answer as tokens; in text it is what follows the base, so that it is split as it would be there."""
    if _is_id(value):
        return (value,)
    if isinstance(value, str) and isinstance(base, str) and value:
        whole = tuple(_encode(base + value, key, where, tokenizer))
        if whole[: len(ids)] == ids and len(whole) > len(ids):
            return whole[len(ids) :]
    if isinstance(value, str):
        value = _encode(value, key, where, tokenizer, add_special_tokens=False)
    return _prompt(value, key, where, tokenizer)


def _pair(record: Mapping[str, Any], where: str, chosen: Sequence[Position] = ()) -> Pair:
    """The pair of a record, at the positions chosen or at its own."""
    base, sources = record["base"], record["source"]
    base_positions = _positions(record.get("base_position"), [base], "base_position", where, chosen)
    source_positions = _positions(
        record.get("source_position", record.get("base_position")), sources, "source_position", where, chosen
    )
    n_sites = max(map(len, (base_positions, source_positions, sources)))
    for name, found in (("base_position", base_positions), ("source_position", source_positions), ("source", sources)):
        if len(found) not in (1, n_sites):
            raise PairError(where, f"{name!r} is for {len(found)} sites, and others for {n_sites}")
    for at_base, at_source in zip(_each(base_positions, n_sites), _each(source_positions, n_sites), strict=True):
        if len(at_base) != len(at_source):
            raise PairError(where, f"there are {len(at_base)} tokens of the base for {len(at_source)} of the source")
    return Pair(base, sources, record["label"], record.get("base_label"), base_positions, source_positions)


def _of_site(given: tuple[Tokens, ...], site: int) -> Tokens:
    return given[0] if len(given) == 1 else given[site]


def _each(given: tuple[Any, ...], n_sites: int) -> tuple[Any, ...]:
    return given * n_sites if len(given) == 1 else given


def _positions(
    given: Any, prompts: Sequence[Tokens], key: str, where: str, chosen: Sequence[Position]
) -> tuple[Tokens, ...]:
    """The tokens for each site, or once for all, counted from the start of the prompt."""
    if chosen:
        wanted = [_named(given, one, key, where) if isinstance(one, str) else one for one in chosen]
    elif isinstance(given, Mapping):
        raise PairError(
            where, f"{key!r} has the names {', '.join(map(repr, given))}; choose one of them as the position"
        )
    elif isinstance(given, Sequence) and not isinstance(given, str) and any(isinstance(p, Sequence) for p in given):
        wanted = list(given)
    else:
        wanted = [-1 if given is None else given]
    rows = [[p] if isinstance(p, int) and not isinstance(p, bool) else p for p in wanted]
    n_sites = max(len(rows), len(prompts))
    if len(rows) not in (1, n_sites) or len(prompts) not in (1, n_sites):
        raise PairError(where, f"{key!r} is for {len(rows)} sites, and there are {len(prompts)} prompts")
    found = []
    for row, prompt in zip(_each(tuple(rows), n_sites), _each(tuple(prompts), n_sites), strict=True):
        if not isinstance(row, Sequence) or isinstance(row, str) or not row:
            raise PairError(where, f"{key!r} is a number, or a list of numbers, not {shown(row)}")
        found.append(tuple(_counted(position, prompt, key, where) for position in row))
    return tuple(found) if len(set(found)) > 1 else (found[0],)


def _named(given: Any, name: str, key: str, where: str) -> Any:
    if not isinstance(given, Mapping) or name not in given:
        there = ", ".join(map(repr, given)) if isinstance(given, Mapping) else shown(given)
        raise PairError(where, f"{key!r} has no position named {name!r}; it has {there}")
    return given[name]


def _counted(position: Any, prompt: Tokens, key: str, where: str) -> int:
    if not isinstance(position, int) or isinstance(position, bool):
        raise PairError(where, f"{key!r} holds {shown(position)}, which is no number of a token")
    if not -len(prompt) <= position < len(prompt):
        raise PairError(where, f"{key!r}: token {position} is not in the prompt, which has {len(prompt)} tokens")
    return position % len(prompt)

"""`Pair`: a counterfactual pair, read from a record of texts or token ids that a user writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from featurizers.errors import FeaturizerError, shown
from featurizers.models import text_ids

Tokens: TypeAlias = tuple[int, ...]
"""Token ids, or the positions of tokens in a prompt."""
Position: TypeAlias = int | str | Sequence[int]
"""A token of a prompt, -1 the last; several tokens; or a name that the records give to one or several."""

KEYS: Final = ("base", "source", "label", "base_label", "base_position", "source_position")


class PairError(FeaturizerError, ValueError):
    """Raised when a record is not a counterfactual pair.

    Attributes:
        where: the record, by its file and line or by its number.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where


@dataclass(frozen=True)
class Pair:
    """Counterfactual pair, as token ids.

    Attributes:
        base: the prompt that the model runs on.
        sources: the prompts that features are taken from: one prompt, or one for each site.
        label: what the model should answer with the features of the source; one or more tokens.
        base_label: what the model answers without an intervention, if that is known.
        base_positions: tokens of the base at each site, or once for all sites; counted from 0.
        source_positions: the same for the source of each site.
    """

    base: Tokens
    sources: tuple[Tokens, ...]
    label: Tokens
    base_label: Tokens | None
    base_positions: tuple[Tokens, ...]
    source_positions: tuple[Tokens, ...]

    @property
    def run(self) -> Tokens:
        """Tokens that the model runs on: the base, and the label without its last token."""
        return self.base + self.label[:-1]

    def base_at(self, site: int) -> tuple[Tokens, Tokens]:
        """Return the base and its positions at a site, given the site's number."""
        return self.base, _of_site(self.base_positions, site)

    def source_at(self, site: int) -> tuple[Tokens, Tokens]:
        """Return the source of a site and its positions there, given the site's number."""
        return _of_site(self.sources, site), _of_site(self.source_positions, site)


def _of_site(values: tuple[Tokens, ...], site: int) -> Tokens:
    return values[0] if len(values) == 1 else values[site]


def tokenized(record: Any, where: str, tokenizer: Any) -> dict[str, Any]:
    """Return a record with token ids in place of texts; its positions stay as they were written.

    Raises:
        PairError: the record lacks something, or has a key or a value that is not allowed.
    """
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


def pair_of(record: Mapping[str, Any], where: str, positions: Sequence[Position] = ()) -> Pair:
    """Return the pair of a tokenized record.

    Args:
        record: as `tokenized` returns it.
        where: names the record in errors.
        positions: of base and source, one for all sites or one for each; the record's own if there are none.

    Raises:
        PairError: a prompt does not have the positions, or they are for different numbers of sites or tokens.
    """
    base, sources = record["base"], record["source"]
    base_positions = _positions(record.get("base_position"), [base], "base_position", where, positions)
    source_positions = _positions(
        record.get("source_position", record.get("base_position")), sources, "source_position", where, positions
    )
    by_key = {"base_position": base_positions, "source_position": source_positions, "source": sources}
    n_sites = max(map(len, by_key.values()))
    for key, per_site in by_key.items():
        if len(per_site) not in (1, n_sites):
            raise PairError(where, f"{key!r} is for {len(per_site)} sites, and others for {n_sites}")
    for at_base, at_source in zip(_each(base_positions, n_sites), _each(source_positions, n_sites), strict=True):
        if len(at_base) != len(at_source):
            raise PairError(where, f"there are {len(at_base)} tokens of the base for {len(at_source)} of the source")
    return Pair(base, sources, record["label"], record.get("base_label"), base_positions, source_positions)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _prompt(value: Any, key: str, where: str, tokenizer: Any) -> Tokens:
    if isinstance(value, str):
        ids, _ = _encode(value, key, where, tokenizer)
    else:
        ids = value.tolist() if isinstance(value, torch.Tensor) else value
    if not isinstance(ids, Sequence) or not ids or not all(map(_is_id, ids)):
        raise PairError(where, f"{key!r} is a text or a list of token ids, not {shown(value)}")
    return tuple(ids)


def _encode(text: str, key: str, where: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of a text with the special tokens that begin a prompt, and without any.

    Special tokens that a tokenizer appends, such as the end of a sequence, are left out: the answer follows the text,
    and positions from the end count the text's own tokens.
    """
    if not _encodable(text):
        raise PairError(where, f"{key!r} has half of a surrogate pair, {shown(text)}, which no tokenizer can encode")
    if tokenizer is None:
        raise PairError(where, f"{key!r} is a text, {shown(text)}; give the tokenizer of the model, or token ids")
    return text_ids(tokenizer, text)


def _encodable(text: str) -> bool:
    """Return whether a text can be written as UTF-8; a lone surrogate, which JSON may hold, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label(base: Any, base_ids: Tokens, value: Any, key: str, where: str, tokenizer: Any) -> Tokens:
    """Tokenize a label; a text is tokenized after its base, because a tokenizer may split it differently alone."""
    if _is_id(value):
        return (value,)
    if isinstance(value, str) and isinstance(base, str) and value:
        whole = tuple(_encode(base + value, key, where, tokenizer)[0])
        if whole[: len(base_ids)] == base_ids and len(whole) > len(base_ids):
            return whole[len(base_ids) :]
    if isinstance(value, str):
        _, value = _encode(value, key, where, tokenizer)
    return _prompt(value, key, where, tokenizer)


def _each(per_site: tuple[Any, ...], n_sites: int) -> tuple[Any, ...]:
    return per_site * n_sites if len(per_site) == 1 else per_site


def _positions(
    written: Any, prompts: Sequence[Tokens], key: str, where: str, chosen: Sequence[Position]
) -> tuple[Tokens, ...]:
    """Return the tokens for each site, or once for all sites, counted from the start of the prompt.

    Args:
        written: the value in the record.
        prompts: one for all sites, or one for each.
        key: of the value in the record.
        where: names the record in errors.
        chosen: positions to use instead; the names among them are looked up in ``written``.
    """
    if chosen:
        per_site = [_named(written, each, key, where) if isinstance(each, str) else each for each in chosen]
    elif isinstance(written, Mapping):
        names = ", ".join(map(repr, written))
        raise PairError(where, f"{key!r} has the names {names}; choose one of them as the position")
    elif (
        isinstance(written, Sequence) and not isinstance(written, str) and any(isinstance(p, Sequence) for p in written)
    ):
        per_site = list(written)
    else:
        per_site = [-1 if written is None else written]
    rows = [[p] if isinstance(p, int) and not isinstance(p, bool) else p for p in per_site]
    n_sites = max(len(rows), len(prompts))
    if len(rows) not in (1, n_sites) or len(prompts) not in (1, n_sites):
        raise PairError(where, f"{key!r} is for {len(rows)} sites, and there are {len(prompts)} prompts")
    counted = []
    for row, prompt in zip(_each(tuple(rows), n_sites), _each(tuple(prompts), n_sites), strict=True):
        if not isinstance(row, Sequence) or isinstance(row, str) or not row:
            raise PairError(where, f"{key!r} is a number, or a list of numbers, not {shown(row)}")
        counted.append(tuple(_from_start(position, prompt, key, where) for position in row))
    return tuple(counted) if len(set(counted)) > 1 else (counted[0],)


def _named(written: Any, name: str, key: str, where: str) -> Any:
    if not isinstance(written, Mapping) or name not in written:
        known = ", ".join(map(repr, written)) if isinstance(written, Mapping) else shown(written)
        raise PairError(where, f"{key!r} has no position named {name!r}; it has {known}")
    return written[name]


def _from_start(position: Any, prompt: Tokens, key: str, where: str) -> int:
    if not isinstance(position, int) or isinstance(position, bool):
        raise PairError(where, f"{key!r} holds {shown(position)}, which is not the number of a token")
    if not -len(prompt) <= position < len(prompt):
        raise PairError(where, f"{key!r}: token {position} is not in the prompt, which has {len(prompt)} tokens")
    return position % len(prompt)

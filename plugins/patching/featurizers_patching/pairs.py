"""Base and source prompts, from texts, token ids, model inputs, or records in the format of `featurizers train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from featurizers.errors import ArtefactError, UsageError, shown
from featurizers.format import parse_json
from featurizers.models import text_ids
from torch import Tensor

Tokens: TypeAlias = tuple[int, ...]
MAX_LINE_BYTES: Final = 2**28
KEYS: Final = ("base", "source", "label", "base_label", "base_position", "source_position")


@dataclass(frozen=True)
class Pair:
    """A base prompt, which is edited, and a source prompt, which activations are taken from.

    Attributes:
        base: token ids.
        source: token ids.
        label: the answer to the source, if it is known; one or more token ids.
        base_label: the answer to the base, if it is known.
        base_names: tokens of the base by name, counted from 0.
        source_names: tokens of the source by name.
    """

    base: Tokens
    source: Tokens
    label: Tokens | None = None
    base_label: Tokens | None = None
    base_names: Mapping[str, Tokens] = field(default_factory=dict)
    source_names: Mapping[str, Tokens] = field(default_factory=dict)

    @property
    def n_equal(self) -> int:
        """Number of first tokens that base and source share."""
        different = (i for i, (b, s) in enumerate(zip(self.base, self.source, strict=False)) if b != s)
        return next(different, min(len(self.base), len(self.source)))


def pairs_of(base: Any, source: Any, tokenizer: Any) -> list[Pair]:
    """Return pairs of prompts.

    Args:
        base: a text, token ids, inputs of a model with ``input_ids``, a list of texts or of token ids; or records,
            such as `featurizers_training.Pairs` or a list of mappings, or a list of `Pair`, and then no source.
        source: the same.
        tokenizer: of the model, for texts.

    Raises:
        UsageError: the prompts are none of these, or are not as many bases as sources.
    """
    records = getattr(base, "records", None) or (base if _are_records(base) else None)
    if source is None and isinstance(base, list) and base and all(isinstance(each, Pair) for each in base):
        return base
    if records is not None:
        if source is not None:
            raise UsageError("the records have their sources; leave the argument source out")
        return [_of_record(record, f"pair {number}", tokenizer) for number, record in enumerate(records)]
    if source is None:
        raise UsageError("give a source prompt for each base, or records with base and source")
    bases, sources = (_prompts(value, name, tokenizer) for name, value in (("base", base), ("source", source)))
    if len(bases) != len(sources):
        raise UsageError(f"there are {len(bases)} base prompts and {len(sources)} source prompts; give one for each")
    return [Pair(*pair) for pair in zip(bases, sources, strict=True)]


def read_pairs(path: str | Path, tokenizer: Any) -> list[Pair]:
    """Read pairs from a file of JSON lines in the format of `featurizers train`.

    Raises:
        UsageError: the file cannot be read, or a line is no record.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read pairs from {str(path)!r}: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                record = parse_json(line.encode(), where, "the line", most=MAX_LINE_BYTES)
            except ArtefactError as error:
                raise UsageError(str(error)) from error
            pairs.append(_of_record(record, where, tokenizer))
    if not pairs:
        raise UsageError(f"{str(path)!r} holds no pairs; give one record a line")
    return pairs


def answer_ids(text: Any, tokenizer: Any, where: str, *, after: str | None = None) -> Tokens:
    """Return the token ids of an answer: a text, a token id, or several.

    Args:
        text: as it follows the prompt, with the space that belongs between them.
        tokenizer: of the model.
        where: names the answer in errors.
        after: the prompt as text, if it is known, so that both are tokenized together.

    Raises:
        UsageError: it is none of these, or the prompt and the answer share a token.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return (text,)
    if not isinstance(text, str):
        return _ids(text, where)
    _needs(tokenizer, where)
    if after is None:
        return _ids(text_ids(tokenizer, text)[1], where)
    prompt, whole = text_ids(tokenizer, after)[0], text_ids(tokenizer, after + text)[0]
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise UsageError(
            f"{where}: {shown(text)} is not made of tokens that follow the prompt; begin it with the space that "
            "belongs between them, or give token ids"
        )
    return tuple(whole[len(prompt) :])


def _are_records(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping) and "base" in value[0]


def _of_record(record: Any, where: str, tokenizer: Any) -> Pair:
    if not isinstance(record, Mapping):
        raise UsageError(f"{where}: a pair is an object with base and source, not {shown(record)}")
    if unknown := [key for key in record if key not in (*KEYS, "where")]:
        raise UsageError(f"{where}: the key {shown(unknown[0])} is not one of {', '.join(KEYS)}")
    if missing := [key for key in KEYS[:2] if record.get(key) is None]:
        raise UsageError(f"{where}: {missing[0]!r} is missing")
    source = record["source"]
    if isinstance(source, Sequence) and not isinstance(source, str) and source and not isinstance(source[0], int):
        if len(source) > 1:
            raise UsageError(f"{where}: patching takes one source for each base, and there are {len(source)}")
        source = source[0]
    base, read = (_prompt(prompt, where, tokenizer) for prompt in (record["base"], source))
    text = record["base"] if isinstance(record["base"], str) else None
    label, base_label = (
        None if record.get(key) is None else answer_ids(record[key], tokenizer, f"{where}: {key}", after=text)
        for key in ("label", "base_label")
    )
    names = record.get("base_position")
    base_names = _names(names, base, f"{where}: base_position")
    source_names = _names(record.get("source_position", names), read, f"{where}: source_position")
    return Pair(base, read, label, base_label, base_names, source_names)


def _names(value: Any, tokens: Tokens, where: str) -> dict[str, Tokens]:
    """Return the named positions of a record, counted from 0; positions without names are not for patching."""
    if not isinstance(value, Mapping):
        return {}
    return {str(name): span(each, len(tokens), f"{where} {shown(name)}") for name, each in value.items()}


def span(value: Any, length: int, where: str) -> Tokens:
    """Return tokens of a prompt, counted from 0.

    Args:
        value: a number, negative from the end, or several.
        length: of the prompt.
        where: names the position in errors.

    Raises:
        UsageError: it is no number, is repeated, or the prompt does not have it.
    """
    numbers = value.tolist() if isinstance(value, Tensor) else value
    numbers = [numbers] if isinstance(numbers, int) else numbers
    if not isinstance(numbers, Sequence) or not numbers or not all(type(each) is int for each in numbers):
        raise UsageError(f"{where}: a position is a number or a list of numbers, not {shown(value)}")
    found = tuple(number + length if number < 0 else number for number in numbers)
    if outside := [given for given, at in zip(numbers, found, strict=True) if not 0 <= at < length]:
        raise UsageError(f"{where}: the prompt has {length} tokens and no position {shown(outside[0])}")
    if len(set(found)) < len(found):
        raise UsageError(f"{where}: a token is named twice in {shown(value)}")
    return found


def _prompts(value: Any, name: str, tokenizer: Any) -> list[Tokens]:
    if isinstance(value, Mapping):
        return _inputs(value, name)
    value = value.tolist() if isinstance(value, Tensor) else value
    many = isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and not isinstance(value[0], int)
    found = [_prompt(each, name, tokenizer) for each in (value if many else [value])]
    if not found:
        raise UsageError(f"{name}: there are no prompts")
    return found


def _inputs(inputs: Mapping[str, Any], name: str) -> list[Tokens]:
    """Return the prompts of a model's inputs, without their padding."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise UsageError(f"{name}: the inputs need 'input_ids', a tensor (batch, tokens)")
    if others := [key for key in inputs if key not in ("input_ids", "attention_mask", "token_type_ids")]:
        raise UsageError(f"{name}: patching runs prompts of token ids alone, and cannot take {shown(others[0])}")
    rows = ids.tolist() if mask is None else [row[kept != 0].tolist() for row, kept in zip(ids, mask, strict=True)]
    return [_ids(row, name) for row in rows]


def _prompt(value: Any, name: str, tokenizer: Any) -> Tokens:
    if isinstance(value, str):
        _needs(tokenizer, name)
        value = text_ids(tokenizer, value)[0]
    return _ids(value, name)


def _ids(value: Any, name: str) -> Tokens:
    ids = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(ids, Sequence) or not ids or not all(type(each) is int and each >= 0 for each in ids):
        raise UsageError(f"{name}: expected a text or a list of token ids, not {shown(value)}")
    return tuple(ids)


def _needs(tokenizer: Any, where: str) -> None:
    if tokenizer is None:
        raise UsageError(f"{where}: a text needs the model's tokenizer; give tokenizer=")

"""Prompts of a file of texts, as padded token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from featurizers.errors import UsageError, one_line, shown
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts, padded on the right.

    Attributes:
        ids: token ids.
        attention: which are the prompts' own and not padding.
        skipped: how many tokens at the start of each prompt take no part.
    """

    ids: Int[Tensor, "batch sequence"]
    attention: Bool[Tensor, "batch sequence"]
    skipped: int

    @property
    def mask(self) -> Bool[Tensor, "batch sequence"]:
        """Which tokens take part."""
        return self.attention & (torch.arange(self.ids.shape[1]) >= self.skipped)

    @property
    def rule(self) -> str:
        """The mask in words."""
        first = {0: "", 1: " but the first of each prompt"}
        return f"every token{first.get(self.skipped, f' but the first {self.skipped} of each prompt')}"


def read_prompts(path: str | Path, tokenizer: Any, *, tokens: int, length: int, skipped: int, key: str) -> Prompts:
    """The first prompts of a file: a text a line, or, in a ``.jsonl`` file, an object with a text a line.

    Args:
        path: of the file.
        tokenizer: of the model.
        tokens: how many shall take part; the last prompt that is needed is cut.
        length: tokens of a prompt at most, the rest of its text is left out.
        skipped: tokens at the start of each prompt that take no part.
        key: of the text in a ``.jsonl`` file.

    Raises:
        UsageError: the file cannot be read, a line is no such object, or all prompts together have fewer than 2 tokens
            that take part.
    """
    if length <= skipped:
        raise UsageError(f"prompts of {length} tokens, of which the first {skipped} take no part, leave none")
    rows: list[list[int]] = []
    wanted = tokens
    path = Path(path).expanduser()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                text = _text(line, f"{path}:{number}", key) if path.suffix == ".jsonl" else line.strip()
                row = list(tokenizer(text, truncation=True, max_length=length)["input_ids"])[: skipped + wanted]
                if len(row) > skipped:
                    rows.append(row)
                    wanted -= len(row) - skipped
                if wanted <= 0:
                    break
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read texts from {str(path)!r}: {one_line(error)}") from error
    if tokens - wanted < 2:
        raise UsageError(
            f"{str(path)!r} has {tokens - wanted} tokens that take part, and a basis needs 2 or more: texts one a line"
        )
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        attention[number, : len(row)] = True
    return Prompts(ids, attention, skipped)


def _text(line: str, where: str, key: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: it is not JSON: {one_line(error)}") from error
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UsageError(f"{where}: an object with a text under {key!r} was expected, not {shown(record)}")
    return text

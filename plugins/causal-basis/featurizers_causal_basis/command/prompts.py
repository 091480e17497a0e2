"""`Prompts`: texts of a file as padded token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from featurizers.errors import ArtefactError, UsageError, one_line, shown
from featurizers.format import parse_json
from featurizers.models import text_ids
from jaxtyping import Bool, Int
from torch import Tensor

MAX_LINE_BYTES: Final = 2**28


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts, padded on the right.

    Attributes:
        ids: token ids.
        attention: False for padding.
        skipped: number of tokens at the start of each prompt that the mask leaves out.
    """

    ids: Int[Tensor, "batch sequence"]
    attention: Bool[Tensor, "batch sequence"]
    skipped: int

    @property
    def mask(self) -> Bool[Tensor, "batch sequence"]:
        """Mask of the selected tokens."""
        return self.attention & (torch.arange(self.ids.shape[1]) >= self.skipped)

    @property
    def rule(self) -> str:
        """Mask in words."""
        first = {0: "", 1: " but the first of each prompt"}
        return f"every token{first.get(self.skipped, f' but the first {self.skipped} of each prompt')}"


def read_prompts(path: str | Path, tokenizer: Any, *, tokens: int, length: int, skipped: int, key: str) -> Prompts:
    """Read the first prompts of a file: one text per line, or in a ``.jsonl`` file one object with a text per line.

    Special tokens that the tokenizer appends, such as an end of sequence, are no tokens of a prompt.

    Args:
        path: of the file.
        tokenizer: of the model.
        tokens: number of tokens to select; the last prompt is cut short.
        length: most tokens of a prompt; the rest of its text is dropped.
        skipped: number of tokens at the start of each prompt that are not selected.
        key: of the text in a ``.jsonl`` file.

    Raises:
        UsageError: the file cannot be read, a line is not such an object, or all prompts together have fewer than 2
            selected tokens.
    """
    if length <= skipped:
        raise UsageError(f"prompts of {length} tokens without the first {skipped} leave none; give longer prompts")
    rows: list[list[int]] = []
    missing = tokens
    path = Path(path).expanduser()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                text = _text(line, f"{path}:{number}", key) if path.suffix == ".jsonl" else line.strip()
                row = text_ids(tokenizer, text)[0][: min(length, skipped + missing)]
                if len(row) > skipped:
                    rows.append(row)
                    missing -= len(row) - skipped
                if missing <= 0:
                    break
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read texts from {str(path)!r}: {one_line(error)}") from error
    if tokens - missing < 2:
        raise UsageError(
            f"{str(path)!r} has {tokens - missing} tokens to use, and a basis needs 2 or more: give one text per line"
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
        record = parse_json(line.encode(), where, "the line", most=MAX_LINE_BYTES)
    except ArtefactError as error:
        raise UsageError(f"{where}: {error.problem}") from error
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UsageError(f"{where}: expected an object with a text under {key!r}, not {shown(record)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: the text has half of a surrogate pair, which no tokenizer can encode") from error
    return text

"""Texts of tokens, fit to be shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from featurizers.errors import printable

MOST: Final = 60
SPACE: Final = "▁"
"""What SentencePiece writes for a space."""
BROKEN: Final = "\ufffd"


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Return the text of each token, without characters that move text or break lines.

    A token that is a part of a character is shown as the tokenizer names it.

    Args:
        tokenizer: of the model; None to show numbers.
        ids: token ids; one that the tokenizer does not know is shown as its number.
    """
    return {number: shown_token(_text(tokenizer, number)) for number in ids}


def shown_token(text: str) -> str:
    """Return a text with line ends as ⏎, tabs as ⇥, and other unprintable characters escaped."""
    return printable(text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥"), MOST)


def _text(tokenizer: Any, number: int) -> str:
    if tokenizer is None:
        return f" #{number}"
    try:
        text = tokenizer.decode([number])
        name = tokenizer.convert_ids_to_tokens(number) if hasattr(tokenizer, "convert_ids_to_tokens") else None
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):
        return f" #{number}"
    if not isinstance(name, str):
        return str(text) or f" #{number}"
    if not text or BROKEN in text:
        return name
    return f" {text}" if name.startswith(SPACE) and not text.startswith(" ") else str(text)

"""Documents of token ids, cut into rows and put together into padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from featurizers.errors import UsageError, shown
from featurizers.models import text_ids
from torch import Tensor

IDS: Final = ("input_ids", "tokens")
"""Keys under which a record has token ids."""


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    Attributes:
        tokenizer: of texts; None if all documents are token ids.
        context: tokens of the longest row; longer documents are cut into several rows. None for no limit.
        max_tokens: number of tokens after which reading ends; None to read everything.
        vocabulary: number of token ids that the model knows; None if that is not known.
        most: tokens of the longest row that the model takes; None if that is not known.
        excluded: token ids that are not measured.
        mask_first: number of tokens at the start of each row that are not measured.
    """

    tokenizer: Any = None
    context: int | None = None
    max_tokens: int | None = None
    vocabulary: int | None = None
    most: int | None = None
    excluded: tuple[int, ...] = ()
    mask_first: int = 0


class Row(NamedTuple):
    """Tokens that the model reads at once: a document, or a part of one.

    Attributes:
        document: its number.
        start: number of the document's tokens before the row.
        ids: token ids.
    """

    document: int
    start: int
    ids: list[int]


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        ids: ``(rows, width)``; 0 where there is padding, on the right.
        is_token: ``(rows, width)``, False for padding.
        is_measured: ``(rows, width)``, False for padding and excluded tokens.
        documents: number of the document of each row; those of one document follow each other.
    """

    ids: Tensor
    is_token: Tensor
    is_measured: Tensor
    documents: list[int]

    def rows(self, rows: slice) -> Batch:
        """Return some rows as a batch of the same width."""
        return Batch(self.ids[rows], self.is_token[rows], self.is_measured[rows], self.documents[rows])

    def inputs(self) -> dict[str, Tensor]:
        """Return the inputs of a model, with a mask only if something is padded."""
        if bool(self.is_token.all()):
            return {"input_ids": self.ids}
        return {"input_ids": self.ids, "attention_mask": self.is_token.long()}


def check_readable_again(tokens: object) -> None:
    """Raise UsageError if the documents can be read only once."""
    if isinstance(tokens, Iterator):
        raise UsageError(
            "tokens is an iterator, which can be read once, and the ablation 'mean' and the metrics 'fidelity' take a "
            "reading of their own: give a list, a tensor or a data set, or leave these out"
        )


def batches(tokens: Any, reading: Reading, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Yield the rows of documents in batches, in their order.

    Args:
        tokens: see `featurizers_evaluate.evaluate`.
        reading: how to read them.
        batch_size: rows of a batch.
        device: of the tensors.

    Raises:
        UsageError: a document is no text and no token ids, does not fit the model, or there is none.
    """
    group: list[Row] = []
    found = False
    for row in _rows(tokens, reading):
        found = True
        group.append(row)
        if len(group) == batch_size:
            yield padded(group, reading, device)
            group = []
    if group:
        yield padded(group, reading, device)
    if not found:
        raise UsageError("there are no tokens to measure on: give at least one document that is not empty")


def padded(rows: Sequence[Row], reading: Reading, device: torch.device) -> Batch:
    """Return rows as one batch."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    is_token = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        is_token[number, : len(row.ids)] = True
    excluded = torch.isin(ids, torch.tensor(reading.excluded, dtype=torch.long))
    kept = is_token & ~excluded
    kept[:, : reading.mask_first] = False
    return Batch(ids.to(device), is_token.to(device), kept.to(device), [row.document for row in rows])


def rows_of(document: Any, number: int, reading: Reading) -> list[Row]:
    """Return the rows of a document; none if it has no tokens.

    Args:
        document: text, token ids or record.
        number: of the document.
        reading: how to read it; ``max_tokens`` is not looked at.

    Raises:
        UsageError: it is none of these, or does not fit the model.
    """
    return list(_cut(_ids(document, number, reading.tokenizer), number, reading))


def _cut(ids: list[int], number: int, reading: Reading) -> Iterator[Row]:
    _check_ids(ids, number, reading)
    step = reading.context or max(len(ids), 1)
    for start in range(0, len(ids), step):
        row = ids[start : start + step]
        if reading.most is not None and len(row) > reading.most:
            raise UsageError(
                f"document {number} has {len(row)} tokens, and the model takes {reading.most}; cut documents into "
                f"rows with context={reading.most}"
            )
        yield Row(number, start, row)


def _rows(tokens: Any, reading: Reading) -> Iterator[Row]:
    """Yield rows; the last one ends at the most tokens."""
    left = reading.max_tokens
    for number, ids in enumerate(_documents(tokens, reading.tokenizer)):
        read = ids[:left]
        yield from _cut(read, number, reading)
        left = None if left is None else left - len(read)
        if left == 0:
            return


def _documents(tokens: Any, tokenizer: Any) -> Iterator[list[int]]:
    if isinstance(tokens, Mapping):
        yield from _of_inputs(tokens)
        return
    if isinstance(tokens, Tensor):
        if tokens.is_floating_point() or tokens.dim() not in (1, 2) or tokens.dtype == torch.bool:
            raise UsageError(f"token ids are integers, (documents, tokens), not {tokens.dtype} {tuple(tokens.shape)}")
        yield from tokens.reshape(-1, tokens.shape[-1]).tolist()
        return
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise UsageError(f"tokens are documents, such as a tensor of token ids or a list of texts, not {shown(tokens)}")
    for number, document in enumerate(tokens):
        yield _ids(document, number, tokenizer)


def _of_inputs(inputs: Mapping[str, Any]) -> Iterator[list[int]]:
    """Yield the rows of inputs of a model, without their padding."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise UsageError("inputs of a model have input_ids, a tensor of (documents, tokens)")
    if mask is None:
        yield from ids.tolist()
        return
    if mask.shape != ids.shape:
        raise UsageError(f"input_ids are {tuple(ids.shape)}, and the attention_mask is {tuple(mask.shape)}")
    for row, real in zip(ids, mask, strict=True):
        yield row[real != 0].tolist()


def content(document: Any, number: int) -> str | list[int]:
    """Return the text or the token ids of a document.

    Args:
        document: text, token ids, or a record with one of these.
        number: of the document, for errors.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(document, Mapping):
        found = next((document[key] for key in (*IDS, "text") if document.get(key) is not None), None)
        if found is None:
            raise UsageError(
                f"document {number} is a record without text, {' or '.join(IDS)}; it has {shown(list(document))}"
            )
        document = found
    if isinstance(document, str):
        return document
    if hasattr(document, "tolist"):
        document = document.tolist()
    if not isinstance(document, Sequence) or not all(type(each) is int for each in document):
        raise UsageError(f"document {number} is no text and no list of token ids: {shown(document)}")
    return list(document)


def _ids(document: Any, number: int, tokenizer: Any) -> list[int]:
    found = content(document, number)
    if not isinstance(found, str):
        return found
    if tokenizer is None:
        raise UsageError(f"document {number} is a text: give the tokenizer of the model, tokenizer=…")
    return text_ids(tokenizer, found)[0]


def _check_ids(ids: list[int], number: int, reading: Reading) -> None:
    limit = reading.vocabulary
    if ids and (min(ids) < 0 or (limit is not None and max(ids) >= limit)):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise UsageError(
            f"document {number} has the token id {wrong}; this model knows those from 0 to "
            f"{'its vocabulary' if limit is None else limit - 1}"
        )


def vocabulary_of(model: object) -> int | None:
    """Return the number of token ids that a model knows; None if that is not known."""
    get = getattr(model, "get_input_embeddings", None)
    number = getattr(get() if callable(get) else None, "num_embeddings", None)
    return number if isinstance(number, int) else None


def longest_of(model: object) -> int | None:
    """Return the tokens of the longest row that a model takes; None if that is not known."""
    number = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return number if isinstance(number, int) else None

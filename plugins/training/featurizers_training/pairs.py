"""`Pairs`: counterfactual pairs, read from records, split, shuffled, and moved to other positions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from featurizers.errors import ArtefactError, UsageError
from featurizers.format import parse_json

from featurizers_training.records import Pair, PairError, Position, Tokens, pair_of, tokenized

MAX_LINE_BYTES: Final = 2**28
CLUSTERS: Final = {"label": "label", "base": "base", "source": "sources"}
"""Parts of a pair that other pairs may share, and their attributes of `Pair`."""


@dataclass(frozen=True)
class Pairs(Sequence[Pair]):
    """Counterfactual pairs.

    Attributes:
        records: the pairs as they were written, with token ids in place of texts; positions may be names.
        pairs: the same pairs at the positions that were chosen.
    """

    records: tuple[Mapping[str, Any], ...]
    pairs: tuple[Pair, ...]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        """Return one pair, or a slice as `Pairs`."""
        if isinstance(index, slice):
            return Pairs(self.records[index], self.pairs[index])
        return self.pairs[index]

    def take(self, rows: Iterable[int]) -> Pairs:
        """Return some of the pairs, in the order of ``rows``."""
        rows = list(rows)
        return Pairs(tuple(self.records[row] for row in rows), tuple(self.pairs[row] for row in rows))

    def split(self, share: float, seed: int = 0) -> tuple[Pairs, Pairs]:
        """Split the pairs at random in two; the second part has ``share`` of them, and at least one.

        Raises:
            UsageError: a part would be empty.
        """
        held_out = max(1, round(share * len(self)))
        if not 0 < share < 1 or held_out >= len(self):
            raise UsageError(f"a share of {share} of {len(self)} pairs leaves one part empty")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.take(sorted(order[held_out:])), self.take(sorted(order[:held_out]))

    def at(self, *positions: Position) -> Pairs:
        """Return the same pairs at other positions of base and source: one for all sites, or one for each.

        Raises:
            PairError: a prompt does not have them.
        """
        return Pairs(
            self.records, tuple(pair_of(record, f"pair {i}", positions) for i, record in enumerate(self.records))
        )

    def with_shuffled_labels(self, seed: int = 0) -> Pairs:
        """Return a control: each pair has the label of another pair, so that only noise is left to find."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        labels = [self.records[row]["label"] for row in order]
        records = [{**record, "label": label} for record, label in zip(self.records, labels, strict=True)]
        pairs = [replace(pair, label=label) for pair, label in zip(self.pairs, labels, strict=True)]
        return Pairs(tuple(records), tuple(pairs))

    def clusters(self, by: str = "label") -> list[tuple[Any, ...]]:
        """Return for each pair its ``label``, ``base`` or ``source``, which pairs may share; see `Accuracy.clustered`.

        Raises:
            UsageError: ``by`` is none of these.
        """
        if by not in CLUSTERS:
            raise UsageError(f"pairs are in clusters by their {', '.join(CLUSTERS)}, not by {by!r}")
        return [getattr(pair, CLUSTERS[by]) for pair in self.pairs]

    def digest(self) -> str:
        """Return the SHA-256 of the pairs, as token ids and positions."""
        rows = [
            [pair.base, pair.sources, pair.label, pair.base_label, pair.base_positions, pair.source_positions]
            for pair in self.pairs
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def common_position(self, site: int) -> Tokens | None:
        """Return the positions that all bases share at a site, counted from either end; None if they differ."""
        positions = [pair.base_at(site)[1] for pair in self.pairs]
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
        """Read pairs from records, such as the rows of a `datasets.Dataset`.

        A record has ``base``, ``source`` and ``label``, each a text or token ids. ``source`` may be a list of
        prompts, one for each site. ``base_label`` is what the model answers without an intervention; some objectives
        need it. ``base_position`` and ``source_position`` say which tokens (-1, the last, by default): a number,
        several numbers, a list with several numbers for each site, or an object that gives names to any of these.
        A label in text follows the base directly: it begins with a space if a space belongs between them.

        Args:
            records: one for each pair.
            tokenizer: of the model, for records in text.
            position: a name, or tokens to use instead of those of the records; see `at`.

        Raises:
            PairError: a record is not like this.
        """
        return cls._of(((f"pair {i}", record) for i, record in enumerate(records)), tokenizer, position)

    @classmethod
    def read(cls, path: str | Path, tokenizer: Any = None, *, position: Position | None = None) -> Pairs:
        """Read pairs from a file of JSON lines; see `of`.

        Raises:
            UsageError: the file cannot be read, or holds no pairs.
            PairError: a line is not a record.
        """
        path = Path(path).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would split texts at U+2028 too
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read pairs from {str(path)!r}: {error}") from error
        records = []
        for where, line in ((f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()):
            try:
                records.append((where, parse_json(line.encode(), where, "the line", most=MAX_LINE_BYTES)))
            except ArtefactError as error:
                raise PairError(where, error.problem) from error
        return cls._of(records, tokenizer, position)

    @classmethod
    def _of(cls, records: Iterable[tuple[str, Any]], tokenizer: Any, position: Position | None) -> Pairs:
        read = tuple(tokenized(record, where, tokenizer) for where, record in records)
        if not read:
            raise UsageError("there are no counterfactual pairs; give at least one record, in a file one a line")
        chosen = () if position is None else (position,)
        return cls(read, tuple(pair_of(record, record["where"], chosen) for record in read))


def check_fit(pairs: Sequence[Pair], n_sites: int) -> None:
    """Raise `UsageError` unless the pairs fit this number of sites and all have the same number of positions."""
    for i, pair in enumerate(pairs):
        for per_site in (pair.sources, pair.base_positions, pair.source_positions):
            if len(per_site) not in (1, n_sites):
                raise UsageError(f"pair {i} is for {len(per_site)} sites, and the search has {n_sites}")
        for site in range(n_sites):
            count, first = (len(each.base_at(site)[1]) for each in (pair, pairs[0]))
            if count != first:
                raise UsageError(f"pair {i} has {count} positions and pair 0 has {first}; give the same number to all")


def check_vocabulary(pairs: Sequence[Pair], size: int | None) -> None:
    """Raise `UsageError` if a token of the pairs is not in a vocabulary of this size; None checks nothing."""
    for i, pair in enumerate(pairs):
        largest = max(map(max, (pair.base, *pair.sources, pair.label, pair.base_label or pair.label)))
        if size is not None and largest >= size:
            raise UsageError(
                f"pair {i} has the token {largest}, and the model's vocabulary has {size}, counted from 0; "
                "use the model's own tokenizer"
            )

"""Labels of features: what people or programs say that features mean, and their file in an artefact."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from featurizers.errors import ArtefactError, ManifestError, UsageError, explain, one_line, shown
from featurizers.files.regular import read_bytes
from featurizers.format.manifest import LABELS_NAME, Manifest, Name, parse_json

if TYPE_CHECKING:
    import pandas

KEY: Final = "feature_labels"
"""Key in the metadata of an artefact that has labels."""
MAX_BYTES: Final = 2**27
"""Largest file of labels."""
MAX_LABELS: Final = 1_000_000
"""Most labels of an artefact."""
MAX_TEXT: Final = 4000
"""Characters of the longest label."""
MAX_NAME: Final = 256
"""Characters of the longest name of an author or a group."""
MAX_LINE: Final = 65_536
"""Bytes of the longest line of the file."""
MOST_AUTHORS: Final = 16
"""Authors that the metadata names, those of the most labels."""


@dataclass(frozen=True, slots=True)
class Label:
    """What somebody says that a feature means.

    Attributes:
        feature: number of the feature; of a slice, its number in the whole.
        text: one line of printable characters.
        author: who said so, such as the name of a language model or of a person.
        score: how well it explains the feature, on the author's scale; None if it was not measured.
        group: of a map between sites, the group that the feature belongs to.

    Raises:
        UsageError: a value is of another type, too long, or not printable.
    """

    feature: int
    text: str
    author: str
    score: float | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if type(self.feature) is not int or not 0 <= self.feature < 2**31:
            raise UsageError(f"a label is of a feature by its number, from 0 on, not of {shown(self.feature)}")
        _check_line(self.text, MAX_TEXT, "text", self.feature)
        _check_line(self.author, MAX_NAME, "author", self.feature)
        if self.group is not None:
            _check_line(self.group, MAX_NAME, "group", self.feature)
        if self.score is not None and (type(self.score) not in (int, float) or not math.isfinite(self.score)):
            raise UsageError(f"the score of a label of feature {self.feature} is a number, not {shown(self.score)}")


def _check_line(text: object, most: int, name: str, feature: int) -> None:
    """Raise UsageError unless a text is one line of printable characters."""
    if not isinstance(text, str) or not 0 < len(text) <= most or not text.isprintable() or text.isspace():
        raise UsageError(
            f"the {name} of a label of feature {feature} is one line of 1 to {most} printable characters, "
            f"not {shown(text)}"
        )


class Labels:
    """Labels of features, by feature and searchable; read-only. A feature may have several.

    Args:
        labels: in any order; they are sorted by group and feature, and those of one feature keep their order.

    Raises:
        UsageError: something is no `Label`, or an author says the same of a feature twice.

    Examples:
        >>> labels = Labels([Label(7, "names of rivers", "alice", score=0.9), Label(7, "water", "bob")])
        >>> [label.text for label in labels.of(7)]
        ['names of rivers', 'water']
        >>> len(labels.search("river"))
        1
    """

    def __init__(self, labels: Iterable[Label]) -> None:
        given = list(labels)
        if wrong := next((each for each in given if not isinstance(each, Label)), None):
            raise UsageError(f"labels are a sequence of featurizers.Label, not of {type(wrong).__name__}")
        if len(given) > MAX_LABELS:
            raise UsageError(f"there are {len(given)} labels; an artefact holds {MAX_LABELS} at most")
        self._labels = tuple(sorted(given, key=lambda each: (each.group or "", each.feature)))
        self._of: dict[tuple[str | None, int], tuple[Label, ...]] = {}
        for label in self._labels:
            key = label.group, label.feature
            before = self._of.get(key, ())
            if any((each.text, each.author) == (label.text, label.author) for each in before):
                raise UsageError(
                    f"{label.author!r} says the same of feature {label.feature} twice: {shown(label.text)}; "
                    "give each label once"
                )
            self._of[key] = (*before, label)

    def __len__(self) -> int:
        """Return the number of labels."""
        return len(self._labels)

    def __iter__(self) -> Iterator[Label]:
        """Yield the labels, by group and feature."""
        return iter(self._labels)

    def __eq__(self, other: object) -> bool:
        """Return whether both hold the same labels."""
        return isinstance(other, Labels) and self._labels == other._labels

    def __hash__(self) -> int:
        """Return a hash of the labels."""
        return hash(self._labels)

    def __repr__(self) -> str:
        """Say how many there are, of how many features, and by whom."""
        return f"Labels({in_words(record_of(self, b''))})"

    @property
    def authors(self) -> dict[str, int]:
        """Number of labels of each author, the largest first."""
        return dict(Counter(label.author for label in self._labels).most_common())

    @property
    def features(self) -> tuple[tuple[str | None, int], ...]:
        """Group and number of each feature that has a label."""
        return tuple(self._of)

    def of(self, feature: int, group: str | None = None) -> tuple[Label, ...]:
        """Return the labels of a feature; none if it has none.

        Args:
            feature: its number; of a slice, its number in the whole.
            group: of a map with several groups, the group of the feature.

        Raises:
            UsageError: the labels are of features of groups, and no group is given.
        """
        found = self._of.get((group, feature), ())
        groups = {own for own, _ in self._of}
        if not found and group is None and groups and None not in groups:
            if len(groups) > 1:
                names = ", ".join(shown(own) for own in sorted(map(str, groups))[:8])
                raise UsageError(f"the labels are of features of groups, such as {names}; give group=")
            found = self._of.get((next(iter(groups)), feature), ())
        return found

    def search(self, words: str, *, author: str | None = None) -> Labels:
        """Return the labels that hold words, in capitals or not; of one author if given."""
        wanted = words.casefold()
        return Labels(
            label for label in self._labels if wanted in label.text.casefold() and author in (None, label.author)
        )

    def only(self, features: Mapping[str | None, Container[int]]) -> Labels:
        """Return the labels of some features, which are given by group, under None where there are no groups."""
        kept = [label for label in self._labels if label.feature in features.get(label.group, ())]
        return self if len(kept) == len(self) else Labels(kept)

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with a row for each label; needs pandas."""
        import pandas as pd

        columns = ["feature", "text", "author", "score", "group"]
        return pd.DataFrame([asdict(label) for label in self._labels], columns=columns)


class LabelsRecord(BaseModel):
    """What the metadata of an artefact say of its labels.

    Attributes:
        sha256: of the file.
        labels: number of labels.
        features: number of features that have one.
        authors: number of labels of each author; of the most frequent ones if there are many.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    labels: Annotated[int, Field(ge=1, le=MAX_LABELS)]
    features: Annotated[int, Field(ge=1, le=MAX_LABELS)]
    authors: Annotated[dict[Name, int], Field(min_length=1, max_length=MOST_AUTHORS)]


def record_in(manifest: Manifest, where: str) -> LabelsRecord | None:
    """Return what a manifest says of labels; None if the artefact has none.

    Raises:
        ManifestError: it is malformed.
    """
    record = manifest.metadata.get(KEY)
    if record is None:
        return None
    try:
        return LabelsRecord.model_validate(record)
    except ValidationError as error:
        raise ManifestError(where, f"metadata.{KEY} does not describe labels: {explain(error)}") from error


def record_of(labels: Labels, raw: bytes) -> LabelsRecord:
    """Return the record of labels that are written as ``raw``."""
    authors = dict(list(labels.authors.items())[:MOST_AUTHORS])
    digest = hashlib.sha256(raw).hexdigest()
    return LabelsRecord.model_construct(
        sha256=digest, labels=len(labels), features=len(labels.features), authors=authors
    )


def in_words(record: LabelsRecord) -> str:
    """Return how many labels there are and by whom, in one line."""
    names = [f"{name} ({count})" for name, count in record.authors.items()]
    others = ["…"] if sum(record.authors.values()) < record.labels else []
    return one_line(f"{record.labels} of {record.features} features, by {', '.join(names + others) or 'nobody'}")


def dump(labels: Labels) -> bytes:
    """Return the bytes of ``feature_labels.jsonl``: a JSON object in each line, without the values that are None.

    Raises:
        ArtefactError: the file would be too large to be read again.
    """
    lines = ({name: value for name, value in asdict(label).items() if value is not None} for label in labels)
    raw = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines).encode()
    if len(raw) > MAX_BYTES:
        raise ArtefactError("labels", f"{LABELS_NAME} would be larger than {MAX_BYTES} bytes; keep fewer labels")
    return raw


def read(folder: Path, record: LabelsRecord, where: str) -> Labels:
    """Read the labels of an artefact.

    Args:
        folder: holds ``feature_labels.jsonl``.
        record: what its config says of them.
        where: name of the artefact in errors.

    Raises:
        ArtefactError: the file is missing, damaged, or not the one that was saved with the config.
    """
    raw = read_bytes(folder / LABELS_NAME, where, ArtefactError, MAX_BYTES)
    if (actual := hashlib.sha256(raw).hexdigest()) != record.sha256:
        raise ArtefactError(
            where,
            f"{LABELS_NAME} has sha256 {actual}, its config says {record.sha256}: it is damaged, or was changed by "
            "hand; give changed labels to the featurizer and save it",
        )
    labels = parse(raw, where)
    if len(labels) != record.labels:
        raise ArtefactError(
            where, f"{LABELS_NAME} has another number of labels ({len(labels)}) than its config says ({record.labels})"
        )
    return labels


def parse(raw: bytes, where: str) -> Labels:
    """Parse the bytes of ``feature_labels.jsonl``.

    Raises:
        ArtefactError: a line is no label; the message names the line.
    """
    if raw.count(b"\n") > MAX_LABELS:
        raise ArtefactError(where, f"{LABELS_NAME} has more than {MAX_LABELS} lines")
    lines = raw.removesuffix(b"\n").split(b"\n")
    try:
        rows = parse_json(b"[%b]" % b",".join(lines), where, LABELS_NAME, most=MAX_BYTES + 2)
        if len(rows) != len(lines) or max(map(len, lines)) > MAX_LINE:
            raise ManifestError(where, "a line is no label")
    except ManifestError:  # one by one, to name the line
        rows = [parse_json(line, where, _line(number), most=MAX_LINE) for number, line in enumerate(lines, 1)]
    try:
        return Labels([_label(row, number, where) for number, row in enumerate(rows, 1)])
    except UsageError as error:
        raise ArtefactError(where, f"{LABELS_NAME}: {error}") from error


def _label(row: Any, number: int, where: str) -> Label:
    """Return the label in a line."""
    if not isinstance(row, dict) or not _REQUIRED <= row.keys() <= _FIELDS:
        raise ArtefactError(
            where,
            f"{_line(number)} is {shown(row)}, not an object with feature, text, author and maybe score and group",
        )
    try:
        return Label(**row)
    except UsageError as error:
        raise ArtefactError(where, f"{_line(number)}: {error}") from error


def _line(number: int) -> str:
    return f"line {number} of {LABELS_NAME}"


_FIELDS: Final = frozenset(Label.__dataclass_fields__)
_REQUIRED: Final = frozenset({"feature", "text", "author"})

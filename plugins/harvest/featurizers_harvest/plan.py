"""`Plan`: all that the rows of a harvest depend on, and its shards; a folder holds the harvest of one plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NamedTuple

from featurizers.errors import ArtefactError, UsageError, shown
from pydantic import BaseModel, ConfigDict

from featurizers_harvest.sources import Source, encoded

FORMAT: Final = "featurizers-harvest"
VERSION: Final = 1


class Shard(NamedTuple):
    """Documents that are computed and committed together.

    Attributes:
        document: number of the first one.
        documents: how many there are.
        place: where the first one begins, see `Source`.
        sha256: of the documents.
    """

    document: int
    documents: int
    place: int
    sha256: str


class Plan(BaseModel):
    """Plan of a harvest, stored as ``plan.json``. Paths and names are in ``about`` alone, which is not compared.

    Attributes:
        model: class, dtype, attention and checksum of the parameters.
        features: by name, what is harvested: kind, checksum, sites, width.
        data: checksum and number of documents, checksum of the tokenizer.
        rows: how documents are cut into rows and rows put into batches, and the dtype of the values.
        environment: versions, device and number of threads.
        about: names, for people.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: dict[str, Any]
    features: dict[str, dict[str, Any]]
    data: dict[str, Any]
    rows: dict[str, Any]
    environment: dict[str, Any]
    about: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Checksum of all but ``about``."""
        text = json.dumps(self.model_dump(exclude={"about"}), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_same(self, other: Plan, where: str) -> None:
        """Raise ArtefactError unless a folder's plan is this one.

        Args:
            other: plan of the folder.
            where: name of the folder.
        """
        mine, theirs = (dict(_leaves(plan.model_dump(exclude={"about"}))) for plan in (self, other))
        differing = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
        if not differing:
            return
        parts = [f"{name} was {shown(theirs.get(name))} and is {shown(mine.get(name))}" for name in differing[:4]]
        more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ArtefactError(
            where,
            f"it holds a harvest of another plan: {'; '.join(parts)}{more}; go on with that one, name a new folder, or "
            "delete this one",
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shards_of(source: Source, tokens: int, most: int | None) -> list[Shard]:
    """Return the shards of documents, each of about so many tokens; a longer document is a shard of its own.

    Args:
        source: the documents, which are read once.
        tokens: about how many a shard has.
        most: number of documents to read; None for all.

    Raises:
        UsageError: a document is no text and no token ids, or there is none.
    """
    shards: list[Shard] = []
    first, begin, size, count, digest = 0, 0, 0, 0, hashlib.sha256()
    for number, (place, document) in enumerate(source.read(0, 0)):
        if number == most:
            break
        raw, about = encoded(document, number)
        if count and size + about > tokens:
            shards.append(Shard(first, count, begin, digest.hexdigest()))
            first, begin, size, count, digest = number, place, 0, 0, hashlib.sha256()
        begin = place if not count else begin
        digest.update(raw)
        size, count = size + about, count + 1
    if not count:
        raise UsageError("there are no documents to harvest")
    return [*shards, Shard(first, count, begin, digest.hexdigest())]


def digest_of(shards: Iterable[Shard]) -> str:
    """Return the checksum of the documents of all shards."""
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None

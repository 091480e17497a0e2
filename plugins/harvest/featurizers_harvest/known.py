"""`Known`: checksums that were computed before, beside the sizes and times of the files that they are of."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from featurizers import Anatomy
from featurizers.errors import ArtefactError
from huggingface_hub import try_to_load_from_cache
from pydantic import BaseModel, ConfigDict, ValidationError

from featurizers_harvest.folders import Folder
from featurizers_harvest.plan import Plan, Shard, digest_of, shards_of, version_of
from featurizers_harvest.sources import Lines, Source, Table
from featurizers_harvest.targets import checksum_of_model

NAME: Final = "known.json"
SETTLED: Final = 2_000_000_000
"""Nanoseconds that a file must be unchanged before it is read: a later change may leave its time as it is."""
LIBRARIES: Final = ("featurizers", "featurizers-harvest", "torch", "transformers", "safetensors")
"""Whose versions decide what parameters are loaded from files."""


class _Record(BaseModel):
    """What ``known.json`` holds: two checksums of files by size and time, and what was computed from these files."""

    model_config = ConfigDict(extra="forbid", strict=True)

    documents: str | None = None
    shards: list[tuple[int, int, int, str]] = []
    model: str | None = None
    model_checksum: str = ""


class Known:
    """Spares a harvest that goes on the reading of all documents and the hashing of all parameters.

    What is known counts if path, size, inode, time of change and time of writing of every file, the options and the
    versions are those of before, and if it is what the plan of the folder says; else all is computed.

    It is made before anything is read: a file that changes later is not known.

    Args:
        folder: of the harvest.
        plan: of the folder; None if it has none, and then nothing is known.
    """

    def __init__(self, folder: Folder, plan: Plan | None) -> None:
        self._folder, self._plan, self._begin = folder, plan, time.time_ns()
        self._old = _Record() if plan is None else _read(folder)
        self._new = _Record()

    def shards(self, source: Source, tokens: int, most: int | None) -> tuple[Shard, ...]:
        """Return the shards of documents, as `shards_of` does."""
        paths = [source.path] if isinstance(source, Lines | Table) else []
        about = [type(source).__name__, getattr(source, "key", None), tokens, most]
        before = self._signature(paths, about)
        if before is not None and before == self._old.documents and self._plan is not None:
            known = tuple(Shard(*each) for each in self._old.shards)
            if digest_of(known) == self._plan.data.get("sha256"):
                self._new.documents, self._new.shards = before, self._old.shards
                return known
        found = tuple(shards_of(source, tokens, most))
        if before is not None and before == self._signature(paths, about):
            self._new.documents, self._new.shards = before, [(*each,) for each in found]
        return found

    def model_checksum(self, anatomy: Anatomy, name: str | None, about: Sequence[Any]) -> str:
        """Return the checksum of a model's parameters, as `checksum_of_model` does.

        Args:
            anatomy: of the model.
            name: folder, file or Hub id from which it was just loaded; None if it was given itself, which is not known.
            about: what else decides its parameters, such as their dtype.
        """
        revision = getattr(getattr(anatomy.backend.model, "config", None), "_commit_hash", None)
        signature = self._signature([] if name is None else _files(name, revision), about)
        known = self._old.model_checksum
        if (
            signature is None
            or signature != self._old.model
            or self._plan is None
            or known != self._plan.model.get("checksum")
        ):
            known = checksum_of_model(anatomy)
        if signature is not None:
            self._new.model, self._new.model_checksum = signature, known
        return known

    def write(self) -> None:
        """Keep what is known now in the folder, if that is new."""
        if self._new != self._old and self._new != _Record():
            self._folder.write(NAME, (self._new.model_dump_json() + "\n").encode())

    def _signature(self, paths: Iterable[Path], about: Sequence[Any]) -> str | None:
        """Return a checksum of the sizes and times of files; None without files, or if one has changed just now."""
        found = []
        for path in paths:
            try:
                stat = os.stat(path)
            except OSError:
                return None
            if max(stat.st_mtime_ns, stat.st_ctime_ns) > self._begin - SETTLED:
                return None
            times = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
            found.append([str(path.absolute()), *times])
        versions = [version_of(name) for name in LIBRARIES]
        text = json.dumps([found, list(about), versions], default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() if found else None


def _files(name: str, revision: str | None) -> list[Path]:
    """Return the files that a model was loaded from: those of a folder, or of the Hub's cache, or one file."""
    path = Path(name).expanduser()
    if not path.exists() and revision is not None:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        path = Path(config).parent if isinstance(config, str) else path
    return [each for each in sorted(path.rglob("*")) if not each.is_dir()] if path.is_dir() else [path]


def _read(folder: Folder) -> _Record:
    """Return what a folder knows; nothing if the file is damaged, as all of it can be computed."""
    try:
        raw = folder.read(NAME)
        return _Record() if raw is None else _Record.model_validate_json(raw)
    except (ArtefactError, ValidationError):
        return _Record()

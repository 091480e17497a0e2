"""`Job`: what a worker needs to begin, by names, so that it can be sent to another process or machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import featurizers
import torch
from featurizers import FeatureSpace
from featurizers.errors import ArtefactError, UsageError
from featurizers.files import os_errors
from featurizers.models import LanguageModel, load_model
from featurizers_evaluate import Reading

from featurizers_harvest.folders import Disk, Folder
from featurizers_harvest.plan import Shard
from featurizers_harvest.shards import Work, Worker
from featurizers_harvest.sources import Source
from featurizers_harvest.targets import checksums_of, targets_of


@dataclass(frozen=True)
class ModelName:
    """Language model to load, as `featurizers.load_model` does.

    Attributes:
        name: Hub id, folder or ``.gguf`` file.
        device: to load it to; None for an accelerator if there is one.
        dtype: of its parameters; None for the stored one.
    """

    name: str
    device: str | None = None
    dtype: torch.dtype | None = torch.float32

    def load(self) -> LanguageModel:
        """Load the model."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return load_model(self.name, device=device, dtype=self.dtype)


@dataclass(frozen=True)
class Job:
    """Makes a worker in the process where it is called.

    Attributes:
        model: to load.
        wanted: what is harvested: sites as texts, and folders of featurizers that were saved for this run.
        checksums: of the featurizers by the names of targets.
        source: the documents.
        reading: how they are cut into rows; the tokenizer is the model's.
        batch_size: as in `Work`, as the next three.
        values: as in `Work`.
        plan: as in `Work`.
        threads: as in `Work`.
        folder: of the harvest.
        shards: of the plan.
    """

    model: ModelName
    wanted: Mapping[str, str | Path]
    checksums: Mapping[str, str]
    source: Source
    reading: Reading
    batch_size: int
    values: str
    plan: str
    threads: int
    folder: Folder
    shards: Sequence[Shard]

    def __call__(self) -> Worker:
        """Load what is needed.

        Raises:
            ArtefactError: a featurizer is not the one of the plan.
        """
        model, tokenizer, _ = self.model.load()
        device = next(model.parameters()).device
        loaded = {
            name: featurizers.load(each, device=device) if isinstance(each, Path) else each
            for name, each in self.wanted.items()
        }
        targets = targets_of(loaded)
        of_spaces = checksums_of(targets)
        for target in targets:
            if target.space is not None and of_spaces[target.space] != self.checksums[target.name]:
                raise ArtefactError(self.folder.where, f"a worker loaded another featurizer as {target.name!r}")
        reading = replace(self.reading, tokenizer=tokenizer)
        work = Work(model, device, targets, self.source, reading, self.batch_size, self.values, self.plan, self.threads)
        return Worker(work, self.folder, self.shards)


@contextmanager
def sent(wanted: Mapping[str, Any], folder: Folder) -> Iterator[dict[str, str | Path]]:
    """Yield what is to be harvested in a form that other processes read: featurizers are saved, and removed again.

    Args:
        wanted: featurizers, maps and sites by name.
        folder: of the harvest; featurizers are saved in it, so that other machines reach them.

    Raises:
        UsageError: featurizers have to be sent, and the folder is in object storage.
    """
    spaces = {name: each for name, each in wanted.items() if isinstance(each, FeatureSpace)}
    others: dict[str, str | Path] = {name: str(each) for name, each in wanted.items() if name not in spaces}
    if not spaces:
        yield others
        return
    if not isinstance(folder, Disk):
        raise UsageError(
            "several workers take featurizers from a folder on a disk, not object storage: use shard=(i, n)"
        )
    scratch = folder.path.absolute() / f".work.{uuid4().hex}"
    with os_errors(scratch):
        scratch.mkdir(parents=True)
    try:
        saved = {
            name: each.save_pretrained(scratch / str(number)) for number, (name, each) in enumerate(spaces.items())
        }
        yield {name: saved.get(name) or others[name] for name in wanted}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

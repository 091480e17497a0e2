"""`Prepared`: the arguments of a harvest, checked, with its plan and its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from featurizers import Anatomy, FeatureSpace
from featurizers.errors import ArtefactError, UsageError, one_line, shown
from featurizers_evaluate import Reading, longest_of, special_tokens, vocabulary_of
from pydantic import ValidationError

from featurizers_harvest.engines import Engine, Start
from featurizers_harvest.folders import Disk, Folder, folder_of
from featurizers_harvest.job import Job, ModelName, sent
from featurizers_harvest.known import Known
from featurizers_harvest.plan import FORMAT, VERSION, Plan, Shard, digest_of, version_of
from featurizers_harvest.shards import DONE, TOKENS, Entry, Work, Worker, device_of, part_name, read_entry
from featurizers_harvest.sources import source_of
from featurizers_harvest.tables import DTYPES
from featurizers_harvest.targets import Target, by_name, check_model, checksums_of, targets_of

CONTEXT = 1024
"""Tokens of the longest row, unless the model takes fewer."""


PACKAGES = ("featurizers", "featurizers-harvest", "torch", "transformers")
"""Whose versions the rows may depend on."""


@dataclass(frozen=True)
class Options:
    """Arguments of `featurizers_harvest.harvest`, which describes them.

    Raises:
        UsageError: one is invalid.
    """

    tokenizer: Any = None
    key: str | None = None
    context: int | None = None
    batch_size: int = 8
    exclude_special_tokens: bool | Iterable[int] = False
    values: str = "float16"
    shard_tokens: int = 2**16
    max_documents: int | None = None
    device: str | None = None
    dtype: torch.dtype | None = torch.float32
    any_model: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("context", "batch_size", "shard_tokens", "max_documents"):
            number = getattr(self, name)
            optional = name in ("context", "max_documents")
            if not (optional and number is None) and (type(number) is not int or number < 1):
                raise UsageError(f"{name} is a whole number of at least 1, not {shown(number)}")
        if self.values not in DTYPES:
            raise UsageError(f"values are {' or '.join(map(repr, DTYPES))}, not {shown(self.values)}")


@dataclass(frozen=True)
class Prepared:
    """A harvest that is ready to be computed.

    Attributes:
        folder: of the harvest.
        plan: what its rows depend on.
        shards: of the documents.
        work: for workers in this process.
        model: name of the model, None if it was given itself.
        wanted: featurizers, maps and sites by name.
        memory: of the checksums of files.
    """

    folder: Folder
    plan: Plan
    shards: tuple[Shard, ...]
    work: Work
    model: ModelName | None
    wanted: Mapping[str, Any]
    memory: Known

    @classmethod
    def of(
        cls, model: object, wanted: Any, data: Any, out: str | Path, options: Options, *, trust: bool = True
    ) -> Prepared:
        """Check the arguments, read the documents once, and compare the plan with that of the folder.

        Args:
            model: as in `harvest`, as the next three.
            wanted: as there.
            data: as there.
            out: as there.
            options: other arguments.
            trust: whether files that are those of the last run, by size and time, need not be read again; see `Known`.

        Raises:
            UsageError: an argument is invalid.
            ArtefactError: the folder holds something else, or a harvest of another plan.
        """
        folder = folder_of(out)
        known = known_plan(folder)
        memory = Known(folder, known if trust else None)
        targets, source = targets_of(wanted), source_of(data, options.key)
        name = ModelName(model, options.device, options.dtype) if isinstance(model, str) else None
        tokenizer = options.tokenizer
        if name is not None:
            model, tokenizer, _ = name.load()
        anatomy = Anatomy(model)
        for site in dict.fromkeys(site for target in targets for site in target.reads.values()):
            anatomy.place(site)
        if not options.any_model:
            check_model(targets, model)
        reading = _reading(anatomy.backend.model, tokenizer, options)
        shards = memory.shards(source, options.shard_tokens, options.max_documents)
        loaded = [str(options.dtype), str(device_of(anatomy.model))]
        checksum = memory.model_checksum(anatomy, None if name is None else name.name, loaded)
        threads = torch.get_num_threads() if known is None else int(known.environment.get("threads", 1))
        plan = _plan(anatomy, checksum, targets, shards, reading, options, threads)
        if known is not None:
            plan.check_same(known, folder.where)
        work = Work(
            model,
            device_of(anatomy.model),
            tuple(targets),
            source,
            reading,
            options.batch_size,
            options.values,
            plan.sha256,
            threads,
        )
        return cls(folder, plan if known is None else known, shards, work, name, by_name(wanted), memory)

    def begin(self) -> None:
        """Write the plan, if the folder has none, and what is known of the files."""
        if self.folder.read("plan.json") is None:
            data = {"format": FORMAT, "version": VERSION, **self.plan.model_dump(), "sha256": self.work.plan}
            self.folder.write("plan.json", (json.dumps(data, indent=1) + "\n").encode())
        self.memory.write()

    def worker(self) -> Worker:
        """Return a worker in this process."""
        return Worker(self.work, self.folder, self.shards)

    def finished(self) -> dict[int, Entry]:
        """Return the entries of the shards that are committed and whose files are all there."""
        return finished(self.folder, self.work.plan, [TOKENS, *(target.folder for target in self.work.targets)])

    @contextmanager
    def start(self, engine: Engine) -> Iterator[Start]:
        """Yield what makes the workers of an engine.

        Raises:
            UsageError: the engine has other processes, and the model was not given by its name.
        """
        if not engine.is_remote:
            yield self.worker
            return
        if self.model is None:
            raise UsageError("several workers load the model by themselves: give its name or its folder, not the model")
        of_spaces = checksums_of(list(self.work.targets))
        checksums = {target.name: of_spaces[target.space] for target in self.work.targets if target.space is not None}
        work = self.work
        reading = Reading(
            None, work.reading.context, None, work.reading.vocabulary, work.reading.most, work.reading.excluded
        )
        with sent(self.wanted, self.folder) as wanted:
            yield Job(
                self.model,
                wanted,
                checksums,
                work.source,
                reading,
                work.batch_size,
                work.values,
                work.plan,
                work.threads,
                self.folder,
                self.shards,
            )


def finished(folder: Folder, plan: str, folders: Iterable[str]) -> dict[int, Entry]:
    """Return the entries of committed shards whose files are all there, by number.

    Args:
        folder: of the harvest.
        plan: checksum of the plan.
        folders: names of the folders in it.
    """
    sizes = {each: folder.sizes(each) for each in folders}
    found = {}
    for name in sorted(folder.sizes(DONE)):
        stem, _, ending = name.rpartition(".")
        number = stem.removeprefix("part-")
        if ending != "json" or not number.isdecimal() or part_name(int(number)) != stem:
            continue
        entry = read_entry(folder, int(number))
        if entry is None or entry.plan != plan:
            continue
        if all(
            each in entry.files and size.get(f"{stem}.parquet") == entry.files[each].bytes
            for each, size in sizes.items()
        ):
            found[int(number)] = entry
    return found


def known_plan(folder: Folder) -> Plan | None:
    """Return the plan of a folder; None if it is empty or does not exist.

    Raises:
        ArtefactError: the folder holds something else, or the plan is damaged.
    """
    raw = folder.read("plan.json")
    if raw is None:
        if isinstance(folder, Disk) and folder.path.exists():
            names = (
                [path.name for path in folder.path.iterdir() if path.name[0] != "."] if folder.path.is_dir() else [""]
            )
            if names:
                raise ArtefactError(
                    folder.where, "it is there already and holds no harvest; name a new or an empty folder"
                )
        return None
    try:
        data = json.loads(raw)
        if not isinstance(data, dict) or (data.pop("format", None), data.pop("version", None)) != (FORMAT, VERSION):
            raise ArtefactError(folder.where, f"plan.json is not of the format {FORMAT!r}, version {VERSION}")
        checksum = data.pop("sha256", None)
        plan = Plan.model_validate(data)
    except (ValueError, ValidationError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(folder.where, f"plan.json is damaged: {one_line(error)}") from error
    if plan.sha256 != checksum:
        raise ArtefactError(folder.where, "plan.json was changed by hand: its checksum is that of another plan")
    return plan


def _reading(model: object, tokenizer: Any, options: Options) -> Reading:
    most = longest_of(model)
    context = options.context or min(CONTEXT, most or CONTEXT)
    excluded = tuple(sorted(special_tokens(options.exclude_special_tokens, tokenizer)))
    return Reading(tokenizer, context, None, vocabulary_of(model), most, excluded)


def _plan(
    anatomy: Anatomy,
    checksum: str,
    targets: list[Target],
    shards: tuple[Shard, ...],
    reading: Reading,
    options: Options,
    threads: int,
) -> Plan:
    model, config = anatomy.model, getattr(anatomy.backend.model, "config", None)
    device, checksums = device_of(model), checksums_of(targets)
    names: dict[str, FeatureSpace[Any]] = {target.name: target.space for target in targets if target.space is not None}
    return Plan(
        model={
            "class": type(anatomy.backend.model).__name__,
            "checksum": checksum,
            "dtype": str(next((p.dtype for p in model.parameters()), None)).removeprefix("torch."),
            "attention": getattr(config, "_attn_implementation", None),
        },
        features={target.name: target.describe(checksums) for target in targets},
        data={
            "documents": sum(shard.documents for shard in shards),
            "shards": len(shards),
            "sha256": digest_of(shards),
            "tokenizer": None if reading.tokenizer is None else _tokenizer_checksum(reading.tokenizer),
        },
        rows={
            "context": reading.context,
            "batch_size": options.batch_size,
            "shard_tokens": options.shard_tokens,
            "excluded_tokens": list(reading.excluded),
            "values": options.values,
        },
        environment={
            "versions": {
                name: version_of(name) for name in ("featurizers", "featurizers-harvest", "torch", "transformers")
            },
            "device": device.type if device.type != "cuda" else torch.cuda.get_device_name(device),
            "threads": threads,
        },
        about={
            "model": getattr(config, "_name_or_path", None) or type(model).__name__,
            "model_revision": getattr(config, "_commit_hash", None),
            "featurizers": {name: {"id": each.id, "revision": each.revision} for name, each in names.items()},
        },
    )


def _tokenizer_checksum(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        text = backend.to_str()
    else:
        get = getattr(tokenizer, "get_vocab", None)
        text = json.dumps([type(tokenizer).__name__, sorted(get().items()) if callable(get) else None], default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

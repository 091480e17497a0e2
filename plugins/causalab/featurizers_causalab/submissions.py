"""Submissions to the MIB benchmark, folders of triplets: read and written as collections of featurizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

from featurizers import Featurizer
from featurizers.errors import ConversionError, ManifestError, SourceError, UsageError, shown
from featurizers.files import filling
from featurizers.format import ExternalFiles
from featurizers.hub import FolderSource, HubSource, Remote, parse_source
from featurizers.store import checked, of_folder, of_repository

from featurizers_causalab import bundles, triplets, units

TASKS: Final = ("4_answer_MCQA", "ARC_easy", "arithmetic", "ravel_task", "ioi_task")
MODELS: Final = {
    "GPT2LMHeadModel": "gpt2",
    "Qwen2ForCausalLM": "Qwen/Qwen2.5-0.5B",
    "Gemma2ForCausalLM": "google/gemma-2-2b",
    "LlamaForCausalLM": "meta-llama/Meta-Llama-3.1-8B-Instruct",
}
"""Model that the benchmark's evaluator loads for each class in the name of a folder."""
FOLDER: Final = re.compile(rf"({'|'.join(TASKS)})_({'|'.join(MODELS)})_([\w.-]{{1,100}})", re.ASCII)
PLAIN: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def read(source: ExternalFiles) -> dict[str, Featurizer[Any]]:
    """Read the featurizers of all units of a source, by folder and unit as subfolder names of a collection.

    Raises:
        ManifestError, WeightsError: a unit cannot be read, or two units get the same name.
    """
    featurizers: dict[str, Featurizer[Any]] = {}
    for name, reader in _readers(source).items():
        if (key := _key(name)) in featurizers:
            raise ManifestError(
                source.where, f"two units get the name {shown(key, 200)}; read their folders one by one"
            )
        featurizers[key] = reader()
    return featurizers


def one(source: ExternalFiles) -> Featurizer[Any] | None:
    """Read the featurizer of a source that holds one unit; return None if it holds none.

    Raises:
        ManifestError: it holds several units, or the unit cannot be read.
        WeightsError: the unit cannot be read.
    """
    readers = _readers(source)
    if len(readers) > 1:
        raise ManifestError(
            source.where,
            f"it holds {len(readers)} units of CausalAbstraction: {_listed(readers)}; read them all with "
            "featurizers_causalab.read_submission, or one from the Hub as causalab:owner/name/FOLDER/UNIT",
        )
    return next((reader() for reader in readers.values()), None)


def resolve(reference: str, repository: Callable[..., ExternalFiles]) -> Featurizer[Any]:
    """Read the featurizer of one unit of a repository.

    Args:
        reference: ``owner/name/FOLDER/UNIT``.
        repository: opens a repository of the Hub.

    Raises:
        SourceError: the reference is of another form, or the repository has no such unit.
        ManifestError, WeightsError: the unit cannot be read.
    """
    owner, _, rest = reference.partition("/")
    name, _, unit = rest.partition("/")
    if not (owner and name and unit):
        raise SourceError(f"cannot read {shown('causalab:' + reference, 200)}; write 'causalab:owner/name/FOLDER/UNIT'")
    readers = _readers(repository(f"{owner}/{name}"))
    if unit not in readers:
        raise SourceError(f"{owner}/{name} has no unit {shown(unit, 200)}; it has {_listed(readers) or 'none'}")
    return readers[unit]()


def read_submission(
    source: str | Path, *, subfolder: str | None = None, revision: str | None = None, token: str | bool | None = None
) -> dict[str, Featurizer[Any]]:
    """Read the featurizers of a submission to the MIB benchmark, or of a folder of causalab, by folder and unit.

    The names can be subfolders of a collection: ``save_collection(read_submission(folder), out)``. The features that a
    unit acts on are its feature set ``selected``; the parts of its name are in its ``site`` and its ``metadata``. No
    code in the folder is run.

    Args:
        source: a folder, or a repository of the Hub, as `featurizers.load` takes them.
        subfolder: a folder in the source.
        revision: branch, tag or commit of a repository.
        token: token of the Hub; the stored one if None.

    Raises:
        SourceError: the source is neither a folder nor a repository.
        ManifestError: a unit cannot be read, or there is none.
        WeightsError: a unit cannot be read.
        HubError: the Hub refused or did not answer.
    """
    parsed = parse_source(source, revision)
    if isinstance(parsed, FolderSource):
        files = of_folder(parsed.path.expanduser() / (subfolder or ""), None)
    elif isinstance(parsed, HubSource):
        files = of_repository(Remote(parsed, subfolder, token), None)
    else:
        raise SourceError(f"{str(source)!r} is an entry of a catalogue; give a folder or a repository")
    featurizers = read(files)
    if not featurizers:
        raise ManifestError(files.where, "it holds no files of CausalAbstraction's units; name the folder that does")
    return {name: checked(featurizer, files) for name, featurizer in featurizers.items()}


def write_submission(featurizers: Mapping[str, Featurizer[Any]], folder: str | Path) -> Path:
    """Write a submission to the MIB benchmark: a triplet for each featurizer.

    A unit keeps the name that it was read with; any other is named after its site and position. If writing fails,
    nothing is left behind.

    Args:
        featurizers: identities and subspaces, by ``FOLDER/ANYTHING`` or ``ANYTHING``; FOLDER is the folder of the unit.
        folder: a new or empty folder.

    Raises:
        UsageError: there are no featurizers, or two are of the same unit.
        ConversionError: CausalAbstraction has no class for a featurizer, or no unit for its site.
        ArtefactError: the folder is not empty, or cannot be written.
    """
    if not featurizers:
        raise UsageError("a submission holds at least one featurizer")
    written: dict[str, str] = {}
    with filling(folder) as new:
        for name, featurizer in featurizers.items():
            parts = name.split("/")
            if not all(map(PLAIN.fullmatch, parts)):
                raise UsageError(f"{name!r} is no name of a folder; use letters, digits, '.', '_', '-' and '/'")
            path = "/".join([*parts[:-1], unit_of(featurizer, name)])
            if path in written:
                raise UsageError(f"{name!r} and {written[path]!r} are both of the unit {path!r}; change a site")
            written[path] = name
            try:
                triplets.write(featurizer, new / path)
            except ConversionError as error:
                raise ConversionError(name, error.problem) from error
    return Path(folder).expanduser()


def unit_of(featurizer: Featurizer[Any], where: str) -> str:
    """Return the name of a featurizer's unit: the one in its metadata if it fits the site, else that of the site.

    Raises:
        ConversionError: CausalAbstraction has no unit for the site.
    """
    site = featurizer.site
    record = featurizer.metadata.get("causalab")
    unit = record.get("unit") if isinstance(record, dict) else None
    parsed = units.parse(unit) if isinstance(unit, str) else None
    if parsed is not None and parsed.site == site and (site is None or site.position == parsed.site.position):  # type: ignore[union-attr]
        return str(unit)
    name = None if site is None else units.name_of(site)
    if name is None:
        raise ConversionError(
            where,
            f"CausalAbstraction has no unit for the site {None if site is None else str(site)!r}; set the featurizer's "
            "site to one such as Site('resid.post', 8).at(position=(-1,))",
        )
    return name


def lost(featurizer: Featurizer[Any]) -> list[str]:
    """Return a sentence for each property of a featurizer that a triplet loses and a comparison would not show."""
    site, losses = featurizer.site, []
    if site is not None and site.model is not None:
        losses.append(f"The model {site.model!r} is not kept; the benchmark takes it from the name of the folder.")
    if featurizer.special_tokens:
        losses.append(f"The special tokens {list(featurizer.special_tokens)} are not kept.")
    if keys := sorted(featurizer.metadata.keys() - {"causalab"}):
        losses.append(f"The metadata {', '.join(map(repr, keys))} are not kept.")
    return losses


def _readers(source: ExternalFiles) -> dict[str, Callable[[], Featurizer[Any]]]:
    """Return a function that reads each unit of a source, by folder and unit. Bundles are read at once.

    Raises:
        ManifestError, WeightsError: a bundle cannot be read, or a unit is in a triplet and in a bundle.
    """
    readers = {name: partial(_triplet, source, name) for name in triplets.names(source)}
    bundled: dict[str, Callable[[], Featurizer[Any]]] = {
        folder + unit: partial(_placed, featurizer, folder + unit)
        for folder in bundles.folders(source)
        for unit, featurizer in bundles.read(source, folder).items()
    }
    if both := sorted(readers.keys() & bundled.keys()):
        raise ManifestError(
            source.where, f"the unit {shown(both[0], 200)} is in a triplet and in {bundles.UNITS}; remove one"
        )
    return {**readers, **bundled}


def _triplet(source: ExternalFiles, name: str) -> Featurizer[Any]:
    return _placed(triplets.read(source, name), name)


def _listed(names: Iterable[str]) -> str:
    first = list(islice(names, 6))
    return ", ".join([*(shown(name, 200) for name in first[:5]), *("…" for _ in first[5:])])


def _key(name: str) -> str:
    """Convert the name of a unit to a valid subfolder of a collection."""
    words = (re.sub(r"[(,]", ".", part.rstrip(")")) for part in name.split("/"))
    return "/".join(re.sub(r"^\.+|[^A-Za-z0-9._-]", "_", word) for word in words)


def _placed(featurizer: Featurizer[Any], name: str) -> Featurizer[Any]:
    """Add the task, model and variable that the folder of a unit names to its featurizer."""
    for part in name.split("/")[:-1]:
        if match := FOLDER.fullmatch(part):
            names = {"task": match[1], "model": match[2], "variable": match[3]}
            featurizer.metadata["causalab"] = {**featurizer.metadata["causalab"], **names}
            if featurizer.site is not None:
                featurizer.site = featurizer.site.at(model=MODELS[match[2]])
            break
    return featurizer

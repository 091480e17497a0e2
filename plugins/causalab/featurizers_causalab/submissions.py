"""Whole submissions to the MIB benchmark: folders of triplets, read and written as collections."""

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
"""The model that the benchmark's evaluator loads for the class that the name of a folder says."""
FOLDER: Final = re.compile(rf"({'|'.join(TASKS)})_({'|'.join(MODELS)})_([\w.-]{{1,100}})", re.ASCII)
PLAIN: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def read(source: ExternalFiles) -> dict[str, Featurizer[Any]]:
    """The featurizers of all units of a source, by folder and name as the subfolders of a collection are called.

    Raises:
        ManifestError, WeightsError: a unit cannot be read, or two would have one name.
    """
    found: dict[str, Featurizer[Any]] = {}
    for name, reader in _readers(source).items():
        if (key := _key(name)) in found:
            raise ManifestError(
                source.where, f"two units would be called {shown(key, 200)}; read their folders one by one"
            )
        found[key] = reader()
    return found


def one(source: ExternalFiles) -> Featurizer[Any] | None:
    """The featurizer of a source that holds one unit; None for one that holds none.

    Raises:
        ManifestError: there are several.
    """
    readers = _readers(source)
    if len(readers) > 1:
        raise ManifestError(
            source.where,
            f"it holds {len(readers)} units of CausalAbstraction: {_listed(readers)}; read them all with "
            "featurizers_causalab.read_submission, or one of the Hub as causalab:owner/name/FOLDER/UNIT",
        )
    return next((reader() for reader in readers.values()), None)


def resolve(reference: str, repository: Callable[..., ExternalFiles]) -> Featurizer[Any]:
    """The featurizer of one unit of a repository: of ``owner/name/FOLDER/UNIT``.

    Raises:
        SourceError: it is not of that form, or the repository has no such unit.
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
    """The featurizers of a submission to the MIB benchmark, or of a folder of causalab, by folder and unit.

    The names are fit for the subfolders of a collection: ``save_collection(read_submission(folder), out)``. The
    features that a unit acts on are its feature set ``selected``; what its names say is in its ``site`` and its
    ``metadata``. Nothing in the folder is run.

    Args:
        source: a folder, or a repository of the Hub, as `featurizers.load` takes them.
        subfolder: a folder in it.
        revision: of a repository.
        token: of the Hub.

    Raises:
        SourceError: the source is neither.
        ManifestError, WeightsError: a unit cannot be read; there is none.
        HubError: the Hub refused or did not answer.
    """
    parsed = parse_source(source, revision)
    if isinstance(parsed, FolderSource):
        foreign = of_folder(parsed.path.expanduser() / (subfolder or ""), None)
    elif isinstance(parsed, HubSource):
        foreign = of_repository(Remote(parsed, subfolder, token), None)
    else:
        raise SourceError(f"{str(source)!r} is an entry of a catalogue; give the folder or the repository")
    found = read(foreign)
    if not found:
        raise ManifestError(foreign.where, "there are no files of CausalAbstraction's units in it")
    return {name: checked(featurizer, foreign) for name, featurizer in found.items()}


def write_submission(featurizers: Mapping[str, Featurizer[Any]], folder: str | Path) -> Path:
    """Write a submission to the MIB benchmark: a triplet for each featurizer, in the folder that its name begins with.

    The name of a unit is the one that it was read with, or that of its site and position.

    Args:
        featurizers: identities and subspaces, by ``FOLDER/ANYTHING`` or ``ANYTHING``.
        folder: a new or an empty one; a writing that fails leaves nothing.

    Raises:
        UsageError: there are none, or two are of one unit.
        ConversionError: CausalAbstraction has no class for one, or no unit for its site.
        ArtefactError: the folder is not empty, or cannot be written.
    """
    if not featurizers:
        raise UsageError("a submission holds at least one featurizer")
    written: dict[str, str] = {}
    with filling(folder) as new:
        for name, featurizer in featurizers.items():
            parts = name.split("/")
            if not all(map(PLAIN.fullmatch, parts)):
                raise UsageError(f"{name!r} is no name of a folder: letters, digits, '.', '_' and '-', joined by '/'")
            path = "/".join([*parts[:-1], unit_of(featurizer, name)])
            if path in written:
                raise UsageError(f"{name!r} and {written[path]!r} are both of the unit {path!r}")
            written[path] = name
            try:
                triplets.write(featurizer, new / path)
            except ConversionError as error:
                raise ConversionError(name, error.problem) from error
    return Path(folder).expanduser()


def unit_of(featurizer: Featurizer[Any], where: str) -> str:
    """The name of a featurizer's unit.

    Raises:
        ConversionError: it has neither a name that could be a file's, nor a site that has one.
    """
    site = featurizer.site
    before = featurizer.metadata.get("causalab")
    unit = before.get("unit") if isinstance(before, dict) else None
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
    """What a triplet cannot hold of a featurizer, beside what is missing in what is read back."""
    site, said = featurizer.site, []
    if site is not None and site.model is not None:
        said.append(f"The model {site.model!r} is not kept; the benchmark takes it from the name of the folder.")
    if featurizer.special_tokens:
        said.append(f"The special tokens {list(featurizer.special_tokens)} are not kept.")
    if other := sorted(featurizer.metadata.keys() - {"causalab"}):
        said.append(f"The metadata {', '.join(map(repr, other))} are not kept.")
    return said


def _readers(source: ExternalFiles) -> dict[str, Callable[[], Featurizer[Any]]]:
    """What reads each unit of a source, by its folder and name; of a bundle all are read at once.

    Raises:
        ManifestError, WeightsError: a bundle cannot be read, or one unit is there twice.
    """
    readers = {name: partial(_triplet, source, name) for name in triplets.names(source)}
    bundled: dict[str, Callable[[], Featurizer[Any]]] = {
        folder + unit: partial(_placed, featurizer, folder + unit)
        for folder in bundles.folders(source)
        for unit, featurizer in bundles.read(source, folder).items()
    }
    if both := sorted(readers.keys() & bundled.keys()):
        raise ManifestError(source.where, f"the unit {shown(both[0], 200)} is in a triplet and in {bundles.UNITS}")
    return {**readers, **bundled}


def _triplet(source: ExternalFiles, name: str) -> Featurizer[Any]:
    return _placed(triplets.read(source, name), name)


def _listed(names: Iterable[str]) -> str:
    first = list(islice(names, 6))
    return ", ".join([*(shown(name, 200) for name in first[:5]), *("…" for _ in first[5:])])


def _key(name: str) -> str:
    """The name of a unit as the subfolder of a collection may be called."""
    words = (re.sub(r"[(,]", ".", part.rstrip(")")) for part in name.split("/"))
    return "/".join(re.sub(r"^\.+|[^A-Za-z0-9._-]", "_", word) for word in words)


def _placed(featurizer: Featurizer[Any], name: str) -> Featurizer[Any]:
    """The featurizer of a unit, with what the folders of the benchmark that its name begins with say."""
    for part in name.split("/")[:-1]:
        if match := FOLDER.fullmatch(part):
            said = {"task": match[1], "model": match[2], "variable": match[3]}
            featurizer.metadata["causalab"] = {**featurizer.metadata["causalab"], **said}
            if featurizer.site is not None:
                featurizer.site = featurizer.site.at(model=MODELS[match[2]])
            break
    return featurizer

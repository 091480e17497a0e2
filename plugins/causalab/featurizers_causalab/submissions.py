"""Whole submissions to the MIB benchmark: folders of triplets, read and written as collections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from featurizers import Featurizer
from featurizers.errors import ConversionError, ManifestError, SourceError, UsageError, shown
from featurizers.foreign import Foreign, checked, of_folder, of_repository
from featurizers.hub import Remote
from featurizers.replacing import filling
from featurizers.sources import FolderSource, HubSource, parse_source

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


def read(source: Foreign) -> dict[str, Featurizer[Any]]:
    """The featurizers of all units of a source, by folder and name as the subfolders of a collection are called.

    Raises:
        ManifestError, WeightsError: a unit cannot be read, or two would have one name.
    """
    found: dict[str, Featurizer[Any]] = {}
    for name in triplets.names(source):
        _add(found, source, name, triplets.read(source, name))
    for folder in bundles.folders(source):
        for unit, featurizer in bundles.read(source, folder).items():
            _add(found, source, f"{folder}{unit}", featurizer)
    return found


def one(source: Foreign) -> Featurizer[Any] | None:
    """The featurizer of a source that holds one unit; None for one that holds none.

    Raises:
        ManifestError: there are several.
    """
    names, folders = triplets.names(source), bundles.folders(source)
    if len(names) + len(folders) == 0:
        return None
    if len(names) == 1 and not folders:
        return _placed(triplets.read(source, names[0]), names[0])
    if len(folders) == 1 and not names:
        found = bundles.read(source, folders[0])
        if len(found) == 1:
            return _placed(next(iter(found.values())), folders[0])
        names = [f"{folders[0]}{unit}" for unit in found]
    listed = ", ".join(shown(name, 200) for name in (names or folders)[:5])
    raise ManifestError(
        source.where,
        f"it holds {len(names) or len(folders)} units of CausalAbstraction: {listed}{', …' if len(names) > 5 else ''}; "
        "read them all with featurizers_causalab.read_submission, or name the folder of one with subfolder=",
    )


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


def _add(found: dict[str, Featurizer[Any]], source: Foreign, name: str, featurizer: Featurizer[Any]) -> None:
    key = "/".join(re.sub(r"[^A-Za-z0-9._-]", "_", re.sub(r"[(,]", ".", part.rstrip(")"))) for part in name.split("/"))
    key = re.sub(r"(^|/)\.+", r"\1_", key)
    if key in found:
        raise ManifestError(source.where, f"two units would be called {shown(key, 200)}; read their folders one by one")
    found[key] = _placed(featurizer, name)


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

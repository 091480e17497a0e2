"""Labels of features from the exports of other programs: Neuronpedia's explanations and runs of delphi."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from featurizers import FeatureSpace, Label, Labels, SiteMap
from featurizers.errors import ArtefactError, UsageError, one_line, shown
from featurizers.files import contained, opened, read_bytes
from featurizers.format import parse_json

MAX_LINE: Final = 1_000_000
"""Bytes of a row of an export, or of a file with one explanation."""
MAX_UNPACKED: Final = 2**32
"""Bytes of all rows of an export."""
MAX_SCORES: Final = 2**26
"""Bytes of the file with the scores of one latent of delphi."""
MAX_FILES: Final = 2_000_000
"""Files of an export."""
MAX_TEXT: Final = 4000
"""Characters that are kept of an explanation."""
UNPARSED: Final = "Explanation could not be parsed."
"""What delphi stores where its language model gave no explanation."""

_LATENT: Final = re.compile(r"(.+)_latent(\d{1,10})\.txt")
_LAYER_OF_MODULE: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d{1,6})(?:\.|$)")
_LAYER_OF_SOURCE: Final = re.compile(r"(\d{1,6})(?:-|$)")


@dataclass(frozen=True)
class _Row:
    """An explanation in an export.

    Attributes:
        place: Neuronpedia's name of the source, or delphi's of the module.
        label: what it says.
    """

    place: str
    label: Label


def import_labels(
    path: str | Path, featurizer: FeatureSpace[Any], *, place: str | None = None, scorer: str | None = None
) -> Labels:
    """Read labels of a featurizer's features from an export of Neuronpedia or a run of delphi.

    Of Neuronpedia: a folder with ``explanations/batch-N.jsonl.gz``, the folder of these files, or one of them, packed
    or not. Of delphi: the folder of a run, with ``explanations/MODULE_latentN.txt`` and maybe ``scores/SCORER/``.
    Identical labels are taken once; explanations that are empty, or that delphi could not parse, are left out. Texts
    are one line of at most 4000 characters, with unprintable characters escaped.

    Args:
        path: of the export.
        featurizer: that the labels are of. Its layer chooses the source or module, if there are several; the groups of
            a map take those of the layers that they read.
        place: the source, such as ``12-gemmascope-res-16k``, or module, such as ``layers.12``, where the layer does not
            tell which.
        scorer: of delphi, whose scores to take, such as ``fuzz``; by default ``detection``, or the only one. The score
            is its accuracy, averaged over the examples with and without the feature.

    Returns:
        The labels, to be assigned to ``featurizer.labels``, which refuses those of features that are not there.

    Raises:
        UsageError: there is no export, it is of other layers, or several of its places fit.
        ArtefactError: a file is damaged, or a link out of the folder; the message names the file and the line.
    """
    path = Path(path).expanduser()
    explanations = path / "explanations"
    folder = explanations if explanations.is_dir() else path
    names = _names(folder)
    batches = [name for name in names if name.endswith((".jsonl", ".jsonl.gz"))]
    latents = [name for name in names if _LATENT.fullmatch(name)]
    if batches and not latents:
        rows = list(_neuronpedia(folder if folder.is_dir() else folder.parent, batches))
    elif latents:
        run = folder.parent if folder.name == "explanations" else folder
        rows = list(_delphi(run, folder, latents, scorer))
    else:
        raise UsageError(
            f"{shown(str(path), 200)} has neither explanations/batch-N.jsonl.gz, as an export of Neuronpedia, nor "
            "explanations/MODULE_latentN.txt, as a run of delphi"
        )
    if scorer is not None and not latents:
        raise UsageError("scorer is for runs of delphi; the rows of Neuronpedia's export have no scores")
    return Labels(dict.fromkeys(_grouped(rows, featurizer, place)))


# ---------------------------------------------------------------------- which place


def _grouped(rows: list[_Row], featurizer: FeatureSpace[Any], place: str | None) -> Iterator[Label]:
    """Yield the labels of the places that belong to the featurizer, each with its group."""
    places = dict.fromkeys(row.place for row in rows)
    if isinstance(featurizer, SiteMap) and len(featurizer.groups) > 1 and place is None:
        groups = _groups_by_layer(featurizer)
        group_of = {each: groups.get(_layer(each)) for each in places}
        chosen = [each for each in places if group_of[each] is not None]
        if not chosen:
            raise UsageError(f"the export is of {_listed(places)}, and {featurizer.id!r} reads none of these layers")
        if len({group_of[each] for each in chosen}) < len(chosen):
            raise UsageError(f"several of {_listed(chosen)} are of one layer; import them one by one, with place=")
    else:
        chosen = [_chosen(places, featurizer, place)]
        by_layer = _groups_by_layer(featurizer) if isinstance(featurizer, SiteMap) else {}
        group_of = {chosen[0]: by_layer.get(_layer(chosen[0]))}
    for row in rows:
        if row.place in chosen:
            yield replace(row.label, group=group_of[row.place])


def _groups_by_layer(site_map: SiteMap[Any]) -> dict[int | None, str]:
    """Return the group of each layer that one group alone reads last."""
    groups: dict[int | None, str] = {}
    for name, group in site_map.groups.items():
        layers = [site_map.reads[read].layer for read in group.reads if read in site_map.reads]
        layer = max((each for each in layers if each is not None), default=None)
        if layer in groups:
            raise UsageError(f"the groups {groups[layer]!r} and {name!r} read one layer, so that a layer names none")
        groups[layer] = name
    return groups


def _chosen(places: Iterable[str], featurizer: FeatureSpace[Any], place: str | None) -> str:
    """Return the one place that is asked for, or that fits the featurizer's layer."""
    places = list(places)
    layers = {site.layer for site in featurizer.sites.values()} - {None}
    if place is not None:
        if place not in places:
            raise UsageError(f"the export is of {_listed(places)}, not of {shown(place)}")
        fitting = [place]
    else:
        fitting = [each for each in places if not layers or _layer(each) in (*layers, None)]
    if not fitting:
        raise UsageError(
            f"the export is of {_listed(places)}, and {featurizer.id!r} belongs to {featurizer.sites_text}; give "
            "place= if they belong together all the same"
        )
    if len(fitting) > 1:
        raise UsageError(f"the export is of {_listed(fitting)}; choose one with place=")
    return fitting[0]


def _layer(place: str) -> int | None:
    """Return the layer in the name of a source or module; None if it names none."""
    found = _LAYER_OF_SOURCE.match(place) or _LAYER_OF_MODULE.search(place)
    return None if found is None else int(found[1])


def _listed(places: Iterable[str]) -> str:
    names = list(places)
    return ", ".join(map(shown, names[:8])) + (", …" if len(names) > 8 else "")


# ---------------------------------------------------------------------- Neuronpedia


def _neuronpedia(folder: Path, names: Iterable[str]) -> Iterator[_Row]:
    """Yield the explanations in files of rows."""
    room = MAX_UNPACKED
    for name in names:
        for number, line in enumerate(_lines(folder / name, str(folder), room), 1):
            room -= len(line)
            if line.strip() and (row := _explanation(line, str(folder), f"line {number} of {name}")) is not None:
                yield row


def _lines(path: Path, where: str, room: int) -> Iterator[bytes]:
    """Yield the lines of a file, unpacked if its name ends in ``.gz``, within bounds."""
    contained(path.parent, path, where, ArtefactError)
    with opened(path, where, ArtefactError) as file:
        stream: Any = gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file
        while True:
            try:
                line = stream.readline(MAX_LINE + 1)
            except (EOFError, OSError, zlib.error) as error:
                raise ArtefactError(where, f"{path.name} cannot be unpacked: {one_line(error)}") from error
            if not line:
                return
            room -= len(line)
            if len(line) > MAX_LINE or room < 0:
                most = MAX_LINE if len(line) > MAX_LINE else MAX_UNPACKED
                what = "a line" if len(line) > MAX_LINE else "the export, unpacked,"
                raise ArtefactError(where, f"{path.name}: {what} is larger than {most} bytes")
            yield line


def _explanation(line: bytes, where: str, name: str) -> _Row | None:
    """Return the explanation in a row; None if its text is empty."""
    data = parse_json(line, where, name, most=MAX_LINE)
    if not isinstance(data, dict) or not {"description", "index", "layer"} <= data.keys():
        raise ArtefactError(where, f"{name} is no explanation: it lacks description, index or layer")
    index, text, layer = (data[key] for key in ("index", "description", "layer"))
    if isinstance(index, str) and re.fullmatch(r"\d{1,10}", index):
        index = int(index)
    if type(index) is not int or not isinstance(text, str) or not isinstance(layer, str):
        raise ArtefactError(where, f"{name} has index {shown(index)}, layer {shown(layer)}, text {shown(text)}")
    author = data.get("explanationModelName") or data.get("typeName") or "neuronpedia"
    return _row(layer, index, text, str(author), None, where, name)


def _row(place: str, feature: int, text: str, author: str, score: float | None, where: str, name: str) -> _Row | None:
    """Return a row whose texts are one line each; None if the text is empty or says that there is none."""
    line = one_line(text, MAX_TEXT)
    if not line or line == UNPARSED:
        return None
    try:
        return _Row(place, Label(feature, line, one_line(author, 200), score))
    except UsageError as error:
        raise ArtefactError(where, f"{name}: {error}") from error


# ---------------------------------------------------------------------- delphi


def _delphi(run: Path, folder: Path, names: Iterable[str], scorer: str | None) -> Iterator[_Row]:
    """Yield the explanations of a run, with the scores of one scorer."""
    author, scores = _explainer(run), _scores_folder(run, scorer)
    for name in names:
        module, number = _LATENT.fullmatch(name).groups()  # type: ignore[union-attr]  # the names were chosen by it
        text = _json(folder / name, MAX_LINE)
        if not isinstance(text, str):
            raise ArtefactError(str(folder), f"{name} holds {shown(text)}, not the text of an explanation")
        score = None
        if scores is not None and (scores / name).exists():
            score = _accuracy(scores / name)
        if (row := _row(module, int(number), text, author, score, str(folder), name)) is not None:
            yield row


def _explainer(run: Path) -> str:
    """Return the language model that explained, which the config of a run names."""
    if not (run / "run_config.json").exists():
        return "delphi"
    config = _json(run / "run_config.json", MAX_LINE)
    model = config.get("explainer_model") if isinstance(config, dict) else None
    return model if isinstance(model, str) and model.strip() else "delphi"


def _scores_folder(run: Path, scorer: str | None) -> Path | None:
    """Return the folder of the scores to take; None if there are no scores."""
    folder = run / "scores"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if scorer is not None and scorer not in names:
        raise UsageError(f"the run has scores of {_listed(names) or 'no scorer'}, not of {shown(scorer)}")
    if scorer is None and len(names) > 1 and "detection" not in names:
        raise UsageError(f"the run has scores of {_listed(names)}; choose one with scorer=")
    if not names:
        return None
    return folder / (scorer or ("detection" if "detection" in names else names[0]))


def _accuracy(path: Path) -> float | None:
    """Return the accuracy of a scorer's answers, averaged over the examples with and without the feature.

    This is the class-balanced accuracy of delphi's own analysis. None without answers of both kinds.
    """
    where, answers = str(path.parent), _json(path, MAX_SCORES)
    right: Mapping[bool, list[bool]] = {True: [], False: []}
    for answer in answers if isinstance(answers, list) else [answers]:
        if not isinstance(answer, dict) or not isinstance(answer.get("activating"), bool):
            raise ArtefactError(where, f"{path.name} has no list of answers with activating and prediction")
        prediction = answer.get("prediction")
        if prediction is not None:
            right[answer["activating"]].append(bool(prediction) == answer["activating"])
    if not all(right.values()):
        return None
    return sum(sum(kind) / len(kind) for kind in right.values()) / 2


def _json(path: Path, most: int) -> Any:
    """Return what a JSON file of at most ``most`` bytes holds."""
    where = str(path.parent)
    raw = read_bytes(contained(path.parent, path, where, ArtefactError), where, ArtefactError, most)
    return parse_json(raw, where, path.name, most=most)


def _names(folder: Path) -> list[str]:
    """Return the names of the files of a folder, in the order of the numbers in them; of a file, its own name."""
    if folder.is_file():
        return [folder.name]
    if not folder.is_dir():
        return []
    names: list[str] = []
    for path in folder.iterdir():
        names.append(path.name)
        if len(names) > MAX_FILES:
            raise UsageError(f"{shown(str(folder), 200)} has more than {MAX_FILES} files")
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])

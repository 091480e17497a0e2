"""Load whole pyvene models that `save_intervenable` wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from featurizers.errors import (
    ArtefactError,
    FeaturizerError,
    ManifestError,
    PluginError,
    UsageError,
    WeightsError,
    explain,
    one_line,
)
from featurizers.features import check_placement
from featurizers.files import contained, recover, resolved
from featurizers.format import (
    INTERVENABLE_NAME,
    INTERVENABLE_WEIGHTS_NAME,
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    Manifest,
    check_header,
    read_header,
    read_tensors,
    verify_weights,
)
from featurizers.hub import FolderSource, HubSource, Remote, parse_source
from featurizers.store import load, manifest_of, plugin_errors, read_unchanged
from pydantic import ValidationError
from torch import Tensor, nn

from featurizers_pyvene.lookup import intervention_class
from featurizers_pyvene.record import FeaturizerRecord, IntervenableRecord, read_record
from featurizers_pyvene.saved_intervention import SavedIntervention, on_meta, own_tensors
from featurizers_pyvene.widths import check_widths

if TYPE_CHECKING:
    from featurizers.features import Featurizer


def load_intervenable(
    source: str | Path,
    model: nn.Module,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
) -> Any:
    """Load a pyvene model that `save_intervenable` wrote, around a given model; its logits are those of the saved one.

    As in `featurizers.load`, no code that the files name is run, and the checksums of all tensors are compared. pyvene
    puts the model in eval mode and freezes its parameters.

    Args:
        source: a folder or a repository, as in `featurizers.load`.
        model: the model that it was saved from, or one like it.
        revision: branch, tag or commit of a repository.
        token: token of the Hub; the stored one if None.
        cache_dir: cache folder for files of the Hub.
        local_files_only: use only the cache.
        device: device of the model and the interventions; if None the model stays where it is, and the interventions
            are put there too.

    Raises:
        ManifestError, WeightsError, ArtefactError: the files are damaged or inconsistent.
        ShapeError: a featurizer is not as wide as its place in the model.
        UsageError: pyvene cannot place an intervention in the model.
        PluginError: no installed plugin registers an intervention or a featurizer.
        HubError: the Hub refused or did not answer.
    """
    check_placement(device, None)
    parsed = parse_source(source, revision)
    target = device if device is not None else next((p.device for p in model.parameters()), None)
    if isinstance(parsed, FolderSource):
        where = str(parsed)
        record, interventions = _read_folder(parsed.path, where, model, target)
    elif isinstance(parsed, HubSource):
        options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        remote = Remote(parsed, **options)
        where, folder = str(remote), remote.file(INTERVENABLE_NAME, most=MAX_CONFIG_BYTES).parent
        record, _ = read_record(folder, where)
        commit = folder.name
        files = _Files(
            where=where,
            collection={"source": f"hub:{parsed.repo_id}", "revision": commit, **options},
            weights=lambda most: remote.file(INTERVENABLE_WEIGHTS_NAME, commit, most),
        )
        interventions = _interventions(record, files, model, target)
    else:
        raise UsageError(f"an intervenable is in a folder or a repository, not in {str(parsed)!r}")
    intervenable = _placed(record, interventions, model, where)
    if device is not None:
        intervenable.set_device(device)
    return intervenable


@dataclass(frozen=True)
class _Files:
    """Files of a saved pyvene model.

    Attributes:
        where: names their source in errors.
        collection: arguments of `load` that name the collection of featurizers.
        weights: returns the local path of ``intervenable.safetensors``, given the most bytes that it may have.
    """

    where: str
    collection: dict[str, Any]
    weights: Callable[[int], Path]


def _read_folder(
    path: Path, where: str, model: nn.Module, device: torch.device | str | None
) -> tuple[IntervenableRecord, list[SavedIntervention]]:
    """Read the record and the interventions of one version of a folder: another program may be saving to it."""
    folder = resolved(path)
    files = _Files(
        where=where,
        collection={"source": path},
        weights=lambda _: contained(folder, folder / INTERVENABLE_WEIGHTS_NAME, where, ArtefactError),
    )

    def read() -> tuple[IntervenableRecord, list[SavedIntervention]]:
        recover(folder)
        contained(folder, folder / INTERVENABLE_NAME, where, ArtefactError)
        record, _ = read_record(folder, where)
        return record, _interventions(record, files, model, device)

    return read_unchanged(folder, (INTERVENABLE_NAME,), read, where)


def _interventions(
    record: IntervenableRecord, files: _Files, model: nn.Module, device: torch.device | str | None
) -> list[SavedIntervention]:
    """Build the interventions of a record, with their featurizers and tensors, for a model."""
    classes = [intervention_class(row.kind) for row in record.interventions]
    featurizers = [_featurizer(entry, files, device) for entry in record.featurizers]
    check_widths(record, featurizers, model, files.where)
    parts: dict[tuple[int, Any], Any] = {}
    interventions: list[Any] = []
    for row, cls in zip(record.interventions, classes, strict=True):
        with _intervention_errors(row.kind, files.where):
            key = row.featurizer, cls.of_featurizer
            if key not in parts:
                parts[key] = cls.of_featurizer(featurizers[row.featurizer])
            interventions.append(on_meta(cls, cls.Config.model_validate(row.config), parts[key]))
    expected = {
        f"{i}.{name}": tensor
        for i, (cls, intervention) in enumerate(zip(classes, interventions, strict=True))
        for name, tensor in own_tensors(cls, intervention).items()
    }
    tensors = _tensors(expected, record, files, device)
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, own = name.partition(".")
        states.setdefault(number, {})[own] = tensor
    for i, (row, intervention) in enumerate(zip(record.interventions, interventions, strict=True)):
        with _intervention_errors(row.kind, files.where):
            intervention.load_state_dict(states.get(str(i), {}), strict=False, assign=True)
            intervention.check()
        if any(tensor.is_meta for tensor in (*intervention.parameters(), *intervention.buffers())):
            raise PluginError(
                f"{files.where}: the intervention {row.kind!r} has tensors that no file holds; tell its author"
            )
    return interventions


@contextmanager
def _intervention_errors(kind: str, where: str) -> Iterator[None]:
    """Turn an error of an intervention's class into a ManifestError, or into a PluginError if the class is at fault."""
    with plugin_errors(f"intervention {kind!r}", where):
        try:
            yield
        except (ArtefactError, PluginError):
            raise
        except (FeaturizerError, ValidationError) as error:
            reason = explain(error) if isinstance(error, ValidationError) else error
            raise ManifestError(where, f"{INTERVENABLE_NAME}: the intervention {kind!r}: {reason}") from error


def _featurizer(entry: FeaturizerRecord, files: _Files, device: torch.device | str | None) -> Featurizer[Any]:
    """Load a featurizer after checking that it is the one that was saved with the record."""
    manifest = manifest_of(**files.collection, subfolder=entry.subfolder)
    if not isinstance(manifest, Manifest) or manifest.sha256 != entry.sha256:
        raise ManifestError(
            files.where,
            f"{entry.subfolder} holds another featurizer than was saved with {INTERVENABLE_NAME}; save the pyvene "
            "model again",
        )
    featurizer: Featurizer[Any] = load(**files.collection, subfolder=entry.subfolder, device=device, verify=True)
    return featurizer


def _tensors(
    expected: dict[str, Tensor], record: IntervenableRecord, files: _Files, device: torch.device | str | None
) -> dict[str, Tensor]:
    """Read the interventions' own tensors after comparing their header with the expected names and shapes."""
    most = 8 * sum(tensor.numel() for tensor in expected.values()) + MAX_HEADER_BYTES
    path = files.weights(most)
    if not path.exists():
        raise WeightsError(files.where, f"{INTERVENABLE_WEIGHTS_NAME} is missing; save the pyvene model again")
    header = read_header(path, files.where, INTERVENABLE_WEIGHTS_NAME)
    names = {"file_name": INTERVENABLE_WEIGHTS_NAME, "config_name": INTERVENABLE_NAME}
    check_header(header, expected, [], files.where, **names)
    verify_weights(path, record.sha256, files.where)
    return read_tensors(path, device, files.where)


def _placed(record: IntervenableRecord, interventions: list[SavedIntervention], model: nn.Module, where: str) -> Any:
    """Build the pyvene model: place the interventions in the model."""
    import pyvene as pv

    representations = [
        {**row.model_dump(exclude={"intervention"}), "intervention": interventions[row.intervention]}
        for row in record.representations
    ]
    try:
        config = pv.IntervenableConfig(representations, mode=record.mode)
        return pv.IntervenableModel(config, model, use_fast=record.use_fast, as_adaptor=record.as_adaptor)
    except Exception as error:  # pyvene looks up the place without checks, so any exception can come
        raise UsageError(
            f"{where}: pyvene cannot place it in a {type(model).__name__}: {type(error).__name__}: {one_line(error)}"
        ) from error

"""Whole pyvene models with registered interventions: saved as JSON and safetensors, loaded to the same logits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
    write_tensors,
)
from featurizers.hub import REPO_ID, FolderSource, HubSource, Remote, parse_source
from featurizers.store import load, manifest_of, plugin_errors, push, read_unchanged, writing_collection
from pydantic import ValidationError
from torch import Tensor, nn

from featurizers_pyvene.lookup import class_of, intervention_class
from featurizers_pyvene.record import (
    FeaturizerRecord,
    IntervenableRecord,
    InterventionRecord,
    ModelRecord,
    RepresentationRecord,
    dump_record,
    read_record,
)
from featurizers_pyvene.saved_intervention import SavedIntervention
from featurizers_pyvene.widths import check_widths

if TYPE_CHECKING:
    from featurizers.features import Featurizer
    from huggingface_hub import CommitInfo

Thing = TypeVar("Thing")


def save_intervenable(intervenable: Any, folder: str | Path) -> Path:
    """Write the interventions of a pyvene model, with their featurizers, and return the folder.

    The folder is a collection of featurizers, each of which `featurizers.load` takes alone, and two files that say
    where they act. A featurizer that several interventions share is stored once. The model is not saved. The new
    folder takes the place of one that was saved there, as a whole; files that are not ours stay.

    Args:
        intervenable: a ``pyvene.IntervenableModel`` whose interventions are registered: the featurizers' own, and
            those of plugins.
        folder: where.

    Raises:
        UsageError: an intervention cannot be saved; nothing was written.
        ArtefactError: the folder holds something else.
        WeightsError: a tensor holds NaN or infinity.
    """
    import pyvene as pv

    if not isinstance(intervenable, pv.IntervenableModel):
        raise UsageError(f"save_intervenable takes a pyvene.IntervenableModel, not a {type(intervenable).__name__}")
    interventions: list[Any] = []
    parts: list[nn.Module] = []
    featurizers: dict[str, Featurizer[Any]] = {}
    rows, others, tensors = [], [], dict[str, Tensor]()
    for key in intervenable.sorted_keys:
        known = len(interventions)
        number = _number(interventions, intervention := intervenable.interventions[key])
        rows.append(_representation(key, intervenable.representations[key], number))
        if number < known:
            continue
        cls = class_of(intervention, key)
        if (part := intervention._modules.get(cls.part)) is None:
            raise UsageError(f"the intervention {key!r} has no {cls.part} yet")
        stored = len(parts)
        if (place := _number(parts, part)) == stored:
            featurizers[f"featurizer-{place}"] = cls.to_featurizer(part)
        config, own = _described(key, cls, intervention, part)
        others.append(InterventionRecord(kind=cls.kind, config=config, featurizer=place))
        tensors |= {f"{number}.{name}": tensor for name, tensor in own.items()}
    with writing_collection(featurizers, folder, (INTERVENABLE_NAME, INTERVENABLE_WEIGHTS_NAME)) as (new, manifests):
        digest = write_tensors(tensors, new / INTERVENABLE_WEIGHTS_NAME, str(folder))
        try:
            record = IntervenableRecord(
                model=_model(intervenable.model),
                mode=intervenable.mode,
                # the model's own is set by any call that names one position
                use_fast=all(intervention.use_fast for intervention in interventions),
                as_adaptor=intervenable.as_adaptor,
                representations=rows,
                interventions=others,
                featurizers=[FeaturizerRecord(subfolder=name, sha256=m.sha256) for name, m in manifests.items()],
                sha256=digest,
            )
        except ValidationError as error:
            raise UsageError(f"the pyvene model cannot be saved: {explain(error)}") from error
        (new / INTERVENABLE_NAME).write_bytes(dump_record(record, str(folder)))
    return Path(folder).expanduser()


def push_intervenable(intervenable: Any, repo_id: str, **options: Any) -> CommitInfo:
    """Save a pyvene model to a repository in one commit; ``options`` are those of `featurizers.push`.

    Raises:
        UsageError: as `save_intervenable`.
        HubError: the Hub refused.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_intervenable(intervenable, Path(scratch) / "intervenable")
        return push(folder, repo_id, **{"commit_message": "Upload intervenable with featurizers", **options})


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
    """The pyvene model that `save_intervenable` wrote, around a model that the caller gives, to the same logits.

    As in `featurizers.load` nothing that is read is run, and the checksums of all tensors are compared. pyvene puts the
    model in eval mode and freezes its parameters.

    Args:
        source: a folder or a repository, as in `featurizers.load`.
        model: the model that it was saved from, or one like it.
        revision: branch, tag or commit of a repository.
        token: of the Hub; the stored one if None.
        cache_dir: where the Hub's files are cached.
        local_files_only: use the cache alone.
        device: where to put the model and the interventions; None leaves the model and puts the others where it is.

    Raises:
        ManifestError, WeightsError, ArtefactError: the files are damaged or inconsistent.
        ShapeError: a featurizer is not as wide as its place in this model.
        UsageError: pyvene cannot place an intervention in this model.
        PluginError: no installed plugin registers an intervention or a featurizer.
        HubError: the Hub refused or did not answer.
    """
    check_placement(device, None)
    parsed = parse_source(source, revision)
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    placed = device if device is not None else next((p.device for p in model.parameters()), None)
    if isinstance(parsed, FolderSource):
        where = str(parsed)
        record, interventions = _of_folder(parsed.path, where, model, placed)
    elif isinstance(parsed, HubSource):
        remote = Remote(parsed, **hub)
        where, folder = str(remote), remote.file(INTERVENABLE_NAME, most=MAX_CONFIG_BYTES).parent
        record, _ = read_record(folder, where)
        at = {"source": f"hub:{parsed.repo_id}", "revision": (commit := folder.name), **hub}
        interventions = _interventions(
            record, where, model, placed, at, lambda most: remote.file(INTERVENABLE_WEIGHTS_NAME, commit, most)
        )
    else:
        raise UsageError(f"an intervenable is in a folder or a repository, not in {str(parsed)!r}")
    intervenable = _placed(record, interventions, model, where)
    if device is not None:
        intervenable.set_device(device)
    return intervenable


# ---------------------------------------------------------------------- saving


def _number(known: list[Thing], thing: Thing) -> int:
    """The place of the very same object in a list, at the end of which it is put if it is not there."""
    for i, other in enumerate(known):
        if other is thing:
            return i
    known.append(thing)
    return len(known) - 1


def _representation(key: str, given: Any, intervention: int) -> RepresentationRecord:
    fields = {name: getattr(given, name) for name in RepresentationRecord.model_fields if name != "intervention"}
    if (partition := fields["subspace_partition"]) is not None:
        fields["subspace_partition"] = [[int(i) for i in part] for part in partition]
    try:
        return RepresentationRecord(**fields, intervention=intervention)
    except ValidationError as error:
        raise UsageError(f"the representation {key!r} cannot be saved: {explain(error)}") from error


def _described(
    key: str, cls: type[SavedIntervention], intervention: Any, part: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of an intervention and its own tensors, from which it can be made again."""
    try:
        config = intervention.get_config()
        made = cls.Config.model_validate(data := config.model_dump(mode="json"))
    except ValidationError as error:
        raise UsageError(f"the intervention {key!r} cannot be saved: {explain(error)}") from error
    own, expected = _own(cls, intervention), _own(cls, _on_meta(cls, made, part))
    if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in expected.items()}:
        raise UsageError(
            f"the intervention {key!r} has the tensors {sorted(own)}, and a new one of its config {sorted(expected)}; "
            "what is set beside the config, such as a source_representation, is not saved"
        )
    return data, own


def _own(cls: type[SavedIntervention], intervention: Any) -> dict[str, Tensor]:
    """The tensors of an intervention that are not its featurizer's."""
    start = f"{cls.part}."
    return {
        name: tensor
        for name, tensor in intervention.state_dict().items()
        if isinstance(tensor, Tensor) and not name.startswith(start)
    }


def _model(model: nn.Module) -> ModelRecord:
    config = getattr(model, "config", None)
    name, revision = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    known = isinstance(name, str) and REPO_ID.fullmatch(name) and not Path(name).exists()
    return ModelRecord(
        class_name=type(model).__name__, id=name if known else None, revision=revision if known else None
    )


# ---------------------------------------------------------------------- loading


def _of_folder(
    path: Path, where: str, model: nn.Module, device: torch.device | str | None
) -> tuple[IntervenableRecord, list[SavedIntervention]]:
    """Read the record and the interventions of one version of a folder: another program may be saving to it."""
    folder = resolved(path)

    def own(_: int) -> Path:
        return contained(folder, folder / INTERVENABLE_WEIGHTS_NAME, where, ArtefactError)

    def read() -> tuple[IntervenableRecord, list[SavedIntervention]]:
        recover(folder)
        contained(folder, folder / INTERVENABLE_NAME, where, ArtefactError)
        record, _ = read_record(folder, where)
        return record, _interventions(record, where, model, device, {"source": path}, own)

    return read_unchanged(folder, (INTERVENABLE_NAME,), read, where)


def _interventions(
    record: IntervenableRecord,
    where: str,
    model: nn.Module,
    device: torch.device | str | None,
    at: dict[str, Any],
    own: Callable[[int], Path],
) -> list[SavedIntervention]:
    """The interventions of a record, with their featurizers and tensors.

    Args:
        record: what to make.
        where: what to call it in an error.
        model: where they will act.
        device: where to put them.
        at: what `load` takes to find a featurizer's collection.
        own: the local path of the interventions' own tensors, of so many bytes at most.
    """
    classes = [intervention_class(row.kind) for row in record.interventions]
    featurizers = [_featurizer(entry, where, device, at) for entry in record.featurizers]
    check_widths(record, featurizers, model, where)
    parts: dict[tuple[int, Any], Any] = {}
    made: list[Any] = []
    for row, cls in zip(record.interventions, classes, strict=True):
        with _intervention_errors(row.kind, where):
            key = row.featurizer, cls.of_featurizer
            if key not in parts:
                parts[key] = cls.of_featurizer(featurizers[row.featurizer])
            made.append(_on_meta(cls, cls.Config.model_validate(row.config), parts[key]))
    expected = {
        f"{i}.{name}": tensor
        for i, (cls, intervention) in enumerate(zip(classes, made, strict=True))
        for name, tensor in _own(cls, intervention).items()
    }
    most = 8 * sum(tensor.numel() for tensor in expected.values()) + MAX_HEADER_BYTES
    tensors = _tensors(own(most), expected, record, where, device)
    for i, (row, intervention) in enumerate(zip(record.interventions, made, strict=True)):
        start = f"{i}."
        with _intervention_errors(row.kind, where):
            state = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
            intervention.load_state_dict(state, strict=False, assign=True)
            intervention.check()
        if any(tensor.is_meta for tensor in (*intervention.parameters(), *intervention.buffers())):
            raise PluginError(f"{where}: the intervention {row.kind!r} has tensors that no file holds; tell its author")
    return made


@contextmanager
def _intervention_errors(kind: str, where: str) -> Iterator[None]:
    """What an intervention's class raises, as an error that names the file, or the class if that is at fault."""
    with plugin_errors(f"intervention {kind!r}", where):
        try:
            yield
        except (ArtefactError, PluginError):
            raise
        except (FeaturizerError, ValidationError) as error:
            reason = explain(error) if isinstance(error, ValidationError) else error
            raise ManifestError(where, f"{INTERVENABLE_NAME}: the intervention {kind!r}: {reason}") from error


def _on_meta(cls: type[SavedIntervention], config: Any, part: Any) -> Any:
    """An intervention whose own tensors have names and shapes, and no values."""
    with torch.device("meta"):
        return cls.from_config(config, part)


def _featurizer(
    entry: FeaturizerRecord, where: str, device: torch.device | str | None, at: dict[str, Any]
) -> Featurizer[Any]:
    manifest = manifest_of(**at, subfolder=entry.subfolder)
    if not isinstance(manifest, Manifest) or manifest.sha256 != entry.sha256:
        raise ManifestError(
            where, f"{entry.subfolder} holds another featurizer than was saved with {INTERVENABLE_NAME}; save it anew"
        )
    return load(**at, subfolder=entry.subfolder, device=device, verify=True)


def _tensors(
    path: Path, expected: dict[str, Tensor], record: IntervenableRecord, where: str, device: torch.device | str | None
) -> dict[str, Tensor]:
    if not path.exists():
        raise WeightsError(where, f"{INTERVENABLE_WEIGHTS_NAME} is missing")
    header = read_header(path, where, INTERVENABLE_WEIGHTS_NAME)
    names = {"file_name": INTERVENABLE_WEIGHTS_NAME, "config_name": INTERVENABLE_NAME}
    check_header(header, expected, [], where, **names)
    verify_weights(path, record.sha256, where)
    return read_tensors(path, device, where)


def _placed(record: IntervenableRecord, interventions: list[SavedIntervention], model: nn.Module, where: str) -> Any:
    """The pyvene model."""
    import pyvene as pv

    representations = [
        {**row.model_dump(exclude={"intervention"}), "intervention": interventions[row.intervention]}
        for row in record.representations
    ]
    try:
        config = pv.IntervenableConfig(representations, mode=record.mode)
        return pv.IntervenableModel(config, model, use_fast=record.use_fast, as_adaptor=record.as_adaptor)
    except Exception as error:  # it looks for the place without checking anything
        raise UsageError(
            f"{where}: pyvene cannot place it in a {type(model).__name__}: {type(error).__name__}: {one_line(error)}"
        ) from error

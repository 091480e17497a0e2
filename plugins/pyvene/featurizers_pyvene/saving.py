"""Save whole pyvene models: their interventions as JSON and safetensors, their featurizers as artefacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import UsageError, explain
from featurizers.files import temporary_folder
from featurizers.format import INTERVENABLE_NAME, INTERVENABLE_WEIGHTS_NAME, write_tensors
from featurizers.hub import REPO_ID
from featurizers.store import push, writing_collection
from pydantic import ValidationError
from torch import Tensor, nn

from featurizers_pyvene.lookup import class_of
from featurizers_pyvene.record import (
    FeaturizerRecord,
    IntervenableRecord,
    InterventionRecord,
    ModelRecord,
    RepresentationRecord,
    dump_record,
)
from featurizers_pyvene.saved_intervention import SavedIntervention, on_meta, own_tensors

if TYPE_CHECKING:
    from featurizers.features import Featurizer
    from huggingface_hub import CommitInfo


def save_intervenable(intervenable: Any, folder: str | Path) -> Path:
    """Write the interventions of a pyvene model, with their featurizers, and return the folder.

    The folder is a collection of featurizers, each of which `featurizers.load` can load by itself, and two files that
    describe the interventions and their places. A featurizer that several interventions share is stored once. The model
    is not saved. A pyvene model that was saved in the folder before is replaced as a whole; other files in it are kept.

    Args:
        intervenable: a ``pyvene.IntervenableModel``. Its interventions must be of registered classes: those of a
            featurizer or of a plugin.
        folder: the folder to write.

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
    representation_records, intervention_records, tensors = [], [], dict[str, Tensor]()
    for key in intervenable.sorted_keys:
        intervention, n_interventions = intervenable.interventions[key], len(interventions)
        index = _index_of(interventions, intervention)
        representation_records.append(_representation(key, intervenable.representations[key], index))
        if index < n_interventions:
            continue
        cls = class_of(intervention, key)
        if (part := intervention._modules.get(cls.part)) is None:
            raise UsageError(f"the intervention {key!r} has no {cls.part} yet; attach one before saving")
        n_parts = len(parts)
        part_index = _index_of(parts, part)
        if part_index == n_parts:
            featurizers[f"featurizer-{part_index}"] = cls.to_featurizer(part)
        config, own = _config_and_tensors(key, cls, intervention, part)
        intervention_records.append(InterventionRecord(kind=cls.kind, config=config, featurizer=part_index))
        tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
    with writing_collection(featurizers, folder, (INTERVENABLE_NAME, INTERVENABLE_WEIGHTS_NAME)) as (new, manifests):
        digest = write_tensors(tensors, new / INTERVENABLE_WEIGHTS_NAME, str(folder))
        try:
            record = IntervenableRecord(
                model=_model(intervenable.model),
                mode=intervenable.mode,
                # a call with one position sets use_fast of the model, but not of its interventions
                use_fast=all(intervention.use_fast for intervention in interventions),
                as_adaptor=intervenable.as_adaptor,
                representations=representation_records,
                interventions=intervention_records,
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
        HubError: the Hub refused or did not answer.
    """
    with temporary_folder() as scratch:
        folder = save_intervenable(intervenable, scratch / "intervenable")
        return push(folder, repo_id, **{"commit_message": "Upload intervenable with featurizers", **options})


def _index_of(objects: list[Any], sought: object) -> int:
    """Return the index of an object in a list, by identity; append it if it is absent."""
    for i, other in enumerate(objects):
        if other is sought:
            return i
    objects.append(sought)
    return len(objects) - 1


def _representation(key: str, representation: Any, intervention: int) -> RepresentationRecord:
    """Convert pyvene's representation to a record; ``intervention`` is the index of its intervention."""
    fields = {
        name: getattr(representation, name) for name in RepresentationRecord.model_fields if name != "intervention"
    }
    if (partition := fields["subspace_partition"]) is not None:
        fields["subspace_partition"] = [[int(i) for i in part] for part in partition]
    try:
        return RepresentationRecord(**fields, intervention=intervention)
    except ValidationError as error:
        raise UsageError(f"the representation {key!r} cannot be saved: {explain(error)}") from error


def _config_and_tensors(
    key: str, cls: type[SavedIntervention], intervention: Any, part: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the own tensors of an intervention, after checking that they suffice to rebuild it."""
    try:
        data = intervention.get_config().model_dump(mode="json")
        config = cls.Config.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"the intervention {key!r} cannot be saved: {explain(error)}") from error
    own, rebuilt = own_tensors(cls, intervention), own_tensors(cls, on_meta(cls, config, part))
    if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in rebuilt.items()}:
        raise UsageError(
            f"the intervention {key!r} has the tensors {sorted(own)}, but one rebuilt from its config has "
            f"{sorted(rebuilt)}; tensors that the config does not imply, such as a source_representation, are not saved"
        )
    return data, own


def _model(model: nn.Module) -> ModelRecord:
    """Describe the model; its id is recorded only if it names a repository of the Hub."""
    config = getattr(model, "config", None)
    name, revision = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    known = isinstance(name, str) and REPO_ID.fullmatch(name) and not Path(name).exists()
    return ModelRecord(
        class_name=type(model).__name__, id=name if known else None, revision=revision if known else None
    )

"""Whole pyvene models with our interventions: made, saved as JSON and safetensors, and loaded to the same logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from featurizers import DictionaryFeaturizer
from featurizers.errors import FeaturizerError, ManifestError, UsageError, WeightsError
from featurizers.files import contained, read_bytes
from featurizers.hub import Remote
from featurizers.manifest import MAX_CONFIG_BYTES, explain, named_folder, parse_json
from featurizers.pushing import push_files
from featurizers.replacing import filling
from featurizers.sources import FolderSource, HubSource, parse_source
from featurizers.weights import check_header, read_header, read_tensors, sha256, write_tensors
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from featurizers_autoencoder.intervention import AutoencoderIntervention, Count, JumpReLUAutoencoderIntervention
from featurizers_autoencoder.layers import (
    SAVED,
    AutoencoderLayer,
    AutoencoderLayerBase,
    JumpReLUAutoencoderLayer,
    SizedLayer,
)

CONFIG_NAME: Final = "intervenable.json"
WEIGHTS_NAME: Final = "intervenable.safetensors"
INTERVENTIONS: dict[str, type[AutoencoderIntervention]] = {
    "autoencoder": AutoencoderIntervention,
    "jumprelu-autoencoder": JumpReLUAutoencoderIntervention,
}
"""What a file may call an intervention; nothing else is looked up."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class AutoencoderRecord(_Record):
    """One autoencoder: its class, by our name of it, and its sizes."""

    kind: str
    input_dim: Count
    latent_dim: Count


class RepresentationRecord(_Record):
    """One place in the model and what is done there.

    Attributes:
        intervention: our name of its class.
        autoencoder: which one of the file; several may share it.
        interchange_dim: as `AutoencoderIntervention.interchange_dim`.
        subspace_partition: every latent of each part.
    """

    layer: Annotated[int, Field(ge=0)] | None
    component: str
    unit: Literal["pos", "h", "h.pos"]
    max_number_of_units: Count
    intervention: str
    autoencoder: Annotated[int, Field(ge=0)]
    interchange_dim: int | list[int] | None = None
    subspace_partition: list[list[int]] | None = None
    group_key: str | int | None = None
    intervention_link_key: str | int | None = None


class IntervenableRecord(_Record):
    """The JSON file, format version 1."""

    library_name: Literal["featurizers"] = "featurizers"
    format: Literal["intervenable"] = "intervenable"
    format_version: Annotated[int, Field(ge=1, le=1)] = 1
    mode: Literal["parallel", "serial"] = "parallel"
    representations: Annotated[list[RepresentationRecord], Field(min_length=1, max_length=10_000)]
    autoencoders: Annotated[list[AutoencoderRecord], Field(min_length=1, max_length=10_000)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def get_intervenable_with_autoencoder(
    model: nn.Module,
    autoencoder: AutoencoderLayerBase | DictionaryFeaturizer,
    interchange_dimensions: int | Sequence[int] | None,
    layer: int,
    *,
    component: str = "block_output",
    max_number_of_units: int = 1,
    device: torch.device | str | None = None,
) -> Any:
    """A pyvene model that interchanges latents of an autoencoder, trained anywhere, at the output of a block.

    Args:
        model: a model that pyvene knows.
        autoencoder: whose weights are copied; a dictionary of the rule relu or jumprelu becomes one.
        interchange_dimensions: which latents; see `AutoencoderIntervention.set_interchange_dim`.
        layer: of the model, from 0.
        component: pyvene's name of the place.
        max_number_of_units: positions of each prompt.
        device: where to put it all; where the model is if None.

    Raises:
        UsageError: a dictionary is none that an autoencoder layer computes.
        FeatureIndexError: the dimensions are no latents.
    """
    import copy

    import pyvene as pv

    if isinstance(autoencoder, DictionaryFeaturizer):
        taken = JumpReLUAutoencoderLayer if autoencoder.config.rule == "jumprelu" else AutoencoderLayer
        own: AutoencoderLayerBase = taken.of_featurizer(autoencoder)
    else:
        own = copy.deepcopy(autoencoder)
    cls = next((c for c in INTERVENTIONS.values() if c.layer is type(own)), AutoencoderIntervention)
    intervention = cls(autoencoder=own)
    intervention.set_interchange_dim(interchange_dimensions)
    config = pv.IntervenableConfig(
        [
            {
                "layer": layer,
                "component": component,
                "unit": "pos",
                "max_number_of_units": max_number_of_units,
                "intervention": intervention,
            }
        ]
    )
    intervenable = pv.IntervenableModel(config, model)
    intervenable.set_device(device or next(model.parameters()).device)
    intervenable.disable_model_gradients()
    return intervenable


def save_intervenable(intervenable: Any, folder: str | Path) -> Path:
    """Write the interventions of a pyvene model, with their autoencoders and dimensions, into a new folder.

    A save that fails leaves nothing. The model itself is not saved. An autoencoder that several share is stored once.

    Raises:
        UsageError: an intervention or an autoencoder is not one of this package's own.
        ArtefactError: the folder is not empty.
        WeightsError: a tensor holds NaN or infinity.
    """
    autoencoders: list[SizedLayer] = []
    records = [
        _record(key, representation, intervenable.interventions[key], autoencoders)
        for key, representation in intervenable.representations.items()
    ]
    tensors = {
        f"{i}.{name}": tensor for i, layer in enumerate(autoencoders) for name, tensor in layer.state_dict().items()
    }
    with filling(folder) as new:
        digest = write_tensors(tensors, new / WEIGHTS_NAME, str(folder))
        record = IntervenableRecord(
            mode=intervenable.mode,
            representations=records,
            autoencoders=[
                AutoencoderRecord(kind=layer.name, input_dim=layer.input_dim, latent_dim=layer.latent_dim)
                for layer in autoencoders
            ],
            sha256=digest,
        )
        (new / CONFIG_NAME).write_text(json.dumps(record.model_dump(), indent=2) + "\n", encoding="utf-8")
    return Path(folder).expanduser()


def _record(key: str, representation: Any, intervention: Any, autoencoders: list[SizedLayer]) -> RepresentationRecord:
    name = next((name for name, cls in INTERVENTIONS.items() if type(intervention) is cls), None)
    if name is None:
        raise UsageError(
            f"the intervention {key!r} is a {type(intervention).__name__}; only those of this package are saved: "
            f"{', '.join(cls.__name__ for cls in INTERVENTIONS.values())}"
        )
    layer = intervention.autoencoder
    if type(layer) not in SAVED.values():
        raise UsageError(
            f"the autoencoder of {key!r} is a {type(layer).__name__}, which no file may name. Register it "
            "as a kind of featurizer, and use its get_interchange_intervention()"
        )
    place = next((i for i, known in enumerate(autoencoders) if known is layer), len(autoencoders))
    if place == len(autoencoders):
        autoencoders.append(layer)
    dims = intervention.interchange_dim
    if representation.unit not in ("pos", "h", "h.pos"):
        raise UsageError(f"the unit of {key!r} is {representation.unit!r}; only pos, h and h.pos are saved")
    return RepresentationRecord(
        layer=representation.layer,
        component=representation.component,
        unit=representation.unit,
        max_number_of_units=int(representation.max_number_of_units),
        intervention=name,
        autoencoder=place,
        interchange_dim=None if dims is None else dims.tolist(),
        subspace_partition=intervention.subspace_partition,
        group_key=representation.group_key,
        intervention_link_key=representation.intervention_link_key,
    )


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
    """The pyvene model that `save_intervenable` wrote, around a model that the caller gives.

    Args:
        source: a folder or a repository, as in `featurizers.load`.
        model: the model it was saved from, or one like it.
        revision: of a repository.
        token: of the Hub.
        cache_dir: where the Hub's files are cached.
        local_files_only: use the cache alone.
        device: where to put the interventions; where the model is if None.

    Raises:
        ManifestError: the JSON is not one of this format.
        WeightsError: the weights are damaged or do not fit it.
        HubError: the Hub refused.
        UsageError: pyvene cannot place an intervention in this model.
    """
    import pyvene as pv

    parsed = parse_source(source, revision)
    if isinstance(parsed, FolderSource):
        folder, where = named_folder(parsed.path, None), str(parsed)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            contained(folder, folder / name, where, ManifestError)
    elif isinstance(parsed, HubSource):
        remote = Remote(parsed, None, token, cache_dir, False, local_files_only)
        folder, where = remote.file(CONFIG_NAME, most=MAX_CONFIG_BYTES).parent, str(remote)
        remote.file(WEIGHTS_NAME, folder.name)
    else:
        raise UsageError(f"an intervenable is in a folder or a repository, not in {str(parsed)!r}")
    record = _read(folder, where)
    device = device or next(model.parameters()).device
    autoencoders = _autoencoders(folder, record, where, device)
    representations: list[dict[str, Any]] = []
    for row in record.representations:
        intervention = INTERVENTIONS[row.intervention](autoencoder=autoencoders[row.autoencoder])
        intervention.subspace_partition = row.subspace_partition  # pyvene would take a part of two for a range
        try:
            intervention.set_interchange_dim(row.interchange_dim)
        except FeaturizerError as error:
            raise ManifestError(where, str(error)) from error
        fields = row.model_dump(exclude={"intervention", "autoencoder", "interchange_dim", "subspace_partition"})
        representations.append({**fields, "intervention": intervention})
    try:
        intervenable = pv.IntervenableModel(pv.IntervenableConfig(representations, mode=record.mode), model)
    except (KeyError, AttributeError, IndexError, ValueError, TypeError) as error:
        raise UsageError(
            f"{where}: pyvene cannot place it in a {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error
    intervenable.set_device(device)
    intervenable.disable_model_gradients()
    return intervenable


def _read(folder: Path, where: str) -> IntervenableRecord:
    raw = read_bytes(folder / CONFIG_NAME, where, ManifestError, MAX_CONFIG_BYTES)
    try:
        record = IntervenableRecord.model_validate(parse_json(raw, where, CONFIG_NAME))
    except ValidationError as error:
        raise ManifestError(where, f"{CONFIG_NAME}: {explain(error)}") from error
    for row in record.representations:
        if row.intervention not in INTERVENTIONS:
            raise ManifestError(
                where, f"the intervention {row.intervention!r} is not known; known are {', '.join(INTERVENTIONS)}"
            )
        if row.autoencoder >= len(record.autoencoders):
            raise ManifestError(where, f"there is no autoencoder {row.autoencoder}; it has {len(record.autoencoders)}")
        latents = record.autoencoders[row.autoencoder].latent_dim
        if outside := [i for part in row.subspace_partition or () for i in part if not 0 <= i < latents]:
            raise ManifestError(where, f"subspace_partition has {outside[0]}, which is none of the {latents} latents")
    if len({row.group_key is None for row in record.representations}) > 1:
        raise ManifestError(where, "some representations have a group_key and others none")
    for layer in record.autoencoders:
        if layer.kind not in SAVED:
            raise ManifestError(where, f"the autoencoder {layer.kind!r} is not known; known are {', '.join(SAVED)}")
    return record


def _autoencoders(folder: Path, record: IntervenableRecord, where: str, device: torch.device | str) -> list[SizedLayer]:
    path = folder / WEIGHTS_NAME
    if not path.exists():
        raise WeightsError(where, f"{WEIGHTS_NAME} is missing")
    with torch.device("meta"):
        layers = [SAVED[layer.kind](layer.input_dim, layer.latent_dim) for layer in record.autoencoders]
    expected = {f"{i}.{name}": tensor for i, layer in enumerate(layers) for name, tensor in layer.state_dict().items()}
    check_header(read_header(path, where, WEIGHTS_NAME), expected, [], where)
    if (found := sha256(path, where)) != record.sha256:
        raise WeightsError(where, f"{WEIGHTS_NAME} has sha256 {found}, but {CONFIG_NAME} says {record.sha256}")
    tensors: dict[str, Tensor] = read_tensors(path, device, where)
    for i, layer in enumerate(layers):
        start = f"{i}."
        own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        layer.load_state_dict(own, assign=True)
    return layers


def push_intervenable(intervenable: Any, repo_id: str, **options: Any) -> Any:
    """Save an intervenable to a repository in one commit; ``options`` are those of `featurizers.pushing.push_files`.

    Raises:
        UsageError: as `save_intervenable`.
        HubError: the Hub refused.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        folder = save_intervenable(intervenable, Path(scratch) / "intervenable")
        files = {name: folder / name for name in (CONFIG_NAME, WEIGHTS_NAME)}
        return push_files(files, repo_id, **options)

"""Schema, reader and writer of `intervenable.json`. Reading it imports neither torch nor pyvene."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from featurizers.errors import ManifestError
from featurizers.format import INTERVENABLE_NAME, MAX_CONFIG_BYTES, Name, Subfolder, read_companion
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

FORMAT_VERSION: Final = 1
MAX_ENTRIES: Final = 10_000
"""Most places, interventions or featurizers that a file may have."""
COMPONENT: Final = re.compile(r"\w+(\[\d+\])*(\.\w+(\[\d+\])*)*", re.ASCII)


def _component(text: str) -> str:
    if not COMPONENT.fullmatch(text) or "__" in text:
        raise ValueError("a component is a name of pyvene's, or a path such as transformer.h[1].output")
    return text


Count = Annotated[int, Field(gt=0, le=2**31)]
Number = Annotated[int, Field(ge=0, lt=MAX_ENTRIES)]
Key = Annotated[int, Field(ge=-(2**31), le=2**31)] | Name
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ModelRecord(_Record):
    """Model that the pyvene model was saved from; for information only."""

    class_name: Name
    id: Name | None = None
    revision: Name | None = None


class RepresentationRecord(_Record):
    """Place in the model: the fields of pyvene's ``RepresentationConfig`` that are data.

    Attributes:
        intervention: index of the intervention in the file; several places may share it.
        group_key: places with the same key take their sources from one input.
        intervention_link_key: places with the same key share one intervention.
        subspace_partition: as it was given to pyvene; not used, the intervention's own partition is.
    """

    layer: Annotated[int, Field(ge=0, le=100_000)] | None = None
    component: Annotated[str, Field(max_length=256), AfterValidator(_component)]
    unit: Literal["pos", "h", "h.pos"]
    max_number_of_units: Count
    intervention: Number
    group_key: Key | None = None
    intervention_link_key: Key | None = None
    moe_key: Key | None = None
    low_rank_dimension: Count | None = None
    latent_dim: Count | None = None
    subspace_partition: list[list[int]] | None = None


class InterventionRecord(_Record):
    """Intervention: its class, arguments and featurizer.

    Attributes:
        kind: registered name of its class; looked up among the installed plugins only.
        config: its arguments; the class's ``Config`` validates them.
        featurizer: index of the featurizer in the file; several interventions may share it.
    """

    kind: Annotated[str, Field(max_length=128)]
    config: dict[str, Any]
    featurizer: Number


class FeaturizerRecord(_Record):
    """Featurizer, stored as an artefact in the same folder.

    Attributes:
        subfolder: its subfolder.
        sha256: checksum of its ``model.safetensors``.
    """

    subfolder: Subfolder
    sha256: Sha256


class IntervenableRecord(_Record):
    """Content of the file, format version 1.

    Attributes:
        model: model that it was saved from, if known.
        mode: pyvene's mode, parallel or serial.
        use_fast: pyvene's option: positions are the same for each example of a batch.
        as_adaptor: pyvene's option: interventions also receive the input of the module.
        representations: the places, in the order in which sources and positions are given.
        sha256: checksum of ``intervenable.safetensors``, which holds the interventions' own tensors.
    """

    library_name: Literal["featurizers"] = "featurizers"
    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
    model: ModelRecord | None = None
    mode: Literal["parallel", "serial"]
    use_fast: bool
    as_adaptor: bool = False
    representations: Annotated[list[RepresentationRecord], Field(min_length=1, max_length=MAX_ENTRIES)]
    interventions: Annotated[list[InterventionRecord], Field(min_length=1, max_length=MAX_ENTRIES)]
    featurizers: Annotated[list[FeaturizerRecord], Field(min_length=1, max_length=MAX_ENTRIES)]
    sha256: Sha256

    @model_validator(mode="after")
    def _refer(self) -> Self:
        """Check that every index refers to an entry, and that groups and links are valid for pyvene."""
        linked: dict[Any, int] = {}
        for i, row in enumerate(self.representations):
            if row.intervention >= len(self.interventions):
                raise ValueError(f"there is no intervention {row.intervention}; there are {len(self.interventions)}")
            key = row.intervention_link_key
            if key is not None and linked.setdefault(key, row.intervention) != row.intervention:
                raise ValueError(
                    f"representation {i} has the intervention {row.intervention}, but is linked to a place that has "
                    f"{linked[key]}; linked places share an intervention"
                )
        for intervention in self.interventions:
            if intervention.featurizer >= len(self.featurizers):
                raise ValueError(f"there is no featurizer {intervention.featurizer}; there are {len(self.featurizers)}")
        unused = set(range(len(self.interventions))) - {row.intervention for row in self.representations}
        if unused:
            raise ValueError(f"the intervention {min(unused)} is at no place; a file names those that are used")
        if len({entry.subfolder for entry in self.featurizers}) < len(self.featurizers):
            raise ValueError("two featurizers are in one subfolder; give each its own")
        groups: list[Any] = [row.group_key for row in self.representations]
        if len({type(key) for key in groups}) > 1 or (groups[0] is not None and groups != sorted(groups)):
            raise ValueError("group_key is given to all representations, as numbers or as strings in order, or to none")
        return self


def read_record(folder: Path, where: str) -> tuple[IntervenableRecord, bytes]:
    """Read the record of a folder; return it and the bytes that it was read from.

    Raises:
        ManifestError: the file is malformed, or was written by a newer version.
    """
    return read_companion(folder, where, IntervenableRecord)


def dump_record(record: IntervenableRecord, where: str) -> bytes:
    """Serialise the record as JSON, with each list of numbers on one line.

    Raises:
        ManifestError: the file would be larger than a reader accepts.
    """
    text = json.dumps(record.model_dump(exclude_none=True), indent=2, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\n[\s\d,-]+\]", lambda match: "[" + ", ".join(re.findall(r"-?\d+", match[0])) + "]", text)
    raw = f"{text}\n".encode()
    if len(raw) > MAX_CONFIG_BYTES:
        raise ManifestError(where, f"{INTERVENABLE_NAME} would be larger than {MAX_CONFIG_BYTES} bytes")
    return raw

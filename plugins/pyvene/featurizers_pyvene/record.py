"""`intervenable.json`: what a saved pyvene model says of itself. Reading it imports neither torch nor pyvene."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from featurizers.errors import ManifestError
from featurizers.format import INTERVENABLE_NAME, MAX_CONFIG_BYTES, Name, Subfolder, read_companion
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

FORMAT_VERSION: Final = 1
MOST: Final = 10_000
"""How many places, interventions or featurizers a file may have."""
COMPONENT: Final = re.compile(r"\w+(\[\d+\])*(\.\w+(\[\d+\])*)*", re.ASCII)


def _component(text: str) -> str:
    if not COMPONENT.fullmatch(text) or "__" in text:
        raise ValueError("a component is a name of pyvene's, or a path such as transformer.h[1].output")
    return text


Count = Annotated[int, Field(gt=0, le=2**31)]
Number = Annotated[int, Field(ge=0, lt=MOST)]
Key = Annotated[int, Field(ge=-(2**31), le=2**31)] | Name
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ModelRecord(_Record):
    """The model that an intervenable was saved from; for people."""

    class_name: Name
    id: Name | None = None
    revision: Name | None = None


class RepresentationRecord(_Record):
    """One place in the model: pyvene's ``RepresentationConfig`` without what is no data.

    Attributes:
        intervention: which one of the file; several places may share it.
        group_key: places of one group take their sources from one input.
        intervention_link_key: places of one key share one intervention.
        subspace_partition: as pyvene was given it; what counts is the intervention's.
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
    """One intervention.

    Attributes:
        kind: registered name of its class; looked up among the installed plugins and nowhere else.
        config: its arguments, which the class's ``Config`` validates.
        featurizer: which one of the file; several interventions may share it.
    """

    kind: Annotated[str, Field(max_length=128)]
    config: dict[str, Any]
    featurizer: Number


class FeaturizerRecord(_Record):
    """One featurizer, an artefact in the same folder.

    Attributes:
        subfolder: where.
        sha256: of its ``model.safetensors``.
    """

    subfolder: Subfolder
    sha256: Sha256


class IntervenableRecord(_Record):
    """The whole file, format version 1.

    Attributes:
        model: what it was saved from, if known.
        mode: of the run, pyvene's.
        use_fast: pyvene's: positions are the same for each example of a batch.
        as_adaptor: pyvene's: interventions are given what the module was given.
        representations: in the order in which sources and positions are given.
        sha256: of ``intervenable.safetensors``, the tensors that are the interventions' own.
    """

    library_name: Literal["featurizers"] = "featurizers"
    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
    model: ModelRecord | None = None
    mode: Literal["parallel", "serial"]
    use_fast: bool
    as_adaptor: bool = False
    representations: Annotated[list[RepresentationRecord], Field(min_length=1, max_length=MOST)]
    interventions: Annotated[list[InterventionRecord], Field(min_length=1, max_length=MOST)]
    featurizers: Annotated[list[FeaturizerRecord], Field(min_length=1, max_length=MOST)]
    sha256: Sha256

    @model_validator(mode="after")
    def _refer(self) -> Self:
        """Every number names something, and groups and links are as pyvene takes them."""
        linked: dict[Any, int] = {}
        for i, row in enumerate(self.representations):
            if row.intervention >= len(self.interventions):
                raise ValueError(f"there is no intervention {row.intervention}; there are {len(self.interventions)}")
            key = row.intervention_link_key
            if key is not None and linked.setdefault(key, row.intervention) != row.intervention:
                raise ValueError(
                    f"representation {i} has the intervention {row.intervention}, but is linked to one that has "
                    f"{linked[key]}; linked places share one"
                )
        for other in self.interventions:
            if other.featurizer >= len(self.featurizers):
                raise ValueError(f"there is no featurizer {other.featurizer}; there are {len(self.featurizers)}")
        if len({entry.subfolder for entry in self.featurizers}) < len(self.featurizers):
            raise ValueError("two featurizers are in one subfolder")
        groups: list[Any] = [row.group_key for row in self.representations]
        if len({type(key) for key in groups}) > 1 or (groups[0] is not None and groups != sorted(groups)):
            raise ValueError("group_key is given to all representations, as numbers or as strings in order, or to none")
        return self


def read_record(folder: Path, where: str) -> tuple[IntervenableRecord, bytes]:
    """Read the record of a folder, and return it with the bytes that it was read from.

    Raises:
        ManifestError: the file is malformed, or was written by a newer version.
    """
    return read_companion(folder, where, IntervenableRecord)


def dump_record(record: IntervenableRecord, where: str) -> bytes:
    """The bytes of the file; each list of numbers is on one line.

    Raises:
        ManifestError: it would be too large to be read again.
    """
    text = json.dumps(record.model_dump(exclude_none=True), indent=2, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\n[\s\d,-]+\]", lambda found: "[" + ", ".join(re.findall(r"-?\d+", found[0])) + "]", text)
    raw = f"{text}\n".encode()
    if len(raw) > MAX_CONFIG_BYTES:
        raise ManifestError(where, f"{INTERVENABLE_NAME} would be larger than {MAX_CONFIG_BYTES} bytes")
    return raw

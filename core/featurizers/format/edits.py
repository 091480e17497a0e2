"""Edits as data: operations through a featurizer in JSON, in artefacts and in requests of servers."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from featurizers.errors import ManifestError, explain, one_line
from featurizers.format.manifest import Manifest

KEY: Final = "feature_edits"
"""Key in the metadata of an artefact that has edits."""
MAX_EDITS: Final = 64
"""Most edits of an artefact."""

Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
Place: TypeAlias = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Numbers: TypeAlias = Number | list[Number]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Rows: TypeAlias = Annotated[list[Annotated[list[Number], Field(min_length=1)]], Field(min_length=1)]
SourceDtype: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]


class EditSpec(BaseModel):
    """One operation.

    Attributes:
        site: at which it acts.
        featurizer: id of the featurizer that it goes through.
        revision: of that featurizer; of a server, it may be left out if the server has one featurizer of this id.
        indices: features to edit, all if left out.
        positions: tokens of the prompt to edit, negative from its end; all tokens if left out.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    site: Name
    featurizer: Name
    revision: Name | None = None
    indices: list[int] | None = None
    positions: Annotated[list[Place], Field(min_length=1)] | None = None


class SteerSpec(EditSpec):
    """`featurizers.Steer`; ``delta`` is a number, or one for each feature."""

    do: Literal["steer"]
    delta: Numbers


class AblateSpec(EditSpec):
    """`featurizers.Ablate`; ``value`` is a number, or one for each feature."""

    do: Literal["ablate"]
    value: Numbers = 0.0


class SourcedSpec(EditSpec):
    """Operation that takes features from a source, and acts on the prompt alone.

    Attributes:
        features: those of the source, which servers take.
        source: its activations, a row for each position or one for all, which artefacts hold.
        source_dtype: dtype of the activations.
    """

    features: Numbers | None = None
    source: Rows | None = None
    source_dtype: SourceDtype = "float32"

    @model_validator(mode="after")
    def _one_source(self) -> SourcedSpec:
        if (self.features is None) == (self.source is None):
            raise ValueError("give the source as features or as source, its activations")
        if self.source is not None and len({len(row) for row in self.source}) > 1:
            raise ValueError("the rows of the source have different widths")
        return self


class InterchangeSpec(SourcedSpec):
    """`featurizers.Interchange`."""

    do: Literal["interchange"]


class MaskSpec(SourcedSpec):
    """`featurizers.Mask`; ``gate`` is from 0 to 1."""

    do: Literal["mask"]
    gate: Share | list[Share]


AnySpec: TypeAlias = Annotated[SteerSpec | AblateSpec | InterchangeSpec | MaskSpec, Field(discriminator="do")]


class EditsRecord(BaseModel):
    """Several operations, in the order in which those of one site are made.

    Attributes:
        version: of this form.
        edits: the operations.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: Literal[1]
    edits: Annotated[list[AnySpec], Field(max_length=1000)]


def record_in(manifest: Manifest, where: str) -> EditsRecord | None:
    """Return the edits that a manifest holds; None if it holds none.

    Raises:
        ManifestError: they are malformed.
    """
    record = manifest.metadata.get(KEY)
    if record is None:
        return None
    try:
        edits = EditsRecord.model_validate(record)
    except ValidationError as error:
        raise ManifestError(where, f"metadata.{KEY} does not describe edits: {explain(error)}") from error
    if len(edits.edits) > MAX_EDITS:
        raise ManifestError(
            where, f"metadata.{KEY} has {len(edits.edits)} edits; an artefact holds {MAX_EDITS} at most"
        )
    return edits


def in_words(spec: AnySpec) -> str:
    """Return what an edit does, in one line."""
    match spec:
        case SteerSpec(delta=value):
            what = f"by {_few(value)}"
        case AblateSpec(value=value):
            what = f"to {_few(value)}"
        case MaskSpec(gate=value):
            what = f"by {_few(value)} towards a stored source"
        case _:
            what = "from a stored source"
    of = "all features" if spec.indices is None else f"feature {_few(spec.indices)}"
    where = "every token" if spec.positions is None else f"the token {_few(spec.positions)}"
    return one_line(f"{spec.do} {of} {what} at {spec.site}, {where}")


def _few(values: float | list[float] | list[int]) -> str:
    """Return the first values of a list."""
    listed = values if isinstance(values, list) else [values]
    return ", ".join(f"{value:g}" for value in listed[:4]) + (f", … ({len(listed)})" if len(listed) > 4 else "")

"""Form of the edits in a request: versioned JSON, checked strictly, with numbers and names of the operator alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from featurizers.errors import FeaturizerError, explain, shown
from featurizers.format import parse_json
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from featurizers_vllm.errors import RequestError

ARGUMENT: Final = "featurizers"
"""Key of the JSON in ``SamplingParams.extra_args``, and in ``vllm_xargs`` over HTTP."""
MOST_BYTES: Final = 1_000_000
"""Longest JSON of a request."""

Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]
Place: TypeAlias = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Numbers: TypeAlias = Number | list[Number]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class EditSpec(BaseModel):
    """One operation of a request.

    Attributes:
        site: an armed site.
        featurizer: id in the operator's list.
        revision: its revision there; may be left out if the list has one featurizer of this id.
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


class InterchangeSpec(EditSpec):
    """`featurizers.Interchange`; ``features`` are those of the source. It acts on the prompt alone."""

    do: Literal["interchange"]
    features: Numbers


class MaskSpec(EditSpec):
    """`featurizers.Mask`; ``features`` are those of the source, ``gate`` is from 0 to 1. On the prompt alone."""

    do: Literal["mask"]
    features: Numbers
    gate: Share | list[Share]


AnySpec: TypeAlias = Annotated[SteerSpec | AblateSpec | InterchangeSpec | MaskSpec, Field(discriminator="do")]


class RequestSpec(BaseModel):
    """The edits of a request, in the order in which those of one site are made.

    Attributes:
        version: of this form.
        edits: the operations.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: Literal[1]
    edits: list[AnySpec]


def given(arguments: Mapping[str, Any] | None) -> str | None:
    """Return the JSON in the extra arguments of a request; None if it has no edits.

    Raises:
        RequestError: the JSON is no string, or stands under a key that is misspelt.
    """
    for key in arguments or {}:
        if key != ARGUMENT and key.lower().replace("_", "").startswith("featurizer"):
            raise RequestError(f"the edits of a request stand under {ARGUMENT!r}, not under {shown(key)}")
    raw = (arguments or {}).get(ARGUMENT)
    if raw is not None and not isinstance(raw, str):
        raise RequestError(f"{ARGUMENT!r} is a string of JSON, not {type(raw).__name__}; write json.dumps(...)")
    return raw


def parse(raw: str) -> RequestSpec:
    """Return the edits of a request.

    Raises:
        RequestError: the JSON is malformed, or says something that this version does not know.
    """
    try:
        return RequestSpec.model_validate(
            parse_json(raw.encode("utf-8", "surrogatepass"), ARGUMENT, "the JSON", most=MOST_BYTES)
        )
    except ValidationError as error:
        raise RequestError(f"{ARGUMENT}: {explain(error)}") from error
    except FeaturizerError as error:
        raise RequestError(str(error)) from error

"""Form of the edits in a request: versioned JSON, checked strictly, with numbers and names of the operator alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from featurizers.errors import FeaturizerError, explain, shown
from featurizers.format import EditsRecord, parse_json
from pydantic import ValidationError

from featurizers_vllm.errors import RequestError

ARGUMENT: Final = "featurizers"
"""Key of the JSON in ``SamplingParams.extra_args``, and in ``vllm_xargs`` over HTTP."""
MOST_BYTES: Final = 1_000_000
"""Longest JSON of a request."""

RequestSpec: TypeAlias = EditsRecord
"""The edits of a request, in the form in which artefacts hold edits too; a source is given by its features."""


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

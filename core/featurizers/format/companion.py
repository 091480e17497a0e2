"""Companion record: `intervenable.json`, which may accompany the index of a collection, with tensors of its own.

`featurizers-pyvene` writes and reads it. The core only copies it with the collection and compares checksums, and needs
neither that plugin nor pyvene for this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from featurizers.errors import ManifestError, explain, shown
from featurizers.files.regular import read_bytes
from featurizers.format.manifest import INTERVENABLE_NAME, LIBRARY_NAME, MAX_CONFIG_BYTES, Subfolder, parse_json

FORMAT_VERSION: Final = 1
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CompanionPart(BaseModel):
    """Featurizer that a companion record refers to, an artefact of the same collection.

    Attributes:
        subfolder: folder of the artefact within the collection.
        sha256: checksum of its ``model.safetensors``.
    """

    model_config = ConfigDict(strict=True)

    subfolder: Subfolder
    sha256: Sha256


class Companion(BaseModel):
    """Keys of a companion record that the core reads; the others belong to the plugin.

    Attributes:
        featurizers: the featurizers that the record refers to.
        sha256: checksum of ``intervenable.safetensors``.
    """

    model_config = ConfigDict(strict=True)

    featurizers: Annotated[list[CompanionPart], Field(min_length=1, max_length=10_000)]
    sha256: Sha256


Record = TypeVar("Record", bound=BaseModel)


def read_companion(folder: Path, where: str, schema: type[Record]) -> tuple[Record, bytes]:
    """Read the companion record of a collection.

    Args:
        folder: holds ``intervenable.json``.
        where: name of the collection in errors.
        schema: `Companion`, or a plugin's model of the whole file.

    Returns:
        The validated record, and the bytes that it was read from.

    Raises:
        ManifestError: the file is malformed, or was written by a newer version.
    """
    raw = read_bytes(folder / INTERVENABLE_NAME, where, ManifestError, MAX_CONFIG_BYTES)
    data = parse_json(raw, where, INTERVENABLE_NAME)
    if not isinstance(data, dict) or data.get("library_name") != LIBRARY_NAME:
        raise ManifestError(where, f'{INTERVENABLE_NAME} lacks "library_name": "{LIBRARY_NAME}"')
    version = data.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ManifestError(
            where,
            f"{INTERVENABLE_NAME} has format_version {shown(version)}, and this version of featurizers reads up to "
            f"{FORMAT_VERSION}. Upgrade with: pip install -U featurizers",
        )
    try:
        return schema.model_validate(data), raw
    except ValidationError as error:
        raise ManifestError(where, f"{INTERVENABLE_NAME}: {explain(error)}") from error

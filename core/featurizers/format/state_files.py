"""State that programs keep between runs: tensors with JSON in one safetensors file, or JSON alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from pydantic import BaseModel, ValidationError

from featurizers.errors import ArtefactError, explain, one_line, shown
from featurizers.files.regular import read_bytes
from featurizers.files.replacement import replacing_file
from featurizers.format.manifest import MAX_CONFIG_BYTES, parse_json
from featurizers.format.weights import read_header_and_metadata, read_tensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

KEY: Final = "featurizers"
"""Name of the JSON in the metadata of a state file, unless another one is asked for."""

UNFINISHED: Final = re.compile(r"\.[^\n]{1,100}\.[0-9a-f]{32}")

RecordT = TypeVar("RecordT", bound=BaseModel)


def write_state(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    format: str | None,
    version: int | None = None,
    key: str = KEY,
) -> None:
    """Write tensors and JSON to one safetensors file, replaced as a whole.

    After a crash at any point the old or the new file is intact. Tensors may hold NaN and infinity.

    Args:
        path: of the file, in a folder that exists.
        tensors: by name, on any device.
        about: JSON object to write beside them; it may not have the keys ``format`` and ``version``.
        format: name of the format, written as ``format``; None to write neither it nor a version.
        version: of the format, written as ``version``.
        key: name of the JSON in the metadata of the file.

    Raises:
        ArtefactError: the file cannot be written, or could not be read again.
    """
    path = Path(path)
    text = _dumped(about, format, version, str(path), indent=None)
    with replacing_file(path) as new:
        save_tensors(tensors, new, str(path), {key: text})


@overload
def read_state(
    path: Path | str,
    *,
    format: str | None,
    version: int | None = ...,
    schema: None = ...,
    key: str = ...,
    expected: str | None = ...,
) -> tuple[dict[str, Tensor], dict[str, Any]]: ...
@overload
def read_state(
    path: Path | str,
    *,
    format: str | None,
    version: int | None = ...,
    schema: type[RecordT],
    key: str = ...,
    expected: str | None = ...,
) -> tuple[dict[str, Tensor], RecordT]: ...
def read_state(
    path: Path | str,
    *,
    format: str | None,
    version: int | None = None,
    schema: type[RecordT] | None = None,
    key: str = KEY,
    expected: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any] | RecordT]:
    """Read what `write_state` wrote; the header is checked before any tensor is read.

    Args:
        path: of the file.
        format: the only format accepted; None for files that name none.
        version: the only version accepted.
        schema: model that validates the JSON, without ``format`` and ``version``; None for no check.
        key: name of the JSON in the metadata of the file.
        expected: noun for what the file should be, which begins each error, such as ``captured activations``.

    Returns:
        The tensors by name on the CPU, and the JSON without ``format`` and ``version``, as a ``schema`` if given.

    Raises:
        ArtefactError: the file is no regular file, is damaged, or is of another format or version.
    """
    path = Path(path)
    with _expecting(str(path), expected, format):
        _, metadata = read_header_and_metadata(path, str(path), path.name)
        if key not in metadata:
            raise ArtefactError(str(path), f"its header has no metadata {key!r}")
        about = _parsed(metadata[key].encode(), path, f"metadata {key!r}", format, version, schema)
        return read_tensors(path, None, str(path), allow_nonfinite=True), about


def write_json(
    path: Path | str, data: Mapping[str, Any], *, format: str | None = None, version: int | None = None
) -> None:
    """Write a JSON object to a file, replaced as a whole, for `read_json`.

    Args:
        path: of the file, in a folder that exists.
        data: strict JSON of at most 1 MB: no NaN or infinity.
        format: as in `write_state`.
        version: as in `write_state`.

    Raises:
        ArtefactError: the file cannot be written, or could not be read again.
    """
    path = Path(path)
    text = _dumped(data, format, version, str(path), indent=2)
    with replacing_file(path) as new:
        new.write_text(f"{text}\n", encoding="utf-8")


@overload
def read_json(
    path: Path | str,
    *,
    format: str | None = ...,
    version: int | None = ...,
    schema: None = ...,
    expected: str | None = ...,
) -> dict[str, Any]: ...
@overload
def read_json(
    path: Path | str,
    *,
    format: str | None = ...,
    version: int | None = ...,
    schema: type[RecordT],
    expected: str | None = ...,
) -> RecordT: ...
def read_json(
    path: Path | str,
    *,
    format: str | None = None,
    version: int | None = None,
    schema: type[RecordT] | None = None,
    expected: str | None = None,
) -> dict[str, Any] | RecordT:
    """Read a file that holds one JSON object, strictly: no repeated key, no NaN, not large, not deep.

    Args:
        path: of the file.
        format: as in `read_state`.
        version: as in `read_state`.
        schema: as in `read_state`.
        expected: as in `read_state`.

    Raises:
        ArtefactError: the file is no regular file, is damaged, or is of another format or version.
    """
    path = Path(path)
    with _expecting(str(path), expected, format):
        raw = read_bytes(path, str(path), ArtefactError, MAX_CONFIG_BYTES)
        return _parsed(raw, path, path.name, format, version, schema)


def is_unfinished(path: Path) -> bool:
    """Return whether a path has the name of a file that `write_state` or `write_json` was killed while writing."""
    return UNFINISHED.fullmatch(path.name) is not None


def _dumped(about: Mapping[str, Any], format: str | None, version: int | None, where: str, indent: int | None) -> str:
    """Return the JSON text of an object with its format and version."""
    named = {} if format is None else {"format": format, "version": version}
    if repeated := named.keys() & about.keys():
        raise ArtefactError(where, f"the keys {', '.join(sorted(repeated))} are written by this function; rename them")
    try:
        text = json.dumps({**named, **about}, indent=indent, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtefactError(where, f"cannot be written as JSON: {one_line(error)}") from error
    parse_json(text.encode(), where, "its JSON")  # what could not be read again is not written
    return text


def _parsed(
    raw: bytes, path: Path, name: str, format: str | None, version: int | None, schema: type[RecordT] | None
) -> dict[str, Any] | RecordT:
    """Return the checked JSON object, without its format and version."""
    where = str(path)
    about = parse_json(raw, where, name)
    if not isinstance(about, dict):
        raise ArtefactError(where, f"{name} is not a JSON object")
    if format is not None:
        stored_format, stored_version = about.pop("format", None), about.pop("version", None)
        if stored_format != format:
            raise ArtefactError(where, f"{name} has the format {shown(stored_format)}, not {format!r}")
        if type(stored_version) is not type(version) or stored_version != version:
            text = f"{name} has version {shown(stored_version)}; this release reads version {version}"
            raise ArtefactError(where, text)
    if schema is None:
        return about
    try:
        # as JSON, so that a strict schema takes lists for tuples
        return schema.model_validate_json(json.dumps(about))
    except ValidationError as error:
        raise ArtefactError(where, f"{name}: {explain(error)}") from error


@contextmanager
def _expecting(where: str, expected: str | None, format: str | None) -> Iterator[None]:
    """Begin each error with what was expected."""
    what = expected or (f"a file of the format {format}" if format else "a JSON object")
    try:
        yield
    except ArtefactError as error:
        raise ArtefactError(where, f"expected {what}: {error.problem}") from error

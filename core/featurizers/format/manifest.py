"""Read and write `config.json`, the description of an artefact. Imports neither torch nor a plugin."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from featurizers.errors import ManifestError, NotOursError, SiteError, explain, one_line, shown
from featurizers.files.regular import looks_like, read_bytes
from featurizers.format.sites import Side, Site
from featurizers.names import KIND

CONFIG_NAME: Final = "config.json"
WEIGHTS_NAME: Final = "model.safetensors"
CARD_NAME: Final = "README.md"
LABELS_NAME: Final = "feature_labels.jsonl"
INTERVENABLE_NAME: Final = "intervenable.json"
INTERVENABLE_WEIGHTS_NAME: Final = "intervenable.safetensors"
LIBRARY_NAME: Final = "featurizers"
FORMAT_VERSION: Final = 2
"""Newest version. Artefacts of one site are written as version 1, and maps between sites as version 2."""
MAX_CONFIG_BYTES: Final = 1_000_000
MAX_CARD_BYTES: Final = 10_000_000
MAX_DEPTH: Final = 64
"""Largest nesting depth of JSON."""

RESERVED: Final = {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, LABELS_NAME}


def _not_a_file(subfolder: str) -> str:
    if RESERVED.intersection(subfolder.split("/")):
        raise ValueError(f"{', '.join(sorted(RESERVED))} are files")
    return subfolder


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has characters that are not printable")
    return text


Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
FormatVersion = Annotated[int, Field(ge=1, le=FORMAT_VERSION)]
FeatureSetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Subfolder = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$", max_length=512),
    AfterValidator(_not_a_file),
]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SiteRecord(_Record):
    """A `Site` as JSON."""

    kind: Name
    layer: Annotated[int, Field(ge=0, le=100_000)] | None = None
    head: Annotated[int, Field(ge=0, le=100_000)] | None = None
    module: Name | None = None
    side: Side | None = None
    position: Annotated[list[int], Field(max_length=100_000)] | None = None
    model: Name | None = None
    model_revision: Name | None = None

    @classmethod
    def of(cls, site: Site) -> SiteRecord:
        """Return the record of a site."""
        fields = {name: getattr(site, name) for name in cls.model_fields}
        return cls(**{**fields, "position": None if site.position is None else list(site.position)})

    def site(self) -> Site:
        """Return the site of a record."""
        fields = self.model_dump()
        return Site(**{**fields, "position": None if self.position is None else tuple(self.position)})


class Entry(_Record):
    """An artefact in an `Index`; ``site`` names its site, or its reads and writes in short."""

    kind: Name
    id: Name
    site: (
        Annotated[
            str, Field(min_length=1, max_length=4 * (256 + len("module::output -> "))), AfterValidator(_printable)
        ]
        | None
    ) = None


class Manifest(_Record):
    """Contents of the ``config.json`` of an artefact: of one site in version 1, of a map between sites in version 2.

    Attributes:
        kind: kind of the featurizer, looked up among the installed plugins and nowhere else.
        id: name for people.
        config: configuration that the kind's ``Config`` validates.
        site: place, and model, where the featurizer was found; version 1 only.
        reads: sites that a map reads, by name; version 2 only.
        writes: sites that a map writes, by name; version 2 only.
        features: names of the feature sets stored with the weights.
        saved_with: versions of the distributions that wrote it.
        sha256: checksum of ``model.safetensors``.
        metadata: any JSON.
    """

    library_name: Literal["featurizers"] = "featurizers"
    format_version: FormatVersion = 1
    kind: Annotated[str, Field(max_length=128)]
    id: Name
    config: dict[str, Any]
    site: SiteRecord | None = None
    reads: Annotated[dict[Name, SiteRecord], Field(max_length=10_000)] | None = None
    writes: Annotated[dict[Name, SiteRecord], Field(max_length=10_000)] | None = None
    features: list[FeatureSetName] = []
    saved_with: dict[Name, Name] = {}
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    metadata: dict[str, Any] = {}

    @field_validator("features")
    @classmethod
    def _features(cls, features: list[str]) -> list[str]:
        if len(set(features)) < len(features):
            raise ValueError("a feature set is named twice")
        return features

    @field_validator("kind")
    @classmethod
    def _kind(cls, kind: str) -> str:
        if not KIND.fullmatch(kind):
            raise ValueError("a kind is lower-case words joined by '-', never an import path")
        return kind

    @model_serializer(mode="wrap")
    def _without_sites_of_others(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the keys of the other version, so that each file has its version's keys alone."""
        fields: dict[str, Any] = write(self)
        absent = ("site",) if self.format_version > 1 else ("reads", "writes")
        return {name: value for name, value in fields.items() if name not in absent}

    def check_version(self, where: str) -> None:
        """Raise ManifestError unless the record has the sites of its version: one site, or reads and writes."""
        has_maps = (self.reads is not None, self.writes is not None)
        if has_maps != (self.format_version > 1, self.format_version > 1) or (self.site is not None and any(has_maps)):
            needed = "a site and no reads or writes" if self.format_version == 1 else "reads and writes and no site"
            raise ManifestError(where, f"{CONFIG_NAME}: format_version {self.format_version} has {needed}")

    def sites(self) -> dict[str, Site]:
        """Return the sites of the record, by name."""
        records = {"site": self.site} if self.reads is None else {**self.reads, **(self.writes or {})}
        return {name: record.site() for name, record in records.items() if record is not None}

    def sites_text(self) -> str | None:
        """Return the site, or the reads and writes in short; None if they are not known."""
        if self.reads is None:
            return None if self.site is None else str(self.site.site())
        if not self.reads or not self.writes:
            return None
        return f"{_in_short(self.reads)} -> {_in_short(self.writes)}"

    def entry(self) -> Entry:
        """Return the entry for this artefact in an index."""
        return Entry(kind=self.kind, id=self.id, site=self.sites_text())


class Index(_Record):
    """Contents of the ``config.json`` at the root of a collection.

    Attributes:
        artefacts: entry of each artefact, by subfolder.
    """

    library_name: Literal["featurizers"] = "featurizers"
    format_version: FormatVersion = 1
    artefacts: dict[Subfolder, Entry]


def _in_short(records: dict[str, SiteRecord]) -> str:
    """Return a list of sites in short: of many, the first and the last."""
    first, *others = (str(record.site()) for record in records.values())
    return f"{first} … {others[-1]}" if others else first


def read(path: Path, where: str) -> Manifest | Index:
    """Read the manifest or index in a ``config.json``.

    Args:
        path: the file.
        where: name of its artefact in errors.

    Raises:
        ManifestError: the file is malformed, or was written by a newer version.
    """
    return parse(read_bytes(path, where, ManifestError, MAX_CONFIG_BYTES), where)


def named_folder(folder: Path) -> Path:
    """Return the path of a folder with ``~`` expanded."""
    try:
        return folder.expanduser()
    except RuntimeError:  # no such user
        return folder


def parse(raw: bytes, where: str) -> Manifest | Index:
    """Parse the bytes of a ``config.json``, as `read` does."""
    data = parse_json(raw, where, CONFIG_NAME)
    if not isinstance(data, dict) or data.get("library_name") != LIBRARY_NAME:
        raise (NotOursError if isinstance(data, dict) else ManifestError)(
            where, f'{CONFIG_NAME} was not written by featurizers: it lacks "library_name": "{LIBRARY_NAME}"'
        )
    version = data.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ManifestError(
            where,
            f"it has format_version {shown(version)}, and this version of featurizers reads up to {FORMAT_VERSION}. "
            "Upgrade with: pip install -U featurizers",
        )
    try:
        record = (Index if "artefacts" in data else Manifest).model_validate(data)
        if isinstance(record, Manifest):
            record.check_version(where)
            record.sites()
    except ValidationError as error:
        raise ManifestError(where, f"{CONFIG_NAME}: {explain(error)}") from error
    except SiteError as error:
        raise ManifestError(where, f"{CONFIG_NAME}: {error}") from error
    return record


def parse_json(raw: bytes, where: str, name: str, *, most: int = MAX_CONFIG_BYTES) -> Any:
    """Parse strict JSON of at most ``most`` bytes.

    Raises:
        ManifestError: the JSON is malformed, too large or nested too deeply, repeats a key, or holds NaN or infinity.
    """
    if len(raw) > most:
        raise ManifestError(where, f"{name} is larger than {most} bytes")
    try:
        data = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        reason = looks_like(raw[:100]) or ("it is nested too deeply" if isinstance(error, RecursionError) else error)
        raise ManifestError(where, f"{name} is not valid JSON: {one_line(reason)}") from error
    _check_depth(data, where, name)
    return data


def dump(record: Manifest | Index) -> bytes:
    """Return the bytes of a ``config.json``.

    Raises:
        ManifestError: the metadata is not JSON, or the file would be too large to be read again.
    """
    try:
        raw = (json.dumps(record.model_dump(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError("metadata", f"cannot be written as JSON: {error}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ManifestError("metadata", f"{CONFIG_NAME} would be larger than {MAX_CONFIG_BYTES} bytes")
    return raw


def _check_depth(data: Any, where: str, name: str) -> None:
    level, depth = [data], 0
    while level := [v for x in level if isinstance(x, dict | list) for v in (x.values() if isinstance(x, dict) else x)]:
        if (depth := depth + 1) > MAX_DEPTH:
            raise ManifestError(where, f"{name} is nested more than {MAX_DEPTH} levels deep")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError(f"the key {shown(repeated(key for key, _ in pairs))} is repeated")
    return data


def repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs a second time, None if all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{shown(number, 40)} is too large a number")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")

"""Reads small YAML files of other libraries as data."""

from __future__ import annotations

from typing import Any

from featurizers.errors import ManifestError, one_line
from featurizers.files import read_bytes
from featurizers.format import ExternalFiles

MAX_BYTES = 65536
"""Largest YAML file that is read."""


def read_yaml(source: ExternalFiles, name: str) -> dict[str, Any]:
    """Return a YAML mapping whose scalars are all strings; tags, and merges of mappings, are not followed.

    Raises:
        ManifestError: the file is too large, not YAML, or not a mapping.
    """
    import yaml  # 20 ms, and only two formats need it

    raw = read_bytes(source.path(name, MAX_BYTES), source.where, ManifestError, MAX_BYTES, name)
    try:
        data = yaml.load(raw.decode("utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ManifestError(source.where, f"{name} is not YAML: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ManifestError(source.where, f"{name} holds a {type(data).__name__}, not a mapping")
    return data

"""Files of other libraries: a plugin that knows their format reads them, and the result is checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from featurizers.errors import (
    FeaturizerError,
    ManifestError,
    PluginError,
    UsageError,
    WeightsError,
    one_line,
    printable,
    shown,
)
from featurizers.features.feature_space import FeatureSpace
from featurizers.features.site_map import SiteMap
from featurizers.files.regular import MAX_LEVELS, contained
from featurizers.format.external_files import ExternalFiles
from featurizers.format.weights import DTYPES, check_finite, is_finite
from featurizers.registry.plugin_host import host

if TYPE_CHECKING:
    from torch import Tensor

    from featurizers.hub.repository import Remote

Columns: TypeAlias = "Tensor | Mapping[str, Tensor | None] | None"
"""Numbers of features to load, int64 ``(k,)``, or such numbers by group; None for all features."""

FeatureSpaceT = TypeVar("FeatureSpaceT", bound=FeatureSpace[Any])

MAX_TREE = 50_000
"""Most files and folders that a folder may hold, at any depth."""


def of_folder(folder: Path, indices: Columns, allow_nonfinite: bool = False) -> ExternalFiles:
    """List the files of a folder on this machine for the plugins that read them.

    Args:
        folder: none of its files may be linked out of it.
        indices: as in `ExternalFiles`.
        allow_nonfinite: as in `ExternalFiles`.

    Raises:
        ManifestError: the folder cannot be listed, or holds too many files.
    """
    where = str(folder)
    names: list[str] = []
    try:
        pending, count = [""], 0
        while pending:
            start = pending.pop()
            for entry in os.scandir(folder / start):
                name, count = f"{start}{entry.name}", count + 1
                if count > MAX_TREE or name.count("/") > MAX_LEVELS:
                    raise ManifestError(
                        where,
                        f"it holds more than {MAX_TREE} files and folders, or {MAX_LEVELS} levels of them; name the "
                        "folder of one featurizer",
                    )
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{name}/")
                elif not entry.is_dir():
                    names.append(name)
    except OSError as error:
        raise ManifestError(where, f"it cannot be listed: {one_line(error.strerror or error)}") from error

    def fetch(name: str, _most: int | None) -> Path:
        return contained(folder, folder / name, where, ManifestError)

    return _external_files(where, tuple(sorted(names)), fetch, indices, None, allow_nonfinite)


def of_repository(
    remote: Remote, indices: Columns, allow_nonfinite: bool = False, verify: bool = False
) -> ExternalFiles:
    """List the files of a repository, or of a folder in it, for the plugins that read them.

    Args:
        remote: repository; its revision is resolved to a commit, and every file is read at that.
        indices: as in `ExternalFiles`.
        allow_nonfinite: as in `ExternalFiles`.
        verify: compare each file with the checksum that the Hub has for it.

    Raises:
        HubError: the files cannot be listed.
    """
    names, commit = remote.names()

    def fetch(name: str, most: int | None) -> Path:
        path = remote.file(name, commit, most)
        if verify:
            remote.verify(path, name)
        return path

    return _external_files(str(remote), names, fetch, indices, commit, allow_nonfinite)


def read(source: ExternalFiles) -> FeatureSpace[Any]:
    """Ask the installed plugins to read the files, and return the checked featurizer.

    Raises:
        ManifestError: no plugin knows the format.
        FeaturizerError: the files are damaged, or hold something else than one featurizer.
    """
    featurizer = host().ask("featurizers_read", source=source)
    if featurizer is None:
        readers = host().asked("featurizers_read")
        raise ManifestError(
            source.where,
            "there is no config.json of featurizers, and no installed plugin knows the format of "
            f"{', '.join(map(shown, source.names[:5])) or 'an empty folder'}"
            f"{', …' if len(source.names) > 5 else ''}; plugins asked: {', '.join(readers)}. "
            "Name the folder of one featurizer with subfolder=, or install the plugin of the format",
        )
    return checked(featurizer, source)


def checked(featurizer: FeatureSpaceT, source: ExternalFiles) -> FeatureSpaceT:
    """Check what a plugin made of external files, set its revision, and return it in evaluation mode.

    Raises:
        PluginError: it is not a featurizer, or the plugin ignored the indices.
        UsageError: the indices are by group, and it is a featurizer of one site.
        WeightsError: a tensor holds NaN or infinity, or the featurizer does not pass its own check.
    """
    if not isinstance(featurizer, FeatureSpace):
        raise PluginError(f"{source.where}: a plugin read a {type(featurizer).__name__}, which is not a Featurizer")
    if source.group_indices is not None and not isinstance(featurizer, SiteMap):
        text = "holds a featurizer, which has no groups; give the features as a list of numbers"
        raise UsageError(f"{source.where} {text}")
    if not _has_read(featurizer, source):
        raise PluginError(f"{source.where}: the plugin of this format did not read the features that were asked for")
    for name, tensor in featurizer.state_dict().items():
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in DTYPES.values():
            allowed = ", ".join(DTYPES.values())
            raise WeightsError(source.where, f"tensor {shown(name)} is {dtype}; a featurizer may have {allowed}")
    featurizer.revision = source.revision
    featurizer.id = printable(featurizer.id, 256) or featurizer.kind
    if not source.allow_nonfinite:
        check_finite(featurizer.state_dict(), source.where)
    elif not all(map(is_finite, featurizer.state_dict().values())):
        return featurizer.eval()
    try:
        featurizer.check()
    except FeaturizerError as error:
        raise WeightsError(source.where, str(error)) from error
    return featurizer.eval()


def _external_files(
    where: str,
    names: tuple[str, ...],
    fetch: Callable[[str, int | None], Path],
    indices: Columns,
    revision: str | None,
    allow_nonfinite: bool,
) -> ExternalFiles:
    by_group = indices if isinstance(indices, Mapping) else None
    of_one = None if isinstance(indices, Mapping) else indices
    return ExternalFiles(where, names, fetch, of_one, revision, allow_nonfinite, by_group)


def _has_read(featurizer: FeatureSpace[Any], source: ExternalFiles) -> bool:
    """Return whether a featurizer has as many features as were asked for, in each group."""
    if source.group_indices is not None:
        groups = featurizer.groups if isinstance(featurizer, SiteMap) else {}
        return groups.keys() == source.group_indices.keys() and all(
            columns is None or groups[name].n_features == len(columns) for name, columns in source.group_indices.items()
        )
    return source.indices is None or featurizer.n_features == len(source.indices)

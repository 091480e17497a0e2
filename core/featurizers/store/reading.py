"""What another library wrote, read by the plugin that knows the format, and checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import FeaturizerError, ManifestError, PluginError, WeightsError, one_line, printable, shown
from featurizers.features.featurizer import Featurizer
from featurizers.files.regular import MAX_LEVELS, contained
from featurizers.format.external_files import ExternalFiles
from featurizers.format.weights import DTYPES, check_finite, is_finite
from featurizers.registry.plugin_host import host

if TYPE_CHECKING:
    from torch import Tensor

    from featurizers.hub.repository import Remote

MAX_TREE = 50_000
"""How many files and folders below a folder are looked at."""


def of_folder(folder: Path, indices: Tensor | None, allow_nonfinite: bool = False) -> ExternalFiles:
    """A folder of this machine, none of whose files may lie elsewhere."""
    where = str(folder)
    names: list[str] = []
    try:
        pending, seen = [""], 0
        while pending:
            start = pending.pop()
            for entry in os.scandir(folder / start):
                name, seen = f"{start}{entry.name}", seen + 1
                if seen > MAX_TREE or name.count("/") > MAX_LEVELS:
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

    return ExternalFiles(where, tuple(sorted(names)), fetch, indices, allow_nonfinite=allow_nonfinite)


def of_repository(
    remote: Remote, indices: Tensor | None, allow_nonfinite: bool = False, verify: bool = False
) -> ExternalFiles:
    """A repository, or a folder of it, at the commit that its revision stands at now.

    Args:
        remote: the repository.
        indices: which features are wanted.
        allow_nonfinite: as in `ExternalFiles`.
        verify: compare each file with the checksum that the Hub has for it.
    """
    names, commit = remote.names()

    def fetch(name: str, most: int | None) -> Path:
        path = remote.file(name, commit, most)
        if verify:
            remote.verify(path, name)
        return path

    return ExternalFiles(str(remote), names, fetch, indices, commit, allow_nonfinite)


def read(source: ExternalFiles) -> Featurizer[Any]:
    """The featurizer that the first plugin which knows the format finds.

    Raises:
        ManifestError: none knows it.
        FeaturizerError: it is damaged, or not a featurizer of one site.
    """
    found = host().ask("featurizers_read", source=source)
    if found is None:
        readers = [info.name for info in host().plugins() if info.state == "loaded"]
        raise ManifestError(
            source.where,
            "there is no config.json of featurizers, and no installed plugin knows the format of "
            f"{', '.join(map(shown, source.names[:5])) or 'an empty folder'}"
            f"{', …' if len(source.names) > 5 else ''}; plugins asked: {', '.join(readers)}. "
            "Name the folder of one featurizer with subfolder=, or install the plugin of the format",
        )
    return checked(found, source)


def checked(found: Any, source: ExternalFiles) -> Featurizer[Any]:
    """What a plugin made of a source, with the commit it came from, once it is known to be sound."""
    if not isinstance(found, Featurizer):
        raise PluginError(f"{source.where}: a plugin read a {type(found).__name__}, which is no Featurizer")
    if source.indices is not None and found.n_features != len(source.indices):
        raise PluginError(f"{source.where}: the plugin of this format did not take the {len(source.indices)} features")
    for name, tensor in found.state_dict().items():
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in DTYPES.values():
            raise WeightsError(source.where, f"tensor {shown(name)} is {dtype}, in which nothing is computed here")
    found.revision = source.revision
    found.id = printable(found.id, 256) or found.kind
    if not source.allow_nonfinite:
        check_finite(found.state_dict(), source.where)
    elif not all(map(is_finite, found.state_dict().values())):
        return found.eval()
    try:
        found.check()
    except FeaturizerError as error:
        raise WeightsError(source.where, str(error)) from error
    return found.eval()

"""Retry the reading of a folder that another program replaces meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from featurizers.errors import ArtefactError, FeaturizerError
from featurizers.files.regular import stat_signature

RETRIES: Final = 20

Result = TypeVar("Result")


def read_unchanged(folder: Path, names: tuple[str, ...], read: Callable[[], Result], where: str) -> Result:
    """Return the result of a read during which none of the named files changed, so that all are of one version.

    If a file was replaced meanwhile, the result or the error of that read is dropped and it is read again.

    Args:
        folder: holds the files.
        names: of the files to watch.
        read: reads the files.
        where: name of the folder in errors.

    Raises:
        FeaturizerError: ``read`` raised it, and no file had changed.
        ArtefactError: the files changed during every one of 20 reads.
    """
    for _ in range(RETRIES):
        before = stat_signature(folder, *names)
        try:
            result = read()
        except FeaturizerError:  # may come from the config of one version and the weights of another
            if before == stat_signature(folder, *names):
                raise
        else:
            if before == stat_signature(folder, *names):
                return result
    raise ArtefactError(where, "another program keeps writing to it; load it when that one has finished")

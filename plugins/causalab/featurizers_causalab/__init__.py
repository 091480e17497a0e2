"""CausalAbstraction's featurizers under their own names, and the files of causalab and the MIB benchmark.

The drop-in for ``neural.featurizers`` is `featurizers_causalab.featurizers`. Files are read as data; no code in them is
run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurizers import Featurizer, hookimpl
from featurizers.format import ExternalFiles

from featurizers_causalab import submissions, triplets
from featurizers_causalab.submissions import read_submission, write_submission

__all__ = ["read_submission", "write_submission"]


@hookimpl
def featurizers_interventions(register: Callable[[type], None]) -> None:
    """Register the interventions, except the interpolation, whose function no file can hold."""
    from featurizers_causalab.interventions import SAVED

    for cls in SAVED:
        register(cls)


@hookimpl
def featurizers_read(source: ExternalFiles) -> Featurizer[Any] | None:
    """Read the featurizer of a folder that holds one unit of CausalAbstraction, in either format."""
    return submissions.one(source)


@hookimpl
def featurizers_resolve(reference: str, repository: Callable[..., ExternalFiles]) -> Featurizer[Any] | None:
    """Read the featurizer of one unit of a repository: ``owner/name/FOLDER/UNIT``."""
    return submissions.resolve(reference, repository)


@hookimpl
def featurizers_write(featurizer: Featurizer[Any], folder: Path) -> list[str] | None:
    """Write the featurizer as the triplet of one unit; return what the triplet does not hold."""
    triplets.write(featurizer, folder / submissions.unit_of(featurizer, str(folder)))
    return submissions.lost(featurizer)

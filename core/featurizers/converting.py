"""`convert`: from any format that `load` reads to any that an installed plugin writes."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import ArtefactError, ConversionError, PluginError
from featurizers.foreign import of_folder
from featurizers.plugins import host

if TYPE_CHECKING:
    from featurizers.featurizer import Featurizer

OURS = "featurizers"
"""What the format of `featurizers.artefact` is called here."""


def convert(featurizer: Featurizer[Any], folder: str | Path, to: str = OURS) -> list[str]:
    """Write a featurizer in the format of a plugin, and say what that format cannot keep.

    Args:
        featurizer: what `featurizers.load` gave.
        folder: a new or an empty one; a conversion that fails leaves nothing.
        to: ``featurizers``, or the name of a plugin that writes a format.

    Returns:
        One sentence for each thing that is lost.

    Raises:
        ArtefactError: the folder is not empty.
        ConversionError: the format cannot hold the map itself.
        PluginError: there is no such plugin, or it writes no format.
    """
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtefactError(str(folder), "it is there already; choose a new or an empty folder")
    if to == OURS:
        featurizer.save_pretrained(target)
        return []
    host().load(to)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    new = scratch / target.name
    new.mkdir(parents=True)
    try:
        lost = host().ask("featurizers_write", to, featurizer=featurizer, folder=new)
        if lost is None:
            raise PluginError(f"the plugin {to!r} writes no format of its own")
        back = host().ask("featurizers_read", to, source=of_folder(new, None))
        if featurizer.id != featurizer.kind and (back is None or back.id != featurizer.id):
            lost = [*lost, f"The name {featurizer.id!r} is not kept."]
        if target.exists():
            target.rmdir()
        new.rename(target)
    except ConversionError as error:
        raise ConversionError(str(folder), error.problem) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [*lost, *_lost_by_all(featurizer)]


def _lost_by_all(featurizer: Featurizer[Any]) -> list[str]:
    """What no format but ours holds."""
    lost = []
    if featurizer.feature_sets:
        lost.append(f"The feature sets {', '.join(map(repr, sorted(featurizer.feature_sets)))} are not kept.")
    if featurizer.site is not None and featurizer.site.position is not None:
        lost.append(f"The positions {list(featurizer.site.position)} are not kept.")
    return lost

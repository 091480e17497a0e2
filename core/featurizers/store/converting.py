"""`convert`: from any format that `load` reads to any that an installed plugin writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import ConversionError, PluginError
from featurizers.files.replacement import filling, refuse_full, resolved
from featurizers.registry.plugin_host import host
from featurizers.store.reading import of_folder

if TYPE_CHECKING:
    from featurizers.features.featurizer import Featurizer

OURS = "featurizers"
"""What the format of `featurizers.store.artefact` is called here."""


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
    if to == OURS:
        refuse_full(resolved(folder))
        featurizer.save_pretrained(folder)
        return []
    host().load(to)
    try:
        with filling(folder) as scratch:
            new = scratch / resolved(folder).name  # some formats keep the name of the folder
            new.mkdir()
            lost = host().ask("featurizers_write", to, featurizer=featurizer, folder=new)
            if lost is None:
                raise PluginError(f"the plugin {to!r} writes no format of its own")
            back = host().ask("featurizers_read", to, source=of_folder(new, None))
            lost = [*lost, *_lost(featurizer, back)]
            del back  # which may hold the files open
            for path in new.iterdir():
                path.rename(scratch / path.name)
            new.rmdir()
    except ConversionError as error:
        raise ConversionError(str(folder), error.problem) from error
    return lost


def _lost(featurizer: Featurizer[Any], back: Featurizer[Any] | None) -> list[str]:
    """What most formats cannot hold, and was not read back."""
    lost = []
    if featurizer.id != featurizer.kind and (back is None or back.id != featurizer.id):
        lost.append(f"The name {featurizer.id!r} is not kept.")
    if gone := sorted(featurizer.feature_sets.keys() - (back.feature_sets.keys() if back else set())):
        lost.append(f"The feature sets {', '.join(map(repr, gone))} are not kept.")
    positions = None if featurizer.site is None else featurizer.site.position
    if positions is not None and (back is None or back.site is None or back.site.position != positions):
        lost.append(f"The positions {list(positions)} are not kept.")
    return lost

"""`convert`: write a featurizer in the format of any installed plugin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import ConversionError, PluginError
from featurizers.files.replacement import filling, refuse_full, resolved
from featurizers.registry.plugin_host import host
from featurizers.store.external import of_folder

if TYPE_CHECKING:
    from featurizers.features.feature_space import FeatureSpace

ARTEFACT = "featurizers"
"""Name of the artefact format, beside the names of plugins."""


def convert(featurizer: FeatureSpace[Any], folder: str | Path, to: str = ARTEFACT) -> list[str]:
    """Write a featurizer in the format of a plugin, and tell what that format cannot keep.

    Args:
        featurizer: featurizer to write, such as `featurizers.load` returns.
        folder: new or empty folder; a conversion that fails leaves it so.
        to: ``featurizers``, or the name of a plugin that writes a format.

    Returns:
        A sentence for each thing that is lost.

    Raises:
        ArtefactError: the folder is not empty.
        ConversionError: the format cannot hold the map itself.
        UsageError: several processes share the featurizer, and none has it whole.
        PluginError: there is no such plugin, or it writes no format.
    """
    if to == ARTEFACT:
        refuse_full(resolved(folder))
        featurizer.save_pretrained(folder)
        return []
    featurizer.stored_tensors()  # raises if no process has it whole
    host().load(to)
    try:
        with filling(folder) as scratch:
            new_folder = scratch / resolved(folder).name  # some formats store the name of the folder
            new_folder.mkdir()
            lost = host().ask("featurizers_write", to, featurizer=featurizer, folder=new_folder)
            if lost is None:
                raise PluginError(f"the plugin {to!r} writes no format of its own")
            reread = host().ask("featurizers_read", to, source=of_folder(new_folder, None))
            lost = [*lost, *_lost(featurizer, reread)]
            del reread  # it may hold the files open
            for path in new_folder.iterdir():
                path.rename(scratch / path.name)
            new_folder.rmdir()
    except ConversionError as error:
        raise ConversionError(str(folder), error.problem) from error
    return lost


def _lost(featurizer: FeatureSpace[Any], reread: FeatureSpace[Any] | None) -> list[str]:
    """Name what most formats cannot hold and the new files, read again, do not have."""
    lost = []
    if featurizer.id != featurizer.kind and (reread is None or reread.id != featurizer.id):
        lost.append(f"The name {featurizer.id!r} is not kept.")
    if gone := sorted(featurizer.feature_sets.keys() - (reread.feature_sets.keys() if reread else set())):
        lost.append(f"The feature sets {', '.join(map(repr, gone))} are not kept.")
    if featurizer.labels and not (reread and reread.labels):
        lost.append(f"The labels of {len(featurizer.labels.features)} features are not kept.")
    if featurizer.edits and not (reread and reread.edits):
        lost.append(f"The edits that it holds ({len(featurizer.edits)}) are not kept.")
    positions, kept = (next((s.position for s in f.sites.values()), None) if f else None for f in (featurizer, reread))
    if positions is not None and kept != positions:
        lost.append(f"The positions {list(positions)} are not kept.")
    return lost

"""Control vectors of llama.cpp: steering edits written as GGUF files, and GGUF files read as featurizers.

A control vector adds one direction for each layer to what the block of this layer returns, at every token. EasySteer's
algorithm ``direct`` reads the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featurizers import Steer, hookimpl
from featurizers.errors import ConversionError, FeaturizerError, ManifestError, UsageError
from featurizers.features import FeatureSpace, Featurizer
from featurizers.format import ExternalFiles

from featurizers_control_vectors.edits import featurizer_of, read_gguf, to_gguf
from featurizers_control_vectors.gguf_files import ARCHITECTURE, MAX_BYTES, architecture_of, read_directions

__all__ = ["read_gguf", "to_gguf"]

FILE = "control_vector.gguf"
"""Name of the file that `featurizers.convert` writes."""


@hookimpl
def featurizers_read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read the one direction of a control vector, None for a folder without one.

    Raises:
        ManifestError: there are several directions.
        WeightsError: the file is damaged.
        UsageError: some features are requested of its one feature.
    """
    names = [name for name in source.names if name.endswith(".gguf") and "/" not in name]
    if len(names) != 1:
        return None
    try:
        path = source.path(names[0], MAX_BYTES)
    except ManifestError:
        return None  # so large a file is a model
    if architecture_of(path, source.where) != ARCHITECTURE:
        return None
    if source.indices is not None or source.group_indices is not None:
        raise UsageError(f"{source.where}: a control vector has one feature; load it whole")
    directions = read_directions(path, source.where)
    if len(directions) != 1:
        raise ManifestError(
            source.where,
            f"{names[0]} has directions of {len(directions)} layers, and a featurizer has one site; read them with "
            "featurizers_control_vectors.read_gguf(path)",
        )
    ((layer, direction),) = directions.items()
    return featurizer_of(layer, direction)


@hookimpl
def featurizers_write(featurizer: FeatureSpace[Any], folder: Path) -> list[str] | None:
    """Write the direction that a growth by 1 of a featurizer's one feature adds; return a sentence for each thing lost.

    Raises:
        ConversionError: it has more features, another site than the output of a block, or no such direction.
    """
    where = str(folder)
    if not isinstance(featurizer, Featurizer):
        raise ConversionError(where, f"a control vector has one site, and {featurizer.id!r} maps between sites")
    if featurizer.n_features != 1:
        count = "any number of" if featurizer.n_features is None else featurizer.n_features
        raise ConversionError(
            where,
            f"a control vector holds one direction, and {featurizer.id!r} has {count} features; say how far to move "
            "which with featurizers_control_vectors.to_gguf({site: Steer(f, delta=…, indices=…)}, path)",
        )
    lost = ["How the feature is read is not kept: the file holds what it adds."]
    if featurizer.special_tokens:
        lost.append(f"The special tokens {list(featurizer.special_tokens)} are not kept: every token is changed.")
    try:
        to_gguf({featurizer.site: Steer(featurizer, delta=1.0)}, folder / FILE, all_tokens=True)
    except FeaturizerError as error:
        raise ConversionError(where, str(error)) from error
    return lost

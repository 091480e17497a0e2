"""Control vectors of llama.cpp and of the library steering-vectors: edits written as their files, and these read.

A control vector adds one direction for each layer to what the block of this layer returns, at every token. EasySteer's
algorithm ``direct`` reads the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featurizers import Site, Steer, hookimpl
from featurizers.errors import ConversionError, FeaturizerError, ManifestError, UsageError
from featurizers.features import FeatureSpace, Featurizer
from featurizers.format import ExternalFiles

from featurizers_control_vectors.edits import featurizer_of
from featurizers_control_vectors.gguf_edits import read_gguf, to_gguf
from featurizers_control_vectors.gguf_files import ARCHITECTURE, MAX_BYTES, architecture_of, read_directions
from featurizers_control_vectors.steering_vectors import read_steering_vector, to_steering_vector

__all__ = ["read_gguf", "read_steering_vector", "to_gguf", "to_steering_vector"]

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
    return featurizer_of(Site("resid.post", layer), direction, f"direction.{layer}")


@hookimpl
def featurizers_write(featurizer: FeatureSpace[Any], folder: Path) -> list[str] | None:
    """Write the direction that the edits of an artefact add; without any, that of a growth by 1 of its one feature.

    Returns:
        A sentence for each thing that is lost.

    Raises:
        ConversionError: it has no edits and more features, another site than the output of a block, or no direction.
    """
    where = str(folder)
    if not isinstance(featurizer, Featurizer):
        raise ConversionError(where, f"a control vector has one site, and {featurizer.id!r} maps between sites")
    if featurizer.n_features != 1 and not featurizer.edits:
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
        edits = featurizer.edits or [Steer(featurizer, delta=1.0)]
        to_gguf({featurizer.site: edits}, folder / FILE, all_tokens=True)
    except FeaturizerError as error:
        raise ConversionError(where, str(error)) from error
    return lost

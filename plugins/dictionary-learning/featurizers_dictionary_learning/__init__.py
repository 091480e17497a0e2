"""dictionary_learning's autoencoders: its classes, its files, and both as featurizers, without its package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featurizers import hookimpl
from featurizers.features import FeatureSpace
from featurizers.format import ExternalFiles

from featurizers_dictionary_learning import reading, writing
from featurizers_dictionary_learning.base import Dictionary
from featurizers_dictionary_learning.classes import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    IdentityDict,
    JumpAutoEncoder,
)
from featurizers_dictionary_learning.package import alias
from featurizers_dictionary_learning.reading import load_dictionary
from featurizers_dictionary_learning.topk import (
    AutoEncoderTopK,
    BatchTopKSAE,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
)

__all__ = [
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "Dictionary",
    "GatedAutoEncoder",
    "IdentityDict",
    "JumpAutoEncoder",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
    "alias",
    "load_dictionary",
]


@hookimpl
def featurizers_read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read the autoencoder in a folder ``{ae.pt, config.json}``, or the crosscoder of a fork."""
    return reading.read(source)


@hookimpl
def featurizers_write(featurizer: FeatureSpace[Any], folder: Path) -> list[str] | None:
    """Write ``ae.pt`` and ``config.json``."""
    return writing.write(featurizer, folder)

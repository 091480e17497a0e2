"""The intervention classes that a file may name: what is asked of each, and where its name is looked up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from featurizers.features import Featurizer
from pydantic import BaseModel
from torch import nn


class SavedIntervention(ABC):
    """A pyvene intervention that `save_intervenable` writes and `load_intervenable` makes again.

    It is a featurizer, a config, and tensors of its own: the parameters and persistent buffers that are not the
    featurizer's. A plugin's class derives from this one beside pyvene's, and is registered by its
    ``featurizers_interventions``; one that derives from a class of `featurizers.pyvene` too gives a kind and, if it has
    more arguments than that, a ``Config``, a `get_config` and a `set_config`.

    Attributes:
        kind: registered name, stored in files: the plugin's name, or that, a dot and a word.
        Config: pydantic model of the arguments; strict, unknown keys forbidden.
        part: name of the child module that several interventions may share, the featurizer as a rule.
    """

    kind: ClassVar[str]
    Config: ClassVar[type[BaseModel]]
    part: ClassVar[str] = "featurizer"

    @abstractmethod
    def get_config(self) -> BaseModel:
        """The arguments as they are now."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, part: Any) -> Self:
        """The intervention of a ``Config``, around a featurizer that others may share.

        It is called under ``torch.device("meta")``: its own tensors have names and shapes, and get their values from
        the file afterwards. A tensor that is no parameter and no persistent buffer names its device.
        """

    def check(self) -> None:  # noqa: B027  # most have nothing to check
        """Raise a `FeaturizerError` if the config or the tensors do not fit the featurizer; called after loading."""

    @staticmethod
    def to_featurizer(part: Any) -> Featurizer[Any]:
        """The featurizer to store for the part that is shared: the part itself, unless a class replaces this."""
        return part  # type: ignore[no-any-return]

    @staticmethod
    def of_featurizer(featurizer: Featurizer[Any]) -> nn.Module:
        """The part that is shared, of the featurizer that was stored; called once for each."""
        return featurizer

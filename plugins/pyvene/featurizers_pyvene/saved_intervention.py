"""`SavedIntervention`: base of the intervention classes that `save_intervenable` can write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from featurizers.features import Featurizer
from pydantic import BaseModel
from torch import Tensor, nn


class SavedIntervention(ABC):
    """Base of a pyvene intervention that `save_intervenable` writes and `load_intervenable` rebuilds.

    A saved intervention consists of a featurizer, a config, and its own tensors: the parameters and persistent buffers
    that do not belong to the featurizer. A plugin's class derives from this class and from pyvene's, and is registered
    by the plugin's hook ``featurizers_interventions``. A class that derives from a class of `featurizers.pyvene`
    defines a kind and, if it has arguments beyond those of its base, a ``Config``, a `get_config` and a ``set_config``.

    Attributes:
        kind: registered name, stored in files: the plugin's name, alone or followed by a dot and a word.
        Config: pydantic model of the arguments; strict, unknown keys forbidden.
        part: name of the child module that several interventions may share; usually the featurizer.
    """

    kind: ClassVar[str]
    Config: ClassVar[type[BaseModel]]
    part: ClassVar[str] = "featurizer"

    @abstractmethod
    def get_config(self) -> BaseModel:
        """Return the current arguments."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, part: Any) -> Self:
        """Build an intervention from a ``Config`` around a shared submodule.

        The caller sets ``torch.device("meta")``, so the intervention's own tensors have names and shapes but no values;
        their values are read from the file afterwards. A tensor that is neither a parameter nor a persistent buffer
        must name its device.
        """

    def check(self) -> None:  # noqa: B027  # most have nothing to check
        """Raise a `FeaturizerError` if the config or the tensors do not fit the featurizer; called after loading."""

    @staticmethod
    def to_featurizer(part: Any) -> Featurizer[Any]:
        """Convert the shared submodule to the featurizer to store. Default: it already is one."""
        return part  # type: ignore[no-any-return]

    @staticmethod
    def of_featurizer(featurizer: Featurizer[Any]) -> nn.Module:
        """Convert a stored featurizer back to the shared submodule; called once for each featurizer."""
        return featurizer


def on_meta(cls: type[SavedIntervention], config: BaseModel, part: Any) -> Any:
    """Build an intervention whose own tensors have names and shapes but no values."""
    with torch.device("meta"):
        return cls.from_config(config, part)


def own_tensors(cls: type[SavedIntervention], intervention: Any) -> dict[str, Tensor]:
    """Return the tensors of an intervention that do not belong to its shared submodule, by name.

    The shared submodule is not asked for its state: that may cost a product of matrices, for each intervention.
    """
    state: dict[str, Any] = {}
    intervention._save_to_state_dict(state, "", keep_vars=False)
    for name, child in intervention.named_children():
        if name != cls.part:
            state |= child.state_dict(prefix=f"{name}.")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}

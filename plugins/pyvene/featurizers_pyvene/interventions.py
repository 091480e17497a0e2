"""The pyvene adapter: intervention classes whose arithmetic is the featurizer's own.

`Featurizer.get_interchange_intervention` and its two siblings return classes that pyvene accepts wherever it
takes an intervention type. pyvene is imported here and nowhere else; it is an extra.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import weakref
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

import torch
from featurizers.errors import FeatureIndexError, ManifestError, MissingDependencyError, UsageError, explain
from featurizers.features import Featurizer, Indices, SigmoidGate
from featurizers.registry import build, host
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from featurizers_pyvene.saved_intervention import SavedIntervention

try:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which of its own extras are missing
        from pyvene.models.interventions import (
            CollectIntervention,
            DistributedRepresentationIntervention,
            SourcelessIntervention,
            TrainableIntervention,
        )
except ImportError as error:
    raise MissingDependencyError("a pyvene intervention", "pyvene", "pip install 'featurizers[pyvene]'") from error


def indices_of_subspaces(subspaces: Sequence[Any] | None, partition: Sequence[Sequence[int]] | None) -> Indices:
    """The features that pyvene's ``subspaces`` mean: a list of features, or of partitions, for each example.

    Raises:
        UsageError: some examples have one and others do not.
        FeatureIndexError: a part that there is not.
    """
    if subspaces is None:
        return None
    if len(subspaces) and all(row is None or (len(row) and all(i is None for i in row)) for row in subspaces):
        return None
    rows = []
    for row in subspaces:
        if row is None or any(i is None for i in row):
            raise UsageError("subspaces are given for some examples of the batch and not for others")
        if partition is not None and (beyond := [part for part in row if not 0 <= part < len(partition)]):
            raise FeatureIndexError(
                f"part {beyond[0]} is not in the subspace_partition, which has {len(partition)} parts"
            )
        rows.append([int(i) for part in row for i in (partition[part] if partition is not None else [part])])
    return rows[0] if rows and all(row == rows[0] for row in rows) else rows


class FeatureInterventionConfig(BaseModel):
    """What is saved of an intervention beside its featurizer and its tensors.

    Attributes:
        subspace_partition: every feature of each part.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    subspace_partition: list[list[Annotated[int, Field(ge=0)]]] | None = None


class FeatureMaskConfig(FeatureInterventionConfig):
    """As its base, and how the gate's logits become the gate.

    Attributes:
        temperature: what the logits are divided by.
        hard: whether the gate is exactly 0 or 1.
    """

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    hard: bool


class FeatureIntervention(SavedIntervention, TrainableIntervention):  # type: ignore[misc]  # pyvene has no types
    """What the three classes share, and a plugin's may: the featurizer as a child module, and a state that names it.

    A class that pyvene restores from its own files is not bound to a featurizer; it builds one from the kind and
    the config in the state dict, which is looked up among the installed plugins.
    """

    Config: ClassVar[type[BaseModel]] = FeatureInterventionConfig
    bound: ClassVar[Featurizer[Any] | None] = None
    featurizer: Featurizer[Any]

    def __init__(self, **kwargs: Any) -> None:
        # activations of several units arrive as (batch, units, d) whatever pyvene's version
        super().__init__(**{**kwargs, "keep_last_dim": True})
        for name in ("embed_dim", "interchange_dim"):
            # pyvene knows them only for some components; a state dict must not depend on that
            if name in self._buffers:
                self.register_buffer(name, self._buffers.pop(name), persistent=False)
        if self.bound is not None:
            self.attach(self.bound)

    def attach(self, featurizer: Featurizer[Any]) -> None:
        """Take the featurizer; a class with tensors of its own makes them here, when their sizes are known."""
        self.featurizer = featurizer

    @classmethod
    def from_config(cls, config: Any, part: Featurizer[Any]) -> Self:
        """The intervention of a config, around a featurizer that others may share."""
        self = cls()
        self.attach(part)
        self.set_config(config)
        return self

    def get_config(self) -> BaseModel:
        """The arguments as they are now."""
        parts = self.subspace_partition
        return FeatureInterventionConfig(
            subspace_partition=None if parts is None else [[int(i) for i in part] for part in parts]
        )

    def set_config(self, config: Any) -> None:
        """Take the arguments of a config."""
        self.subspace_partition = config.subspace_partition

    def check(self) -> None:
        """Raise `FeatureIndexError` if the partition has features that the featurizer has not."""
        if self.featurizer.n_features is not None:
            for part in self.subspace_partition or ():
                self.featurizer.select(part, torch.empty(0))

    def get_extra_state(self) -> str:
        """The kind and the config of the featurizer, and the intervention's own config, as JSON."""
        record = {"kind": self.featurizer.kind, "id": self.featurizer.id}
        configs = {"config": self.featurizer.config, "intervention": self.get_config()}
        return json.dumps({**record, **{name: config.model_dump(mode="json") for name, config in configs.items()}})

    def set_extra_state(self, state: str) -> None:
        """Build the featurizer that a state dict names, or check that it is the one there, and take the config.

        Raises:
            UsageError: the featurizer there is of another kind.
            ManifestError: the intervention's config is none of this class.
        """
        record = json.loads(state)
        if "featurizer" not in self._modules:
            featurizer = build(host().featurizer_class(record["kind"]), record["config"])
            featurizer.id = record["id"]
            self.attach(featurizer)
        elif self.featurizer.kind != record["kind"]:
            raise UsageError(f"the state is of kind {record['kind']!r}, the featurizer {self.featurizer.kind!r}")
        try:
            self.set_config(self.Config.model_validate(record["intervention"]))
        except ValidationError as error:
            raise ManifestError(f"the state of {type(self).__name__}", explain(error)) from error

    def _indices(self, subspaces: Sequence[Any] | None) -> Indices:
        return indices_of_subspaces(subspaces, self.subspace_partition)

    def __str__(self) -> str:
        """The class and the featurizer's id."""
        return f"{type(self).__name__.partition('_')[0]}(id={self.featurizer.id})"


class FeatureInterchangeIntervention(FeatureIntervention, DistributedRepresentationIntervention):  # type: ignore[misc]
    """`Featurizer.interchange` as a pyvene intervention."""

    kind = "interchange"

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Base with the features of the source that ``subspaces`` name, all without it."""
        return self.featurizer.interchange(base, source, self._indices(subspaces))


class FeatureCollectIntervention(FeatureIntervention, SourcelessIntervention, CollectIntervention):  # type: ignore[misc]
    """`Featurizer.collect` as a pyvene intervention."""

    kind = "collect"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_source_constant = True  # a trainable intervention unsets it, which is what makes pyvene save it

    def forward(
        self, base: Tensor, source: Tensor | None = None, subspaces: Sequence[Any] | None = None, **_: Any
    ) -> Tensor:
        """The features of base, ``(batch, units, n_features)``, or those that ``subspaces`` name."""
        return self.featurizer.collect(base, self._indices(subspaces))


class FeatureMaskIntervention(FeatureIntervention, DistributedRepresentationIntervention):  # type: ignore[misc]
    """`Featurizer.mask` with a trainable gate as a pyvene intervention.

    Attributes:
        gate: a `featurizers.SigmoidGate`; soft until ``hard`` is set, in training mode or not.
    """

    kind = "mask"
    Config = FeatureMaskConfig
    gate: SigmoidGate

    def attach(self, featurizer: Featurizer[Any]) -> None:
        """Take the featurizer, and make a gate for its features.

        Raises:
            UsageError: it does not say how many there are.
        """
        if featurizer.n_features is None:
            raise UsageError(f"a mask needs the number of features; create {featurizer.kind!r} with d_in")
        super().attach(featurizer)
        self.gate = SigmoidGate(featurizer.n_features)

    def get_config(self) -> BaseModel:
        """The arguments as they are now."""
        return FeatureMaskConfig(
            **super().get_config().model_dump(), temperature=self.gate.temperature, hard=self.gate.hard
        )

    def set_config(self, config: Any) -> None:
        """Take the arguments of a config."""
        super().set_config(config)
        self.gate.temperature, self.gate.hard = config.temperature, config.hard

    @property
    def mask(self) -> nn.Parameter:
        """The gate's logits."""
        return self.gate.logits

    @property
    def hard(self) -> bool:
        """Whether the gate is exactly 0 or 1."""
        return self.gate.hard

    @hard.setter
    def hard(self, hard: bool) -> None:
        self.gate.hard = hard

    def get_temperature(self) -> Tensor:
        """What the logits are divided by."""
        return torch.tensor(self.gate.temperature)

    def set_temperature(self, temperature: float | Tensor) -> None:
        """Set what the logits are divided by."""
        self.gate.temperature = float(temperature)

    def get_sparsity_loss(self) -> Tensor:
        """The sum of the soft gates."""
        return self.gate.sparsity_loss()

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Base with its features moved towards the source by the gate."""
        if self._indices(subspaces) is not None:
            raise UsageError("a mask acts on every feature; set the logits of the gate instead of subspaces")
        return self.featurizer.mask(base, source, self.gate())


INTERVENTIONS: dict[str, type[FeatureIntervention]] = {
    base.kind: base for base in (FeatureInterchangeIntervention, FeatureCollectIntervention, FeatureMaskIntervention)
}
"""The core's own, by the names under which they are saved."""

_bound: weakref.WeakValueDictionary[tuple[str, str], type] = weakref.WeakValueDictionary()


def bind(base: type, featurizer: Featurizer[Any], **fixed: int) -> type:
    """The subclass of an intervention class that is bound to a featurizer; the same one each time.

    Its name can be imported from the module of ``base``, whose ``__getattr__`` is `bound_class`: by this process the
    class itself, by any other its base, which takes the featurizer from the state that pyvene loads.

    Args:
        base: a `FeatureIntervention`.
        featurizer: what its interventions act through.
        fixed: attributes of the class.
    """
    variant = "".join(f"{key}{value}" for key, value in fixed.items())
    name = f"{base.__name__}_{id(featurizer):x}{variant}"
    cls = _bound.get((base.__module__, name))
    if cls is None:  # while the class lives it holds its featurizer, so that no other can have its id
        cls = type(base)(
            name, (base,), {"bound": featurizer, "__module__": base.__module__, "__doc__": base.__doc__, **fixed}
        )
        _bound[base.__module__, name] = cls
    return cls


def unbound(cls: type) -> type:
    """The class that `bind` made this one of, or the class itself."""
    return cls.__bases__[0] if _bound.get((cls.__module__, cls.__name__)) is cls else cls


def bound_class(module: str, name: str) -> type:
    """What a bound class of a module is under its name; for the ``__getattr__`` of a module that has such classes.

    Raises:
        AttributeError: no class of this module is named so.
    """
    base = vars(sys.modules[module]).get(name.rpartition("_")[0])
    if not (isinstance(base, type) and issubclass(base, FeatureIntervention)):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return _bound.get((module, name), base)


def __getattr__(name: str) -> type:
    return bound_class(__name__, name)

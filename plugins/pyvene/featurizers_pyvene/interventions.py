"""Intervention classes for pyvene that call the featurizer's own operations.

`Featurizer.get_interchange_intervention`, `get_collect_intervention` and `get_mask_intervention` return subclasses of
these, bound to one featurizer; pyvene accepts them wherever it takes an intervention type. Importing this module
imports pyvene.
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
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its missing extras
        from pyvene.models.interventions import (
            CollectIntervention,
            DistributedRepresentationIntervention,
            SourcelessIntervention,
            TrainableIntervention,
        )
except ImportError as error:
    raise MissingDependencyError("a pyvene intervention", "pyvene", "pip install 'featurizers[pyvene]'") from error


def indices_of_subspaces(subspaces: Sequence[Any] | None, partition: Sequence[Sequence[int]] | None) -> Indices:
    """Convert pyvene's ``subspaces`` to feature indices.

    Args:
        subspaces: for each example of the batch a list of features, or of parts if there is a partition.
        partition: the features of each part.

    Returns:
        None for all features, one list if all examples have the same, else a list for each example.

    Raises:
        UsageError: some examples have a list and others have None.
        FeatureIndexError: a part is not in the partition.
    """
    if subspaces is None:
        return None
    if len(subspaces) and all(row is None or (len(row) and all(i is None for i in row)) for row in subspaces):
        return None
    rows = []
    for row in subspaces:
        if row is None or any(i is None for i in row):
            raise UsageError("subspaces are given for some examples of the batch only; give them for all or for none")
        if partition is not None and (beyond := [part for part in row if not 0 <= part < len(partition)]):
            raise FeatureIndexError(
                f"part {beyond[0]} is not in the subspace_partition, which has {len(partition)} parts"
            )
        rows.append([int(i) for part in row for i in (partition[part] if partition is not None else [part])])
    return rows[0] if rows and all(row == rows[0] for row in rows) else rows


class FeatureInterventionConfig(BaseModel):
    """Arguments of an intervention that are saved beside its featurizer and its tensors.

    Attributes:
        subspace_partition: the features of each part.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    subspace_partition: list[list[Annotated[int, Field(ge=0)]]] | None = None


class FeatureMaskConfig(FeatureInterventionConfig):
    """Arguments of a mask intervention.

    Attributes:
        temperature: divides the gate's logits.
        hard: whether the gate is exactly 0 or 1.
    """

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    hard: bool


class FeatureIntervention(SavedIntervention, TrainableIntervention):  # type: ignore[misc]  # pyvene has no types
    """Base of the interventions here and in plugins: holds the featurizer as a child module.

    The state dict names the featurizer's kind and config. An intervention that pyvene restores from its own files is
    not bound to a featurizer, so it builds one from these; the kind is looked up among the installed plugins.

    Attributes:
        bound: the featurizer of a class that `bind` made, None for any other class.
        featurizer: maps the activations; absent until it is attached.
    """

    Config: ClassVar[type[BaseModel]] = FeatureInterventionConfig
    bound: ClassVar[Featurizer[Any] | None] = None
    featurizer: Featurizer[Any]

    def __init__(self, **kwargs: Any) -> None:
        # with keep_last_dim several units arrive as (batch, units, d) in every version of pyvene
        super().__init__(**{**kwargs, "keep_last_dim": True})
        for name in ("embed_dim", "interchange_dim"):
            # pyvene sets these for some components only; the state dict must not depend on that
            if name in self._buffers:
                self.register_buffer(name, self._buffers.pop(name), persistent=False)
        if self.bound is not None:
            self.attach(self.bound)

    def attach(self, featurizer: Featurizer[Any]) -> None:
        """Set the featurizer. A class with tensors of its own makes them here, where their sizes are known."""
        self.featurizer = featurizer

    @classmethod
    def from_config(cls, config: Any, part: Featurizer[Any]) -> Self:
        """Build an intervention from a config around a featurizer, which other interventions may share."""
        self = cls()
        self.attach(part)
        self.set_config(config)
        return self

    def get_config(self) -> BaseModel:
        """Return the current arguments."""
        parts = self.subspace_partition
        return FeatureInterventionConfig(
            subspace_partition=None if parts is None else [[int(i) for i in part] for part in parts]
        )

    def set_config(self, config: Any) -> None:
        """Set the arguments."""
        self.subspace_partition = config.subspace_partition

    def check(self) -> None:
        """Raise `FeatureIndexError` if the partition has a feature that the featurizer lacks."""
        if self.featurizer.n_features is None or not self.subspace_partition:
            return
        for part in self.subspace_partition:
            if len(set(part)) < len(part):
                self.featurizer.select(part, torch.empty(0))
        every = {index for part in self.subspace_partition for index in part}
        self.featurizer.select(sorted(every), torch.empty(0))  # once, because there may be many parts

    def get_extra_state(self) -> str:
        """Return the featurizer's kind, id and config and the intervention's config, as JSON."""
        record = {"kind": self.featurizer.kind, "id": self.featurizer.id}
        configs = {"config": self.featurizer.config, "intervention": self.get_config()}
        return json.dumps({**record, **{name: config.model_dump(mode="json") for name, config in configs.items()}})

    def set_extra_state(self, state: str) -> None:
        """Build the featurizer that the state names, unless one is attached, and set the arguments.

        Raises:
            UsageError: the attached featurizer is of another kind.
            ManifestError: this class does not accept the intervention's config.
        """
        record = json.loads(state)
        if "featurizer" not in self._modules:
            featurizer = build(host().featurizer_class(record["kind"]), record["config"])
            featurizer.id = record["id"]
            self.attach(featurizer)
        elif self.featurizer.kind != record["kind"]:
            raise UsageError(
                f"the state is of a featurizer of kind {record['kind']!r}, but the intervention has one of kind "
                f"{self.featurizer.kind!r}"
            )
        try:
            self.set_config(self.Config.model_validate(record["intervention"]))
        except ValidationError as error:
            raise ManifestError(f"the state of {type(self).__name__}", explain(error)) from error

    def chosen(self, base: Tensor, subspaces: Sequence[Any] | None) -> Indices:
        """Return the features of ``base`` to act on; a subclass may choose others."""
        return indices_of_subspaces(subspaces, self.subspace_partition)

    def __str__(self) -> str:
        """Return the class name and the featurizer's id."""
        return f"{type(self).__name__.partition('_')[0]}(id={self.featurizer.id})"


class FeatureInterchangeIntervention(FeatureIntervention, DistributedRepresentationIntervention):  # type: ignore[misc]
    """`Featurizer.interchange` as a pyvene intervention."""

    kind = "interchange"

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Return ``base`` with the chosen features taken from ``source``; all if ``subspaces`` is None."""
        return self.featurizer.interchange(base, source, self.chosen(base, subspaces))


class FeatureCollectIntervention(FeatureIntervention, SourcelessIntervention, CollectIntervention):  # type: ignore[misc]
    """`Featurizer.collect` as a pyvene intervention."""

    kind = "collect"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_source_constant = True  # TrainableIntervention sets False, but a collect has no source

    def forward(
        self, base: Tensor, source: Tensor | None = None, subspaces: Sequence[Any] | None = None, **_: Any
    ) -> Tensor:
        """Return the chosen features of ``base``, ``(batch, units, k)``; all if ``subspaces`` is None."""
        return self.featurizer.collect(base, self.chosen(base, subspaces))


class FeatureMaskIntervention(FeatureIntervention, DistributedRepresentationIntervention):  # type: ignore[misc]
    """`Featurizer.mask` with a trainable gate as a pyvene intervention.

    Attributes:
        gate: a `featurizers.SigmoidGate`; soft unless ``hard`` is set, in training mode or not.
    """

    kind = "mask"
    Config = FeatureMaskConfig
    gate: SigmoidGate

    def attach(self, featurizer: Featurizer[Any]) -> None:
        """Set the featurizer and make a gate for its features.

        Raises:
            UsageError: the featurizer does not say how many features it has.
        """
        if featurizer.n_features is None:
            raise UsageError(f"a mask needs the number of features; create {featurizer.kind!r} with d_in")
        super().attach(featurizer)
        self.gate = SigmoidGate(featurizer.n_features)

    def get_config(self) -> BaseModel:
        """Return the current arguments."""
        return FeatureMaskConfig(
            **super().get_config().model_dump(), temperature=self.gate.temperature, hard=self.gate.hard
        )

    def set_config(self, config: Any) -> None:
        """Set the arguments."""
        super().set_config(config)
        self.gate.temperature, self.gate.hard = config.temperature, config.hard

    @property
    def mask(self) -> nn.Parameter:
        """Logits of the gate, ``(n_features,)``."""
        return self.gate.logits

    @property
    def hard(self) -> bool:
        """True if the gate is exactly 0 or 1."""
        return self.gate.hard

    @hard.setter
    def hard(self, hard: bool) -> None:
        self.gate.hard = hard

    def get_temperature(self) -> Tensor:
        """Return the number that divides the logits."""
        return torch.tensor(self.gate.temperature)

    def set_temperature(self, temperature: float | Tensor) -> None:
        """Set the number that divides the logits."""
        self.gate.temperature = float(temperature)

    def get_sparsity_loss(self) -> Tensor:
        """Return the sum of the soft gates."""
        return self.gate.sparsity_loss()

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Return ``base`` with its features moved towards those of ``source`` by the gate."""
        if self.chosen(base, subspaces) is not None:
            raise UsageError("a mask acts on every feature; set the logits of the gate instead of subspaces")
        return self.featurizer.mask(base, source, self.gate())


INTERVENTIONS: dict[str, type[FeatureIntervention]] = {
    base.kind: base for base in (FeatureInterchangeIntervention, FeatureCollectIntervention, FeatureMaskIntervention)
}
"""Classes of this package by the kind under which they are saved."""

_bound: weakref.WeakValueDictionary[tuple[str, str], type] = weakref.WeakValueDictionary()


def bind(base: type, featurizer: Featurizer[Any], **fixed: int) -> type:
    """Return the subclass of an intervention class that is bound to a featurizer; the same class at each call.

    pyvene saves the class by its name. `bound_class`, which the module of ``base`` must use in its ``__getattr__``,
    resolves that name: to the bound class in this process, to ``base`` in any other. There the intervention builds
    its featurizer from the state that pyvene loads.

    Args:
        base: a subclass of `FeatureIntervention`.
        featurizer: the featurizer of its instances.
        fixed: class attributes to set.
    """
    variant = "".join(f"{key}{value}" for key, value in fixed.items())
    name = f"{base.__name__}_{id(featurizer):x}{variant}"
    cls = _bound.get((base.__module__, name))
    if cls is None:  # a living class keeps its featurizer alive, so no other featurizer can have the same id()
        cls = type(base)(
            name, (base,), {"bound": featurizer, "__module__": base.__module__, "__doc__": base.__doc__, **fixed}
        )
        _bound[base.__module__, name] = cls
    return cls


def unbound(cls: type) -> type:
    """Return the class that `bind` derived this one from, or the class itself if it is not bound."""
    return cls.__bases__[0] if _bound.get((cls.__module__, cls.__name__)) is cls else cls


def bound_class(module: str, name: str) -> type:
    """Resolve the name of a bound class; for the ``__getattr__`` of a module that defines intervention classes.

    Args:
        module: name of the module that defines the base class.
        name: name that `bind` gave the bound class.

    Returns:
        The bound class if this process made it, else its base class.

    Raises:
        AttributeError: the module has no such base class.
    """
    base = vars(sys.modules[module]).get(name.rpartition("_")[0])
    if not (isinstance(base, type) and issubclass(base, FeatureIntervention)):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return _bound.get((module, name), base)


def __getattr__(name: str) -> type:
    return bound_class(__name__, name)

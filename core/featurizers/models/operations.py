"""Operations: edits of the activations of a site, made through a featurizer.

Each operation is a frozen description; `featurizers.intervene` carries it out with hooks on a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from featurizers.errors import ShapeError, UsageError, shown
from featurizers.features.featurizer import Featurizer
from featurizers.features.indices import Indices, Selection, values_like
from featurizers.features.site_map import SiteMap
from featurizers.format.labels import Label
from featurizers.models.positions import Inputs, Positions

Writes: TypeAlias = Literal["additive", "pinned", "pinned-everywhere"]
"""How the writes of a map change; see `Operation`."""
GroupIndices: TypeAlias = "Indices | Mapping[str, Indices]"
"""Indices of features; of a `SiteMap` with several groups, indices by group, none of those that are not named."""


@dataclass(frozen=True, eq=False)
class Operation(ABC):
    """Base of the operations.

    Attributes:
        featurizer: maps the activations to features and back; a featurizer of one site, or a map between sites.
        positions: tokens to edit; see `Positions`.
        later: for maps. ``recomputed``: features that are read after an edit at an earlier site are those of the edited
            run; ``frozen``: all features are those of the run without this operation, which costs a second pass.
        writes: for maps that write several sites, where it must be chosen. ``additive``: the change of the features is
            added to what the model computes at each write; since the model itself carries an early change on, it
            arrives there twice. ``pinned``: a write is what it was in the run without this operation plus the change
            of the features alone, which costs a second pass. ``pinned-everywhere``: the same, and the writes of all
            other tokens but the special ones are what they were too.
    """

    featurizer: Featurizer[Any] | SiteMap[Any]
    positions: Positions = field(default=None, kw_only=True)
    later: Literal["recomputed", "frozen"] = field(default="recomputed", kw_only=True)
    writes: Writes | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise UsageError unless the first argument is a featurizer, and the options are those of its form."""
        name = type(self).__name__
        if not isinstance(self.featurizer, Featurizer | SiteMap):
            raise UsageError(f"{name} needs a Featurizer or a SiteMap first, got {type(self.featurizer).__name__}")
        if self.later not in ("recomputed", "frozen"):
            raise UsageError(f"later is 'recomputed' or 'frozen', not {self.later!r}")
        if self.writes not in (None, *get_args(Writes)):
            raise UsageError(f"writes is {', '.join(map(repr, get_args(Writes)))}, not {self.writes!r}")
        by_group = any(isinstance(getattr(self, part, None), Mapping) for part in ("indices", "delta", "value", "gate"))
        if by_group and isinstance(self.featurizer, Featurizer):
            raise UsageError(f"{name}: values by group are for maps between sites, and this is a featurizer")
        if isinstance(self.featurizer, Featurizer) and (self.later, self.writes) != ("recomputed", None):
            raise UsageError(f"{name}: later and writes are options of maps between sites, and this is a featurizer")

    @property
    def of_site(self) -> Featurizer[Any]:
        """The featurizer, of an operation at one site.

        Raises:
            UsageError: the operation is through a map between sites, which `intervene` carries out.
        """
        if not isinstance(self.featurizer, Featurizer):
            raise UsageError(
                f"{self.featurizer.id!r} maps between sites and has no single site; give the operation in a list: "
                "intervene(model, [operation])"
            )
        return self.featurizer

    @abstractmethod
    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return edited activations, or features to collect, for activations ``(batch, n_positions, d_in)``."""

    def edited(self, features: Tensor, source: Tensor | None, group: str) -> Tensor:
        """Return new values of features of a map, as `apply` gives them to a featurizer.

        Args:
            features: those chosen by the operation, ``(batch, n_positions, k)``.
            source: the same features of the source, if the operation has one.
            group: name of their group.

        Raises:
            UsageError: the operation does not act through maps.
        """
        raise UsageError(f"{type(self).__name__} does not act through maps between sites")


@dataclass(frozen=True, eq=False)
class SourcedOperation(Operation):
    """Base of the operations that take features from a source.

    Attributes:
        source: activations of the same site, ``(batch, n_positions, d_in)``, or ``(batch, d_in)`` for a single
            position; or inputs of the model, whose activations are then collected without gradient.
        source_positions: tokens to read in those inputs; None for ``positions``.
    """

    source: Tensor | Inputs = field(kw_only=True)
    source_positions: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise UsageError unless the source is activations or model inputs."""
        super().__post_init__()
        if not isinstance(self.source, Tensor | Mapping):
            raise UsageError(
                f"the source of {type(self).__name__} is a tensor of activations or a mapping of model inputs, "
                f"not {type(self.source).__name__}"
            )
        if isinstance(self.source, Tensor) and not self.source.is_floating_point():
            raise UsageError("the source holds integers; give token ids as a mapping: source={'input_ids': ids}")
        several = isinstance(self.featurizer, SiteMap) and len(self.featurizer.read_widths) > 1
        if isinstance(self.source, Tensor) and several:
            raise UsageError(f"{self.featurizer.id!r} reads several sites; give the source as inputs of the model")


@dataclass(frozen=True, eq=False)
class Interchange(SourcedOperation):
    """Replaces features by those of a source: `Featurizer.interchange`.

    Attributes:
        indices: features to replace, the same for all examples or for each example its own.
    """

    indices: GroupIndices = field(default=None, kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return base with the source's features."""
        return self.of_site.interchange(base, given(source), cast("Indices", self.indices))

    def edited(self, features: Tensor, source: Tensor | None, group: str) -> Tensor:
        """Return the source's features."""
        return given(source).to(features.dtype).expand_as(features)


@dataclass(frozen=True, eq=False)
class Mask(SourcedOperation):
    """Moves each feature towards the source's by a gate: `Featurizer.mask`.

    Attributes:
        gate: ``(n_features,)`` between 0 and 1, or a module that returns such a tensor, as `featurizers.SigmoidGate`
            does.
    """

    gate: Tensor | nn.Module | Mapping[str, Tensor | nn.Module] = field(kw_only=True)

    def __post_init__(self) -> None:
        """Raise UsageError unless the gate is a tensor or a module."""
        super().__post_init__()
        if not all(isinstance(gate, Tensor | nn.Module) for gate in _each(self.gate)):
            raise UsageError(f"the gate of Mask is a tensor or a module that returns one, not {shown(self.gate)}")

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return base with its features moved towards the source's."""
        gate: Any = self.gate  # not by group, as the constructor has checked
        gate = gate() if isinstance(gate, nn.Module) else gate
        return self.of_site.mask(base, given(source), gate)

    def edited(self, features: Tensor, source: Tensor | None, group: str) -> Tensor:
        """Return the features moved towards the source's."""
        gate = _of_group(self.gate, group)
        gate = gate() if isinstance(gate, nn.Module) else gate
        if gate.shape[-1:] != features.shape[-1:]:
            raise ShapeError(f"the gate has shape {tuple(gate.shape)}, but {group!r} has {features.shape[-1]} features")
        return features.lerp(given(source).to(features.dtype).expand_as(features), values_like(gate, features))


@dataclass(frozen=True, eq=False)
class Steer(Operation):
    """Adds to features: `Featurizer.steer`.

    Attributes:
        delta: a number, or one number for each of the features, in units of the features.
        indices: features to add to.
    """

    delta: float | Tensor | Mapping[str, float | Tensor] = field(kw_only=True)
    indices: GroupIndices = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise UsageError unless delta is a number or a tensor."""
        super().__post_init__()
        if not all(map(_is_value, _each(self.delta))):
            raise UsageError(f"the delta of Steer is a number or a tensor, not {shown(self.delta)}")

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return base with delta added to its features."""
        return self.of_site.steer(base, cast("Tensor | float", self.delta), cast("Indices", self.indices))

    def edited(self, features: Tensor, source: Tensor | None, group: str) -> Tensor:
        """Return the features with delta added."""
        return features + values_like(_of_group(self.delta, group), features)


@dataclass(frozen=True, eq=False)
class Ablate(Operation):
    """Sets features to a value: `Featurizer.ablate`.

    Attributes:
        value: a number; a number for each of the features, such as a mean over a data set; or ``"mean"``, the mean
            over the examples and positions of the batch.
        indices: features to set.
    """

    value: float | Tensor | Literal["mean"] | Mapping[str, float | Tensor | Literal["mean"]] = field(
        default=0.0, kw_only=True
    )
    indices: GroupIndices = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise UsageError unless the value is a number, a tensor or ``"mean"``."""
        super().__post_init__()
        if not all(_is_value(value) or (isinstance(value, str) and value == "mean") for value in _each(self.value)):
            raise UsageError(f"Ablate takes a number, a tensor or 'mean', not {shown(self.value)}")

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return base with its features set."""
        value: Any = self.value  # not by group, as the constructor has checked
        if isinstance(value, str):
            value = self.of_site.collect(base, cast("Indices", self.indices)).flatten(0, -2).mean(dim=0)
        return self.of_site.ablate(base, cast("Indices", self.indices), value)

    def edited(self, features: Tensor, source: Tensor | None, group: str) -> Tensor:
        """Return the value."""
        value = _of_group(self.value, group)
        if isinstance(value, str):
            return features.flatten(0, -2).mean(dim=0).expand_as(features)
        return values_like(value, features)


@dataclass(frozen=True, eq=False)
class Collect(Operation):
    """Collects the features of a site, and edits nothing.

    Attributes:
        indices: features to collect, in this order.
    """

    indices: GroupIndices = field(default=None, kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return the features, ``(batch, n_positions, k)``."""
        return self.of_site.collect(base, cast("Indices", self.indices))

    def labels(self) -> Any:
        """Return the labels of each column of what is collected; none for a feature that nothing is said of.

        Returns:
            A list with a tuple of `Label` for each column; of a map with several groups, such a list by group.

        Raises:
            FeatureIndexError: indices that the featurizer does not have.
            UsageError: the featurizer takes activations of any width, so that its columns are not known.
        """
        f = self.featurizer
        tensor = next(iter((*f.parameters(), *f.buffers())), torch.empty(0))
        x, numbering = torch.empty(1, getattr(f, "d_in", None) or 0, device=tensor.device), f.numbering()
        if isinstance(f, Featurizer):
            if f.n_features is None and f.d_in is None:
                raise UsageError(f"{f.id!r} takes activations of any width; create it with d_in, to know its columns")
            chosen: dict[str | None, Selection] = {None: f.select(cast("Indices", self.indices), x)}
        else:
            chosen = {group: f.select(group, own, x) for group, own in f.by_group(self.indices).items()}
        found: dict[str | None, list[tuple[Label, ...]]] = {}
        for group, selection in chosen.items():
            if selection.differs_by_example:
                raise UsageError("Collect takes the same indices for every example; collect all and index the result")
            numbers, columns = numbering[group].numbers, selection.as_columns()
            own_columns = range(len(numbers)) if columns is None else columns.tolist()
            labels = f.labels
            found[group] = [() if labels is None else labels.of(numbers[c], group) for c in own_columns]
        return found if isinstance(f, SiteMap) and len(f.groups) > 1 else next(iter(found.values()), [])


def _each(value: Any) -> Iterable[Any]:
    """Return the values of a mapping by group, or the one value for all."""
    return value.values() if isinstance(value, Mapping) else (value,)


def _is_value(value: object) -> bool:
    return isinstance(value, Tensor | Real)


def given(source: Tensor | None) -> Tensor:
    """Return the source's activations, which `intervene` has read.

    Raises:
        UsageError: the source is None, because the operation has model inputs and is not run by `intervene`.
    """
    if source is None:
        raise UsageError("the operation has a source in the form of inputs, which only `intervene` can run")
    return source


def _of_group(value: Any, group: str) -> Any:
    """Return the value for a group, of a mapping by group or of one value for all.

    Raises:
        UsageError: a mapping lacks the group.
    """
    if not isinstance(value, Mapping):
        return value
    if group not in value:
        raise UsageError(
            f"there is no value for the group {group!r}; there are values for {', '.join(map(repr, value))}"
        )
    return value[group]

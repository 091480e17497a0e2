"""Methods of search: what is trained at a site, and how a source's features are taken through it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias, TypeVar

import featurizers
import torch
from featurizers import Featurizer, SigmoidGate
from featurizers.errors import UsageError
from featurizers.models import GATE_LOGITS, SELECTED
from featurizers_subspace import SubspaceFeaturizer
from torch import Tensor, nn

from featurizers_training.gates import BoundaryGate

Activations: TypeAlias = Callable[[], Tensor]
"""Gives activations ``(n, d_in)``, which cost a run of the model, to whoever wants them."""

Gate = TypeVar("Gate", SigmoidGate, BoundaryGate)


class Searched(nn.Module):
    """A featurizer at one site, and a gate on its features or none.

    Args:
        featurizer: the features.
        gate: how far each feature is taken from the source, which is trained; None takes all features whole.
        learned: the part of the featurizer that is trained, None if it is not.
    """

    def __init__(
        self,
        featurizer: Featurizer[Any],
        gate: SigmoidGate | BoundaryGate | None = None,
        learned: Featurizer[Any] | None = None,
    ) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.gate = gate
        self.learned = [] if learned is None else list(learned.parameters())

    def forward(self, base: Tensor, source: Tensor) -> Tensor:
        """Activations ``(*batch, d)`` of the base with the features of the source."""
        if self.gate is None:
            return self.featurizer.interchange(base, source)
        return self.featurizer.mask(base, source, self.gate())

    def found(self) -> Featurizer[Any]:
        """The featurizer with the features that the gate selects, and the gate's logits, as feature sets."""
        if self.gate is not None:
            self.featurizer.feature_sets[SELECTED] = self.gate.selected()
            if isinstance(self.gate, SigmoidGate):
                logits = self.gate.logits.detach().expand(self.gate.n_features)
                self.featurizer.feature_sets[GATE_LOGITS] = logits.clone()
        return self.featurizer


@dataclass(frozen=True)
class Method(ABC):
    """Base of the methods; each is a frozen description.

    Attributes:
        name: what the command line and an artefact call it.
        lr: learning rate of the featurizer's parameters.
    """

    name: ClassVar[str]
    lr: float = field(default=1e-2, kw_only=True)

    @abstractmethod
    def search(
        self, d_in: int, seed: int, through: Featurizer[Any] | None, activations: Activations | None = None
    ) -> Searched:
        """What to train at a site of width ``d_in``; nothing, if a method has no parameters and is measured as it is.

        Args:
            d_in: width of the activations.
            seed: of what begins at random.
            through: a featurizer in whose features the search is made; it is not trained.
            activations: gives those of the pairs, ``(n, d_in)``, to the methods that look at them first.
        """

    def anneal(self, searched: Searched, progress: float) -> None:  # noqa: B027  # most have nothing to set
        """Set what changes in the course of a search, ``progress`` from 0 to 1."""

    def penalty(self, searched: Searched) -> Tensor:
        """What is added to the loss, for one site."""
        return torch.zeros(())

    @property
    def rate_of_gates(self) -> float:
        """Learning rate of the gates' parameters."""
        return self.lr

    def groups(self, searched: Sequence[Searched]) -> list[dict[str, Any]]:
        """The trained parameters with their learning rates, as an optimizer takes them."""
        maps = [parameter for one in searched for parameter in one.learned]
        gates = [parameter for one in searched if one.gate is not None for parameter in one.gate.parameters()]
        groups = [{"params": maps, "lr": self.lr}, {"params": gates, "lr": self.rate_of_gates}]
        return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class DAS(Method):
    """Distributed alignment search: a rotated subspace whose features are interchanged.

    Geiger et al. 2023, arXiv:2303.02536.

    Attributes:
        n_features: dimensions of the subspace.
    """

    name: ClassVar[str] = "das"
    n_features: int
    lr: float = field(default=3e-2, kw_only=True)

    def search(
        self, d_in: int, seed: int, through: Featurizer[Any] | None, activations: Activations | None = None
    ) -> Searched:
        """A random orthonormal basis."""
        featurizer, subspace = _rotation(d_in, self.n_features, seed, through)
        return Searched(featurizer, learned=subspace)


@dataclass(frozen=True)
class DBM(Method):
    """Differential binary masking: which features of a given featurizer are interchanged, all of them soft at first.

    De Cao et al. 2020, arXiv:2004.14992; on the neurons themselves where no featurizer is given. The gate of a feature
    is ``sigmoid(logit / temperature)``; the temperature falls in geometric steps over the first ``annealing`` of the
    search and then stays. A feature is selected where its logit is positive.

    Attributes:
        sparsity: what is added to the loss for each feature that is taken, by its soft gate.
        temperature: first and last.
        annealing: share of the search in which the temperature falls.
        gate_lr: learning rate of the logits.
        tied: whether one logit stands for all features, so that a site is taken whole or not.
    """

    name: ClassVar[str] = "dbm"
    sparsity: float = 0.0
    temperature: tuple[float, float] = (1.0, 0.01)
    annealing: float = 0.5
    gate_lr: float = 5e-2
    tied: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        if not min(self.temperature) > 0 or not 0 < self.annealing <= 1:
            raise UsageError("temperatures are positive, and annealing is the share of the search, above 0 and up to 1")

    @property
    def rate_of_gates(self) -> float:
        """Learning rate of the logits."""
        return self.gate_lr

    def search(
        self, d_in: int, seed: int, through: Featurizer[Any] | None, activations: Activations | None = None
    ) -> Searched:
        """The featurizer as it is, and a gate of logits 0."""
        featurizer = _given(d_in, through)
        return Searched(featurizer, self._gate(featurizer))

    def _gate(self, featurizer: Featurizer[Any]) -> SigmoidGate:
        if featurizer.n_features is None:
            raise UsageError(f"a mask needs the number of features; create {featurizer.kind!r} with d_in")
        return SigmoidGate(featurizer.n_features, temperature=self.temperature[0], tied=self.tied)

    def anneal(self, searched: Searched, progress: float) -> None:
        """Set the temperature."""
        first, last = self.temperature
        _gate_of(searched, SigmoidGate).temperature = first * (last / first) ** min(progress / self.annealing, 1.0)

    def penalty(self, searched: Searched) -> Tensor:
        """The expected number of features that are taken, times ``sparsity``."""
        return self.sparsity * _gate_of(searched, SigmoidGate).sparsity_loss()


@dataclass(frozen=True)
class DASDBM(DBM):
    """DAS and DBM at once: a rotated subspace is trained, and which of its features are interchanged.

    Attributes:
        n_features: dimensions of the subspace; all if None.
    """

    name: ClassVar[str] = "das+dbm"
    n_features: int | None = None

    def search(
        self, d_in: int, seed: int, through: Featurizer[Any] | None, activations: Activations | None = None
    ) -> Searched:
        """A random orthonormal basis, and a gate of logits 0."""
        featurizer, subspace = _rotation(d_in, self.n_features, seed, through)
        return Searched(featurizer, self._gate(featurizer), subspace)


@dataclass(frozen=True)
class BoundlessDAS(Method):
    """Boundless DAS: a rotation of the whole space, of which the first features are taken up to a learned boundary.

    Wu et al. 2023, arXiv:2305.08809. The gate is a `BoundaryGate`; its temperature falls in geometric steps.

    Attributes:
        sparsity: what is added to the loss if every feature is taken; in proportion for fewer.
        temperature: first and last, in features.
        start: share of the features within the boundary at first.
        gate_lr: learning rate of the boundary, as a share of the features.
    """

    name: ClassVar[str] = "boundless"
    sparsity: float = 0.0
    temperature: tuple[float, float] = (50.0, 0.1)
    start: float = 0.5
    gate_lr: float = 1e-2

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        if not min(self.temperature) > 0 or not 0 < self.start <= 1:
            raise UsageError("temperatures are positive, and start is a share of the features, above 0 and up to 1")

    @property
    def rate_of_gates(self) -> float:
        """Learning rate of the boundary."""
        return self.gate_lr

    def search(
        self, d_in: int, seed: int, through: Featurizer[Any] | None, activations: Activations | None = None
    ) -> Searched:
        """A random rotation, and a boundary at ``start``."""
        featurizer, subspace = _rotation(d_in, None, seed, through)
        n_features = subspace.get_parameter("basis").shape[1]
        return Searched(featurizer, BoundaryGate(n_features, self.start, self.temperature[0]), subspace)

    def anneal(self, searched: Searched, progress: float) -> None:
        """Set the temperature."""
        first, last = self.temperature
        _gate_of(searched, BoundaryGate).temperature = first * (last / first) ** progress

    def penalty(self, searched: Searched) -> Tensor:
        """The share of features within the boundary, times ``sparsity``."""
        return self.sparsity * _gate_of(searched, BoundaryGate).boundary.squeeze()


@dataclass(frozen=True)
class FullVector(Method):
    """No search: the whole vector is interchanged, or all features of a given featurizer. A baseline."""

    name: ClassVar[str] = "full-vector"

    def search(
        self, d_in: int, seed: int, through: Featurizer[Any] | None, activations: Activations | None = None
    ) -> Searched:
        """The identity."""
        return Searched(_given(d_in, through))


@dataclass(frozen=True)
class RandomSubspace(DAS):
    """No search: a random subspace is interchanged. A baseline for `DAS` of the same size."""

    name: ClassVar[str] = "random"

    def search(
        self, d_in: int, seed: int, through: Featurizer[Any] | None, activations: Activations | None = None
    ) -> Searched:
        """A random orthonormal basis, which is not trained."""
        return Searched(_rotation(d_in, self.n_features, seed, through)[0])


@dataclass(frozen=True)
class PCA(Method):
    """No search: the principal components of the activations are interchanged. A baseline for `DAS` of the same size.

    They are those of the activations of sources and bases of the pairs at the site, each token of a prompt once,
    about their mean; through a featurizer, those of its features.

    Attributes:
        n_features: how many components, those of most variance.
    """

    name: ClassVar[str] = "pca"
    n_features: int

    def search(
        self, d_in: int, seed: int, through: Featurizer[Any] | None, activations: Activations | None = None
    ) -> Searched:
        """The components, which are not trained.

        Raises:
            UsageError: there are no activations to find them in.
        """
        if activations is None:
            raise UsageError("principal components need the activations of the pairs")
        with torch.no_grad():
            x = activations() if through is None else through.encode(activations())
            components = SubspaceFeaturizer.fit_pca(x.float(), self.n_features).requires_grad_(False)
        return Searched(components if through is None else through >> components)


METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (DAS, DBM, DASDBM, BoundlessDAS)}
"""The searches, by name."""

BASELINES: dict[str, type[Method]] = {cls.name: cls for cls in (FullVector, RandomSubspace, PCA)}
"""What is measured beside them and trains nothing, by name."""


def _given(d_in: int, through: Featurizer[Any] | None) -> Featurizer[Any]:
    """The identity, or the featurizer given: its own tensors, with a name, a site and feature sets to be written to.

    What an earlier search selected does not belong to this one.
    """
    if through is None:
        return featurizers.create("identity", d_in=d_in)
    shared = copy.copy(through)
    sets = through.feature_sets.items()
    shared.feature_sets = {name: kept for name, kept in sets if name not in (SELECTED, GATE_LOGITS)}
    return shared


def _gate_of(searched: Searched, kind: type[Gate]) -> Gate:
    """The gate that a method made.

    Raises:
        UsageError: it is that of another method.
    """
    if not isinstance(searched.gate, kind):
        raise UsageError(f"this method trains a {kind.__name__}, not a {type(searched.gate).__name__}")
    return searched.gate


def _rotation(
    d_in: int, n_features: int | None, seed: int, through: Featurizer[Any] | None
) -> tuple[Featurizer[Any], Featurizer[Any]]:
    """A random subspace of the features of a featurizer, or of the activations; and the subspace alone."""
    width = d_in if through is None else through.n_features
    if width is None:
        raise UsageError("a rotation needs the number of features; create the featurizer with d_in")
    k = width if n_features is None else n_features
    subspace = featurizers.create("subspace", d_in=width, n_features=k, seed=seed)
    return subspace if through is None else through >> subspace, subspace

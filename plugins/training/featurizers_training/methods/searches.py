"""Methods: DAS, DBM, both at once, boundless DAS, and the baselines beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from featurizers import Featurizer, SigmoidGate
from featurizers.errors import UsageError
from featurizers_subspace import SubspaceFeaturizer

from featurizers_training.methods.base import (
    Activations,
    GatedMethod,
    Method,
    Searched,
    Through,
    identity_or,
    random_subspace,
)
from featurizers_training.methods.gates import BoundaryGate


@dataclass(frozen=True)
class DAS(Method):
    """Distributed alignment search: a trained subspace whose features are interchanged.

    Geiger et al. 2023, arXiv:2303.02536.

    Attributes:
        n_features: dimensions of the subspace.
    """

    name: ClassVar[str] = "das"
    n_features: int
    lr: float = field(default=3e-2, kw_only=True)

    def search(self, d_in: int, seed: int, through: Through, activations: Activations | None = None) -> Searched:
        """Return a random orthonormal basis."""
        featurizer, subspace = random_subspace(d_in, self.n_features, seed, through)
        return Searched(featurizer, learned=subspace)


@dataclass(frozen=True)
class DBM(GatedMethod):
    """Differential binary masking: a gate selects features of a given featurizer; at first each is taken by half.

    De Cao et al. 2020, arXiv:2004.14992. Without a featurizer the features are the neurons. The gate of a feature is
    ``sigmoid(logit / temperature)``; the temperature falls geometrically over the first ``annealing`` of the search and
    then stays. A feature is selected if its logit is positive.

    Attributes:
        sparsity: added to the loss for each feature that is taken, by its soft gate.
        temperature: first and last.
        annealing: share of the search in which the temperature falls.
        gate_lr: learning rate of the logits.
        tied: whether all features share one logit, so that a site is taken whole or not at all.
    """

    name: ClassVar[str] = "dbm"
    annealing: float = 0.5
    gate_lr: float = 5e-2
    tied: bool = False

    def __post_init__(self) -> None:
        """Refuse a schedule that cannot be followed."""
        super().__post_init__()
        if not 0 < self.annealing <= 1:
            raise UsageError(f"annealing is the share of the search, above 0 and up to 1, not {self.annealing}")

    @property
    def rate_of_gates(self) -> float:
        """Learning rate of the logits."""
        return self.gate_lr

    def search(self, d_in: int, seed: int, through: Through, activations: Activations | None = None) -> Searched:
        """Return the featurizer as it is, and a gate of logits 0."""
        featurizer = identity_or(through, d_in)
        return Searched(featurizer, self._gate(featurizer))

    def _gate(self, featurizer: Featurizer[Any]) -> SigmoidGate:
        if featurizer.n_features is None:
            raise UsageError(f"a mask needs the number of features; create {featurizer.kind!r} with d_in")
        return SigmoidGate(featurizer.n_features, temperature=self.temperature[0], tied=self.tied)

    def anneal(self, searched: Searched, progress: float) -> None:
        """Set the temperature."""
        super().anneal(searched, min(progress / self.annealing, 1.0))


@dataclass(frozen=True)
class DASDBM(DBM):
    """DAS and DBM at once: a subspace is trained, and a gate that selects among its features.

    Attributes:
        n_features: dimensions of the subspace; None for all.
    """

    name: ClassVar[str] = "das+dbm"
    n_features: int | None = None

    def search(self, d_in: int, seed: int, through: Through, activations: Activations | None = None) -> Searched:
        """Return a random orthonormal basis, and a gate of logits 0."""
        featurizer, subspace = random_subspace(d_in, self.n_features, seed, through)
        return Searched(featurizer, self._gate(featurizer), subspace)


@dataclass(frozen=True)
class BoundlessDAS(GatedMethod):
    """Boundless DAS: a rotation of the whole space, whose first features are taken up to a learned boundary.

    Wu et al. 2023, arXiv:2305.08809. The gate is a `BoundaryGate`; its temperature falls geometrically.

    Attributes:
        sparsity: added to the loss if every feature is taken; in proportion if fewer are.
        temperature: first and last, in features.
        start: share of the features within the boundary at first.
        gate_lr: learning rate of the boundary, as a share of the features.
    """

    name: ClassVar[str] = "boundless"
    temperature: tuple[float, float] = (50.0, 0.1)
    start: float = 0.5
    gate_lr: float = 1e-2

    def __post_init__(self) -> None:
        """Refuse a schedule that cannot be followed."""
        super().__post_init__()
        if not 0 < self.start <= 1:
            raise UsageError(f"start is a share of the features, above 0 and up to 1, not {self.start}")

    @property
    def rate_of_gates(self) -> float:
        """Learning rate of the boundary."""
        return self.gate_lr

    def search(self, d_in: int, seed: int, through: Through, activations: Activations | None = None) -> Searched:
        """Return a random rotation, and a boundary at ``start``."""
        featurizer, subspace = random_subspace(d_in, None, seed, through)
        n_features = subspace.get_parameter("basis").shape[1]
        return Searched(featurizer, BoundaryGate(n_features, self.start, self.temperature[0]), subspace)


@dataclass(frozen=True)
class FullVector(Method):
    """No search: the whole vector is interchanged, or all features of a given featurizer. A baseline."""

    name: ClassVar[str] = "full-vector"

    def search(self, d_in: int, seed: int, through: Through, activations: Activations | None = None) -> Searched:
        """Return the identity, or the given featurizer."""
        return Searched(identity_or(through, d_in))


@dataclass(frozen=True)
class RandomSubspace(DAS):
    """No search: a random subspace is interchanged. A baseline for `DAS` of the same size."""

    name: ClassVar[str] = "random"

    def search(self, d_in: int, seed: int, through: Through, activations: Activations | None = None) -> Searched:
        """Return a random orthonormal basis, which is not trained."""
        return Searched(random_subspace(d_in, self.n_features, seed, through)[0])


@dataclass(frozen=True)
class PCA(Method):
    """No search: the principal components of the activations are interchanged. A baseline for `DAS` of the same size.

    They are computed from the activations of all sources and bases at the site, each token of a prompt once, about
    their mean; through a featurizer, from its features.

    Attributes:
        n_features: number of components, those of most variance.
    """

    name: ClassVar[str] = "pca"
    n_features: int

    def search(self, d_in: int, seed: int, through: Through, activations: Activations | None = None) -> Searched:
        """Return the components, which are not trained.

        Raises:
            UsageError: there are no activations to compute them from.
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
"""The baselines, by name."""

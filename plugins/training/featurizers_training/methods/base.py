"""`Searched`, a featurizer with a gate at one site; bases of the methods; and the featurizers that they start from."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import featurizers
import torch
from featurizers import Featurizer, SigmoidGate
from featurizers.errors import UsageError
from featurizers.models import GATE_LOGITS, SELECTED
from torch import Tensor, nn

from featurizers_training.methods.gates import BoundaryGate

Activations: TypeAlias = Callable[[], Tensor]
"""Returns activations ``(n, d_in)``; a call may run the model."""
Through: TypeAlias = Featurizer[Any] | None
"""A featurizer in whose features a search is made, if any; it is not trained."""


class Searched(nn.Module):
    """A featurizer at one site, with or without a gate on its features.

    Args:
        featurizer: the features.
        gate: how far each feature is taken from the source; it is trained. None takes all features whole.
        learned: the part of the featurizer that is trained, or None.
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
        """Return activations ``(*batch, d)`` of the base with the features of the source."""
        if self.gate is None:
            return self.featurizer.interchange(base, source)
        return self.featurizer.mask(base, source, self.gate())

    def found(self) -> Featurizer[Any]:
        """Return the featurizer, after writing the gate's selection and logits to its feature sets."""
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
        name: in the command line and in artefacts.
        lr: learning rate of the featurizer's parameters.
    """

    name: ClassVar[str]
    lr: float = field(default=1e-2, kw_only=True)

    @abstractmethod
    def search(self, d_in: int, seed: int, through: Through, activations: Activations | None = None) -> Searched:
        """Return the featurizer and the gate to train at a site; a baseline returns one without trained parameters.

        Args:
            d_in: width of the activations.
            seed: of the random start.
            through: a featurizer in whose features the search is made, or None.
            activations: of the pairs at the site, for the methods that look at them first.
        """

    def anneal(self, searched: Searched, progress: float) -> None:  # noqa: B027  # most have nothing to set
        """Set what changes during a search, such as a temperature; ``progress`` goes from 0 to 1."""

    def penalty(self, searched: Searched) -> Tensor:
        """Return the term that is added to the loss for one site."""
        return torch.zeros(())

    @property
    def rate_of_gates(self) -> float:
        """Learning rate of the gates' parameters."""
        return self.lr

    def groups(self, searched: Sequence[Searched]) -> list[dict[str, Any]]:
        """Return the trained parameters with their learning rates, as an optimizer takes them."""
        maps = [parameter for each in searched for parameter in each.learned]
        gates = [parameter for each in searched if each.gate is not None for parameter in each.gate.parameters()]
        groups = [{"params": maps, "lr": self.lr}, {"params": gates, "lr": self.rate_of_gates}]
        return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class GatedMethod(Method):
    """Base of the methods that train a gate, whose temperature falls geometrically during the search.

    Attributes:
        sparsity: weight in the loss of the gate's own loss, which grows with the features that it takes.
        temperature: of the gate, first and last.
    """

    sparsity: float = 0.0
    temperature: tuple[float, float] = (1.0, 0.01)

    def __post_init__(self) -> None:
        """Refuse temperatures that are not positive."""
        if not min(self.temperature) > 0:
            raise UsageError(f"the temperatures of a gate are positive, not {self.temperature}")

    def anneal(self, searched: Searched, progress: float) -> None:
        """Set the temperature."""
        first, last = self.temperature
        _gate_of(searched).temperature = first * (last / first) ** progress

    def penalty(self, searched: Searched) -> Tensor:
        """Return the gate's ``sparsity_loss``, times ``sparsity``."""
        return self.sparsity * _gate_of(searched).sparsity_loss()


def identity_or(through: Through, d_in: int) -> Featurizer[Any]:
    """Return the identity, or a copy of ``through`` that shares its tensors and may be labelled.

    The copy does not have the feature sets that an earlier search selected.
    """
    if through is None:
        identity: Featurizer[Any] = featurizers.create("identity", d_in=d_in)
        return identity
    shared = copy.copy(through)
    sets = through.feature_sets.items()
    shared.feature_sets = {name: numbers for name, numbers in sets if name not in (SELECTED, GATE_LOGITS)}
    return shared


def random_subspace(
    d_in: int, n_features: int | None, seed: int, through: Through
) -> tuple[Featurizer[Any], Featurizer[Any]]:
    """Return a random subspace of the activations or of a featurizer's features, composed with it and alone.

    Args:
        d_in: width of the activations.
        n_features: dimensions of the subspace; None for all.
        seed: of the basis.
        through: the featurizer, if any.

    Raises:
        UsageError: the featurizer does not know its number of features.
    """
    width = d_in if through is None else through.n_features
    if width is None:
        raise UsageError("a rotation needs the number of features; create the featurizer with d_in")
    n_features = width if n_features is None else n_features
    subspace = featurizers.create("subspace", d_in=width, n_features=n_features, seed=seed)
    return subspace if through is None else through >> subspace, subspace


def _gate_of(searched: Searched) -> SigmoidGate | BoundaryGate:
    if searched.gate is None:
        raise UsageError("this method trains a gate, and the search has none; pass what the method's search returned")
    return searched.gate

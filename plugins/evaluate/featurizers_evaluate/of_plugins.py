"""Metrics that other plugins measure: interchange accuracy on pairs, and the fidelity of causal bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from featurizers import Featurizer
from featurizers.errors import MissingDependencyError
from featurizers.registry import host
from torch.nn import functional

from featurizers_evaluate.definitions import DEFINITIONS
from featurizers_evaluate.documents import Batch, Reading, batches, check_readable_again
from featurizers_evaluate.measuring import Plan
from featurizers_evaluate.result import Metric
from featurizers_evaluate.subjects import Subject

_OF_ALL: Final = "directions are compared, and documents are not resampled"
_EQUAL: Final = "all energies, or all divergences, are equal"


def interchange(model: object, pairs: Any, subject: Subject) -> dict[str, Metric]:
    """Return the interchange accuracy, measured by featurizers-training.

    Raises:
        MissingDependencyError: it is not installed.
    """
    name = "interchange_accuracy"
    if "training" not in host().names():
        raise MissingDependencyError(
            "interchange accuracy", "featurizers-training", "pip install 'featurizers[training]'"
        )
    if not isinstance(subject.space, Featurizer):
        return {
            name: Metric(name, None, why=f"pairs are measured at one site, and {subject.space.id!r} maps between sites")
        }
    accuracy = host().module("training").evaluate(model, pairs, subject.space)
    return {name: Metric(name, accuracy.value, accuracy.interval)}


def fidelity(model: object, tokens: Any, reading: Reading, plan: Plan, subject: Subject) -> dict[str, Metric]:
    """Return the fidelity of a causal basis, measured by featurizers-causal-basis on all tokens at once.

    Raises:
        UsageError: the documents can be read only once.
    """
    names = [name for name, definition in DEFINITIONS.items() if definition.group == "fidelity"]
    kind = subject.space.kind
    if kind != "causal-basis":
        why = f"it compares the energies of a causal basis with the model, and the kind {kind!r} has no energies"
        return {name: Metric(name, None, why=why) for name in names}
    check_readable_again(tokens)
    whole = _together(list(batches(tokens, reading, plan.batch_size, torch.device("cpu"))))
    space: Any = subject.space
    found = (
        host()
        .module("causal-basis")
        .causal_fidelity(
            space, model, whole.inputs(), mask=whole.is_measured, seed=plan.seed, batch_size=plan.batch_size
        )
    )
    values = {
        "fidelity_spearman": found.spearman,
        "fidelity_kl": float(found.model_kl.mean()),
        "fidelity_control_kl": float(found.control_kl.mean()),
    }
    return {name: Metric(name, value, why=_OF_ALL if value is not None else _EQUAL) for name, value in values.items()}


def _together(several: Sequence[Batch]) -> Batch:
    """Return batches as one, padded on the right to the longest."""
    width = max(batch.ids.shape[1] for batch in several)

    def joined(name: str) -> torch.Tensor:
        parts = [getattr(batch, name) for batch in several]
        return torch.cat([functional.pad(part, (0, width - part.shape[1])) for part in parts])

    documents = [document for batch in several for document in batch.documents]
    return Batch(joined("ids"), joined("is_token"), joined("is_measured"), documents)

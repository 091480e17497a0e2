"""`BasisRecord`: how a causal basis was found, and what its energies measure."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from featurizers.format import Side
from pydantic import BaseModel, ConfigDict, Field

Mode: TypeAlias = Literal["mean", "resample", "zero"]
"""Value that ablation sets a direction to: its mean over tokens, its value in another token, or zero."""

Text = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class BasisRecord(BaseModel):
    """Record of how a causal basis was found. Immutable; stored in the artefact's config.

    Attributes:
        units: of the energies.
        objective: what an energy measures: ``kl``, the divergence between the output distributions with and without
            ablation, or ``ce``, the increase of the cross-entropy with the labels.
        mode: how a direction is ablated.
        side: whether the activations are the ``input`` of the block (``resid.pre``) or its ``output``
            (``resid.post``).
        mask: rule that selected the tokens, in words.
        n_tokens: number of selected tokens.
        readout: name of the readout that gave the output distribution, such as ``logit-lens``.
        readout_sha256: hash of the readout's tensors.
        model: Hub id of the model.
        model_revision: commit of the model.
        seed: of everything random.
        preset: of the solver.
        solver: the solver's numbers, which the preset stands for.
        evaluations: how often the objective was evaluated.
        resamples: number of derangements that an energy is averaged over, for ``resample``.
        steps: for each vector, the step of the greedy search that found it, from 0.
        inversions: number of steps with a greater energy than the step before, which missed that optimum.
        joint_energy: energy of ablating all vectors at once, which is not the sum of the energies. None for a
            truncated basis.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    units: Literal["nats/token"] = "nats/token"
    objective: Literal["kl", "ce"] = "kl"
    mode: Mode
    side: Side
    mask: Text = "every token"
    n_tokens: Annotated[int, Field(gt=0, lt=2**63)]
    readout: Text
    readout_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    model: Text | None = None
    model_revision: Text | None = None
    seed: Count = 0
    preset: Text | None = None
    solver: Annotated[dict[str, Finite | int | str | bool | None], Field(max_length=100)] = {}
    evaluations: Count | None = None
    resamples: Count | None = None
    # not strict, because JSON has only lists; a tuple keeps the record immutable
    steps: Annotated[tuple[Count, ...], Field(strict=False, max_length=2**16)] | None = None
    inversions: Count | None = None
    joint_energy: Finite | None = None

    def first(self, k: int, of: int) -> BasisRecord:
        """Return the record of the first k of ``of`` vectors. A truncated basis has no joint energy."""
        steps = None if self.steps is None else self.steps[:k]
        return self if k == of else self.model_copy(update={"steps": steps, "joint_energy": None})

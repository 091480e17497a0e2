"""`causal_fidelity`: whether the directions that matter to a readout matter to the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from featurizers import Anatomy, Site
from featurizers.errors import UsageError
from featurizers.models import Inputs, Place, collect, hook
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featurizers_causal_basis.derangement import derange
from featurizers_causal_basis.featurizer import CausalBasisFeaturizer
from featurizers_causal_basis.inputs import inputs_of, rows_of
from featurizers_causal_basis.massive import warn_of_massive
from featurizers_causal_basis.ranks import spearman


@dataclass(frozen=True, eq=False)
class Fidelity:
    """How much ablating each direction of a basis changes what the model predicts, beside random directions.

    Attributes:
        energies: of the basis, by its own readout, nats per token.
        model_kl: KL(model ‖ model with the direction ablated), mean over the tokens that take part, nats per token.
        control_kl: the same of as many random orthonormal directions.
        n_tokens: how many took part.
        seed: of the random directions, and of the order of the tokens for ``resample``.
    """

    energies: Float[Tensor, " k"]
    model_kl: Float[Tensor, " k"]
    control_kl: Float[Tensor, " k"]
    n_tokens: int
    seed: int

    @property
    def spearman(self) -> float | None:
        """Rank correlation of ``energies`` with ``model_kl``; None for a single direction or if all are equal."""
        return spearman(self.energies, self.model_kl)

    def record(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        lists = {name: getattr(self, name).tolist() for name in ("energies", "model_kl", "control_kl")}
        return {**lists, "spearman": self.spearman, "n_tokens": self.n_tokens, "seed": self.seed, "units": "nats/token"}


@torch.no_grad()
def causal_fidelity(
    basis: CausalBasisFeaturizer,
    model: nn.Module,
    tokens: Int[Tensor, "batch sequence"] | Inputs,
    *,
    mask: Bool[Tensor, "batch sequence"] | Int[Tensor, "batch sequence"] | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> Fidelity:
    """The effect on the model of ablating each direction of a basis at its site, beside random directions.

    Each direction is ablated as the record says: to the basis' stored mean, to zero, or to another token's. Belrose et
    al. 2023 (arXiv:2303.08112), section 4.2, compare the two energies by their rank correlation. Cost: 2 k + 1
    forward passes of the prompts.

    Args:
        basis: with a site.
        model: the decoder with its language-model head that the basis belongs to, in evaluation mode.
        tokens: prompts, or what the model is called with.
        mask: which tokens take part, true or 1: they are ablated, and the divergence is the mean over them. The
            ``attention_mask`` unless given. The first token of a prompt is best left out of most models.
        seed: of everything random.
        batch_size: prompts a pass.

    Raises:
        UsageError: the basis has no site; the model is being trained; no token takes part, or one alone for
            ``resample``.
        ShapeError: the mask has another shape than the prompts.
        SiteError: the model does not have the site.

    Warns:
        MassiveTokenWarning: a token that takes part is more than 20 times as long as the median one.
    """
    if basis.site is None:
        raise UsageError(f"{basis.id!r} does not say where it belongs; set basis.site = Site('resid.post', 8)")
    if model.training:
        raise UsageError("the model is in training mode, in which dropout changes every run; call model.eval()")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size is a number of prompts, 1 or more, not {batch_size!r}")
    inputs, taking_part, _ = inputs_of({"input_ids": tokens} if isinstance(tokens, Tensor) else tokens, mask)
    n_prompts = len(inputs["input_ids"])
    place = Anatomy(model).place(basis.site)
    batches = [_Batch(rows_of(inputs, rows, n_prompts), taking_part[rows]) for rows in _parts(n_prompts, batch_size)]
    own = copy.deepcopy(basis).to(next(model.parameters()).device)
    bases = [own, _control(own, seed)]
    values = _values(bases, model, batches, seed, basis.site)
    found = torch.zeros(2, basis.n_features, dtype=torch.float64)
    for number, batch in enumerate(batches):
        clean = _log_probs(model, batch)
        for i, f in enumerate(bases):
            for j in range(f.n_features):
                edited = _ablated(model, batch, place, f, j, values[i][number][..., [j]])
                found[i, j] += float((clean.exp() * (clean - edited)).sum(-1, dtype=torch.float64).sum())
    n_tokens = int(taking_part.sum())
    mine, random = found / n_tokens
    return Fidelity(basis.energies.detach().double().cpu(), mine, random, n_tokens, seed)


@dataclass(frozen=True, eq=False)
class _Batch:
    inputs: Inputs
    mask: Tensor


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(i, i + size) for i in range(0, n, size))


def _control(basis: CausalBasisFeaturizer, seed: int) -> CausalBasisFeaturizer:
    """Random orthonormal directions, uniform over all such, as many and at the same site."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(basis.d_in, basis.n_features, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    vectors = (q * r.diagonal().sign()).to(basis.directions)
    return CausalBasisFeaturizer.of(vectors, torch.zeros_like(basis.energies), basis.mean, basis.record)


def _values(
    bases: list[CausalBasisFeaturizer], model: nn.Module, batches: list[_Batch], seed: int, site: Site
) -> list[list[Tensor]]:
    """For each basis and batch what its features are set to, ``(batch, sequence, k)`` or ``(k,)``."""
    resample = bases[0].record.mode == "resample"
    features: list[list[Tensor]] = [[], []]
    for number, batch in enumerate(batches):
        if number and not resample:  # the first batch is looked at for massive tokens
            break
        hidden = collect(model, batch.inputs, [site])[site]
        warn_of_massive(hidden, batch.mask.to(hidden.device))
        for i, f in enumerate(bases):
            features[i].append(f.encode(hidden))
    if not resample:
        return [[f.ablation_values()] * len(batches) for f in bases]
    for i in range(len(bases)):
        rows = [values[batch.mask.to(values.device)] for values, batch in zip(features[i], batches, strict=True)]
        # the same order of the tokens for both
        moved = torch.split(derange(torch.cat(rows), torch.Generator().manual_seed(seed)), [len(part) for part in rows])
        for number, (batch, part) in enumerate(zip(batches, moved, strict=True)):
            whole = features[i][number]
            features[i][number] = whole.index_put((batch.mask.to(whole.device),), part)
    return features


def _ablated(model: nn.Module, batch: _Batch, place: Place, f: CausalBasisFeaturizer, j: int, value: Tensor) -> Tensor:
    """Log-probabilities of the tokens that take part, ``(n, vocabulary)``, with feature j at a value."""
    column = torch.tensor([j], device=f.directions.device)

    def edit(hidden: Tensor) -> Tensor:
        features = f.encode(hidden, column)
        edited = torch.where(batch.mask.to(hidden.device).unsqueeze(-1), value, features)
        return f.apply_edit(hidden, features, edited, column)

    handle = hook(place, edit)
    try:
        return _log_probs(model, batch)
    finally:
        handle.remove()


def _log_probs(model: nn.Module, batch: _Batch) -> Tensor:
    logits = model(**batch.inputs).logits
    chosen: Tensor = logits[batch.mask.to(logits.device)]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(-1)

"""`causal_fidelity`: compares the effect of a basis on the model with its energies by a readout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from featurizers import Anatomy, Site
from featurizers.errors import UsageError
from featurizers.models import Inputs, Place, collect, eager, hook, last_clean_block
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featurizers_causal_basis.featurizer import CausalBasisFeaturizer
from featurizers_causal_basis.inputs import batches, checked_inputs, derange, refuse_training, warn_of_massive
from featurizers_causal_basis.solve.remainder import Remainder


@dataclass(frozen=True, eq=False)
class Fidelity:
    """Effect on the model's output of ablating each direction of a basis, beside random directions.

    Attributes:
        energies: of the basis, by its own readout, nats per token.
        model_kl: KL(model ‖ model with the direction ablated), mean over the selected tokens, nats per token.
        control_kl: the same for as many random orthonormal directions.
        n_tokens: number of selected tokens.
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
        """Return all numbers, ready for JSON."""
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
    """Measure the effect on the model of ablating each direction of a basis at its site, beside random directions.

    Each direction is ablated as the record says: to its value in the stored mean, to zero, or to its value in another
    token. Belrose et al. 2023 (arXiv:2303.08112), section 4.2, compare the two energies by their rank correlation.
    Cost: 2 k + 1 passes of the prompts through the blocks from the site on, and two whole passes.

    Args:
        basis: with a site.
        model: the decoder with its language-model head that the basis belongs to, in evaluation mode.
        tokens: prompts, or the model's inputs.
        mask: selects the tokens, true or 1: they are ablated, and the divergence is the mean over them. Default: the
            ``attention_mask``. In most models the first token of a prompt is best left out.
        seed: of everything random.
        batch_size: prompts per forward pass.

    Raises:
        UsageError: the basis has no site; the model is in training mode; the mask selects no token, or a single one
            for ``resample``.
        ShapeError: the mask has another shape than the prompts.
        SiteError: the model does not have the site.

    Warns:
        MassiveTokenWarning: a selected token is more than 20 times as long as the median one.
    """
    if basis.site is None:
        raise UsageError(f"{basis.id!r} does not say where it belongs; set basis.site = Site('resid.post', 8)")
    refuse_training(model)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size is a number of prompts, 1 or more, not {batch_size!r}")
    inputs, selected, _ = checked_inputs({"input_ids": tokens} if isinstance(tokens, Tensor) else tokens, mask)
    anatomy = Anatomy(model)
    place, depth = anatomy.place(basis.site), last_clean_block(anatomy, basis.site) + 1
    parts = [(batch, selected[rows]) for rows, batch in batches(inputs, batch_size)]
    own = copy.deepcopy(basis).to(next(model.parameters()).device)
    bases = [own, _control(own, seed)]
    values = _ablated_values(bases, model, parts, basis.site, seed)
    totals = torch.zeros(2, basis.n_features, dtype=torch.float64)
    for number, (batch, chosen) in enumerate(parts):
        rest = Remainder(model, batch, depth)
        clean = _log_probs(rest(rest.hidden), chosen)
        for i, f in enumerate(bases):
            for j in range(f.n_features):
                edit = _ablation(f, j, values[i][number][..., [j]], chosen)
                if basis.site.kind == "resid.post":  # where the rest of the model begins
                    logits = rest(edit(rest.hidden))
                else:
                    with _hooked(place, edit):
                        logits = rest(rest.hidden)
                edited = _log_probs(logits, chosen)
                totals[i, j] += float((clean.exp() * (clean - edited)).sum(-1, dtype=torch.float64).sum())
    n_tokens = int(selected.sum())
    model_kl, control_kl = totals / n_tokens
    return Fidelity(basis.energies.detach().double().cpu(), model_kl, control_kl, n_tokens, seed)


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float | None:
    """Return Spearman's rank correlation; equal values share their mean rank. None if all of x or of y are equal.

    Examples:
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0])), 6)
        0.5
    """
    ranks = torch.stack([_ranks(x), _ranks(y)])
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    lengths = centred.norm(dim=1)
    return float(centred[0] @ centred[1] / (lengths[0] * lengths[1])) if (lengths > 0).all() else None


def _ranks(x: Tensor) -> Tensor:
    """Return ranks from 0, the mean rank for equal values."""
    x = x.detach().double()
    return (x < x.unsqueeze(-1)).sum(-1).double() + ((x == x.unsqueeze(-1)).sum(-1).double() - 1) / 2


def _control(basis: CausalBasisFeaturizer, seed: int) -> CausalBasisFeaturizer:
    """Return as many random orthonormal directions at the same site, uniformly distributed."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(basis.d_in, basis.n_features, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    vectors = (q * r.diagonal().sign()).to(basis.directions)
    return CausalBasisFeaturizer.of(vectors, torch.zeros_like(basis.energies), basis.mean, basis.record)


def _ablated_values(
    bases: list[CausalBasisFeaturizer], model: nn.Module, parts: Sequence[tuple[Inputs, Tensor]], site: Site, seed: int
) -> list[list[Tensor]]:
    """Return, for each basis and batch, the ablated values of its features: ``(batch, sequence, k)`` or ``(k,)``."""
    resample = bases[0].record.mode == "resample"
    read = parts if resample else parts[:1]  # else only to warn of massive tokens
    hiddens = [collect(model, inputs, [site])[site] for inputs, _ in read]
    masks = [mask.to(hidden.device) for hidden, (_, mask) in zip(hiddens, read, strict=True)]
    for hidden, mask in zip(hiddens, masks, strict=True):
        warn_of_massive(hidden, mask)
    if resample:
        return [_resampled([f.encode(hidden) for hidden in hiddens], masks, seed) for f in bases]
    return [[f.ablation_values()] * len(parts) for f in bases]


def _resampled(features: list[Tensor], masks: list[Tensor], seed: int) -> list[Tensor]:
    """Exchange the features of the selected tokens of all batches by one derangement, which depends on the seed."""
    selected = [part[mask] for part, mask in zip(features, masks, strict=True)]
    moved = derange(torch.cat(selected), torch.Generator().manual_seed(seed))
    rows = torch.split(moved, [len(part) for part in selected])
    return [part.index_put((mask,), new) for part, mask, new in zip(features, masks, rows, strict=True)]


def _ablation(f: CausalBasisFeaturizer, j: int, value: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function of activations that sets feature j of the selected tokens to a value."""
    column = torch.tensor([j], device=f.directions.device)

    def edit(hidden: Tensor) -> Tensor:
        features = f.encode(hidden, column)
        edited = torch.where(mask.to(hidden.device).unsqueeze(-1), value, features)
        return f.apply_edit(hidden, features, edited, column)

    return edit


@contextmanager
def _hooked(place: Place, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Edit the activations of a place while the context lasts."""
    with eager():
        handle = hook(place, edit)
        try:
            yield
        finally:
            handle.remove()


def _log_probs(logits: Tensor, mask: Tensor) -> Float[Tensor, "n vocabulary"]:
    """Return the log-probabilities of the selected tokens."""
    selected: Tensor = logits[mask.to(logits.device)]
    return selected.to(torch.promote_types(selected.dtype, torch.float32)).log_softmax(-1)

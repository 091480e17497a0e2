"""Readings of the data: every batch is run once, and its sums are added to those of each subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from featurizers import Site, SiteMap
from featurizers.errors import FeaturizerError, UsageError
from torch import Tensor

from featurizers_evaluate.documents import Batch, Reading, check_readable_again
from featurizers_evaluate.harvests import HarvestRuns
from featurizers_evaluate.processes import Processes
from featurizers_evaluate.runs import Clean, Losses, Runs, has_next
from featurizers_evaluate.subjects import Subject
from featurizers_evaluate.sums import Sums, Weights, per_row

CHUNK: Final = 2**25
"""Features that are computed at once."""
FEW: Final = 0.12
"""Share of features that are not 0 up to which they are looked for first, and then counted alone."""

Observer = Callable[[Tensor, Batch], None]
"""Is called with the features of some rows, ``(rows, width, n_features)``, and these rows."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        groups: of metrics, some of `GROUPS`.
        ablations: some of `ABLATIONS`.
        batch_size: rows that run together.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        progress: is called with the number of tokens after each batch.
        processes: those that share the batches.
    """

    groups: tuple[str, ...]
    ablations: tuple[str, ...]
    batch_size: int
    resamples: int
    seed: int
    progress: Callable[[int], None]
    processes: Processes


@dataclass
class Measured:
    """What was measured of one subject.

    Attributes:
        subject: that was measured.
        writes: sums over tokens of each write by name; empty for a single one.
        sums: over tokens, of all writes side by side.
        active: at how many measured tokens each feature is not 0, int64 ``(n_features,)``; None if not measured.
        inactive: number of features that were 0, over all measured tokens.
        documents: number of documents.
        tokens: number of tokens that are no padding.
        no_effect: reason why the model cannot run with the reconstruction; empty if it can.
        missing: groups of metrics that cannot be measured, each with the reason.
    """

    subject: Subject
    writes: dict[str, Sums] = field(init=False)
    sums: Sums = field(init=False)
    active: Tensor | None = None
    inactive: int = 0
    documents: int = 0
    tokens: int = 0
    no_effect: str = ""
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin the sums."""
        names = list(self.subject.writes)
        self.writes = {name: Sums() for name in names} if len(names) > 1 else {}
        self.sums = Sums(list(self.writes.values()))


class Part(NamedTuple):
    """Measurements of one subject in one process; the fields are those of `Measured`."""

    writes: dict[str, Sums]
    sums: Sums
    active: Tensor | None
    inactive: int
    documents: int
    tokens: int
    no_effect: str


@torch.no_grad()
def measure(
    runs: Runs | HarvestRuns,
    subjects: Sequence[Subject],
    tokens: Any,
    reading: Reading,
    plan: Plan,
    observe: Observer | None = None,
) -> list[Measured]:
    """Measure subjects on the same data.

    Args:
        runs: of the model, or of a harvest in its place.
        subjects: what to measure.
        tokens: documents; those of the harvest, if it is one.
        reading: how to read them.
        plan: what to measure.
        observe: is called with all features as they are computed; None for nothing.

    Raises:
        UsageError: the data or the model do not fit, or no token is measured.
        ShapeError: a subject does not fit its site.
    """
    has_effect = "effect" in plan.groups and isinstance(runs, Runs)
    means = _means(runs, subjects, tokens, reading, plan) if has_effect and "mean" in plan.ablations else {}
    found = plan.processes.gathered(lambda: _parts(_own(runs, subjects, tokens, reading, plan, means, observe)))
    measured = _joined(found, subjects)
    if isinstance(runs, HarvestRuns):
        for each in measured:
            each.missing = runs.why_not(each.subject)
    return measured


def _own(
    runs: Runs | HarvestRuns,
    subjects: Sequence[Subject],
    tokens: Any,
    reading: Reading,
    plan: Plan,
    means: Mapping[Site, Tensor],
    observe: Observer | None,
) -> list[Measured]:
    """Measure subjects on the batches of this process; documents and tokens are counted of all."""
    measured = [Measured(subject) for subject in subjects]
    has_effect = "effect" in plan.groups and isinstance(runs, Runs)
    weights, n_tokens, n_measured = Weights(plan.resamples, plan.seed), 0, 0
    for batch, clean in runs.read(tokens, reading, plan.batch_size, logits=has_effect, has=plan.processes.has):
        of_rows = weights.of(batch.documents)
        n_tokens += int(batch.is_token.sum())
        n_measured += int(batch.is_measured.sum())
        plan.progress(n_tokens)
        if clean is None:
            continue
        effects = _Effects(runs, batch, clean, means, plan.ablations) if has_effect and isinstance(runs, Runs) else None
        for each in measured:
            rows = _reconstructed(each, clean, batch, of_rows, plan, observe)
            if effects is not None:
                rows |= effects.of(each)
            each.sums.add(of_rows, rows)
    _check_measured(n_measured)
    for each in measured:
        each.documents, each.tokens = weights.documents, n_tokens
    return measured


def _means(
    runs: Runs | HarvestRuns, subjects: Sequence[Subject], tokens: Any, reading: Reading, plan: Plan
) -> dict[Site, Tensor]:
    """Return the mean of the measured activations at each write, in a first reading that stops after the sites."""
    check_readable_again(tokens)
    sites = dict.fromkeys(site for subject in subjects for site in subject.writes.values())

    def own_sums() -> list[Sums]:
        sums = {site: Sums() for site in sites}
        for batch, clean in runs.read(tokens, reading, plan.batch_size, logits=False, has=plan.processes.has):
            if clean is None:
                continue
            ones = torch.ones(len(batch.documents), 1, dtype=torch.float64)
            for site, own in sums.items():
                y = _flat(clean.activations[site])
                own.add_vectors(ones, y, batch.is_measured.to(y.device))
                own.add(ones, {"tokens": batch.is_measured.sum(dim=-1)})
        return list(sums.values())

    means = {}
    for site, parts in zip(sites, zip(*plan.processes.gathered(own_sums), strict=True), strict=True):
        total = Sums()
        for part in parts:
            total.include(part)
        _check_measured(int(total["tokens"][0]))
        means[site] = total.mean_vector().to(torch.float32)
    return means


def _parts(measured: Sequence[Measured]) -> list[Part]:
    """Return what a process measured without the subjects, which may hold what cannot be sent."""
    return [
        Part(each.writes, each.sums, each.active, each.inactive, each.documents, each.tokens, each.no_effect)
        for each in measured
    ]


def _joined(found: Sequence[Sequence[Part]], subjects: Sequence[Subject]) -> list[Measured]:
    """Return what all processes measured of each subject."""
    measured = [Measured(subject) for subject in subjects]
    for parts in found:
        for each, part in zip(measured, parts, strict=True):
            for name, sums in part.writes.items():
                each.writes[name].include(sums)
            each.sums.include(part.sums)
            if part.active is not None:
                each.active = part.active if each.active is None else each.active + part.active
            each.inactive += part.inactive
            each.documents, each.tokens = part.documents, part.tokens  # counted of all batches by each process
            each.no_effect = each.no_effect or part.no_effect
    return measured


def _check_measured(tokens: int) -> None:
    if not tokens:
        raise UsageError("every token is excluded; give other documents, or exclude fewer special tokens")


def _reconstructed(
    each: Measured, clean: Clean, batch: Batch, weights: Tensor, plan: Plan, observe: Observer | None
) -> dict[str, Tensor]:
    """Add vectors and counts of features of a batch, keep the reconstructions, and return sums of its rows."""
    space, stored = each.subject.space, clean.stored.get(each.subject.space)
    width = batch.ids.shape[1] * max(space.n_features or 1, 1)
    step = max(1, CHUNK // width)
    parts: list[dict[str, Tensor]] = []
    reconstructions: list[dict[Site, Tensor]] = []
    for start in range(0, len(batch.ids), step):
        rows = slice(start, start + step)
        kept = batch.is_measured[rows]
        found = {"tokens": kept.sum(dim=-1)}
        if all(site in clean.activations for site in each.subject.sites):
            x = {site: value[rows] for site, value in clean.activations.items()}
            features, decoded = each.subject.reconstruct(x, batch.is_token[rows])
            found |= _of_writes(each, x, decoded, kept, weights[rows])
            reconstructions.append(decoded)
        if stored is not None:
            features = stored.dense(rows, each.subject.limit)
        features = features.flatten(2)
        if "sparsity" in plan.groups:
            found |= _sparsity(each, features, kept.to(features.device))
        if observe is not None:
            observe(features, batch.rows(rows))
        parts.append(found)
    clean.reconstructions = {
        site: torch.cat([part[site] for part in reconstructions]) for site in (reconstructions or [{}])[0]
    }
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def _of_writes(
    each: Measured, x: Mapping[Site, Tensor], decoded: Mapping[Site, Tensor], kept: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Add activations and the sums of each write, and return sums of the rows of all writes side by side."""
    device = x[next(iter(decoded))].device
    y = {name: _flat(x[site].to(device)).float() for name, site in each.subject.writes.items()}
    y_hat = {name: _flat(decoded[site].to(device)).float() for name, site in each.subject.writes.items()}
    for name, sums in each.writes.items():
        sums.add_vectors(weights, y[name], kept.to(device))
        sums.add(weights, _of_rows(y[name], y_hat[name], kept))
    whole = torch.cat(list(y.values()), dim=-1)
    if not each.writes:
        each.sums.add_vectors(weights, whole, kept.to(device))
    return _of_rows(whole, torch.cat(list(y_hat.values()), dim=-1), kept)


def _of_rows(y: Tensor, y_hat: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Return sums of each row, ``(rows,)``, over the tokens that ``kept`` marks; see `DEFINITIONS` for the formulas."""
    norm, norm_hat, dot = y.norm(dim=-1), y_hat.norm(dim=-1), (y * y_hat).sum(dim=-1)
    product = norm * norm_hat
    of_tokens = {
        "residual": (y - y_hat).square().sum(dim=-1),
        "cosine": torch.where(product > 0, dot / product, 0.0),
        "norm": norm,
        "norm_hat": norm_hat,
        "ratio": norm_hat / torch.where(norm < 1e-4, 1.0, norm),
        "square_hat": norm_hat.square(),
        "dot": dot,
    }
    kept = kept.to(y.device)
    return {"tokens": kept.sum(dim=-1), **{name: per_row(value, kept) for name, value in of_tokens.items()}}


def _sparsity(each: Measured, features: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Count the features that are not 0, and return sums of the rows."""
    rows, width, n = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    if int(features.count_nonzero()) <= FEW * features.numel():
        flat = features.reshape(-1, n)
        tokens, columns = flat.nonzero(as_tuple=True)
        here = kept.reshape(-1)[tokens]
        tokens, columns = tokens[here], columns[here]
        sizes = flat[tokens, columns].abs().to(dtype)
        l0 = torch.bincount(tokens // width, minlength=rows)
        l1 = sizes.new_zeros(rows * width).index_add_(0, tokens, sizes).reshape(rows, width)
        count = torch.bincount(columns, minlength=n).cpu()
    else:
        active = (features != 0) & kept[..., None]
        count, l0 = active.sum(dim=(0, 1)).cpu(), active.sum(dim=(1, 2))
        l1 = features.abs().sum(dim=-1, dtype=dtype)
    each.active = count if each.active is None else each.active + count
    each.inactive += int(kept.sum()) * n - int(count.sum())
    return {"l0": l0, "l1": per_row(l1, kept)}


class _Effects:
    """Losses of the model on one batch, with and without edits; ablations of the same sites are run once."""

    def __init__(
        self, runs: Runs, batch: Batch, clean: Clean, means: Mapping[Site, Tensor], ablations: Sequence[str]
    ) -> None:
        if clean.logits is None:
            raise ValueError("the clean run was stopped before the logits")
        self._runs, self._batch, self._clean = runs, batch, clean
        self._means, self._ablations = means, ablations
        self._has_next = has_next(batch).to(clean.logits.device)
        self._measured = batch.is_measured.to(clean.logits.device)
        self._losses_of = Losses(clean.logits, batch)
        loss = self._losses_of.of_clean()
        self._rows = {"next": self._has_next.sum(dim=-1), "ce_loss_clean": per_row(loss, self._has_next)}
        self._of_sites: dict[tuple[Site, ...], dict[str, Tensor]] = {}

    def of(self, each: Measured) -> dict[str, Tensor]:
        """Return sums of the rows for one subject."""
        sites = tuple(each.subject.writes.values())
        if sites not in self._of_sites:
            self._of_sites[sites] = {
                key: value for name in self._ablations for key, value in self._ablated(name, sites).items()
            }
        rows = {**self._rows, **self._of_sites[sites]}
        if not each.no_effect:
            try:
                logits = self._with_reconstruction(each.subject)
            except FeaturizerError as error:
                each.no_effect = str(error)
            else:
                rows |= self._losses(logits, "ce_loss", "kl")
        return rows

    def _with_reconstruction(self, subject: Subject) -> Tensor:
        sites, space = list(subject.writes.values()), subject.space
        if isinstance(space, SiteMap) and len(sites) > 1:
            left_out = self._batch.is_token & ~self._batch.is_measured
            excluded = set(self._batch.ids[left_out].tolist())
            if excluded & set(self._batch.ids[self._batch.is_measured].tolist()):
                raise UsageError("tokens are left out by their place, and a replacement model by their id alone")
            return self._runs.replaced(self._batch, self._clean, space, excluded)
        put = {}
        for site in sites:
            y = self._clean.activations[site]
            y_hat = self._clean.reconstructions[site].to(y.device, y.dtype)
            put[site] = torch.where(self._measured.to(y.device)[(..., *(None,) * (y.dim() - 2))], y_hat, y)
        return self._runs.edited(self._batch, self._clean, put)

    def _ablated(self, name: str, sites: Sequence[Site]) -> dict[str, Tensor]:
        put = {}
        for site in sites:
            y = self._clean.activations[site]
            value = torch.zeros(y.shape[2:]) if name == "zero" else self._means[site].reshape(y.shape[2:])
            put[site] = value.to(y.device, y.dtype).expand_as(y)
        return self._losses(
            self._runs.edited(self._batch, self._clean, put), f"ce_loss_{name}_ablation", f"kl_{name}_ablation"
        )

    def _losses(self, logits: Tensor, loss_name: str, divergence_name: str) -> dict[str, Tensor]:
        loss, divergence = self._losses_of.of(logits)
        return {loss_name: per_row(loss, self._has_next), divergence_name: per_row(divergence, self._measured)}


def _flat(x: Tensor) -> Tensor:
    """Return activations as ``(rows, width, d)``."""
    return x.flatten(2)

"""Metrics from sums."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from featurizers_evaluate.definitions import DEFINITIONS
from featurizers_evaluate.measuring import Measured, Plan
from featurizers_evaluate.result import Histogram, Metric
from featurizers_evaluate.sums import LEAST_DOCUMENTS, Sums, interval

BAR = 0.25
"""Width of a bar of the histogram, in powers of ten."""

_FORMULAS: dict[str, Callable[[Sums], Tensor]] = {
    "explained_variance": lambda s: 1 - s.mean("residual", "tokens") / s.variance(),
    "fvu": lambda s: s.mean("residual", "tokens") / s.variance(),
    "mse": lambda s: s.mean("residual", "tokens"),
    "cosine": lambda s: s.mean("cosine", "tokens"),
    "l2_norm_in": lambda s: s.mean("norm", "tokens"),
    "l2_norm_out": lambda s: s.mean("norm_hat", "tokens"),
    "l2_ratio": lambda s: s.mean("ratio", "tokens"),
    "relative_reconstruction_bias": lambda s: s.mean("square_hat", "dot"),
    "l0": lambda s: s.mean("l0", "tokens"),
    "l1": lambda s: s.mean("l1", "tokens"),
    "ce_loss_clean": lambda s: s.mean("ce_loss_clean", "next"),
    "ce_loss": lambda s: s.mean("ce_loss", "next"),
    "kl": lambda s: s.mean("kl", "tokens"),
}
for _name in ("zero", "mean"):
    _loss, _kl = f"ce_loss_{_name}_ablation", f"kl_{_name}_ablation"
    _FORMULAS |= {
        _loss: lambda s, loss=_loss: s.mean(loss, "next"),  # type: ignore[misc]
        f"ce_recovered_{_name}_ablation": lambda s, loss=_loss: (  # type: ignore[misc]
            (s[loss] - s["ce_loss"]) / (s[loss] - s["ce_loss_clean"])
        ),
        _kl: lambda s, kl=_kl: s.mean(kl, "tokens"),  # type: ignore[misc]
        f"kl_recovered_{_name}_ablation": lambda s, kl=_kl: 1 - s["kl"] / s[kl],  # type: ignore[misc]
    }
_DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "dead_features": lambda density: density == 0,
    "dense_features_1_percent": lambda density: density > 0.01,
    "dense_features_10_percent": lambda density: density > 0.1,
}
_OF_RECONSTRUCTION = ("ce_loss", "kl")
_MEASURED = {*_FORMULAS, *_DENSITIES}


def metrics_of(measured: Measured, plan: Plan) -> dict[str, Metric]:
    """Return the metrics of a subject by name, each with a value or the reason why it has none."""
    found = {}
    for name, definition in DEFINITIONS.items():
        of_ablation = name.endswith("_ablation")
        if (
            name not in _MEASURED
            or definition.group not in plan.groups
            or definition.group in measured.missing
            or (of_ablation and name.split("_")[-2] not in plan.ablations)
        ):
            continue
        found[name] = _metric(name, measured)
    return found


def writes_of(measured: Measured, plan: Plan) -> dict[str, dict[str, Metric]]:
    """Return the metrics of the reconstruction at each write by its site; nothing for a single write."""
    if "reconstruction" not in plan.groups or "reconstruction" in measured.missing:
        return {}
    names = [name for name, definition in DEFINITIONS.items() if definition.group == "reconstruction"]
    return {
        str(measured.subject.writes[write]): {name: _of_sums(name, sums, measured.documents) for name in names}
        for write, sums in measured.writes.items()
    }


def density_of(measured: Measured) -> Tensor | None:
    """Return the share of the tokens at which each feature is not 0; None for dense or unmeasured features."""
    if measured.active is None or not measured.inactive:
        return None
    return measured.active.double() / measured.sums["tokens"][0]


def histogram_of(density: Tensor) -> Histogram:
    """Return the numbers of features by the logarithm of their density."""
    alive = density[density > 0].log10()
    first = math.floor(float(alive.min()) / BAR) if len(alive) else -1
    edges = [BAR * number for number in range(min(first, -1), 1)]
    bars = torch.histogram(alive, torch.tensor(edges, dtype=alive.dtype)).hist.long().tolist()
    return Histogram(tuple(edges), tuple(bars), int((density == 0).sum()))


def _metric(name: str, measured: Measured) -> Metric:
    kind = measured.subject.space.kind
    density = density_of(measured)
    if DEFINITIONS[name].group == "sparsity" and density is None:
        return Metric(name, None, why=f"no feature of any token was 0: those of the kind {kind!r} are dense")
    if name in _DENSITIES and density is not None:
        share = float(_DENSITIES[name](density).double().mean())
        return Metric(name, share, why="features are counted, and a resample would need counts of its own")
    if measured.no_effect and (name in _OF_RECONSTRUCTION or "_recovered_" in name):
        return Metric(name, None, why=f"the model cannot run with the reconstruction: {measured.no_effect}")
    if DEFINITIONS[name].group == "effect" and "ce" in name and not float(measured.sums["next"][0]):
        return Metric(name, None, why="no measured token is followed by another")
    return _of_sums(name, measured.sums, measured.documents)


def _of_sums(name: str, sums: Sums, documents: int) -> Metric:
    values = _FORMULAS[name](sums)
    value = float(values[0])
    if not math.isfinite(value):
        return Metric(name, None, why=_why(name, sums))
    bounds = interval(values, documents)
    few = f"{documents} documents are too few for an interval; it takes {LEAST_DOCUMENTS}"
    return Metric(name, value, bounds, "" if bounds else few if len(values) > 1 else "no resamples were asked for")


def _why(name: str, sums: Sums) -> str:
    """Return why a value is not finite."""
    if not all(bool(each[0].isfinite()) for each in (sums.variance(), sums["norm"], sums["ce_loss_clean"])):
        return "the activations or the losses of the model are not finite"
    if not all(bool(sums[key][0].isfinite()) for key in ("residual", "norm_hat", "ce_loss", "kl")):
        return "the reconstruction, or the model with it, is not finite"
    if name in ("fvu", "explained_variance"):
        return "all activations measured are equal, so that their variance is 0"
    if name == "relative_reconstruction_bias":
        return "the reconstructions are orthogonal to the activations, so that the mean of y·ŷ is 0"
    return "the ablation changes nothing, so that there is nothing to recover"

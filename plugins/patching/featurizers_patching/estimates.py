"""Estimates of the effects of cells from gradients: attribution patching."""

from __future__ import annotations

import numpy as np
import torch
from featurizers import Site
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_patching.engine.gradients import Gradients
from featurizers_patching.engine.reading import Read
from featurizers_patching.group import Group
from featurizers_patching.metrics import KL
from featurizers_patching.request import Request

METHODS = ("exact", "gradient", "integrated")


def check_estimable(request: Request) -> None:
    """Raise UsageError unless the method can estimate what the call asks for."""
    method = request.method.name
    if method == "exact":
        return
    if method == "gradient" and (flat := [name for name, each in request.metrics.items() if isinstance(each, KL)]):
        raise UsageError(
            f"the gradient of {flat[0]!r} is zero at the base, where the divergence is least; take "
            "method='integrated', or another metric"
        )
    if "attn.pattern" in request.freeze or (method == "integrated" and request.freeze):
        frozen = "attn.pattern" if "attn.pattern" in request.freeze else request.freeze[0]
        raise UsageError(f"freeze={frozen!r} does not go with method={method!r}; take method='exact'")
    if method == "gradient":
        return
    if request.options.operation not in ("interchange", "mask"):
        raise UsageError(
            "method='integrated' goes from the base to the source, which this operation does not; take "
            "method='gradient' or 'exact'"
        )
    for number, pair in enumerate(request.pairs):
        if len(pair.base) != len(pair.source):
            raise UsageError(
                f"pair {number}: the base has {len(pair.base)} tokens and the source {len(pair.source)}, and "
                "method='integrated' goes from one to the other token by token; give prompts of equal length"
            )


def estimated(group: Group) -> tuple[Tensor, Tensor]:
    """Return estimates of the change of each metric in each cell ``(metrics, cells)``, and clean logits.

    The estimate is the sum, over what a cell changes, of the change times the gradient. With ``integrated`` the
    gradient is the mean over midpoints between the token embeddings of base and source.

    Returns:
        Changes of the metrics, and the logits of the bases ``(prompts, n, k)``.
    """
    request = group.request
    steps = request.method.steps
    at_base = Gradients(request.model, group.prompts, request.sites, request.freeze)
    clean = group.narrowed(at_base.logits).detach()
    gradients: list[list[Tensor]] = []
    if request.method.name == "gradient":
        gradients = _of_metrics(group, at_base, clean)
    else:
        embed = [Site("embed")]
        every = torch.arange(len(group.prompts) * group.prompts.width)
        base, source = (
            Read(request.model, prompts, embed).rows(0, every) for prompts in (group.prompts, group.sources)
        )
        for step in range(steps):
            between = torch.lerp(base, source, (step + 0.5) / steps)
            run = Gradients(request.model, group.prompts, request.sites, (), between)
            here = _of_metrics(group, run, clean)
            gradients = here if not gradients else [_added(*each) for each in zip(gradients, here, strict=True)]
        gradients = [[each / steps for each in of_sites] for of_sites in gradients]
    return _changes(group, at_base, gradients), clean


def _of_metrics(group: Group, run: Gradients, clean: Tensor) -> list[list[Tensor]]:
    """Return gradients by metric and site."""
    with torch.enable_grad():
        scored = group.scored(group.narrowed(run.logits), clean, np.arange(len(group.prompts)))
        return [run.of(found) for found in group.measured(scored, "between base and source")]


def _added(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(first, second, strict=True)]


def _changes(group: Group, at_base: Gradients, gradients: list[list[Tensor]]) -> Tensor:
    cells, width = group.cells, group.prompts.width
    found = torch.zeros(len(gradients), len(cells), dtype=torch.float64)
    for site in range(len(group.request.sites)):
        chosen = cells.spot == site
        if not chosen.any():
            continue
        cell = cells.cell[chosen]
        activations = at_base.activations(site)
        rows = torch.as_tensor(cells.pair[cell] * width + cells.token[chosen], device=activations.device)
        base = activations.index_select(0, rows)
        change = group.edit(site)(base, cells.number[chosen]).to(base.dtype) - base
        precise = torch.promote_types(base.dtype, torch.float32)
        for of_metric, of_sites in zip(found, gradients, strict=True):
            products = change.to(precise) * of_sites[site].index_select(0, rows).to(precise)
            of_metric.index_add_(0, torch.from_numpy(cell), products.sum(-1).to("cpu", torch.float64))
    return found

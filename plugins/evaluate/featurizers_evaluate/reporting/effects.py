"""Direct effects of features on the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from featurizers import Anatomy, Site
from featurizers.errors import FeaturizerError, SiteError
from featurizers.models import Norm, Unembedding, head_of
from torch import Tensor

from featurizers_evaluate.reporting.directions import Directions
from featurizers_evaluate.reporting.stream import STREAM, why_not_in_stream
from featurizers_evaluate.reporting.top import top_rows

SHOWN: Final = 10
STEP: Final = 512
"""Features whose logits are computed at once, at most."""
CHUNK: Final = 2**25
"""Logits that are computed at once."""


@dataclass(frozen=True)
class Effects:
    """Tokens that each feature promotes and suppresses most by what it writes.

    Attributes:
        high: token ids ``(n, 10)`` int32, largest first.
        high_values: their logits, a unit of the feature, before the final norm divides by its scale.
        low: token ids with the smallest logits, smallest first.
        low_values: their logits.
        how: description of what was computed.
    """

    high: Tensor
    high_values: Tensor
    low: Tensor
    low_values: Tensor
    how: str


@torch.no_grad()
def logit_effects(
    directions: Directions,
    sites: Mapping[str, Site],
    model: object,
    columns: Tensor,
    reach: Callable[[int], None] = lambda _: None,
) -> Effects | str:
    """Return the direct effects of features on the logits, or why they are not defined.

    A direction goes through the weight of the final norm (a LayerNorm subtracts the mean too) and the unembedding. It
    is not divided by the scale of the norm, which is one positive number for each token.

    Args:
        directions: of the features.
        sites: of the writes, by name.
        model: a decoder with its head.
        columns: of the features, ``(n,)``.
        reach: is called with the number of features that are done.
    """
    if not directions.writes:
        return directions.why
    anatomy = Anatomy(model)
    added, why = _added(sites, model, anatomy)
    if not added:
        return why
    try:
        weight, norm = _readout(anatomy, skip_norm=any(sites[name].kind == "norm.out" for name in added))
    except FeaturizerError as error:
        return f"the model's logits are not a final norm and a head: {error}"
    k = min(SHOWN, len(weight))
    parts: list[tuple[Tensor, ...]] = []
    for some in torch.split(columns, max(1, min(STEP, CHUNK // len(weight)))):
        rows = torch.stack([directions.writes[name](some) for name in added]).sum(dim=0)
        rows = (rows if norm is None else norm.linear(rows)).to(weight)
        logits = weight @ rows.T.contiguous()  # a third faster so, on a CPU
        high, low = top_rows(logits, k), top_rows(logits, k, largest=False)
        parts.append(tuple(each.T.cpu() for each in (*high, *low)))
        reach(sum(len(part[0]) for part in parts))
    high_values, high_ids, low_values, low_ids = (torch.cat(each) for each in zip(*parts, strict=True))
    through = "" if norm is None else "the final norm's weight and "
    scale = "" if norm is None else ", before the norm's division by its scale"
    where = f", summed over {len(added)} sites" if len(added) > 1 else "" if len(sites) == 1 else f", at {added[0]}"
    how = f"decoder direction through {through}the unembedding{where}, in logits for a unit of the feature{scale}"
    return Effects(high_ids.int(), high_values.float(), low_ids.int(), low_values.float(), how)


def _added(sites: Mapping[str, Site], model: object, anatomy: Anatomy) -> tuple[list[str], str]:
    """Return the writes whose directions are summed, or none and why.

    Places of the stream hold the same stream, so that of several the last one counts; what is added to the stream is
    summed.
    """
    if not sites:
        return [], "the featurizer does not know its site"
    finals = [name for name, site in sites.items() if site.kind == "norm.out"]
    if finals:
        return finals[-1:], ""
    inside = [name for name, site in sites.items() if site.kind in STREAM]
    if inside:
        return inside[-1:], ""
    reasons = {name: why_not_in_stream(model, site, anatomy) for name, site in sites.items()}
    wrong = [why for why in reasons.values() if why]
    return ([], wrong[0]) if wrong else (list(sites), "")


def _readout(anatomy: Anatomy, *, skip_norm: bool) -> tuple[Tensor, Norm | None]:
    """Return the unembedding ``(vocabulary, d)`` with its scale, and the final norm.

    Raises:
        SiteError: the model has no head, or a final norm that is none.
    """
    model: Any = anatomy.backend.model
    head = head_of(model)
    weight = Unembedding.of(model, head=head).weight.T
    if skip_norm:
        return weight, None
    try:
        module = anatomy.place("norm.out").module
    except SiteError:
        return weight, None
    norm = Norm.of(module, weight.shape[1])
    if norm is None:
        raise SiteError(f"{type(module).__name__} is neither a LayerNorm nor an RMSNorm")
    return weight, norm

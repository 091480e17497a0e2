"""`Contexts`: the places in the data where each feature is largest, with the tokens around them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from featurizers_evaluate.documents import Batch

AROUND: Final = 10
"""Tokens before and after the largest one that a context shows."""
WIDTH: Final = 2 * AROUND + 1
SPARE: Final = 2
"""Contexts that are kept for each that is shown, because equal ones are left out at the end."""


class Contexts:
    """The rows of the data in which each feature is largest, one context a row, with the tokens around the place.

    Of equal values the earliest is kept, so that the result does not depend on how rows are batched. Memory does not
    grow with the data.

    Args:
        n_features: number of features.
        shown: contexts of each feature.
        device: of the features.
        sign: 1 for the largest values, -1 for the smallest.
        floor: values times the sign that are not above it are no contexts.
    """

    def __init__(self, n_features: int, shown: int, device: torch.device, *, sign: int, floor: float) -> None:
        kept = SPARE * shown
        self._shown, self._sign, self._floor = shown, sign, floor
        self._values = torch.full((kept, n_features), -torch.inf, device=device)
        self._ids = torch.full((kept, n_features, WIDTH), -1, dtype=torch.int32, device=device)
        self._strengths = torch.zeros(kept, n_features, WIDTH, device=device)

    def add(self, features: Tensor, batch: Batch) -> None:
        """Add rows.

        Args:
            features: ``(rows, width, n_features)`` float32.
            batch: the rows.
        """
        ids, is_token = batch.ids.to(features.device), batch.is_token.to(features.device)
        measured = batch.is_measured.to(features.device)
        signed = features if self._sign > 0 else -features
        if not bool(measured.all()):
            signed = signed.masked_fill(~measured[..., None], -torch.inf)
        best = signed.amax(dim=1)
        best = torch.where(best > self._floor, best, -torch.inf)
        kept = len(self._values)
        order = torch.cat([self._values, best]).sort(dim=0, descending=True, stable=True)
        places = order.indices[:kept]
        is_new = (places >= kept) & (order.values[:kept] > -torch.inf)
        if not bool(is_new.any()):
            return
        changed = is_new.any(dim=0).nonzero().squeeze(-1)
        old = places[:, changed].clamp(max=kept - 1)
        for state in (self._ids, self._strengths):
            state[:, changed] = state[old, changed]
        self._values = order.values[:kept].clone()
        slots, columns = is_new.nonzero(as_tuple=True)
        rows = places[slots, columns] - kept
        positions = signed[rows, :, columns].argmax(dim=-1)
        around = positions[:, None] + torch.arange(-AROUND, AROUND + 1, device=features.device)
        inside = (around >= 0) & (around < features.shape[1])
        around = around.clamp(0, features.shape[1] - 1)
        inside &= is_token[rows[:, None], around]
        self._ids[slots, columns] = torch.where(inside, ids[rows[:, None], around], -1).int()
        seen = inside & measured[rows[:, None], around]
        values = features[rows[:, None], around, columns[:, None]]
        self._strengths[slots, columns] = torch.where(seen, values, 0.0)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, token ids and features of the contexts that differ in their tokens, largest value first.

        Returns:
            Values ``(n_features, shown)``, NaN where there are fewer; ids ``(n_features, shown, 21)`` int32, -1 beyond
            the row; features at these tokens, likewise, 0 where they were not measured.
        """
        values = self._values.T.contiguous()
        ids, strengths = self._ids.transpose(0, 1).contiguous(), self._strengths.transpose(0, 1).contiguous()
        missing = values == -torch.inf
        for number in range(1, values.shape[1]):
            repeated = (ids[:, :number] == ids[:, number : number + 1]).all(dim=-1).any(dim=-1)
            missing[:, number] |= repeated
        order = missing.byte().argsort(dim=1, stable=True)[:, : self._shown]
        rows = torch.arange(len(values), device=values.device)[:, None]
        values = torch.where(missing, torch.nan, self._sign * values)[rows, order]
        absent = values.isnan()[..., None]
        return (
            values.cpu(),
            ids[rows, order].masked_fill(absent, -1).cpu(),
            strengths[rows, order].masked_fill(absent, 0.0).cpu(),
        )

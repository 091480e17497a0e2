"""`Encoder`: raw features of normalised activations, either all of them or only those that fire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from featurizers.builtin import sparse
from featurizers.features.active import Active
from featurizers.features.rules import Rule

CHUNK = 4096
"""Features that `Encoder.active` encodes at a time on a CPU, so that their pre-activations stay in the cache."""


@dataclass(eq=False, slots=True)
class Encoder:
    """Linear encoder and activation rule of a dictionary, made of the dictionary's own tensors.

    Attributes:
        weight: ``(n_features, d_in)``.
        bias: ``(n_features,)``, None if the rule brings its own.
        centre: ``(d_in,)``, subtracted from normalised activations; None to subtract nothing.
        rule: from pre-activations to features.
        tensors: parameters of the rule, ``(n_features,)`` each.
        options: numbers of the rule.
    """

    weight: Tensor
    bias: Tensor | None
    centre: Tensor | None
    rule: Rule
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]

    def features(self, normal: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Tensor:
        """Return raw features, all or those in ``columns``; a rule that acts on each alone reads those rows only."""
        if columns is None or self.rule.elementwise:
            return self.rule(self._pre(normal, columns), self._tensors(columns), self.options)
        return self.features(normal)[..., columns]

    def active(self, normal: Float[Tensor, "n d_in"], share: float = sparse.DENSE) -> Active | None:
        """Return the raw features of n tokens that fire, or None if they are more than a share of all.

        The gradient reaches ``normal``, and not the weights.
        """
        select = self.rule.select
        with torch.no_grad():
            coordinates = self._nonzero(normal, share) if select is None else self._selected(select, normal, share)
        if coordinates is None:
            return None
        rows, columns, pre = coordinates
        pre = sparse.pre_activations(self._centred(normal), pre, rows, columns, self.weight)
        options = self.options if select is None else {}
        return Active(rows, columns, self.rule.function(pre, **self._tensors(columns), **options))

    def _selected(self, select: Callable[..., Tensor], normal: Tensor, share: float) -> Active | None:
        """Return the pre-activations that the rule selects, or None if they are more than a share of all."""
        n, f = len(normal), len(self.weight)
        pre = self._pre(normal)
        selected = select(pre, **self.options)
        if selected.numel() > share * n * f:
            return None
        selected = selected.sort(dim=-1).values
        rows = torch.arange(n, device=normal.device).repeat_interleave(selected.shape[-1])
        return Active(rows, selected.reshape(-1), pre.gather(-1, selected).reshape(-1))

    def _nonzero(self, normal: Tensor, share: float) -> Active | None:
        """Return the pre-activations of nonzero features, or None as soon as they are more than a share of all."""
        n, f = len(normal), len(self.weight)
        chunks, count = [], 0
        step = CHUNK if normal.device.type == "cpu" else f
        for start in range(0, f, step):
            part = slice(start, start + step)
            pre = self._pre(normal, part)
            rows, columns = self.rule(pre, self._tensors(part), self.options).nonzero(as_tuple=True)
            count += len(rows)
            if count > share * n * min(start + step, f):
                return None
            chunks.append((rows, columns + start, pre[rows, columns]))
        rows, columns, values = map(torch.cat, zip(*chunks, strict=True))
        order = rows.argsort(stable=True)
        return Active(rows[order], columns[order], values[order])

    def _pre(self, normal: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        where = slice(None) if columns is None else columns
        bias = None if self.bias is None else self.bias[where]
        return functional.linear(self._centred(normal), self.weight[where], bias)

    def _centred(self, normal: Tensor) -> Tensor:
        return normal if self.centre is None else normal - self.centre

    def _tensors(self, columns: Tensor | slice | None = None) -> dict[str, Tensor]:
        where = slice(None) if columns is None else columns
        return {name: tensor[where] for name, tensor in self.tensors.items()}

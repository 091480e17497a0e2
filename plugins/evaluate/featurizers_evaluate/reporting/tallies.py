"""`Tally`: what one reading of the data shows of each feature."""

from __future__ import annotations

from typing import Final

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_evaluate.documents import Batch
from featurizers_evaluate.reporting.contexts import Contexts
from featurizers_evaluate.reporting.histograms import Histograms

DENSE: Final = 0.5
"""Share of features that are not 0 above which a feature space is dense."""
STEP: Final = 2**24
"""Features that are looked at together."""


class Tally:
    """Counts, sums, histograms and contexts of features, in memory that does not grow with the data.

    Of a sparse feature space values that are not 0 are counted, and contexts are those of the largest values above 0
    and of the smallest below 0. Of a dense one, such as a subspace, all values are, and both ends have contexts. The
    first rows decide which it is.

    Args:
        contexts: number of contexts of each end.

    Attributes:
        tokens: number of tokens measured.
        is_dense: whether most features of a token are not 0.
        count: measured tokens at which each feature is not 0, ``(n_features,)`` int64.
        total: sum of the values, ``(n_features,)`` float64.
        squares: sum of their squares, likewise.
        least: smallest value, ``(n_features,)`` float32; infinity for a feature that is always 0.
        most: largest value, likewise; minus infinity.
    """

    def __init__(self, contexts: int) -> None:
        self._shown = contexts
        self._high: Contexts | None = None
        self._low: Contexts | None = None
        self._histograms: Histograms | None = None
        self.tokens, self.is_dense = 0, False

    def add(self, features: Tensor, batch: Batch) -> None:
        """Add the features ``(rows, width, n_features)`` of some rows.

        Raises:
            UsageError: one is NaN or infinite.
        """
        features = features.detach().float()
        step = max(1, STEP // features[0].numel())
        for start in range(0, len(features), step):
            rows = slice(start, start + step)
            self._add(features[rows], batch.rows(rows))

    def _add(self, features: Tensor, batch: Batch) -> None:
        n = features.shape[-1]
        flat = features.reshape(-1, n)
        tokens, columns = flat.nonzero(as_tuple=True)
        values = flat[tokens, columns]
        kept = batch.is_measured.to(features.device)
        if not bool(kept.all()):
            here = kept.reshape(-1)[tokens]
            columns, values = columns[here], values[here]
        if not bool(values.isfinite().all()):
            wrong = int(columns[~values.isfinite()][0])
            raise UsageError(f"feature {wrong} is NaN or infinite at a token; a report needs finite features")
        measured = int(kept.sum())
        if self._histograms is None and measured:
            self._begin(flat[kept.reshape(-1)], len(values))
        if self._histograms is None or self._high is None:
            return  # no token yet
        self.tokens += measured
        self.count += torch.bincount(columns, minlength=n)
        self.total.index_add_(0, columns, values.double())
        self.squares.index_add_(0, columns, values.double().square())
        self.least.scatter_reduce_(0, columns, values, "amin")
        self.most.scatter_reduce_(0, columns, values, "amax")
        self._histograms.add(columns, values)
        self._high.add(features, batch)
        if self._low is None and len(values) and float(values.min()) < 0:
            self._low = Contexts(n, self._shown, features.device, sign=-1, floor=0.0)
        if self._low is not None:
            self._low.add(features, batch)

    def _begin(self, first: Tensor, active: int) -> None:
        """Make the state that fits the features of the first tokens ``(tokens, n_features)``."""
        n, device = first.shape[-1], first.device
        self.is_dense = active > DENSE * first.numel()
        floor = -torch.inf if self.is_dense else 0.0
        self.count = torch.zeros(n, dtype=torch.long, device=device)
        self.total = torch.zeros(n, dtype=torch.float64, device=device)
        self.squares = torch.zeros(n, dtype=torch.float64, device=device)
        self.least = torch.full((n,), torch.inf, device=device)
        self.most = torch.full((n,), -torch.inf, device=device)
        self._histograms = Histograms(first[0].clone() if self.is_dense else torch.zeros(n, device=device))
        self._high = Contexts(n, self._shown, device, sign=1, floor=floor)
        if self.is_dense:
            self._low = Contexts(n, self._shown, device, sign=-1, floor=floor)

    @property
    def histograms(self) -> Histograms:
        """Histograms of the values that are counted.

        Raises:
            ValueError: no token was added.
        """
        if self._histograms is None:
            raise ValueError("no token was added")
        return self._histograms

    def high(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the contexts of the largest values; see `Contexts.result`."""
        if self._high is None:
            raise ValueError("no token was added")
        return self._high.result()

    def low(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the contexts of the smallest values; None if no feature is negative."""
        return None if self._low is None else self._low.result()

"""`Settings` of a search."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from featurizers import Site
from featurizers.errors import UsageError
from torch import nn

from featurizers_training.pairs import Pairs
from featurizers_training.runs.clean_runs import CleanRuns

AUTOCAST: Final = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Settings of a search.

    Attributes:
        epochs: passes over the pairs.
        batch_size: pairs in an optimizer step, over all processes.
        micro_batch: pairs in a forward pass of one process, for a model that cannot hold a batch; the gradient is the
            same.
        seed: of the random start and of the order of the pairs.
        warmup: share of the steps in which the learning rate rises; it then falls to a twentieth; both linearly.
        precision: of the model's arithmetic: ``fp32`` as the model is, or autocast to ``bf16`` or ``fp16``.
        patience: stop after this many epochs without a better accuracy on the validation pairs, and return to the best.
        clip: largest norm of the gradient.
        cache_bytes: how much of the clean runs may be kept in memory; see `CleanRuns`.
    """

    epochs: int = 5
    batch_size: int = 32
    micro_batch: int | None = None
    seed: int = 0
    warmup: float = 0.1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    patience: int | None = None
    clip: float | None = None
    cache_bytes: int = 2**31

    def __post_init__(self) -> None:
        """Refuse values that are not allowed."""
        for name in ("epochs", "batch_size", "micro_batch", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} is a whole number, at least 1, not {value!r}")
        if self.precision not in AUTOCAST:
            raise UsageError(f"precision is one of {', '.join(AUTOCAST)}, not {self.precision!r}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is a share of the steps from 0 to below 1, not {self.warmup!r}")

    def arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context in which the model computes with `precision`."""
        dtype = AUTOCAST[self.precision]
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    def clean_runs(self, model: nn.Module, pairs: Pairs, sites: Sequence[Site | str]) -> CleanRuns:
        """Return clean runs of a model in evaluation mode, as a search with these settings makes them."""
        with self.arithmetic(next(model.parameters()).device):
            size = self.micro_batch or self.batch_size
            return CleanRuns(model, pairs, sites, batch_size=size, cache_bytes=self.cache_bytes)

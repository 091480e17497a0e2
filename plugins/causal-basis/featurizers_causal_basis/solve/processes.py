"""`Processes`: sums over the tokens of all processes, so that every process decides from the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from featurizers.errors import FeaturizerError, UsageError
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Processes that share the tokens; only this one if torch.distributed is not initialised.

    Attributes:
        group: of torch.distributed; None for all processes.
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return dist.get_rank(self.group) if self.size > 1 else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, in float64 on the CPU."""
        total = tensor.detach().cpu().double()
        if self.size == 1:
            return total
        total = total.to(self._device())
        dist.all_reduce(total, group=self.group)
        return total.cpu()

    def all(self, value: Any) -> list[Any]:
        """Return the value of each process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_first(self, action: Callable[[], T]) -> T:
        """Run an action in process 0, and return its result in every process.

        Raises:
            UsageError: process 0 refuses. There, its own error is raised, which may be an ArtefactError.
        """
        result: Any = None
        error: FeaturizerError | None = None
        if self.rank == 0:
            try:
                result = action()
            except FeaturizerError as caught:
                error = caught
        result, problem = self.all((result, None if error is None else str(error)))[0]
        if error is not None:
            raise error
        if problem is not None:
            raise UsageError(f"process 0 refuses: {problem}")
        return result  # type: ignore[no-any-return]

    def rows(self, rows: Tensor) -> tuple[Tensor, int]:
        """Return the rows of all processes, by rank, and the index of this process's first row among them."""
        if self.size == 1:
            return rows, 0
        counts = self.all(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:]).to(self._device())
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=self.group)
        whole = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
        return whole.to(rows.device), sum(counts[: self.rank])

    def _device(self) -> torch.device:
        """Return the device that tensors are sent from. NCCL sends only from GPUs."""
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

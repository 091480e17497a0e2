"""`Processes`: processes of one group that share the batches, and how torchrun tells a process its place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from featurizers.errors import OtherRankError, UsageError, one_line, shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")


class Launch(NamedTuple):
    """Place of this process among those that torchrun started.

    Attributes:
        rank: its number.
        size: number of processes, on all machines.
        local_rank: its number on this machine.
    """

    rank: int
    size: int
    local_rank: int

    @property
    def device(self) -> str:
        """Device for this process: one of the accelerators of this machine, or the CPU."""
        import torch

        count = torch.cuda.device_count()
        return f"cuda:{self.local_rank % count}" if count else "cpu"


def launched() -> Launch | None:
    """Return the place of this process, None if torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return Launch(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def is_first() -> bool:
    """Return whether this is the first process of torchrun, or torchrun did not start it."""
    place = launched()
    return place is None or place.rank == 0


@contextlib.contextmanager
def torchrun_group() -> Iterator[ProcessGroup | None]:
    """Make the group of the processes that torchrun started; yield None if it did not start this one."""
    if launched() is None:
        yield None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")  # it gathers sums, which are on the CPU
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Processes:
    """Processes that share the batches: each runs every n-th.

    Args:
        group: of torch.distributed; None for this process alone.

    Attributes:
        rank: number of this process.
        size: number of processes.

    Raises:
        UsageError: it is no group, or this process is not in it.
    """

    def __init__(self, group: Any = None) -> None:
        self._group, self.rank, self.size = group, 0, 1
        if group is None:
            return
        import torch.distributed as dist

        if not dist.is_initialized() or not isinstance(group, dist.ProcessGroup):
            raise UsageError(f"group is a torch.distributed.ProcessGroup with this process, not {shown(group)}")
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def has(self, batch: int) -> bool:
        """Return whether this process runs the batch of a number."""
        return batch % self.size == self.rank

    def gathered(self, compute: Callable[[], Result]) -> list[Result]:
        """Return what each process computed, the same list in all. What is computed must be picklable.

        Raises:
            OtherRankError: another process failed.
        """
        if self._group is None:
            return [compute()]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        try:
            own = compute()
        except Exception as error:
            problem = f"{type(error).__name__}: {one_line(error)}"
            with contextlib.suppress(RuntimeError):  # the others are gone
                dist.all_gather_object(found, (False, problem), group=self._group)
            raise
        dist.all_gather_object(found, (True, own), group=self._group)
        for rank, (is_done, value) in enumerate(found):
            if not is_done:
                raise OtherRankError(rank, value)
        return [value for _, value in found]

"""`Saver`: saves what is divided: the first process writes one file, and asks the others for their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch
import torch.distributed as dist
from featurizers.errors import OtherRankError, UsageError, one_line
from featurizers.format import Pieces, check_finite
from torch import Tensor, nn

from featurizers_sharded.ranks import MOST_PROBLEM, Ranks, reported

PIECE_BYTES: Final = 2**26
"""Bytes of the rows that are sent at once."""

_END: Final = -1
"""Request of the first process that ends the exchange."""


@reported("fetched")
class Saver:
    """Saves tensors whose rows are divided over the processes.

    Args:
        share: module with the tensors of this process, under the names of the file.
        sizes: for each tensor that is divided, how many rows each process holds; all processes have the others whole.
        ranks: the processes.

    Attributes:
        share: as given.
        ranks: as given.
    """

    def __init__(self, share: nn.Module, sizes: Mapping[str, list[int]], ranks: Ranks) -> None:
        self.share, self._sizes, self.ranks = share, sizes, ranks
        self._is_writing = False

    @contextmanager
    def saving(self, name: str) -> Iterator[bool]:
        """Enclose a save in all processes; yield True in the first, which writes.

        Args:
            name: of the featurizer, for errors.

        Raises:
            WeightsError: a weight of this process is NaN or infinite.
            OtherRankError: another process failed.
        """
        ranks = self.ranks
        with ranks.reporting():
            check_finite(self.share.state_dict(), name)
            with ranks.together("save_pretrained"):
                problem = ""
                if ranks.rank:
                    self._send()
                    yield False
                else:
                    self._is_writing = True
                    try:
                        yield True
                    except BaseException as error:
                        problem = f"{type(error).__name__}: {one_line(error, MOST_PROBLEM)}"
                        raise
                    finally:
                        self._is_writing = False
                        self._asked([_END, 0, 0])
                        ranks.settle(problem)
                if ranks.rank and (told := ranks.settle("")):
                    raise OtherRankError(0, told)

    def pieces(self, name: str) -> Mapping[str, Tensor | Pieces]:
        """Return the whole tensors in the first process; their rows are fetched as they are read.

        Args:
            name: of the featurizer, for errors.

        Raises:
            UsageError: it is not being saved by `saving`, and the other processes do not follow this one.
        """
        if not self._is_writing and self.ranks.tell is None:
            raise UsageError(
                f"{name!r} is divided over a mesh, and no process has it whole: call save_pretrained(folder) in every "
                "process, and push that folder or load it without mesh=; or let one process use it, in "
                "featurizers_sharded.led(…)"
            )
        found: dict[str, Tensor | Pieces] = {}
        for number, (each, tensor) in enumerate(self.share.state_dict().items()):
            sizes = self._sizes.get(each)
            if sizes is None:
                found[each] = tensor
            else:
                shape = (sum(sizes), *tensor.shape[1:])
                found[each] = Pieces(tensor.dtype, shape, partial(self._rows, sizes, number, tensor))
        return found

    def _rows(self, sizes: list[int], number: int, own: Tensor) -> Iterator[Tensor]:
        """Yield the rows of a tensor, those of each process in turn."""
        yield own
        step = _step(own)
        for rank in range(1, self.ranks.size):
            for start in range(0, sizes[rank], step):
                rows = min(step, sizes[rank] - start)
                if self._is_writing:
                    self._asked([number, rank, start])
                yield self._received(own, rank, rows) if self._is_writing else self.fetched(number, rank, start, rows)

    def fetched(self, number: int, rank: int, start: int, rows: int) -> Tensor:
        """Return rows of another process in the first one; all processes call it.

        Args:
            number: of the tensor.
            rank: which process has the rows.
            start: its first row.
            rows: how many.
        """
        own: Tensor = list(self.share.state_dict().values())[number]
        if not self.ranks.rank:
            return self._received(own, rank, rows)
        if self.ranks.rank == rank:
            dist.send(own[start : start + rows].contiguous(), group=self.ranks.group, group_dst=0)
        return own

    def _received(self, own: Tensor, rank: int, rows: int) -> Tensor:
        piece = own.new_empty(rows, *own.shape[1:])
        dist.recv(piece, group=self.ranks.group, group_src=rank)
        return piece

    def _send(self) -> None:
        """Send rows to the first process until it is done."""
        tensors = list(self.share.state_dict().values())
        while True:
            number, rank, start = self._asked([0, 0, 0])
            if number == _END:
                return
            if rank == self.ranks.rank:
                piece = tensors[number][start : start + _step(tensors[number])]
                dist.send(piece.contiguous(), group=self.ranks.group, group_dst=0)

    def _asked(self, question: list[int]) -> list[int]:
        """Return what the first process asks for: the number of a tensor, a rank, and a row of its own."""
        told = torch.tensor(question, dtype=torch.int64, device=self.ranks.device_type)
        dist.broadcast(told, group=self.ranks.group, group_src=0)
        return [int(each) for each in told]


def _step(tensor: Tensor) -> int:
    """Return how many rows of a tensor are sent at once."""
    return max(1, PIECE_BYTES // max(1, tensor[0].nbytes))


class SavedTogether:
    """Part of a featurizer that all processes save together.

    Attributes:
        id: of the featurizer.
        saver: saves its tensors.
    """

    id: str
    saver: Saver

    def stored_tensors(self) -> Mapping[str, Tensor | Pieces]:
        """Return the whole tensors, whose rows are fetched from the processes while they are written.

        Raises:
            UsageError: it is not saved by ``save_pretrained`` in all processes.
        """
        return self.saver.pieces(self.id)

    @contextmanager
    def saving(self) -> Iterator[bool]:
        """Enclose a save: the first process writes, the others send their rows to it."""
        with self.saver.saving(self.id) as is_writer:
            yield is_writer

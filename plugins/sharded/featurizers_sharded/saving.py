"""Saving a dictionary on a mesh: the first process writes one file, and asks the others for their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch
import torch.distributed as dist
from featurizers.errors import OtherRankError, UsageError, one_line
from featurizers.format import Pieces, check_finite
from torch import Tensor

from featurizers_sharded.ranks import MOST_PROBLEM, Ranks
from featurizers_sharded.share import WHOLE, Share

PIECE_BYTES: Final = 2**26
"""Bytes of the rows that are sent at once."""

_END: Final = -1
"""Request of the first process that ends the exchange."""


@contextmanager
def saving(share: Share, ranks: Ranks, name: str) -> Iterator[bool]:
    """Enclose a save in all processes; yield True in the first, which writes.

    Args:
        share: of this process.
        ranks: the processes.
        name: of the dictionary, for errors.

    Raises:
        WeightsError: a weight of this process is NaN or infinite.
        OtherRankError: another process failed.
    """
    with ranks.reporting():
        check_finite(share.state_dict(), name)
        with ranks.together("save_pretrained"):
            problem = ""
            if ranks.rank:
                _send(share, ranks)
                yield False
            else:
                share.is_saving = True
                try:
                    yield True
                except BaseException as error:
                    problem = f"{type(error).__name__}: {one_line(error, MOST_PROBLEM)}"
                    raise
                finally:
                    share.is_saving = False
                    _asked(ranks, [_END, 0, 0])
                    ranks.settle(problem)
            if ranks.rank and (told := ranks.settle("")):
                raise OtherRankError(0, told)


def pieces(share: Share, ranks: Ranks, name: str) -> Mapping[str, Tensor | Pieces]:
    """Return the whole tensors of a dictionary in the first process; their rows are fetched as they are read.

    Raises:
        UsageError: the dictionary is not being saved by `saving`.
    """
    if not share.is_saving:
        raise UsageError(
            f"{name!r} is divided over a mesh: call save_pretrained(folder) in every process, and then push that "
            "folder or load it without mesh="
        )
    found: dict[str, Tensor | Pieces] = {}
    for number, (each, tensor) in enumerate(share.state_dict().items()):
        shape = (sum(share.sizes), *tensor.shape[1:])
        rows = partial(_rows, share.sizes, ranks, number, tensor)
        found[each] = tensor if each in WHOLE else Pieces(tensor.dtype, shape, rows)
    return found


def _rows(sizes: list[int], ranks: Ranks, number: int, own: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a tensor, those of each process in turn."""
    yield own
    step = max(1, PIECE_BYTES // max(1, own[0].nbytes))
    for rank in range(1, ranks.size):
        for start in range(0, sizes[rank], step):
            rows = min(step, sizes[rank] - start)
            _asked(ranks, [number, rank, start])
            piece = own.new_empty(rows, *own.shape[1:])
            dist.recv(piece, group=ranks.group, group_src=rank)
            yield piece


def _send(share: Share, ranks: Ranks) -> None:
    """Send rows to the first process until it is done."""
    tensors = list(share.state_dict().values())
    while True:
        number, rank, start = _asked(ranks, [0, 0, 0])
        if number == _END:
            return
        if rank == ranks.rank:
            tensor = tensors[number]
            step = max(1, PIECE_BYTES // max(1, tensor[0].nbytes))
            dist.send(tensor[start : start + step].contiguous(), group=ranks.group, group_dst=0)


def _asked(ranks: Ranks, question: list[int]) -> list[int]:
    """Return what the first process asks for: the number of a tensor, a rank, and a row of its own."""
    told = torch.tensor(question, dtype=torch.int64, device=ranks.device_type)
    dist.broadcast(told, group=ranks.group, group_src=0)
    return [int(each) for each in told]

"""`led`: the first process uses featurizers on a mesh by itself, and the others compute their part of its calls."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from featurizers.errors import FeaturizerError, OtherRankError, UsageError, one_line, shown
from torch import Tensor

from featurizers_sharded.ranks import MOST_PROBLEM, Ranks


@contextmanager
def led(*featurizers: Any) -> Iterator[bool]:
    """Let the first process alone use featurizers on a mesh; yield True in it, and False in the others.

    A program that knows nothing of processes then runs and writes once: a harvest, an evaluation. The others wait at
    the beginning of the block, compute their part of each call that the first process makes, and enter the block when
    it has left it. The first process sends them what it gives to a call, so that they need neither the model nor the
    data. There are no gradients.

    Args:
        featurizers: all those of one mesh that the first process uses.

    Raises:
        UsageError: they are not featurizers on one mesh, or are led already.
        OtherRankError: in the others, if the block failed in the first process.

    Examples:
        with featurizers_sharded.led(f) as is_first:
            if is_first:
                featurizers.harvest(model, {"f": f}, documents, "harvested")
    """
    ranks = _ranks_of(featurizers)
    with ranks.together("led", len(featurizers)):
        objects = [*featurizers, *(each.saver for each in featurizers)]
    if ranks.rank:
        _follow(objects, ranks)
        yield False
        return
    for each in featurizers:
        each.ranks.tell = partial(_tell, objects)
    problem = ""
    try:
        yield True
    except BaseException as error:
        problem = f"{type(error).__name__}: {one_line(error, MOST_PROBLEM)}"
        raise
    finally:
        for each in featurizers:
            each.ranks.tell = None
        with contextlib.suppress(*([RuntimeError] if problem else [])):  # the others may be gone
            _sent(ranks, problem)


def _ranks_of(featurizers: tuple[Any, ...]) -> Ranks:
    """Return the processes of featurizers, which have to be the same.

    Raises:
        UsageError: they are not featurizers on one mesh, or are led already.
    """
    for each in featurizers:
        if not isinstance(getattr(each, "ranks", None), Ranks):
            raise UsageError(f"led takes featurizers that are divided over a mesh, not {shown(type(each).__name__)}")
    if not featurizers or any(each.ranks.group is not featurizers[0].ranks.group for each in featurizers):
        raise UsageError("led takes one or more featurizers, all on one mesh")
    if any(each.ranks.tell is not None for each in featurizers):
        raise UsageError("these featurizers are led already")
    ranks: Ranks = featurizers[0].ranks
    return ranks


def _tell(objects: list[Any], owner: Any, name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Tell the other processes of a call that this one is about to make.

    Raises:
        UsageError: they do not have the featurizer, or the call has gradients.
    """
    number = next((number for number, each in enumerate(objects) if each is owner), None)
    if number is None:
        raise UsageError("the other processes do not know this featurizer: give each that is used to led, and no copy")
    given = (*owner.share.parameters(), *_tensors((args, options)))
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        raise UsageError("there are no gradients in led: use torch.no_grad(), or call the featurizer in every process")
    file = io.BytesIO()
    torch.save((number, name, args, dict(options)), file)
    _sent(owner.ranks, (str(next(owner.share.parameters()).device), file.getvalue()))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _follow(objects: list[Any], ranks: Ranks) -> None:
    """Compute this process's part of the calls of the first one, until it has left its block.

    Raises:
        OtherRankError: the block failed there.
    """
    own = str(next(objects[0].share.parameters()).device)
    while True:
        told = _sent(ranks, None)
        if isinstance(told, str):
            if told:
                raise OtherRankError(0, told)
            return
        device, raw = told  # torch has unpickled `told`, so that unpickling `raw` adds no trust in the first process
        number, name, args, options = torch.load(io.BytesIO(raw), map_location={device: own}, weights_only=False)
        with torch.no_grad(), contextlib.suppress(FeaturizerError):  # the first process has the error too
            result = getattr(objects[number], name)(*args, **options)
            if name == "saving":
                with result:
                    pass


def _sent(ranks: Ranks, message: Any) -> Any:
    """Return what the first process sends; the others give None."""
    found = [message]
    dist.broadcast_object_list(found, group=ranks.group, group_src=0)
    return found[0]

"""Engines: what computes the shards. Numbers of shards go in, small results come out; rows never pass through one."""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from featurizers.errors import ArtefactError, FeaturizerError, MissingDependencyError, UsageError, shown

if TYPE_CHECKING:  # each worker imports this module, and not what a worker does, before it starts
    from featurizers_harvest.shards import Result

Start: TypeAlias = "Callable[[], Callable[[int], Result]]"
"""Makes what computes a shard from its number, and commits it. It is called once in each worker."""

RETRIES: Final = 3
"""Times that workers are started anew after one was killed before any shard was committed."""


class Engine(ABC):
    """Computes shards. A shard is committed by the worker, so that an engine that computes one twice does no harm.

    Attributes:
        is_remote: True if ``start`` is pickled, so that models and featurizers are given by name.
    """

    is_remote: bool = True

    @abstractmethod
    def run(self, start: Start, shards: Sequence[int]) -> Iterator[Result]:
        """Yield a result for each shard, in any order.

        Args:
            start: see `Start`.
            shards: their numbers.
        """


class Local(Engine):
    """Computes shards in this process, one after the other."""

    is_remote = False

    def run(self, start: Start, shards: Sequence[int]) -> Iterator[Result]:
        """See `Engine.run`."""
        if shards:
            yield from map(start(), shards)


class Processes(Engine):
    """Computes shards in processes of this machine. If one is killed they are started anew.

    Args:
        workers: number of processes.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(self, start: Start, shards: Sequence[int]) -> Iterator[Result]:
        """See `Engine.run`.

        Raises:
            ArtefactError: workers die again and again.
        """
        left, failures = list(shards), 0
        while left:
            done = 0
            try:
                for result in self._once(start, tuple(left)):
                    left.remove(result.shard)
                    done += 1
                    yield result
            except BrokenProcessPool as error:
                failures = 0 if done else failures + 1
                if failures > RETRIES:
                    problem = "workers were killed again and again; is there too little memory? Give fewer workers"
                    raise ArtefactError("harvest", problem) from error

    def _once(self, start: Start, shards: Sequence[int]) -> Iterator[Result]:
        context = multiprocessing.get_context("spawn")
        workers = min(self._workers, len(shards))
        with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(start,)) as pool:
            waiting = iter(shards)
            running: set[Future[Result]] = {pool.submit(_compute, next(waiting)) for _ in range(workers)}
            try:
                while running:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for each in finished:
                        yield each.result()
                        running |= {
                            pool.submit(_compute, number) for number in [next(waiting, None)] if number is not None
                        }
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


_of_process: list[Any] = []
"""The start of this process, or what it made."""


def _begin(start: Start) -> None:
    _of_process[:] = [start, None]


def _compute(number: int) -> Result:
    if _of_process[1] is None:  # made here, so that its errors reach the caller
        _of_process[1] = _of_process[0]()
    result: Result = _of_process[1](number)
    return result


class Ray(Engine):
    """Computes shards in actors of a Ray cluster, which are started anew where they were killed.

    The folder of the harvest and the data must be where all machines reach them.

    Args:
        workers: number of actors.
        cpus: of each.
        gpus: of each.
        address: of the cluster, as in ``ray.init``; None for the one that is connected, or a new one on this machine.
    """

    def __init__(self, workers: int, *, cpus: float = 1, gpus: float = 0, address: str | None = None) -> None:
        self._workers, self._cpus, self._gpus, self._address = workers, cpus, gpus, address

    def run(self, start: Start, shards: Sequence[int]) -> Iterator[Result]:
        """See `Engine.run`.

        Raises:
            MissingDependencyError: Ray is not installed.
        """
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError("the engine 'ray'", "ray", "pip install 'featurizers-harvest[ray]'") from error
        if not ray.is_initialized():
            ray.init(address=self._address, include_dashboard=False, log_to_driver=False)
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_restarts": -1, "max_task_retries": -1}
        actor = ray.remote(**options)(_Actor)
        waiting, running = iter(shards), {}
        actors = [actor.remote(start) for _ in range(min(self._workers, len(shards)))]
        try:
            for each in actors:
                running[each.compute.remote(next(waiting))] = each
            while running:
                (finished, *_), _ = ray.wait(list(running))
                each = running.pop(finished)
                outcome = ray.get(finished)
                if isinstance(outcome, FeaturizerError):
                    raise outcome
                yield outcome
                number = next(waiting, None)
                if number is not None:
                    running[each.compute.remote(number)] = each
        finally:
            for each in actors:
                ray.kill(each)


class _Actor:
    """Worker of `Ray`. Errors of this library are returned, because Ray would retry or wrap them."""

    def __init__(self, start: Start) -> None:
        self._start, self._worker = start, None

    def compute(self, number: int) -> Any:
        try:
            if self._worker is None:
                self._worker = self._start()  # type: ignore[assignment]
            return self._worker(number)  # type: ignore[misc]
        except FeaturizerError as error:
            return error


def engine_of(name: str | Engine, workers: int) -> Engine:
    """Return an engine by its name, ``local`` or ``ray``, or an engine unchanged.

    Raises:
        UsageError: there is no such engine.
    """
    if isinstance(name, Engine):
        return name
    if type(workers) is not int or workers < 1:
        raise UsageError(f"workers is a number of at least 1, not {shown(workers)}")
    if name == "local":
        return Local() if workers == 1 else Processes(workers)
    if name == "ray":
        return Ray(workers)
    raise UsageError(f"an engine is 'local', 'ray' or a featurizers_harvest.Engine, not {shown(name)}")

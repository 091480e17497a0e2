"""Two sides of a comparison, timed in alternation.

A case gives two callables, ours and the peer's, and a check that both compute the same. They are called in turn,
A B A B …, so that a machine that slows down slows both; each pair gives one ratio.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from pydantic import BaseModel
from torch import Tensor

SLOW = 5.0
"""A call that takes so many seconds is repeated three times only."""


class Skipped(Exception):
    """A case cannot run here; the message says why."""


class Unequal(Exception):
    """The two sides of a case do not compute the same."""


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        device: where the tensors are.
        dtype: of activations and models; bases stay in float32, as the library advises.
        quick: small sizes and few repeats, to see that everything runs.
        pairs: how many times each side is sampled; a slow case is sampled three times.
        sample: seconds that one sample takes at least, by calling a fast side many times.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    quick: bool = False
    pairs: int = 15
    sample: float = 0.05

    def size(self, full: int, quick: int) -> int:
        """A size, smaller where the run is to be quick."""
        return quick if self.quick else full

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        """Random activations, the same on every device."""
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.device, self.dtype)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Sense: TypeAlias = Literal["at least", "at most"]


@dataclass(frozen=True)
class Case:
    """Two callables that compute the same.

    Attributes:
        what: what ours does, for the table.
        peer: what theirs does.
        ours: one call of the library.
        theirs: one call of the peer.
        check: compares the results of both and says how close they are, or raises `Unequal`.
        after: where a call is a whole run of minutes: says what the timed runs came to, or raises `Unequal`. Such
            calls are not warmed up, and each side makes three at most.
    """

    what: str
    peer: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    check: Callable[[], str]
    after: Callable[[], str] | None = None


@dataclass(frozen=True)
class Sizes:
    """Two sizes of the same contents, or two times of which one is a part of the other."""

    what: str
    peer: str
    ours: float
    theirs: float
    checked: str
    unit: Literal["s", "bytes"] = "bytes"


@dataclass(frozen=True)
class Benchmark:
    """A named case and what its ratio must be.

    Attributes:
        name: for ``--only``.
        build: prepares the case; raises `Skipped` where it cannot run.
        sense: ``at least``: the ratio is the peer's time over ours, larger is better; ``at most``: it is our time
            over the peer's, smaller is better.
        required: the bound on the ratio at full size, None for a row that is there to compare.
    """

    name: str
    build: Callable[[Settings], Case | Sizes]
    sense: Sense = "at least"
    required: float | None = None


class Row(BaseModel):
    """One line of the table; times in seconds, sizes in bytes.

    Attributes:
        ratio: of the medians.
        spread: quartiles of the ratios of pairs, or their extremes where there are few; the ratio itself where one
            measurement is all.
        cpu_ratio: of the medians of CPU time, which another program on the machine disturbs less; None for sizes
            and for GPUs.
        met: whether the ratio is within its bound, None without a bound or in a quick run.
        outcome: what whole runs came to.
        skipped: why there are no numbers.
    """

    name: str
    what: str = ""
    peer: str = ""
    unit: Literal["s", "bytes"] = "s"
    sense: Sense = "at least"
    required: float | None = None
    ours: float = 0.0
    theirs: float = 0.0
    ratio: float = 0.0
    spread: tuple[float, float] = (0.0, 0.0)
    pairs: int = 0
    ours_cpu: float | None = None
    theirs_cpu: float | None = None
    cpu_ratio: float | None = None
    met: bool | None = None
    checked: str = ""
    outcome: str = ""
    skipped: str | None = None


def run(benchmark: Benchmark, settings: Settings) -> Row:
    """Check and measure one benchmark.

    Raises:
        Unequal: the two sides do not compute the same.
    """
    try:
        case = benchmark.build(settings)
        checked = case.checked if isinstance(case, Sizes) else case.check()
    except Skipped as reason:
        return Row(name=benchmark.name, sense=benchmark.sense, required=benchmark.required, skipped=str(reason))
    row = Row(
        name=benchmark.name,
        what=case.what,
        peer=case.peer,
        sense=benchmark.sense,
        required=benchmark.required,
        checked=checked,
    )
    if isinstance(case, Sizes):
        row.unit, row.ours, row.theirs = case.unit, case.ours, case.theirs
        row.ratio = _ratio(row.ours, row.theirs, row.sense)
        row.spread = row.ratio, row.ratio
    else:
        _time(case, row, settings)
    if row.required is not None and not settings.quick:
        row.met = row.ratio >= row.required if row.sense == "at least" else row.ratio <= row.required
    return row


def cpu_seconds(call: Callable[[], object], settings: Settings, samples: int = 7) -> float:
    """Median CPU time of one call, after a warm-up; of one sample where it is slow. For curves of one side alone."""
    calls = _calibrate(call, settings)
    return statistics.median(cpu for _, cpu in _samples(call, calls, samples if calls else 1, settings))


def _time(case: Case, row: Row, settings: Settings) -> None:
    ours_calls, theirs_calls = (0 if case.after else _calibrate(side, settings) for side in (case.ours, case.theirs))
    row.pairs = min(3, settings.pairs) if theirs_calls == 0 else settings.pairs
    ours, theirs = [], []
    for _ in range(row.pairs):
        ours += _samples(case.ours, ours_calls, 1, settings)
        theirs += _samples(case.theirs, theirs_calls, 1, settings)
    row.ours, row.ours_cpu = (statistics.median(column) for column in zip(*ours, strict=True))
    row.theirs, row.theirs_cpu = (statistics.median(column) for column in zip(*theirs, strict=True))
    row.ratio = _ratio(row.ours, row.theirs, row.sense)
    if settings.device.type == "cpu":
        row.cpu_ratio = _ratio(row.ours_cpu, row.theirs_cpu, row.sense)
    else:
        row.ours_cpu = row.theirs_cpu = None
    row.spread = _spread([_ratio(a, b, row.sense) for (a, _), (b, _) in zip(ours, theirs, strict=True)])
    if case.after is not None:
        row.outcome = case.after()


def _ratio(ours: float, theirs: float, sense: Sense) -> float:
    return theirs / ours if sense == "at least" else ours / theirs


def _spread(ratios: list[float]) -> tuple[float, float]:
    if len(ratios) < 5:
        return min(ratios), max(ratios)
    low, _, high = statistics.quantiles(ratios, n=4)
    return low, high


def _calibrate(call: Callable[[], object], settings: Settings) -> int:
    """Warm up, and say how many calls make a sample; 0 stands for one call of a slow side."""
    start = time.perf_counter()
    call()
    settings.synchronize()
    if time.perf_counter() - start > SLOW:
        return 0
    start = time.perf_counter()
    count = 0
    while (elapsed := time.perf_counter() - start) < settings.sample:
        call()
        settings.synchronize()
        count += 1
    return max(1, round(count * settings.sample / elapsed))


def _samples(call: Callable[[], object], calls: int, samples: int, settings: Settings) -> Iterator[tuple[float, float]]:
    """Wall and CPU seconds of one call, each from ``calls`` of them; the garbage collector waits meanwhile."""
    calls = max(1, calls)
    for _ in range(samples):
        gc.collect()
        gc.disable()
        try:
            settings.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                call()
            settings.synchronize()
            yield (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
        finally:
            gc.enable()


def same(ours: Tensor, theirs: Tensor, tolerance: float, what: str = "results") -> str:
    """Say how close two tensors are.

    Raises:
        Unequal: they differ by more than the tolerance, relative to the largest element.
    """
    ours, theirs = ours.detach(), theirs.detach().reshape(ours.shape)
    if torch.equal(ours, theirs):
        return f"{what}: equal in every element"
    scale = float(theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny))
    difference = float((ours.double() - theirs.double()).abs().max()) / scale
    if not difference <= tolerance:
        raise Unequal(f"{what} differ by {difference:.2g} of the largest element, more than {tolerance:.2g}")
    return f"{what}: largest difference {difference:.1g} of the largest element"


def tolerance(dtype: torch.dtype) -> float:
    """How far apart two ways to compute the same may come out in a dtype."""
    return 64 * torch.finfo(dtype).eps

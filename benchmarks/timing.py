"""Time the two sides of a comparison in alternation.

A case has two callables, this library's (``ours``) and the peer's (``theirs``), and a check that both compute the same.
They are called in turn, A B A B …, so that a slower machine slows both. Each pair of samples gives one ratio.
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
"""Calls that take more seconds than this are sampled three times only."""


class Skipped(Exception):
    """Raised if a case cannot run here; the message says why."""


class Unequal(Exception):
    """Raised if the two sides of a case do not compute the same."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        device: device of the tensors.
        dtype: dtype of activations and models; bases stay in float32, as the library recommends.
        quick: use small sizes and few samples, to check that everything runs.
        pairs: number of samples of each side; a slow case has three.
        sample: least duration of a sample in seconds; a fast side is called many times.
        processor: take ratios and their spread in CPU time, on a machine that others use too.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    quick: bool = False
    pairs: int = 15
    sample: float = 0.05
    processor: bool = False

    def size(self, full: int, quick: int) -> int:
        """Return the full size, or the small one in a quick run."""
        return quick if self.quick else full

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        """Return random activations, the same on every device."""
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
        what: description of the computation, for the table.
        peer: description of the peer.
        ours: calls this library once.
        theirs: calls the peer once.
        check: compares the results of both; returns how close they are, or raises `Unequal`.
        after: for calls that last minutes: describes the results of the timed calls, or raises `Unequal`. Such calls
            have no warm-up, and at most three samples.
        share: of the work that a call of the peer does, whose times are divided by it.
    """

    what: str
    peer: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    check: Callable[[], str]
    after: Callable[[], str] | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Elsewhere:
    """Seconds that a call took in another process; a call that returns this is not timed here."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Sizes:
    """Two sizes of the same content, the time of a part and that of the whole, or two amounts of work."""

    what: str
    peer: str
    ours: float
    theirs: float
    checked: str
    unit: Literal["s", "bytes", "FLOP"] = "bytes"


@dataclass(frozen=True)
class Benchmark:
    """Named case with a bound on its ratio.

    Attributes:
        name: name for ``--only``.
        build: prepares the case; raises `Skipped` if it cannot run.
        sense: ``at least``: the ratio is theirs / ours, larger is better; ``at most``: the ratio is ours / theirs,
            smaller is better.
        required: bound on the ratio at full size, None if there is none.
    """

    name: str
    build: Callable[[Settings], Case | Sizes]
    sense: Sense = "at least"
    required: float | None = None


class Row(BaseModel):
    """Row of the table; times in seconds, sizes in bytes.

    Attributes:
        ratio: ratio of the medians.
        spread: quartiles of the ratios of pairs, or their extremes if there are fewer than five; the ratio itself for a
            single measurement.
        cpu_ratio: ratio of the medians of CPU time, which other programs disturb less; None for sizes and for GPUs.
        met: True if the ratio is within its bound; None without a bound or in a quick run.
        outcome: results of calls that last minutes.
        skipped: reason why there are no numbers.
    """

    name: str
    what: str = ""
    peer: str = ""
    unit: Literal["s", "bytes", "FLOP"] = "s"
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
    """Return the median CPU time of one call after a warm-up, from one sample if the call is slow."""
    calls = _calibrate(call, settings)
    return statistics.median(cpu for _, cpu in _samples(call, calls, samples if calls else 1, settings))


def _time(case: Case, row: Row, settings: Settings) -> None:
    ours_calls, theirs_calls = (0 if case.after else _calibrate(side, settings) for side in (case.ours, case.theirs))
    row.pairs = min(3, settings.pairs) if theirs_calls == 0 else settings.pairs
    ours, theirs = [], []
    for _ in range(row.pairs):
        ours += _samples(case.ours, ours_calls, 1, settings)
        theirs += [
            (wall / case.share, cpu / case.share) for wall, cpu in _samples(case.theirs, theirs_calls, 1, settings)
        ]
    row.ours, row.ours_cpu = (statistics.median(column) for column in zip(*ours, strict=True))
    row.theirs, row.theirs_cpu = (statistics.median(column) for column in zip(*theirs, strict=True))
    row.ratio = _ratio(row.ours, row.theirs, row.sense)
    if settings.device.type == "cpu":
        row.cpu_ratio = _ratio(row.ours_cpu, row.theirs_cpu, row.sense)
        row.ratio = row.cpu_ratio if settings.processor else row.ratio
    else:
        row.ours_cpu = row.theirs_cpu = None
    clock = int(settings.processor)
    row.spread = _spread([_ratio(a[clock], b[clock], row.sense) for a, b in zip(ours, theirs, strict=True)])
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
    """Warm up and return the number of calls in a sample; 0 means a single call of a slow side."""
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
    """Yield wall and CPU seconds of a call, averaged over ``calls`` calls without garbage collection."""
    calls = max(1, calls)
    for _ in range(samples):
        gc.collect()
        gc.disable()
        try:
            settings.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                result = call()
            settings.synchronize()
            if isinstance(result, Elsewhere):
                yield result.wall, result.cpu
                continue
            yield (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
        finally:
            gc.enable()


def same(ours: Tensor, theirs: Tensor, tolerance: float, what: str = "results") -> str:
    """Compare two tensors and return a description of their difference.

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
    """Return the largest relative difference that rounding may cause between two computations in a dtype."""
    return 64 * torch.finfo(dtype).eps

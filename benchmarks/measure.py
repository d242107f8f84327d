"""What a benchmark is, and how one is timed: checked first, then all contenders in turn, round after round; medians.

The report and pytest-benchmark both run these same groups. Nothing here knows gdlib or a peer.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

Run = Callable[[], Any]

LEAST_SECONDS = 0.02  # short calls repeat until a timing takes this long: well above what a scheduler takes from it
# Before a timing: by then the idle threads of the contender before have stopped spinning and left the cores. Those of OpenBLAS take about
# 0.1 s: until then whoever shares work among threads, 80 ms after NumPy too, is half as fast.
REST_SECONDS = 0.15
# After it, untimed, one run at least: cores that were idle reach their speed, and a caller its caches, within some milliseconds. Forward
# pass and gradients of Linear(512, 512) on 512 rows took one thread 4.0 ms at first, then 3.5, and two 2.7, then 1.8.
WARM_SECONDS = 0.005


class UnavailableError(RuntimeError):
    """A contender that cannot run here, and why."""


@dataclass(frozen=True)
class Contender:
    """`prepare` takes the group's problem and returns what is timed; a run does `work` units, and returns what the group checks."""

    name: str
    prepare: Callable[[Any], Run]
    work: float = 1.0
    variant: str = ""  # one of several forms of the same contender: the report keeps the fastest
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # a run's settings of the whole process: a number of threads
    limit: bool = False  # the machine's own: nothing to check, nothing to beat

    @property
    def label(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name


def unchecked(problem: Any, result: Any) -> None:
    """For limits, and for processes that fail loudly."""


@dataclass(frozen=True)
class Group:
    """Contenders for one unit of work on one problem; `check(problem, result)` raises when a result is wrong."""

    title: str
    unit: str
    contenders: Sequence[Contender]
    problem: Callable[[], Any] = lambda: None
    check: Callable[[Any, Any], None] = unchecked
    note: str = ""
    flops: float = 0.0  # of one unit; 0: no figure for a roofline
    bytes: float = 0.0  # that one unit must read or write at least: each array once
    rate: str = ""  # what a rate counts: "GFLOP", "GB", or nothing
    dtype: str = "float32"
    rounds: int = 7

    @property
    def amount(self) -> float:
        return {"GFLOP": self.flops, "GB": self.bytes}.get(self.rate, 0.0) / 1e9

    def validate(self, contender: Contender) -> Run:
        """What is timed, after one run whose result has been checked. Raises AssertionError, UnavailableError."""
        try:
            run = contender.prepare(self.problem())
        except ModuleNotFoundError as error:
            raise UnavailableError(f"{error.name} is not installed") from None
        with contender.around():
            result = run()
        if not contender.limit:
            self.check(self.problem(), result)
        return run


@dataclass
class Timing:
    """Seconds per unit, one for each round; `missing` says why there are none."""

    contender: Contender
    samples: list[float] = field(default_factory=list)
    missing: str = ""

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples) if self.samples else math.nan

    def over(self, other: "Timing") -> float:
        """How many times as long as the other: the median over rounds, in each of which both met the same machine."""
        pairs = list(zip(self.samples, other.samples, strict=False))
        return statistics.median(mine / theirs for mine, theirs in pairs) if pairs else math.nan


def measure(group: Group, rounds: int) -> list[Timing]:
    """Time the contenders of a group in turn, there and back, so that a neighbour's load and its drift meet all of them alike: each after
    a rest, and warm."""
    timings = [Timing(contender) for contender in group.contenders]
    ready: list[tuple[Timing, Run, int, int]] = []
    for timing in timings:
        try:
            run = group.validate(timing.contender)
        except UnavailableError as reason:
            timing.missing = str(reason)
            continue
        with timing.contender.around():
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
        ready.append((timing, run, math.ceil(WARM_SECONDS / seconds), math.ceil(LEAST_SECONDS / seconds)))
    for _ in range(rounds):
        for timing, run, untimed, calls in ready:
            with timing.contender.around():
                time.sleep(REST_SECONDS)
                for _ in repeat(None, untimed):
                    run()
                begin = time.perf_counter()
                for _ in repeat(None, calls):
                    run()
                seconds = time.perf_counter() - begin
            timing.samples.append(seconds / calls / timing.contender.work)
        ready.reverse()
    return timings

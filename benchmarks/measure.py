"""What a benchmark is, and how one is timed: checked first, then all contenders in turn, round after round; medians.

The report and pytest-benchmark both run these same groups. Nothing here knows gdlib or a peer.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

Run = Callable[[], Any]

LEAST_SECONDS = 0.02  # short calls repeat until a timing takes this long: well above what a scheduler takes from it
REST_SECONDS = 0.005  # before a timing: by then the idle threads of the contender before have stopped spinning, and left the cores


class UnavailableError(RuntimeError):
    """A contender that cannot run here, and why."""


@dataclass(frozen=True)
class Contender:
    """`prepare` takes the group's problem and returns what is timed; a run does `work` units, and returns what the group checks."""

    name: str
    prepare: Callable[[Any], Run]
    work: float = 1.0
    variant: str = ""  # one of several forms of the same contender: the report keeps the fastest
    threads: int | None = None  # for PyTorch, where it is one setting for the whole process
    limit: bool = False  # the machine's own: nothing to check, nothing to beat

    @property
    def label(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def set_threads(self) -> None:
        if self.threads is not None:
            sys.modules["torch"].set_num_threads(self.threads)


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
    amount: float = 1.0  # of `amount_unit` in one unit, for a rate
    amount_unit: str = ""
    rounds: int = 9

    def validate(self, contender: Contender) -> Run:
        """What is timed, after one run whose result has been checked. Raises AssertionError, UnavailableError."""
        try:
            run = contender.prepare(self.problem())
        except ModuleNotFoundError as error:
            raise UnavailableError(f"{error.name} is not installed") from None
        contender.set_threads()
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
    """Time the contenders of a group in turn, so that a neighbour's load meets all of them."""
    timings = [Timing(contender) for contender in group.contenders]
    ready: list[tuple[Timing, Run, int]] = []
    for timing in timings:
        try:
            run = group.validate(timing.contender)
        except UnavailableError as reason:
            timing.missing = str(reason)
            continue
        begin = time.perf_counter()
        run()
        ready.append((timing, run, max(1, math.ceil(LEAST_SECONDS / (time.perf_counter() - begin)))))
    for _ in range(rounds):
        for timing, run, calls in ready:
            timing.contender.set_threads()
            time.sleep(REST_SECONDS)
            begin = time.perf_counter()
            for _ in repeat(None, calls):
                run()
            timing.samples.append((time.perf_counter() - begin) / calls / timing.contender.work)
    return timings

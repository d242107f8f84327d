"""Timings by group and contender, and what is read from them: the fastest form, shares of a limit, ratios with peers, fitted exponents."""

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks.measure import Group, Timing, measure

Timings = dict[str, Timing]  # by name of the contender
Results = dict[str, Timings]  # by title of the group


def fastest(timings: Sequence[Timing]) -> Timings:
    """The fastest variant of each contender."""
    best: Timings = {}
    for timing in timings:
        known = best.setdefault(timing.contender.name, timing)
        if timing.samples and not known.seconds <= timing.seconds:  # one that is missing has NaN
            best[timing.contender.name] = timing
    return best


def run(groups: Iterable[Group], rounds: Callable[[Group], int]) -> Results:
    results: Results = {}
    for group in groups:
        print(f"{group.title} ...", file=sys.stderr, flush=True)
        results[group.title] = fastest(measure(group, rounds(group)))
    return results


def limit(timings: Timings) -> Timing | None:
    """The fastest limit that was reached in these turns."""
    return min((t for t in timings.values() if t.contender.limit and t.samples), key=lambda t: t.seconds, default=None)


def share(timings: Timings, name: str) -> float:
    """Of the limit, turn by turn; NaN where none could be measured."""
    reached = limit(timings)
    return reached.over(timings[name]) if reached else math.nan


def ours(timings: Timings) -> Timing:
    return next(timing for name, timing in timings.items() if name.startswith("gdlib"))


def peers(timings: Timings) -> list[Timing]:
    return [t for name, t in timings.items() if not t.contender.limit and not name.startswith("gdlib")]


def ratio(timings: Timings, names: Sequence[str], base: str = "") -> float:
    """How many times as long as gdlib the best of these peers takes; NaN where one of them is missing."""
    return min_or_nan([timings[name].over(timings[base] if base else ours(timings)) for name in names])


def best_peer(timings: Timings) -> tuple[float, str]:
    """The same for all peers that are here, and which one it is."""
    found = [(timing.over(ours(timings)), timing.contender.label) for timing in peers(timings) if timing.samples]
    return min(found, default=(math.nan, ""))


def min_or_nan(values: Sequence[float]) -> float:
    """The least; NaN when one is, so that nothing is claimed without its peers."""
    return math.nan if not values or any(map(math.isnan, values)) else min(values)


def geometric_mean(values: Sequence[float]) -> float:
    return math.nan if not values or any(map(math.isnan, values)) else statistics.geometric_mean(values)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """The slope of a straight line through the logarithms, and R^2: the share of the variance that the line explains."""
    x, y = np.log(sizes), np.log(seconds)
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(1 - ((y - slope * x - intercept) ** 2).sum() / ((y - y.mean()) ** 2).sum())

"""What gdlib is measured against: each aim with its bound, and how its figure comes from the results of one run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import (
    bench_calls,
    bench_footprint,
    bench_gemm,
    bench_gradient_descent,
    bench_networks,
    bench_reference,
    bench_scaling,
    bench_sgd,
    bench_threads,
    machine,
)
from benchmarks.measure import Group
from benchmarks.results import Results, Timings, exponent, geometric_mean, min_or_nan, ratio, share

REFERENCE, ONE_ROW = bench_reference.GROUPS[0].title, bench_calls.GROUPS[0].title
SQUARE = [group for group in bench_gemm.GROUPS if "2048 x 2048" in group.title]
NOISE = 0.03  # two timings of the same code differ by this much: "never slower" cannot be measured more finely
BLAS, FRAMEWORKS = ("NumPy", "PyTorch"), ("PyTorch", "JAX jit(scan)")
Value = float | tuple[float, str]  # the figure, and where it was the worst


@dataclass(frozen=True)
class Aim:
    what: str
    sign: str
    bound: float
    unit: str
    value: Callable[[Results], Value]
    of: str = ""  # the topic that this line stands under

    def reached(self, value: float) -> bool:
        return {">=": value >= self.bound, "<=": value <= self.bound, "<": value < self.bound}[self.sign]


def _versus(title: str, base: str, *names: str) -> Callable[[Results], Value]:
    return lambda results: ratio(results[title], names, base)


def _least(groups: Sequence[Group], figure: Callable[[Timings], float]) -> Callable[[Results], Value]:
    """The worst of some groups and its title; NaN when one is NaN."""

    def value(results: Results) -> Value:
        figures = {group.title: figure(results[group.title]) for group in groups}
        return min_or_nan(list(figures.values())), min(figures, key=lambda title: figures[title])

    return value


def _mean(groups: Sequence[Group], names: Sequence[str]) -> Callable[[Results], Value]:
    return lambda results: geometric_mean([ratio(results[group.title], names) for group in groups])


def _percent_of_limit(name: str) -> Callable[[Timings], float]:
    return lambda timings: 100 * share(timings, name)


def gain(results: Results, work: bench_threads.Work) -> float:
    """How many times as long one thread takes as all of them; NaN on one CPU."""
    timings = results[work.group.title]
    one, all_of_them = (timings[bench_threads.label(bench_threads.GDLIB, count)] for count in (1, machine.THREADS))
    return math.nan if machine.THREADS == 1 else one.over(all_of_them)


def _least_gain(compute_bound: bool) -> Callable[[Results], Value]:
    def value(results: Results) -> Value:
        found = {work.name: gain(results, work) for work in bench_threads.WORKS if work.compute_bound or not compute_bound}
        return min_or_nan(list(found.values())), min(found, key=lambda name: found[name])

    return value


def scaling(results: Results, axis: bench_scaling.Axis, who: str = "gdlib") -> tuple[float, float]:
    timings = results[axis.group.title]
    return exponent(axis.sizes, [timings[bench_scaling.label(who, size)].seconds for size in axis.sizes])


def _worst_exponent(results: Results) -> Value:
    off = {axis.name: abs(scaling(results, axis)[0] - 1) for axis in bench_scaling.AXES}
    return max(off.values()), max(off, key=lambda name: off[name])


def _worst_fit(results: Results) -> Value:
    fits = {axis.name: scaling(results, axis)[1] for axis in bench_scaling.AXES}
    return min(fits.values()), min(fits, key=lambda name: fits[name])


def _reference_step(results: Results) -> Value:
    return 1e6 * results[REFERENCE]["gdlib readable loop"].seconds / bench_reference.STEPS


FIT, LOOP = "gdlib fit", "gdlib readable loop"
IN_ORDER, SHUFFLED, DESCENTS = bench_sgd.IN_ORDER.title, bench_sgd.SHUFFLED.title, bench_gradient_descent.GROUPS
AIMS = [
    Aim("beside PyTorch's loop with a DataLoader", ">=", 2000, "x", _versus(REFERENCE, FIT, "PyTorch loop"), "Reference program, `fit`"),
    Aim("beside scikit-learn", ">=", 8, "x", _versus(REFERENCE, FIT, "scikit-learn SGDRegressor")),
    Aim("beside JAX's scan, which does not shuffle", ">=", 6, "x", _versus(REFERENCE, FIT, "JAX jit(scan), in order")),
    Aim("one step", "<=", 5, " us", _reference_step, "Reference program, readable loop"),
    Aim("beside PyTorch's", ">=", 55, "x", _versus(REFERENCE, LOOP, "PyTorch loop")),
    Aim("beside NumPy's", ">=", 2.5, "x", _versus(REFERENCE, LOOP, "NumPy loop")),
    Aim("from the call to the result", "<=", 0.5, " us", lambda r: 1e6 * r[ONE_ROW]["gdlib"].seconds, "One row through Linear(10, 1)"),
    Aim("beside PyTorch", ">=", 5, "x", _versus(ONE_ROW, "gdlib", "PyTorch")),
    Aim("beside NumPy's matmul and bias", ">=", 2.2, "x", _versus(ONE_ROW, "gdlib", "NumPy")),
    Aim("share of the read bandwidth, the least", ">=", 85, " %", _least(DESCENTS, _percent_of_limit(FIT)), "Gradient descent step"),
    Aim("beside NumPy, the least", ">=", 3, "x", _least(DESCENTS, lambda t: ratio(t, ["NumPy, two passes"]))),
    Aim("beside PyTorch, the least", ">=", 5, "x", _least(DESCENTS, lambda t: ratio(t, ["PyTorch autograd", "PyTorch by hand"]))),
    Aim("in order, beside scikit-learn float32", ">=", 10, "x", _versus(IN_ORDER, FIT, "scikit-learn float32"), "SGD epoch, 1M x 100"),
    Aim("shuffled, beside scikit-learn float32", ">=", 10, "x", _versus(SHUFFLED, FIT, "scikit-learn float32")),
    Aim(
        "in order, one thread: share of one core's read bandwidth",
        ">=",
        70,
        " %",
        lambda results: 100 * share(results[IN_ORDER], "gdlib fit, 1 thread"),
    ),
    Aim("beside the better of OpenBLAS and MKL, geometric mean", ">=", 1.15, "x", _mean(bench_gemm.GROUPS, BLAS), "Matrix products"),
    Aim("the same, the least", ">=", 0.95, "x", _least(bench_gemm.GROUPS, lambda t: ratio(t, BLAS))),
    Aim("2048^3: share of the FMA peak, the least", ">=", 90, " %", _least(SQUARE, _percent_of_limit("gdlib"))),
    Aim(
        "beside the better of PyTorch and JAX, geometric mean",
        ">=",
        1.5,
        "x",
        _mean(bench_networks.AIMED, FRAMEWORKS),
        "Training steps of networks",
    ),
    Aim("the same, the least", ">=", 1.05, "x", _least(bench_networks.AIMED, lambda t: ratio(t, FRAMEWORKS))),
    Aim(
        "from 784-512-10 up: share of the FMA peak, the least", ">=", 80, " %", _least(bench_networks.LARGE, _percent_of_limit("gdlib fit"))
    ),
    Aim(
        f"{machine.THREADS} beside one where computing is the cost, the least",
        ">=",
        0.9 * machine.THREADS,
        "x",
        _least_gain(compute_bound=True),
        "Threads",
    ),
    Aim(f"never slower than one, but for {100 * NOISE:.0f} % of noise: the least", ">=", 1 - NOISE, "x", _least_gain(compute_bound=False)),
    Aim("how far an exponent is from 1, the most", "<=", 0.1, "", _worst_exponent, "Cost against size"),
    Aim("R^2 of a straight line, the least", ">=", 0.99, "", _worst_fit),
    Aim("memory of a descent beyond X and y", "<", 16, " MB", lambda _: bench_gradient_descent.memory_beyond_data() / 1e6, "Footprint"),
    Aim("`import gdlib` over `import numpy`", "<=", 40, " ms", lambda _: 1e3 * bench_footprint.import_seconds_beyond_numpy()),
    Aim("wheel in dist/ (`pip wheel --no-deps -w dist .`)", "<", 2, " MB", lambda _: bench_footprint.wheel_bytes() / 1e6),
]

"""Cost against one size at a time, the others fixed: twice the rows, features, outputs or batch must cost twice as much.

The sizes of one axis take turns, so that a neighbour's load meets them all; the report fits a straight line to the logarithms.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import gdlib
from benchmarks import bench_gemm, bench_gradient_descent, bench_threads, machine, peers
from benchmarks.bench_gradient_descent import EPOCHS, LR
from benchmarks.measure import Contender, Group, Run
from benchmarks.peers import Regression

BATCH_SIZE, SGD_ROWS = 256, 262_144


@dataclass(frozen=True)
class Axis:
    name: str
    what: str
    sizes: Sequence[int]
    group: Group


def label(who: str, size: int) -> str:
    return f"{who}, {size:,}"


descent_problem = functools.cache(bench_gradient_descent.problem.__wrapped__)  # all sizes of an axis are needed at once
layer_problem = functools.cache(bench_gemm.problem.__wrapped__)


def gdlib_sgd(problem: Regression) -> Run:
    def run() -> Any:
        model = gdlib.Linear(problem.X.shape[1], 1, seed=0)
        optimizer = gdlib.SGD(model.parameters(), lr=_sgd_lr(problem))
        options: Any = {"loss": gdlib.MSELoss(), "optimizer": optimizer, "batch_size": BATCH_SIZE, "shuffle": False}
        gdlib.fit(model, problem.X, problem.y, epochs=1, **options)
        return [parameter.data for parameter in model.parameters()]

    return run


def _sgd_lr(problem: Regression) -> float:
    return 0.1 / (1 + problem.X.shape[1] / BATCH_SIZE)  # stable for any number of features


def numpy_sgd(problem: Regression) -> Run:
    return peers.numpy_loop(problem, 1, _sgd_lr(problem), BATCH_SIZE, shuffle=False)


def numpy_descent(problem: Regression) -> Run:
    return peers.numpy_loop(problem, EPOCHS, LR, len(problem.X), shuffle=False)


def numpy_products(layer: bench_gemm.Layer) -> Run:
    forward, gradients = (bench_gemm.numpy_layer(layer, part) for part in (bench_gemm.FORWARD, bench_gemm.GRADIENTS))
    return lambda: (forward(), gradients())


def _axis(
    name: str,
    what: str,
    sizes: Sequence[int],
    problem: Callable[[int], Any],
    preparations: dict[str, Callable[[Any], Run]],
    check: Callable[[Any, Any], None],
    limits: Sequence[Contender],
    work: float = 1.0,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Axis:
    def prepare(_: Any, size: int, how: Callable[[Any], Run]) -> Run:
        given = problem(size)
        run = how(given)
        return lambda: (given, run())

    contenders = [
        Contender(label(who, size), partial(prepare, size=size, how=how), work, around=around)
        for who, how in preparations.items()
        for size in sizes
    ]
    title = f"Scaling with {name}: {what}"
    return Axis(name, what, sizes, Group(title, "run", [*contenders, *limits], check=lambda _, result: check(*result), rounds=9))


def check_sgd(problem: Regression, parameters: Any) -> None:
    """gdlib and NumPy start from different weights: an epoch must have explained most of y's variance, 0.01 being noise."""
    weight, bias = (value.ravel() if hasattr(value, "ravel") else value for value in parameters)
    rest = float(((problem.X @ weight + bias - problem.y[:, 0]) ** 2).mean() / problem.y.var())
    assert rest < 0.6, f"{rest:.2g} of the variance is left after an epoch"


# From where the work is more than the call and its threads. X is far larger than most caches for every number of rows and features: a line
# that left a cache on its way would bend there.
ROWS, FEATURES, WIDTHS = [2**k for k in range(18, 22)], [2**k for k in range(6, 11)], [2**k for k in range(7, 13)]
_descents: Any = {"gdlib": bench_gradient_descent.gdlib_fit, "NumPy": numpy_descent}
_sgds: Any = {"gdlib": gdlib_sgd, "NumPy": numpy_sgd}
_products: Any = {"gdlib": bench_threads.gdlib_products, "NumPy": numpy_products}
_bandwidth, _peak = partial(machine.bandwidth, machine.THREADS), partial(machine.fma_peak, "float32", machine.THREADS)
AXES = [
    _axis(
        "rows",
        "a step of gradient descent, 100 features",
        ROWS,
        lambda size: descent_problem(size, 100, "float32"),
        _descents,
        bench_gradient_descent.check,
        _bandwidth(400 * ROWS[-1]),
        EPOCHS,
    ),
    _axis(
        "features",
        f"an SGD epoch of {SGD_ROWS:,} rows, batch {BATCH_SIZE}, gdlib on one thread",
        FEATURES,
        functools.cache(lambda size: bench_gradient_descent.data(SGD_ROWS, size, "float32")),
        _sgds,
        check_sgd,
        machine.bandwidth(1, 4 * SGD_ROWS * FEATURES[-1]),
        around=partial(machine.gdlib_threads, 1),  # the line would bend where a batch becomes large enough for two
    ),
    _axis(
        "outputs",
        "products of 256 rows, 512 inputs, forward and gradients",
        WIDTHS,
        lambda size: layer_problem(256, 512, size, "float32"),
        _products,
        bench_threads.check_products,
        [_peak(6.0 * 256 * 512 * WIDTHS[-1])],
    ),
    _axis(
        "batch",
        "products of Linear(512, 512), forward and gradients",
        WIDTHS,
        lambda size: layer_problem(size, 512, 512, "float32"),
        _products,
        bench_threads.check_products,
        [_peak(6.0 * 512 * 512 * WIDTHS[-1])],
    ),
]
GROUPS = [axis.group for axis in AXES]


def test_scaling(time_contender: None) -> None: ...

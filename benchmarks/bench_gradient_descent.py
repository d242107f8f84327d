"""Full-batch gradient descent on matrices larger than a cache: a step beside one reading of X, and the memory that it takes beyond X."""

import functools
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import gdlib
from benchmarks import machine, peers
from benchmarks.measure import Contender, Group, Run, UnavailableError
from benchmarks.peers import Regression

LR, EPOCHS = 0.25, 10  # the Hessian's eigenvalues are close to 2: stable, and every step still moves the weights
HEADLINE = (1_000_000, 100, "float32")
SHAPES = (HEADLINE, (1_000_000, 100, "float64"), (200_000, 1_000, "float32"), (200_000, 1_000, "float64"))
BLOCK = 8192  # rows: X is built and checked without temporary arrays of its size


def data(rows: int, features: int, dtype: str) -> Regression:
    rng = np.random.default_rng(0)
    X, y = np.empty((rows, features), dtype), np.empty((rows, 1), dtype)
    weight = rng.standard_normal((features, 1)).astype(dtype)
    for begin in range(0, rows, BLOCK):
        x = X[begin : begin + BLOCK]
        rng.standard_normal(out=x, dtype=X.dtype)
        y[begin : begin + BLOCK] = x @ weight + 0.1 * rng.standard_normal((len(x), 1), dtype=X.dtype)
    return Regression(X, y)


@functools.lru_cache(maxsize=1)  # one matrix in memory at a time
def problem(rows: int, features: int, dtype: str) -> Regression:
    """`right` is the weights and the bias after EPOCHS steps from zero, by the normal equations in float64."""
    wanted = rows * features * np.dtype(dtype).itemsize
    if machine.free_bytes() < 3 * wanted:
        raise UnavailableError(f"{wanted / 1e9:.1f} GB are too much for the free memory")
    given = data(rows, features, dtype)
    gram, moment = np.zeros((features + 1, features + 1)), np.zeros((features + 1, 1))
    for begin in range(0, rows, BLOCK):
        x = np.insert(given.X[begin : begin + BLOCK].astype(np.float64), features, 1, axis=1)
        gram += x.T @ x
        moment += x.T @ given.y[begin : begin + BLOCK]
    theta = np.zeros((features + 1, 1))
    for _ in range(EPOCHS):
        theta -= LR * 2 / rows * (gram @ theta - moment)
    return Regression(given.X, given.y, right=theta[:, 0])


def check(problem: Regression, parameters: Any) -> None:
    """The weights after EPOCHS steps are right to rounding: 1e-4 of their size in float32, 1e-10 in float64."""
    theta = np.concatenate([np.asarray(value, np.float64).ravel() for value in parameters])
    error = float(np.linalg.norm(theta - problem.right) / np.linalg.norm(problem.right))
    assert error < (1e-4 if problem.X.dtype == np.float32 else 1e-10), f"the weights are off by {error:.2g} of their size"


def gdlib_fit(problem: Regression) -> Run:
    def run() -> Any:
        model = gdlib.Linear(problem.X.shape[1], 1, dtype=problem.X.dtype, seed=0)
        for parameter in model.parameters():
            parameter.data[:] = 0
        gdlib.fit(model, problem.X, problem.y, loss=gdlib.MSELoss(), optimizer=gdlib.GD(model.parameters(), lr=LR), epochs=EPOCHS)
        return [parameter.data for parameter in model.parameters()]

    return run


def _group(rows: int, features: int, dtype: str) -> Group:
    size = rows * features * np.dtype(dtype).itemsize
    options: Any = {"epochs": EPOCHS, "lr": LR, "batch_size": rows}
    jax = partial(peers.jax_scan, epochs_a_call=EPOCHS, **options)
    contenders = [
        Contender("gdlib fit", gdlib_fit, EPOCHS),
        Contender("NumPy, two passes", partial(peers.numpy_loop, shuffle=False, **options), EPOCHS),
        *peers.pytorch("PyTorch autograd", partial(peers.pytorch_loop, batches="in order", **options), EPOCHS),
        *peers.pytorch("PyTorch by hand", partial(peers.pytorch_by_hand, shuffle=False, **options), EPOCHS),
        *([Contender("JAX jit(scan)", jax, EPOCHS)] if dtype == "float32" else []),  # its float64 is a setting of the whole process
        *machine.reading("X itself read once", lambda problem: problem.X, machine.THREADS),
        *machine.bandwidth(machine.THREADS, size),
    ]
    note = f"A run is {EPOCHS} steps. X takes {size / 1e6:,.0f} MB; the bandwidth is that of {machine.large_bytes() / 1e6:,.0f} MB."
    title = f"Gradient descent, {rows:,} x {features:,} {dtype}"
    problem_here = partial(problem, rows, features, dtype)
    return Group(title, "step", contenders, problem_here, check, note, 4 * rows * features, size, "GB", dtype, rounds=7)


GROUPS = [_group(*shape) for shape in SHAPES]


def _resident_bytes(mark: str) -> int:
    """Resident memory now (VmRSS) or at its peak (VmHWM); the peak for both where there is no /proc.

    On Linux getrusage will not do: a child's ru_maxrss starts at its parent's, and hides any growth below that.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(mark))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_growth() -> int:
    """Bytes by which `fit` raises this process's peak memory, X and y being there already."""
    run = gdlib_fit(data(*HEADLINE))
    before = _resident_bytes("VmRSS")
    run()
    return _resident_bytes("VmHWM") - before


def memory_beyond_data() -> int:
    """The same for the first `fit` of a fresh process."""
    return int(machine.fresh_interpreter("from benchmarks import bench_gradient_descent as bench; print(bench.peak_growth())"))


def test_gradient_descent(time_contender: None) -> None: ...

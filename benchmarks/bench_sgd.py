"""One epoch of stochastic gradient descent on a matrix larger than a cache, in order and shuffled, and a pass over its batches alone.

Beside one reading of X.
"""

import functools
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

import gdlib
from benchmarks import machine, peers
from benchmarks.bench_gradient_descent import BLOCK, data
from benchmarks.measure import Contender, Group, Run, UnavailableError
from benchmarks.peers import Regression

ROWS, FEATURES, BATCH_SIZE, LR = 1_000_000, 100, 256, 0.05
STEPS = -(-ROWS // BATCH_SIZE)
BYTES = 4 * ROWS * FEATURES
BY_INDEX, BY_TAKING, AT_ONCE = FORMS = ("batch by batch", "batch by batch, taken", "all at once")  # of shuffled batches


@functools.lru_cache(maxsize=1)
def problem() -> Regression:
    """`right` is the loss of the least-squares fit, by the normal equations in float64."""
    if machine.free_bytes() < 6 * BYTES:  # scikit-learn's float64, and the shuffled copies of NumPy and PyTorch
        raise UnavailableError(f"{6 * BYTES / 1e9:.1f} GB are too much for the free memory")
    given = data(ROWS, FEATURES, "float32")
    gram, moment, square = np.zeros((FEATURES + 1, FEATURES + 1)), np.zeros(FEATURES + 1), 0.0
    for begin in range(0, ROWS, BLOCK):
        x = np.insert(given.X[begin : begin + BLOCK].astype(np.float64), FEATURES, 1, axis=1)
        y = given.y[begin : begin + BLOCK, 0].astype(np.float64)
        gram += x.T @ x
        moment += x.T @ y
        square += float(y @ y)
    return Regression(given.X, given.y, right=(square - float(moment @ np.linalg.solve(gram, moment))) / ROWS)


def check(problem: Regression, parameters: Any) -> None:
    """The loss over all rows is within 5 % of that of the least-squares fit."""
    weight, bias = (np.asarray(value, np.float32).ravel() for value in parameters)
    loss = float(np.mean((problem.X @ weight + bias - problem.y[:, 0]).astype(np.float64) ** 2))
    assert loss <= 1.05 * problem.right, f"the final loss is {loss:.4g}; at most 1.05 * {problem.right:.4g} is right"


def gdlib_fit(problem: Regression, shuffle: bool) -> Run:
    def run() -> Any:
        model = gdlib.Linear(FEATURES, 1, seed=0)
        optimizer, loss = gdlib.SGD(model.parameters(), lr=LR), gdlib.MSELoss()
        gdlib.fit(model, problem.X, problem.y, loss=loss, optimizer=optimizer, epochs=1, batch_size=BATCH_SIZE, shuffle=shuffle, seed=0)
        return [parameter.data for parameter in model.parameters()]

    return run


def _group(shuffle: bool) -> Group:
    options: Any = {"epochs": 1, "lr": LR, "batch_size": BATCH_SIZE}
    fit = partial(gdlib_fit, shuffle=shuffle)
    contenders = [
        Contender("gdlib fit", fit),
        Contender("gdlib fit, 1 thread", fit, around=partial(machine.gdlib_threads, 1)),
        *(
            Contender(f"scikit-learn {dtype}", partial(peers.sklearn_sgd, dtype=dtype, shuffle=shuffle, **options))
            for dtype in ("float32", "float64")
        ),
        Contender("NumPy loop", partial(peers.numpy_loop, shuffle=shuffle, **options)),
        *peers.pytorch("PyTorch loop", partial(peers.pytorch_loop, batches="shuffled" if shuffle else "in order", **options)),
        *peers.pytorch("PyTorch by hand", partial(peers.pytorch_by_hand, shuffle=shuffle, **options)),
        Contender("JAX jit(scan)", partial(peers.jax_scan, shuffle=shuffle, **options)),
        *machine.bandwidth(machine.THREADS if shuffle else 1, BYTES),
    ]
    note = (
        f"An epoch is {STEPS:,} steps of {BATCH_SIZE} rows ({ROWS:,} of one row for scikit-learn), from a fresh model; the loss at its end "
        "must be within 5 % of the noise floor. "
    )
    note += (
        "The limit is reading in order, with all threads, which share a batch."
        if shuffle
        else "The limit is one core's: a batch is too little work to share."
    )
    order = "shuffled" if shuffle else "in order"
    title = f"SGD epoch, {ROWS:,} x {FEATURES}, batch {BATCH_SIZE}, {order}"
    return Group(title, "epoch", contenders, problem, check, note, 4 * ROWS * FEATURES, BYTES, "GB", rounds=5)


@functools.lru_cache(maxsize=1)
def numbered() -> Regression:
    """Each row's target is its number, which float32 holds."""
    return Regression(problem().X, np.arange(ROWS, dtype=np.float32)[:, None])


def check_batches(problem: Regression, result: Any) -> None:
    """Each row once, out of order, and in the first and the last batch the rows that their numbers tell."""
    first, last = np.asarray(result[0]), np.asarray(result[1])
    numbers = [np.asarray(batch)[:, 0] for batch in result[2]]
    drawn = np.concatenate(numbers)
    assert np.array_equal(np.sort(drawn), problem.y[:, 0]), "a pass leaves rows out, or repeats some"
    assert np.mean(drawn == problem.y[:, 0]) < 0.01, "rows come in order"
    for rows, batch in ((first, numbers[0]), (last, numbers[-1])):
        assert np.array_equal(rows, problem.X[batch.astype(int)]), "a batch has other rows than its targets"


def gdlib_batches(problem: Regression) -> Run:
    return lambda: _passed(gdlib.DataLoader(problem.X, problem.y, batch_size=BATCH_SIZE, shuffle=True, seed=0))


def numpy_batches(problem: Regression, form: str) -> Run:
    """The rows of a batch by their numbers, or all at once, and views of them."""
    X, y, rng = problem.X, problem.y, np.random.default_rng(0)
    into, into_targets = np.empty_like(X), np.empty_like(y)

    def all_rows(order: Any) -> Any:
        rows, targets = (np.take(array, order, axis=0, out=out, mode="clip") for array, out in ((X, into), (y, into_targets)))
        return ((rows[begin : begin + BATCH_SIZE], targets[begin : begin + BATCH_SIZE]) for begin in range(0, ROWS, BATCH_SIZE))

    def run() -> Any:
        order = rng.permutation(ROWS)
        parts = (order[begin : begin + BATCH_SIZE] for begin in range(0, ROWS, BATCH_SIZE))
        if form == BY_INDEX:
            return _passed((X[part], y[part]) for part in parts)
        if form == BY_TAKING:
            return _passed((X.take(part, axis=0, mode="clip"), y.take(part, axis=0, mode="clip")) for part in parts)
        return _passed(all_rows(order))

    return run


def pytorch_batches(problem: Regression, form: str) -> Run:
    """The same; a DataLoader, which takes rows one by one, is no match."""
    import torch

    X, y = torch.from_numpy(problem.X), torch.from_numpy(problem.y)
    into, into_targets = (torch.from_numpy(np.zeros_like(array)) for array in (problem.X, problem.y))

    def run() -> Any:
        order = torch.randperm(ROWS)
        if form == BY_INDEX:
            return _passed((X[part], y[part]) for part in order.split(BATCH_SIZE))
        if form == BY_TAKING:
            return _passed((X.index_select(0, part), y.index_select(0, part)) for part in order.split(BATCH_SIZE))
        rows, targets = torch.index_select(X, 0, order, out=into), torch.index_select(y, 0, order, out=into_targets)
        return _passed(zip(rows.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True))

    return run


def _passed(batches: Iterable[Any]) -> Any:
    """The rows of the first and the last batch, and the targets of all."""
    passed = iter(batches)
    batch = next(passed)
    first, targets = batch[0], [batch[1]]
    for batch in passed:
        targets.append(batch[1])
    return first, batch[0], targets


def _batches() -> Group:
    contenders = [
        Contender("gdlib DataLoader", gdlib_batches),
        *(Contender("NumPy", partial(numpy_batches, form=form), variant=form) for form in FORMS),
        *(contender for form in FORMS for contender in peers.pytorch("PyTorch", partial(pytorch_batches, form=form), form=form)),
        *machine.bandwidth(machine.THREADS, BYTES),
    ]
    note = (
        f"A pass draws an order and copies each row into its batch. The limit is reading in order with {machine.plural(machine.THREADS)}."
    )
    title = f"Shuffled batches, {ROWS:,} x {FEATURES}, {BATCH_SIZE} rows each"
    return Group(title, "pass", contenders, numbered, check_batches, note, bytes=BYTES, rate="GB", rounds=5)


IN_ORDER, SHUFFLED = EPOCHS = [_group(False), _group(True)]
GROUPS = [*EPOCHS, _batches()]


def test_sgd(time_contender: None) -> None: ...

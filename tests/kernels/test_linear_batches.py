"""Mini-batches of data larger than 512 KiB, which are cut into pieces of rows, and whose scattered rows are asked for ahead."""

from functools import cache

import numpy as np
import pytest

from gdlib import _core
from tests import oracle
from tests.kernels.guarded import Guarded, poisoned, values

SEEDS = (5, 6)
LR = 0.01
# (rows, in_features, out_features, batch_size): 2 to 8 pieces, equal and not, on few outputs and on more; none of 20 outputs, nor of few
# features up to 6,399 rows of 10.
SHAPES = [
    (3000, 100, 1, 256),
    (2100, 130, 3, 300),
    (700, 500, 1, 699),
    (1900, 120, 9, 270),
    (900, 300, 20, 250),
    (8000, 37, 1, 50),
    (8000, 37, 1, 999),
    (6000, 60, 1, 999),
    (6000, 26, 1, 999),
    (40, 5001, 1, 9),
    (20000, 10, 1, 1025),
    (13000, 10, 1, 6399),
    (13000, 10, 1, 6400),
    (70000, 2, 1, 16385),
]


def train(x, target, start, batch_size, seeds, threads):
    _core.set_num_threads(threads)
    steps, losses, parameters = len(SEEDS) * -(-len(x) // batch_size), np.zeros(len(SEEDS)), Guarded(start)
    ranges, layers = [(0, start.size, LR, 0.0, 0.0, 0.0, False, False, True)], [("linear", x.shape[1], target.shape[1], True)]
    args = (x, target, parameters.array, None, layers, ranges, batch_size, seeds, 0, steps, True, 0.0, losses)
    assert _core.train(*args)[:2] == ("finished", steps)
    parameters.check()
    return parameters.array, losses


def problem(shape, dtype):
    rows, width, out, _ = shape
    rng = np.random.default_rng(width)
    return [values(rng, size, dtype) for size in ((rows, width), (rows, out), out * (width + 1))]


@cache  # every ISA asks for it
def numpy_loop(shape, dtype):
    x, target, parameters = map(np.float64, problem(shape, dtype))
    width, out, batch_size = shape[1:]
    losses = np.zeros(len(SEEDS))
    for epoch, seed in enumerate(SEEDS):
        order = np.array(oracle.shuffle_order(seed, len(x)))
        for begin in range(0, len(x), batch_size):
            rows = order[begin : begin + batch_size]
            weight, bias = parameters[: out * width].reshape(out, width), parameters[out * width :]
            residual = x[rows] @ weight.T + bias - target[rows]
            losses[epoch] += np.sum(residual**2)
            gradient = np.concatenate([(residual.T @ x[rows]).ravel(), residual.sum(axis=0)])
            parameters = parameters - LR * 2 * gradient / residual.size
    return parameters, losses


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_scattered_batches(isa, dtype, shape):
    """Against float64, with equal bits on any number of threads."""
    x, target, start = problem(shape, dtype)
    x, target = poisoned(x, row_gap=3), poisoned(target)
    results = [train(x, target, start, shape[3], np.array(SEEDS, np.uint64), threads) for threads in range(1, 9)]
    rtol = 3e-5 if dtype == np.float32 else 1e-12
    for got, wanted in zip(results[0], numpy_loop(shape, dtype), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())
    for other in results:
        assert [array.tobytes() for array in other] == [array.tobytes() for array in results[0]]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_scattered_batches_give_the_bits_of_rows_that_lie_in_that_order(isa, dtype, shape):
    x, target, start = problem(shape, dtype)
    same_order = np.full(len(SEEDS), SEEDS[0], np.uint64)
    order = _core.shuffle_order(SEEDS[0], len(x))
    shuffled = train(x, target, start, shape[3], same_order, 2)
    lying = train(x[order], target[order], start, shape[3], None, 2)
    assert [array.tobytes() for array in shuffled] == [array.tobytes() for array in lying]


@pytest.mark.parametrize(
    "shape", [(512, 50, 1), (300, 70, 1), (2000, 10, 1), (1000, 30, 1), (256, 130, 3), (200, 120, 9)], ids=lambda s: "x".join(map(str, s))
)
def test_the_size_of_the_data_set_does_not_show_in_the_bits(isa, dtype, shape):
    """Epochs of one batch, and one epoch of as many copies of it, which no cache is taken to hold."""
    rows, width, out = shape
    copies = 2 + (6 << 20) // (rows * width * np.dtype(dtype).itemsize)
    x, target, start = problem((rows, width, out, rows), dtype)
    results = []
    for tiled, epochs in ((1, copies), (copies, 1)):
        parameters, losses = start.copy(), np.zeros(epochs)
        ranges, layers = [(0, start.size, LR, 0.0, 0.0, 0.0, False, False, True)], [("linear", width, out, True)]
        given = np.tile(x, (tiled, 1)), np.tile(target, (tiled, 1))
        assert _core.train(*given, parameters, None, layers, ranges, rows, None, 0, copies, True, 0.0, losses)[:2] == ("finished", copies)
        results.append(parameters.tobytes())
    assert results[0] == results[1]

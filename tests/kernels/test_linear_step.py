"""The fused training step, one step of train() at a time: shuffled or in order, in one task or several, against the float64 oracle.

With lr 1, the summed loss and a single step, parameters - gradient is what train() leaves behind.
"""

from functools import cache

import numpy as np
import pytest

from gdlib import _core
from tests import oracle
from tests.kernels.guarded import CANARY, MARGIN, Guarded, poisoned, values
from tests.kernels.sweep import LARGEST

PLAIN = (1.0, 0.0, 0.0, 0.0, False, False, True)  # lr, momentum, dampening, weight_decay, nesterov, maximize, first_step
MOST_OUTPUTS = 5


def descend(x, target, parameters, has_bias, epoch_seeds, losses):
    """One step over all rows."""
    ranges = [(0, parameters.size, *PLAIN)]
    return _core.train(
        x,
        target,
        parameters,
        None,
        [("linear", x.shape[1], target.shape[1], has_bias)],
        ranges,
        x.shape[0],
        epoch_seeds,
        0,
        1,
        False,
        0.0,
        losses,
    )


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_small_sizes(isa, dtype, has_bias):
    """Every number of rows and of features from 1 to 67, and 1 to 5 outputs; shuffled where rows + in_features is odd."""
    rng = np.random.default_rng(3)
    x, target = values(rng, (LARGEST, LARGEST), dtype), values(rng, (LARGEST, MOST_OUTPUTS), dtype)
    weight, bias = values(rng, (MOST_OUTPUTS, LARGEST), dtype), values(rng, MOST_OUTPUTS, dtype)
    targets = {(n, out): poisoned(target[:n, :out]) for n in range(1, LARGEST + 1) for out in range(1, MOST_OUTPUTS + 1)}
    seeds = np.array([7], np.uint64)
    for width in range(1, LARGEST + 1):
        batches = [poisoned(x[:n, :width], row_gap=n % 4) for n in range(1, LARGEST + 1)]
        step = oracle.linear_step(x[:, :width], target, weight[:, :width], bias if has_bias else None)
        for out in range(1, MOST_OUTPUTS + 1):
            start = np.concatenate([weight[:out, :width].ravel(), bias[: out if has_bias else 0]])
            # Updated as one range, few features of one output have a kernel of their own; in two, they take the same way as the others.
            cut = width if width % 3 == 0 else start.size
            ranges = [(0, cut, *PLAIN), (cut, start.size, *PLAIN)] if cut < start.size else [(0, start.size, *PLAIN)]
            # One row of memory for each number of rows of x: canaries, the parameters, canaries.
            memory = np.full((LARGEST, MARGIN + start.size + MARGIN), CANARY, dtype)
            after = memory[:, MARGIN:-MARGIN]
            after[...] = start
            losses = np.zeros(LARGEST)
            for i, batch in enumerate(batches):
                n = i + 1
                stop, done = _core.train(
                    batch,
                    targets[n, out],
                    after[i],
                    None,
                    [("linear", width, out, has_bias)],
                    ranges,
                    n,
                    seeds if (n + width) % 2 else None,
                    0,
                    1,
                    False,
                    0.0,
                    losses[i:n],
                )
                assert (stop, done) == ("finished", 1)
            what = f"in_features {width}, out_features {out}"
            assert (memory[:, :MARGIN] == dtype(CANARY)).all(), f"{what}: written before the parameters"
            assert (memory[:, -MARGIN:] == dtype(CANARY)).all(), f"{what}: written past the parameters"
            got = after[:, : out * width].reshape(LARGEST, out, width)
            oracle.assert_within(got, oracle.Interval(*(edge[1:, :out] for edge in step.weight)), f"weight, {what}")
            if has_bias:
                oracle.assert_within(after[:, out * width :], oracle.Interval(*(edge[1:, :out] for edge in step.bias)), f"bias, {what}")
            oracle.assert_within(losses, oracle.Interval(*(edge[1:, out - 1] for edge in step.loss)), f"loss, {what}")


@pytest.mark.parametrize("seed", [None, 7], ids=["in-order", "shuffled"])
def test_every_way_begins_its_sums_at_zero(isa, dtype, seed):
    """Dot products whose terms are all -0 are 0, for every number of features of a small batch: then -0 - 0 leaves the weights at -0."""
    tiny, rows, outputs = np.finfo(dtype).tiny ** 0.8, 8, 2
    seeds = None if seed is None else np.array([seed], np.uint64)
    for width in range(1, LARGEST + 1):
        x, target = np.full((rows, width), tiny, dtype), np.zeros((rows, outputs), dtype)
        target[: rows // 2] = tiny
        parameters = np.full(outputs * (width + 1), -0.0, dtype)
        assert descend(x, target, parameters, True, seeds, np.zeros(1))[:2] == ("finished", 1)
        weights = parameters[: outputs * width]
        assert (weights == 0).all(), f"in_features {width}"
        assert np.signbit(weights).all(), f"in_features {width}"


@cache  # for every ISA, and both orders
def large_problem(shape, dtype):
    rows, in_features, out = shape
    rng = np.random.default_rng(rows)
    x = poisoned(values(rng, (rows, in_features), dtype), row_gap=2)
    target = poisoned(values(rng, (rows, out), dtype))
    weight, bias = poisoned(values(rng, (out, in_features), dtype)), poisoned(values(rng, out, dtype))
    step = oracle.linear_step(x, target, weight, bias)
    last = oracle.Step(*(oracle.Interval(low[-1], high[-1]) for low, high in step))
    return x, target, weight, bias, last


# (rows, in_features, out_features); a task has 512 KiB of x, at least 64 rows: from 3 to 11 tasks, with a short one at the end.
@pytest.mark.parametrize("shape", [(10003, 67, 1), (3001, 123, 2), (300, 1500, 1), (200, 1111, 3)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("seed", [None, 5], ids=["in-order", "shuffled"])
def test_several_tasks(isa, dtype, shape, seed):
    x, target, weight, bias, wanted = large_problem(shape, dtype)
    seeds = None if seed is None else np.array([seed], np.uint64)
    results = []
    for threads in range(1, 9):
        _core.set_num_threads(threads)
        parameters, losses = Guarded(np.concatenate([weight.ravel(), bias])), np.zeros(1)
        assert descend(x, target, parameters.array, True, seeds, losses)[:2] == ("finished", 1)
        parameters.check()
        results.append((parameters.array, losses))
    parameters, losses = results[0]
    oracle.assert_within(parameters[: weight.size].reshape(weight.shape), wanted.weight, "weight")
    oracle.assert_within(parameters[weight.size :], wanted.bias, "bias")
    oracle.assert_within(losses, oracle.Interval(*(edge[-1:] for edge in wanted.loss)), "loss")
    for other in results:
        assert [array.tobytes() for array in other] == [array.tobytes() for array in results[0]]


@pytest.mark.parametrize("out", [1, 2])
def test_shuffled_rows_give_the_bits_of_rows_that_lie_in_that_order(isa, dtype, out):
    """Few rows, which a cache holds, and many: each is read in the way that suits it."""
    rng = np.random.default_rng(out)
    for width in (1, 3, 9, 16, 17, 40, 47, 100, 127, 128, 129, 131, 300, 512, 513, 1023, 1024, 1025, 2048, 2049):
        for rows in (77, 2_400_000 // width // np.dtype(dtype).itemsize):
            x, target, start = values(rng, (rows, width), dtype), values(rng, (rows, out), dtype), values(rng, out * (width + 1), dtype)
            order = _core.shuffle_order(7, rows)
            shuffled, lying = (start.copy(), np.zeros(1)), (start.copy(), np.zeros(1))
            descend(x, target, shuffled[0], True, np.array([7], np.uint64), shuffled[1])
            descend(x[order], target[order], lying[0], True, None, lying[1])
            assert [array.tobytes() for array in shuffled] == [array.tobytes() for array in lying], f"{rows} x {width}"


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rows", [1, 31, 2003])
def test_squared_error(isa, dtype, rows, has_bias):
    """The loss alone, over all rows."""
    rng = np.random.default_rng(rows)
    x, target = poisoned(values(rng, (rows, 300), dtype), row_gap=1), poisoned(values(rng, (rows, 2), dtype))
    weight, bias = values(rng, (2, 300), dtype), values(rng, 2, dtype) if has_bias else np.zeros(0, dtype)
    parameters = poisoned(np.concatenate([weight.ravel(), bias]))
    wanted = oracle.linear_step(x, target, weight, bias if has_bias else None).loss
    got = np.array([_core.squared_error(x, target, parameters, [("linear", 300, 2, has_bias)])])
    oracle.assert_within(got, oracle.Interval(*(edge[-1, -1:] for edge in wanted)))


# One task and several; gradients of their own for each task, and products that share the threads.
@pytest.mark.parametrize(("rows", "in_features", "out"), [(200_000, 1, 16), (100_000, 2, 40), (40_000, 1024, 65)], ids=str)
def test_gradients_of_many_rows_and_outputs_are_carried_in_double(rows, in_features, out):
    """Equal float32 terms: one chain of additions over all rows would be off by 1e-3."""
    x = np.broadcast_to(np.full(in_features, 0.1, np.float32), (rows, in_features))
    target = np.full((rows, out), 0.1, np.float32)
    parameters = np.zeros(out * (in_features + 1), np.float32)
    assert descend(x, target, parameters, True, None, np.zeros(1))[0] == "finished"
    wanted = 2 * rows * 0.1  # of every bias, and a tenth of it of every weight
    np.testing.assert_allclose(parameters[: out * in_features], 0.1 * wanted, rtol=3e-4)
    np.testing.assert_allclose(parameters[out * in_features :], wanted, rtol=1e-4)

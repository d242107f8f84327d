"""Many steps in one kernel call, for one output and few features: the same run as step by step, for every option of the update."""

import itertools

import numpy as np
import pytest

from gdlib import _core
from tests.kernels.guarded import Guarded, poisoned, values

OPTIONS = [  # lr, momentum, dampening, weight_decay, nesterov, maximize, first_step
    (0.004, 0.0, 0.0, 0.0, False, False, True),
    (0.004, 0.0, 0.0, 0.3, False, True, True),
    (0.004, 0.9, 0.0, 0.1, False, False, True),
    (0.004, 0.9, 0.2, 0.1, False, False, False),
    (0.004, 0.8, 0.0, 0.0, True, False, True),
]


def train(x, target, parameters, momentum, has_bias, ranges, batch_size, seeds, mean=True, steps=None):
    losses = np.zeros(3)
    steps = steps or 3 * -(-len(x) // batch_size)
    layers = [("linear", x.shape[1], 1, has_bias)]
    args = (x, target, parameters, momentum, layers, ranges, batch_size, seeds, 0, steps, mean, 0.0, losses)
    return *_core.train(*args), losses


def problem(rows, features, dtype, has_bias):
    rng = np.random.default_rng(features)
    x = poisoned(values(rng, (rows, features), dtype), row_gap=1)
    return x, poisoned(values(rng, (rows, 1), dtype)), values(rng, features + has_bias, dtype), values(rng, features + has_bias, dtype)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_as_step_by_step(isa, dtype, options, has_bias):
    """Two ranges with equal options are the same update, and take the way of a visit to each batch."""
    seeds = np.array([1, 2, 3], np.uint64)
    for features, batch_size in itertools.product((1, 2, 3, 5, 6, 7, 13, 14, 15, 16, 29, 30, 31, 45, 62), (1, 7, 16, 37)):
        x, target, start, buffer = problem(40, features, dtype, has_bias)
        results = []
        n = start.size
        for ranges in ([(0, n, *options)], [(0, n // 2, *options), (n // 2, n, *options)]):
            parameters, momentum = Guarded(start), Guarded(buffer)
            order = seeds if features % 2 else None
            stop, _, losses = train(
                x, target, parameters.array, momentum.array, has_bias, ranges, batch_size, order, mean=bool(batch_size % 2)
            )
            assert stop == "finished"
            parameters.check()
            momentum.check()
            results.append((parameters.array, momentum.array if options[1] else buffer, losses))
        what = f"{features} features in batches of {batch_size}"
        rtol = 2e-4 if dtype == np.float32 else 1e-11
        for got, wanted in zip(*results, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max(), err_msg=what)


def test_batches_that_are_taken(isa, dtype):
    """Batch and features alone settle which way is taken: in a run the bits differ from those of two ranges, else they are the same."""
    limits = [(1, 16384), (3, 16384), (10, 6399 if dtype == np.float32 else 1024), (24, 1024), (60, 271), (5, 12799)]
    lanes = {"scalar": 16, "neon": 16, "avx2": 32, "avx512": 64}[isa] // np.dtype(dtype).itemsize
    for features, most in limits:
        if features > 4 * lanes - 2:
            continue
        for batch_size in (most, most + 1):
            x, target, start, _ = problem(2 * batch_size, features, dtype, True)
            n, bits = start.size, []
            options = (0.02, 0.0, 0.0, 0.0, False, False, True)
            for ranges in ([(0, n, *options)], [(0, n // 2, *options), (n // 2, n, *options)]):
                parameters = start.copy()
                stop, _, losses = train(x, target, parameters, np.zeros(n, dtype), True, ranges, batch_size, None)
                assert stop == "finished"
                bits.append(parameters.tobytes() + losses.tobytes())
            assert (bits[0] != bits[1]) == (batch_size == most), f"{features} features in batches of {batch_size}"


def test_a_run_may_be_cut_anywhere(isa, dtype):
    """First and last step are free: the same bits in one call and in several."""
    x, target, start, _ = problem(100, 10, dtype, True)
    options = (0.01, 0.5, 0.0, 0.0, False, False)
    whole, buffer = start.copy(), np.zeros_like(start)
    train(x, target, whole, buffer, True, [(0, 11, *options, True)], 8, None)
    pieces, piece_buffer, losses = start.copy(), np.zeros_like(start), np.zeros(3)
    for first, last in itertools.pairwise((0, 1, 5, 14, 39)):
        ranges = [(0, 11, *options, first == 0)]
        args = (x, target, pieces, piece_buffer, [("linear", 10, 1, True)], ranges, 8, None, first, last, True, 0.0, losses)
        assert _core.train(*args) == ("finished", last)
    assert pieces.tobytes() == whole.tobytes()
    assert piece_buffer.tobytes() == buffer.tobytes()


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_rows_that_are_extended_once_give_the_same_bits(isa, dtype, has_bias, shuffled):
    """A call of three epochs copies the rows, calls of one epoch read them where they are."""
    for features in (0, 1, 2, 3, 6, 7, 10, 14, 15, 30, 62):
        if features + has_bias == 0:
            continue
        x, target, start, _ = problem(150, features, dtype, has_bias)
        seeds = np.array([3, 1, 2], np.uint64) if shuffled else None
        layers, n, steps = [("linear", features, 1, has_bias)], start.size, 5
        whole, buffer, losses = Guarded(start), np.zeros_like(start), np.zeros(3)
        options = (0.002, 0.5, 0.0, 0.0, False, False)
        args = (x, target, whole.array, buffer, layers, [(0, n, *options, True)], 32, seeds, 0, 3 * steps, True, 0.0, losses)
        assert _core.train(*args) == ("finished", 3 * steps)
        whole.check()
        pieces, piece_buffer, piece_losses = start.copy(), np.zeros_like(start), np.zeros(3)
        for epoch in range(3):
            ranges, last = [(0, n, *options, epoch == 0)], (epoch + 1) * steps
            args = (x, target, pieces, piece_buffer, layers, ranges, 32, seeds, epoch * steps, last, True, 0.0, piece_losses)
            assert _core.train(*args) == ("finished", last)
        assert pieces.tobytes() == whole.array.tobytes(), features
        assert piece_buffer.tobytes() == buffer.tobytes(), features
        assert piece_losses.tobytes() == losses.tobytes(), features


@pytest.mark.parametrize("shuffled", [True, False])
def test_extended_rows_are_found_from_any_step_on(isa, dtype, shuffled):
    """A kernel call begins where the one before it ended: within an epoch, and after as many steps as the clock allows."""
    for features in (3, 6, 14, 30, 62):  # the most of one, two or four vectors with the bias, on one ISA or another
        x, target, start, _ = problem(2000, features, dtype, True)
        seeds = np.arange(1, 5, dtype=np.uint64) if shuffled else None
        results = []
        for cuts in ((2, 191), (2, 63, 126, 189, 191)):  # three epochs of 63 steps, which are worth a copy, and less
            parameters, buffer, losses = start.copy(), np.zeros_like(start), np.zeros(4)
            for first, last in itertools.pairwise(cuts):
                ranges = [(0, features + 1, 0.0005, 0.5, 0.0, 0.0, False, False, first == 2)]
                layers = [("linear", features, 1, True)]
                args = (x, target, parameters, buffer, layers, ranges, 32, seeds, first, last, True, 0.0, losses)
                assert _core.train(*args) == ("finished", last)
            results.append([array.tobytes() for array in (parameters, buffer, losses)])
        assert results[0] == results[1], features


def test_it_stops_before_a_step_whose_loss_is_not_finite(isa, dtype):
    x, target, start, _ = problem(40, 10, dtype, True)
    bad = x.copy()
    bad[17, 3] = np.nan
    wanted = start.copy()
    ranges = [(0, 11, *OPTIONS[0])]
    stop, steps, losses = train(x, target, wanted, None, True, ranges, 8, None, steps=2)
    assert (stop, steps) == ("finished", 2)
    got = start.copy()
    stop, steps, bad_losses = train(bad, target, got, None, True, ranges, 8, None)
    assert (stop, steps) == ("non_finite", 2)
    assert got.tobytes() == wanted.tobytes()
    assert bad_losses[0] == losses[0]


def test_a_gradient_of_the_target_that_overflows_is_nobodys(isa):
    """The square of a residual of 1e17 fits float32; its product with a target of 1e23 does not, and is no parameter's gradient."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 10)).astype(np.float32)
    target = (1e23 * (1 + 1e-6 * rng.standard_normal((64, 1)))).astype(np.float32)
    parameters = np.zeros(11, np.float32)
    parameters[10] = 1e23
    stop, _, losses = train(x, target, parameters, None, True, [(0, 11, *OPTIONS[0])], 32, None)
    assert stop == "finished"
    assert np.isfinite(losses).all()
    assert np.isfinite(parameters).all()

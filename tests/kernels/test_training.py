"""Rounds of train(): whole runs against a float64 loop in NumPy, rounds cut anywhere, and each way in which a round may end."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdlib import _core
from tests import oracle
from tests.kernels.guarded import Guarded, poisoned, values

ROWS, FEATURES, OUTPUTS, EPOCHS = 103, 13, 2, 3
LAYERS = [("linear", FEATURES, OUTPUTS, True)]
WEIGHTS, PARAMETERS = OUTPUTS * FEATURES, OUTPUTS * (FEATURES + 1)
PLAIN = {"lr": 0.02, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}


def problem(dtype):
    rng = np.random.default_rng(11)
    x = poisoned(values(rng, (ROWS, FEATURES), dtype), row_gap=4)
    return x, poisoned(values(rng, (ROWS, OUTPUTS), dtype)), values(rng, PARAMETERS, dtype)


def range_tuple(begin, end, first_step=True, **options):
    return (begin, end, *(PLAIN | options).values(), first_step)


def ranges_of(run, mean, batch_size):
    """(begin, end, options). A sum over n elements has an n-fold gradient: the same run needs an n-th of lr."""
    shrink = 1 if mean else OUTPUTS * min(batch_size, ROWS)
    ranges = [(begin, end, PLAIN | options) for begin, end, options in RUNS[run]]
    return [(begin, end, options | {"lr": options["lr"] / shrink}) for begin, end, options in ranges]


@cache  # every ISA asks for it
def numpy_loop(dtype, run, mean, seeds, batch_size):
    """The run in float64: the readable definition."""
    x, target, parameters = map(np.float64, problem(dtype))
    ranges = ranges_of(run, mean, batch_size)
    buffer, losses, first = np.zeros(PARAMETERS), np.zeros(EPOCHS), True
    for epoch in range(EPOCHS):
        order = np.arange(ROWS) if seeds is None else np.array(oracle.shuffle_order(seeds[epoch], ROWS))
        for begin in range(0, ROWS, batch_size):
            rows = order[begin : begin + batch_size]
            weight, bias = parameters[:WEIGHTS].reshape(OUTPUTS, FEATURES), parameters[WEIGHTS:]
            residual = x[rows] @ weight.T + bias - target[rows]
            losses[epoch] += np.sum(residual**2)
            gradient = 2 * np.concatenate([(residual.T @ x[rows]).ravel(), residual.sum(axis=0)])
            if mean:
                gradient /= residual.size
            parameters = parameters.copy()
            for start, end, options in ranges:
                part = slice(start, end)
                momentum = buffer[part] if options["momentum"] else None
                parameters[part], momentum = oracle.sgd_step(parameters[part], gradient[part], momentum, **options, first_step=first)
                if momentum is not None:
                    buffer[part] = momentum
            first = False
    return parameters, buffer, losses


WHOLE = (0, PARAMETERS)
RUNS = {
    "plain": [(*WHOLE, {})],
    "momentum": [(*WHOLE, {"momentum": 0.9, "lr": 0.01})],
    "dampening": [(*WHOLE, {"momentum": 0.5, "dampening": 0.25})],
    "nesterov": [(*WHOLE, {"momentum": 0.9, "nesterov": True, "lr": 0.005, "weight_decay": 0.1})],
    "weight-decay": [(*WHOLE, {"weight_decay": 0.5})],
    "maximize": [(*WHOLE, {"maximize": True, "lr": 0.0005})],
    "decay-of-the-weights-alone": [(0, WEIGHTS, {"weight_decay": 0.3, "momentum": 0.5}), (WEIGHTS, PARAMETERS, {"lr": 0.1})],
    "frozen-bias": [(0, WEIGHTS, {})],
}


@pytest.mark.parametrize("batch_size", [1, 10, 103, 500])
@pytest.mark.parametrize("seeds", [None, (4, 4, 9)], ids=["in-order", "shuffled"])
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("run", RUNS)
def test_run_against_numpy(isa, dtype, run, mean, seeds, batch_size):
    x, target, start = problem(dtype)
    ranges = ranges_of(run, mean, batch_size)
    steps = EPOCHS * -(-ROWS // batch_size)
    parameters, momentum, losses = Guarded(start), Guarded(np.zeros(PARAMETERS, dtype)), np.zeros(EPOCHS)
    uses_momentum = any(options["momentum"] for *_, options in ranges)
    result = _core.train(
        x,
        target,
        parameters.array,
        momentum.array if uses_momentum else None,
        LAYERS,
        [range_tuple(begin, end, **options) for begin, end, options in ranges],
        batch_size,
        None if seeds is None else np.array(seeds, np.uint64),
        0,
        steps,
        mean,
        0.0,
        losses,
    )
    wanted, buffer, wanted_losses = numpy_loop(dtype, run, mean, seeds, batch_size)
    assert result == ("finished", steps)
    parameters.check()
    momentum.check()
    # A step's roundings are worth a few units of the last place of the largest parameter, and these runs do not amplify them (descent
    # contracts; the ascent grows by less than 2): at most they add up over the steps. Momentum sums about 1 / (1 - 0.9) of them.
    unit = np.finfo(dtype).eps / 2
    tolerance = 8 * (8 + steps) * unit
    np.testing.assert_allclose(parameters.array, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))
    np.testing.assert_allclose(losses, wanted_losses, rtol=2 * tolerance)
    if uses_momentum:
        np.testing.assert_allclose(momentum.array, buffer, rtol=0, atol=8 * tolerance * max(1, np.abs(buffer).max()))


@settings(derandomize=True, deadline=None, max_examples=25, database=None)
@given(cuts=st.lists(st.integers(0, 44), max_size=6), shuffled=st.booleans(), threads=st.sampled_from([1, 2, 3, 7]))
def test_rounds_may_be_cut_anywhere(cuts, shuffled, threads):
    """Steps 0 to 44 of 4 epochs in one round, or in several that hand on parameters, momentum and losses: the same bits."""
    dtype, epochs, steps = np.float32, 4, 44
    x, target, start = problem(dtype)
    seeds = np.arange(epochs, dtype=np.uint64) if shuffled else None
    options = {"momentum": 0.9, "nesterov": True}

    def run(borders):
        parameters, momentum, losses = start.copy(), np.full(PARAMETERS, 1e9, dtype), np.zeros(epochs)
        for begin, end in zip([0, *borders], [*borders, steps], strict=True):
            ranges = [range_tuple(*WHOLE, first_step=begin == 0, **options)]
            result = _core.train(x, target, parameters, momentum, LAYERS, ranges, 10, seeds, begin, end, True, 0.0, losses)
            assert result == ("finished", end)
        return parameters.tobytes(), momentum.tobytes(), losses.tobytes()

    whole = run([])
    _core.set_num_threads(threads)
    # A round without steps leaves the buffer unset: its successor would still be the first.
    assert run(sorted(cut for cut in set(cuts) if cut > 0)) == whole


def run_stopping(dtype, x, target, parameters, epochs=5, lr=0.02, loss_limit=0.0, batch_size=10, progress=None):
    losses = np.zeros(epochs)
    steps = epochs * -(-x.shape[0] // batch_size)
    ranges = [(0, parameters.size, lr, 0.0, 0.0, 0.0, False, False, True)]
    result = _core.train(
        x,
        target,
        parameters,
        None,
        [("linear", x.shape[1], target.shape[1], True)],
        ranges,
        batch_size,
        None,
        0,
        steps,
        True,
        loss_limit,
        losses,
        progress,
    )
    return result, losses


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_stops_before_the_update_of_a_bad_step(isa, dtype, bad):
    x, target, start = problem(dtype)
    target = target.copy()
    target[57, 1] = bad  # in the sixth batch of 10
    parameters = start.copy()
    (stop, done), losses = run_stopping(dtype, x, target, parameters)
    assert (stop, done) == ("non_finite", 5)
    clean = start.copy()
    run_stopping(dtype, x[:50], target[:50], clean, epochs=1)
    assert parameters.tobytes() == clean.tobytes()
    assert np.isfinite(losses).all()


def test_stops_at_parameters_that_overflow(isa, dtype):
    """A loss can be finite while the step that it leads to is not; the epoch's end finds it."""
    x, target = np.ones((1, 1), dtype), np.zeros((1, 1), dtype)
    parameters = np.full(2, 1e3, dtype)
    ranges = [(0, 2, float(np.finfo(dtype).max), 0.0, 0.0, 0.0, False, False, True)]
    losses = np.zeros(3)
    stop, done = _core.train(x, target, parameters, None, [("linear", 1, 1, True)], ranges, 1, None, 0, 3, True, 0.0, losses)
    assert (stop, done) == ("non_finite", 1)


def test_stops_above_the_limit(isa, dtype):
    x, target, start = problem(dtype)
    (stop, done), losses = run_stopping(dtype, x, target, start.copy(), lr=1.0, loss_limit=1e4)
    mean = losses / (ROWS * OUTPUTS)
    epochs = done // 11
    assert stop == "above_limit"
    assert mean[epochs - 1] > 1e4
    assert (mean[: epochs - 1] <= 1e4).all()
    assert not mean[epochs:].any()
    (stop, _), _ = run_stopping(dtype, x, target, start.copy(), lr=0.02, loss_limit=1e4)
    assert stop == "finished"


def test_progress_ends_a_run_by_raising():
    x, target, start = problem(np.float32)
    calls = []

    def progress(epochs_done):
        calls.append(epochs_done)
        raise KeyboardInterrupt

    # 10^6 epochs take seconds, and progress is called every 50 ms.
    with pytest.raises(KeyboardInterrupt):
        run_stopping(np.float32, x, target, start, epochs=1_000_000, progress=progress)
    assert len(calls) == 1
    assert 0 < calls[0] < 1_000_000


def test_steps_may_be_shared_tried_and_watched():
    """Short steps of a network are tried on one thread and on several; whatever is chosen, and whatever `progress` computes between two of
    them on the same thread, the bits are those of one thread."""
    rng = np.random.default_rng(12)
    x, target = values(rng, (512, 13), np.float32), values(rng, (512, 1), np.float32)
    layers = [("linear", 13, 64, True), ("tanh", 64, 64, False), ("linear", 64, 64, True), ("relu", 64, 64, False), ("linear", 64, 1, True)]
    start = values(rng, 13 * 64 + 64 + 64 * 64 + 64 + 64 + 1, np.float32) / 16
    rows, weight = values(rng, (2000, 300), np.float32), values(rng, (64, 300), np.float32)
    wanted = _core.linear_forward(rows, weight, None)
    seen = []

    def progress(_):
        seen.append(np.array_equal(_core.linear_forward(rows, weight, None), wanted))

    runs = []
    for threads in (1, 2, 3, 8):
        _core.set_num_threads(threads)
        parameters, losses = start.copy(), np.zeros(3000)  # 0.2 s: several trials, and calls of progress
        ranges = [(0, parameters.size, 1e-3, 0.0, 0.0, 0.0, False, False, True)]
        _core.train(x, target, parameters, None, layers, ranges, 256, None, 0, 6000, True, 0.0, losses, progress)
        runs.append((parameters.tobytes(), losses.tobytes()))
    assert runs[1:] == runs[:1] * 3
    assert seen
    assert all(seen)


def test_long_sums_are_carried_in_double(isa):
    """Whole runs of equal float32 terms: a sum in float32 would be off by 1e-3, or stand still."""
    rows = 1 << 18
    x, target = np.full((rows, 1), 1.0, np.float32), np.full((rows, 1), 0.1, np.float32)
    squared = _core.squared_error(x, target, np.zeros(2, np.float32), [("linear", 1, 1, True)])
    assert squared == pytest.approx(rows * float(np.float32(0.1)) ** 2, rel=1e-6)
    for outputs in (1, 8):
        g = np.full((rows, outputs), 0.1, np.float32)
        weight, bias = np.zeros((outputs, 1), np.float32), np.zeros(outputs, np.float32)
        _core.linear_backward(g, x, np.zeros((outputs, 1), np.float32), weight, bias)
        np.testing.assert_allclose(bias, rows * 0.1, rtol=5e-5)
        np.testing.assert_allclose(weight, rows * 0.1, rtol=2e-4)

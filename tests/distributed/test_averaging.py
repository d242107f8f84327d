"""Shards, local rounds and the average, without processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gdlib
from gdlib.distributed import averaging

sizes = st.integers(1, 2000)


@settings(deadline=None, derandomize=True, database=None)
@given(sizes, st.integers(1, 64))
def test_shards_are_equal_and_hold_every_row(rows, workers):
    if rows < workers:
        with pytest.raises(ValueError, match=f"{rows} rows cannot be shared by {workers} workers"):
            averaging.shards(rows, workers)
        return
    shards = averaging.shards(rows, workers)
    assert len(shards) == workers
    assert {s.stop - s.start for s in shards} == {-(-rows // workers)}
    held = np.zeros(rows, int)
    for shard in shards:
        held[shard] += 1
    assert held.min() == 1
    assert held.max() <= 2
    assert held.sum() - rows < workers  # rows held twice
    if rows % workers == 0:
        assert held.max() == 1


@settings(deadline=None, derandomize=True, database=None)
@given(sizes, st.integers(1, 100))
def test_steps_per_round_reach_the_last_row(rows, batch_size):
    steps = averaging.steps_per_round(rows, batch_size)
    assert (steps - 1) * batch_size < rows <= steps * batch_size


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**64 - 1), sizes)
def test_global_order_is_a_permutation_and_the_seeds_own(seed, rows):
    order = averaging.global_order(seed, rows)
    np.testing.assert_array_equal(np.sort(order), np.arange(rows))
    np.testing.assert_array_equal(order, averaging.global_order(seed, rows))
    assert averaging.global_order(None, rows) is None


def test_global_order_spreads_sorted_rows_over_all_shards():
    order = averaging.global_order(5, 10_000)
    means = [order[shard].mean() for shard in averaging.shards(10_000, 4)]
    np.testing.assert_allclose(means, 4999.5, atol=5 * 10_000 / np.sqrt(12 * 2500))  # 5 standard errors


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([np.float32, np.float64]), st.integers(0, 2**32 - 1))
def test_average_is_the_mean_in_rank_order(workers, size, dtype, seed):
    padded = np.random.default_rng(seed).standard_normal((workers + 1, size + 5)).astype(dtype)
    states = padded[:, :size]  # rows further apart than they are long, as in shared memory
    total = states[1].copy()
    for k in range(2, workers + 1):
        total += states[k]
    assert averaging.average(states[1:], states[0])
    np.testing.assert_array_equal(states[0], total / dtype(workers))
    assert np.shares_memory(states[0], padded)


def test_average_of_equal_states_is_that_state():
    state = np.random.default_rng(0).standard_normal(33)
    mean = np.empty(33)
    for workers in (1, 2):  # sums of more round
        assert averaging.average(np.tile(state, (workers, 1)), mean)
        np.testing.assert_array_equal(mean, state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_average_reports_what_is_not_finite(bad):
    states = np.ones((2, 5))
    states[1, 3] = bad
    assert not averaging.average(states, np.empty(5))


def problem(rows=300, features=7):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((rows, features))
    return x, x @ rng.standard_normal((features, 1)) + 0.1 * rng.standard_normal((rows, 1))


def task_of(model, optimizer, rows, batch_size, mean=True):
    momentum = optimizer.momentum_buffer(model._arena)
    return averaging.Round(
        parameters=model._arena.data.size,
        layers=model.architecture(),
        has_momentum=momentum is not None,
        ranges=optimizer.update_ranges(model._arena),
        batch_size=min(batch_size, rows),
        steps=averaging.steps_per_round(rows, batch_size),
        mean=mean,
    )


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("bias", [False, True])
def test_rounds_of_one_worker_are_fit(momentum, bias):
    x, y = problem()
    model = gdlib.Linear(7, 1, bias, dtype=np.float64, seed=2)
    optimizer = gdlib.SGD(model.parameters(), 0.02, momentum=momentum, dampening=0.1)
    task = task_of(model, optimizer, len(x), 16)
    state = np.zeros(task.state_size)
    state[: task.parameters] = model._arena.data
    seeds = [4, 9, 11]
    losses = [averaging.local_round(task, x, y, state, number, seed)[2] / len(x) for number, seed in enumerate(seeds)]
    history = gdlib.fit(model, x, y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=3, batch_size=16, seed=seeds)
    np.testing.assert_array_equal(state[: task.parameters], model._arena.data)
    assert losses == history.loss
    if momentum:
        np.testing.assert_array_equal(state[task.parameters :], optimizer.momentum_buffer(model._arena))


def test_a_round_is_pure():
    x, y = problem()
    model = gdlib.Linear(7, 1, dtype=np.float64, seed=2)
    task = task_of(model, gdlib.SGD(model.parameters(), 0.02, momentum=0.5), len(x), 10)
    start = np.random.default_rng(1).standard_normal(task.state_size)
    first, again = start.copy(), start.copy()
    answers = [averaging.local_round(task, x, y, state, 2, 7) for state in (first, again)]
    assert answers[0] == answers[1]
    assert answers[0][:2] == ("finished", 30)
    np.testing.assert_array_equal(first, again)
    assert (first != start).all()


def test_a_round_stops_where_the_loss_is_not_finite():
    x, y = problem()
    x[60] = np.nan
    model = gdlib.Linear(7, 1, dtype=np.float64, seed=2)
    task = task_of(model, gdlib.SGD(model.parameters(), 0.02), len(x), 10)
    assert averaging.local_round(task, x, y, np.zeros(task.state_size), 0, None)[:2] == ("non_finite", 6)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5]))
def test_averaging_reaches_the_least_squares_solution(workers, seed, momentum):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((600, 5))
    y = x @ rng.standard_normal((5, 1)) + 1.0 + 0.1 * rng.standard_normal((600, 1))
    model = gdlib.Linear(5, 1, dtype=np.float64, seed=2)
    order = averaging.global_order(seed, 600)
    shards = averaging.shards(600, workers)
    task = task_of(model, gdlib.SGD(model.parameters(), 0.02, momentum=momentum), shards[0].stop, 10)
    states = np.zeros((workers + 1, task.state_size))
    for number in range(30):
        for shard, state in zip(shards, states[1:], strict=True):
            state[:] = states[0]
            assert averaging.local_round(task, x[order[shard]], y[order[shard]], state, number, seed + number)[0] == "finished"
        assert averaging.average(states[1:], states[0])
    design = np.column_stack([x, np.ones(600)])
    least = np.linalg.lstsq(design, y, rcond=None)[0]
    excess = np.mean((design @ (states[0, :6, None] - least)) ** 2)
    # Steps of constant length end in a cloud around the solution: some hundredths of the noise's variance, more with momentum.
    assert excess < 0.03 * 0.1**2

"""Averaging between worker processes: the result, and every way in which a run can end."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

import gdlib
import gdlib.distributed
from gdlib.distributed import averaging, shared_memory


def problem(rows=2001, features=6, outputs=1, dtype=np.float32):
    rng = np.random.default_rng(7)
    X = rng.standard_normal((rows, features)).astype(dtype)
    y = X @ rng.standard_normal((features, outputs)) + 0.1 * rng.standard_normal((rows, outputs))
    return X, y.astype(dtype)


def run(fit, X, y, lr=0.01, momentum=0.5, reduction="mean", bias=True, **options):
    model = gdlib.Linear(X.shape[1], y.shape[1], bias, dtype=X.dtype, seed=1)
    optimizer = gdlib.SGD(model.parameters(), lr, momentum=momentum)
    history = fit(model, X, y, loss=gdlib.MSELoss(reduction), optimizer=optimizer, **{"epochs": 3, "seed": 5, **options})
    return model, optimizer, history


def momentum_of(model, optimizer):
    return optimizer.momentum_buffer(model._arena)


def test_two_workers_nearly_reach_the_loss_of_one_process():
    X, y = problem()
    model, optimizer, history = run(gdlib.distributed.fit, X, y, epochs=6)
    alone, _, reference = run(gdlib.fit, X, y, epochs=6)
    assert len(history.loss) == 6
    assert history.loss[-1] == pytest.approx(reference.loss[-1], rel=0.05)
    np.testing.assert_allclose(model.weight.data, alone.weight.data, atol=0.02)
    assert history.seconds > 0
    assert history.rows_per_second == pytest.approx(2001 * 6 / history.seconds)
    assert history.lr == [0.01]
    summary = {"optimizer": "SGD", "lr": 0.01, "epochs": 6, "batch_size": 32, "rows": 2001, "workers": 2}
    assert model.training_summary.items() >= summary.items()
    assert model.training_summary["final_loss"] == history.loss[-1]
    # Momentum was averaged and handed back: a second run goes on from it.
    assert momentum_of(model, optimizer).any()
    again = gdlib.distributed.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=1, seed=5)
    assert again.loss[0] == pytest.approx(history.loss[-1], rel=0.05)


def test_a_network_is_averaged_as_any_model():
    X, y = problem(outputs=2)

    def train(fit, **options):
        model = gdlib.Sequential(gdlib.Linear(6, 8, seed=1), gdlib.Tanh(), gdlib.Linear(8, 2, seed=2))
        optimizer = gdlib.SGD(model.parameters(), 0.05, momentum=0.5)
        history = fit(model, X, y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=6, seed=5, **options)
        return model, optimizer, history

    model, optimizer, history = train(gdlib.distributed.fit)
    twin, _, twin_history = train(gdlib.distributed.fit)
    assert model._arena.data.tobytes() == twin._arena.data.tobytes()
    assert history.loss == twin_history.loss
    assert momentum_of(model, optimizer).any()
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert model.training_summary["workers"] == 2
    # One worker makes the steps of one process, on the rows in the order of the first seed.
    order = averaging.global_order(5, len(X))
    alone, _, reference = train(gdlib.distributed.fit, workers=1)
    X, y = X[order], y[order]
    same, _, same_history = train(gdlib.fit)
    assert alone._arena.data.tobytes() == same._arena.data.tobytes()
    assert reference.loss == same_history.loss


def test_same_seed_and_workers_give_the_same_bits_and_those_of_the_maths():
    X, y = problem(rows=2002, outputs=2)  # shards of 668 share two rows
    model, optimizer, history = run(gdlib.distributed.fit, X, y, workers=3, seed=[8, 2, 6])
    twin, twin_optimizer, twin_history = run(gdlib.distributed.fit, X, y, workers=3, seed=[8, 2, 6])
    np.testing.assert_array_equal(model._arena.data, twin._arena.data)
    np.testing.assert_array_equal(momentum_of(model, optimizer), momentum_of(twin, twin_optimizer))
    assert history.loss == twin_history.loss

    start = gdlib.Linear(6, 2, seed=1)
    order, shards = averaging.global_order(8, 2002), averaging.shards(2002, 3)
    ranges = gdlib.SGD(start.parameters(), 0.01, momentum=0.5).update_ranges(start._arena)
    task = averaging.Round(14, start.architecture(), True, ranges, 32, averaging.steps_per_round(668, 32), True)
    states = np.zeros((4, task.state_size), np.float32)
    states[0, :14] = start._arena.data
    for number, seed in enumerate([8, 2, 6]):
        losses = []
        for shard, state in zip(shards, states[1:], strict=True):
            state[:] = states[0]
            losses.append(averaging.local_round(task, X[order[shard]], y[order[shard]], state, number, seed)[2])
        assert averaging.average(states[1:], states[0])
        assert sum(losses) / (3 * 668 * 2) == pytest.approx(history.loss[number], rel=1e-12)
    np.testing.assert_array_equal(states[0, :14], model._arena.data)
    np.testing.assert_array_equal(states[0, 14:], momentum_of(model, optimizer))


@pytest.mark.parametrize(
    ("shuffle", "reduction", "bias", "momentum"), [(True, "mean", True, 0.5), (False, "sum", False, 0.0)], ids=["shuffled", "in order"]
)
def test_one_worker_gives_the_bits_of_fit_on_the_shuffled_rows(shuffle, reduction, bias, momentum):
    X, y = problem(rows=500, dtype=np.float64)
    options = {"shuffle": shuffle, "reduction": reduction, "bias": bias, "momentum": momentum, "lr": 0.001, "batch_size": 20}
    model, optimizer, history = run(gdlib.distributed.fit, X, y, workers=1, **options)
    order = averaging.global_order(5, 500) if shuffle else np.arange(500)
    alone, alone_optimizer, reference = run(gdlib.fit, X[order], y[order], **options)
    np.testing.assert_array_equal(model._arena.data, alone._arena.data)
    assert history.loss == reference.loss
    if momentum:
        np.testing.assert_array_equal(momentum_of(model, optimizer), momentum_of(alone, alone_optimizer))


def test_rows_are_copied_in_pieces_and_from_any_layout(monkeypatch):
    X, y = problem(rows=301)
    model, _, _ = run(gdlib.distributed.fit, X, y)
    monkeypatch.setattr(shared_memory, "_COPY_BYTES", 500)
    wide = np.full((301, 9), np.nan, np.float32)
    wide[:, 2:8] = X
    other, _, _ = run(gdlib.distributed.fit, wide[:, 2:8], np.asfortranarray(y))
    np.testing.assert_array_equal(model._arena.data, other._arena.data)


def test_progress_counts_epochs(capsys):
    X, y = problem(rows=64)
    run(gdlib.distributed.fit, X, y, progress=True)
    error = capsys.readouterr().err
    assert "3/3" in error
    assert "loss=" in error


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": 0}, ValueError, "workers is 0; it must be at least 1"),
        ({"workers": "2"}, TypeError, "workers is '2'; a whole number"),
        ({"workers": 11}, ValueError, "10 rows cannot be shared by 11 workers"),
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"seed": [1, 2]}, ValueError, "one for each of 3 epochs"),
        ({"reduction": "none"}, ValueError, "no single number to descend"),
    ],
)
def test_wrong_arguments_are_refused_before_a_process_starts(options, error, message, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", None)
    X, y = problem(rows=10)
    with pytest.raises(error, match=message):
        run(gdlib.distributed.fit, X, y, **options)


def test_gd_is_refused():
    X, y = problem(rows=10)
    model = gdlib.Linear(6, 1)
    with pytest.raises(ValueError, match=r"GD takes all rows at each step.*use gdlib\.fit"):
        gdlib.distributed.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=gdlib.GD(model.parameters(), lr="auto"), epochs=1)


@pytest.mark.parametrize("which", ["X", "y"])
def test_nan_is_an_error_that_names_the_callers_row(which):
    X, y = problem(rows=100)
    (X if which == "X" else y)[41, 0] = np.nan
    model = gdlib.Linear(6, 1, seed=1)
    start = model._arena.data.copy()
    optimizer = gdlib.SGD(model.parameters(), 0.01, momentum=0.5)
    with pytest.raises(ValueError, match=f"{which} holds 1 value that is NaN or infinite.*row 41"):
        gdlib.distributed.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=2)
    np.testing.assert_array_equal(model._arena.data, start)
    assert optimizer.state_dict()["state"] == {}
    assert model.training_summary is None


def test_a_full_disk_is_an_error(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"48024 bytes of X do not fit in .*temporary; free some, or set TMPDIR"):
        run(gdlib.distributed.fit, *problem())


def test_divergence_names_round_and_worker_and_keeps_the_last_average():
    X, y = problem()
    model = gdlib.Linear(6, 1, seed=1)
    start = model._arena.data.copy()
    optimizer = gdlib.SGD(model.parameters(), lr=100.0)
    with pytest.raises(
        gdlib.DivergenceError, match=r"in round 1 the loss of worker 0 is no longer finite.*about .* largest stable lr"
    ) as caught:
        gdlib.distributed.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=3, seed=0)
    assert caught.value.epoch == 1
    assert 1 < caught.value.step < 32
    assert caught.value.lr == 100.0
    np.testing.assert_array_equal(model._arena.data, start)


def test_divergence_of_one_worker_in_a_later_round(monkeypatch):
    X, y = problem()
    after_two, _, _ = run(gdlib.distributed.fit, X, y, epochs=2)
    send = shared_memory._Workers.send

    def spoil(pool, command):
        if isinstance(command, tuple) and command[0] == 2:
            pool.job.states()[0] *= np.float32(1e38)
        send(pool, command)

    monkeypatch.setattr(shared_memory._Workers, "send", spoil)
    model = gdlib.Linear(6, 1, seed=1)
    optimizer = gdlib.SGD(model.parameters(), 0.01, momentum=0.5)
    with pytest.raises(gdlib.DivergenceError, match="in round 3 the loss of worker"):
        gdlib.distributed.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=3, seed=5)
    np.testing.assert_array_equal(model._arena.data, after_two._arena.data)


def test_an_exploding_loss_is_divergence():
    X, y = problem(rows=64)
    with pytest.raises(gdlib.DivergenceError, match=r"the loss has grown to"):
        run(gdlib.distributed.fit, X, y, lr=4.0, momentum=0.0, epochs=50)


def test_an_exception_in_a_round_arrives_with_rank_round_and_traceback(monkeypatch):
    monkeypatch.setattr(averaging, "steps_per_round", lambda rows, batch_size: 10**6)
    with pytest.raises(RuntimeError, match=r"(?s)worker [01] failed in round 1:.*local_round.*ValueError: the steps do not lie inside"):
        run(gdlib.distributed.fit, *problem(rows=64))


def test_an_exception_at_the_start_arrives_too(monkeypatch):
    monkeypatch.setattr(shared_memory, "_write_rows", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"(?s)worker [01] failed at its start:.*map_rows.*FileNotFoundError"):
        run(gdlib.distributed.fit, *problem(rows=64))


def test_a_killed_worker_is_an_error_and_the_last_average_is_kept(monkeypatch):
    X, y = problem()
    after_two, twin_optimizer, _ = run(gdlib.distributed.fit, X, y, epochs=2)
    average, rounds = averaging.average, []

    def kill_one(states, mean):
        rounds.append(average(states, mean))
        if len(rounds) == 2:
            (victim,) = (child for child in multiprocessing.active_children() if child.name == "gdlib-worker-1")
            os.kill(victim.pid, signal.SIGKILL)
        return rounds[-1]

    monkeypatch.setattr(averaging, "average", kill_one)
    model = gdlib.Linear(6, 1, seed=1)
    optimizer = gdlib.SGD(model.parameters(), 0.01, momentum=0.5)
    with pytest.raises(RuntimeError, match=r"worker 1 ended in round 3 with exit code -9"):
        gdlib.distributed.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=1000, seed=5)
    np.testing.assert_array_equal(model._arena.data, after_two._arena.data)
    np.testing.assert_array_equal(momentum_of(model, optimizer), momentum_of(after_two, twin_optimizer))


def test_workers_leave_ctrl_c_to_the_parent(monkeypatch):
    X, y = problem()
    undisturbed, _, _ = run(gdlib.distributed.fit, X, y)
    average = averaging.average

    def interrupt_all(states, mean):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
        return average(states, mean)

    monkeypatch.setattr(averaging, "average", interrupt_all)
    model, _, _ = run(gdlib.distributed.fit, X, y)
    np.testing.assert_array_equal(model._arena.data, undisturbed._arena.data)

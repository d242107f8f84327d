"""fit: the same run as the readable loop, repeatable bit by bit, interruptible, and loud when something is wrong."""

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import gdlib
from gdlib import GD, SGD, DataLoader, Linear, MSELoss, fit
from gdlib.training import auto_lr
from tests.lines import problem, run


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}])
@pytest.mark.parametrize("outputs", [1, 3, 9])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_readable_loop_and_fit_agree(dtype, rtol, options, outputs, reduction):
    X, y = problem(outputs=outputs, dtype=dtype)
    lr = 0.01 if reduction == "mean" else 0.0003
    loop, native = Linear(10, outputs, dtype=dtype, seed=0), Linear(10, outputs, dtype=dtype, seed=0)
    criterion = MSELoss(reduction)
    optimizer = SGD(loop.parameters(), lr=lr, **options)
    losses = []
    for _ in range(100):
        total = 0.0
        for x, t in DataLoader(X, y, batch_size=32, shuffle=True, seed=0):
            optimizer.zero_grad()
            loss = criterion(loop(x), t)
            total += loss * (len(x) / len(X) if reduction == "mean" else 1)
            loop.backward(criterion.backward())
            optimizer.step()
        losses.append(total)
    history = fit(native, X, y, loss=criterion, optimizer=SGD(native.parameters(), lr=lr, **options), epochs=100, batch_size=32, seed=0)
    np.testing.assert_allclose(native.weight.data, loop.weight.data, rtol=rtol, atol=rtol * np.abs(loop.weight.data).max())
    np.testing.assert_allclose(native.bias.data, loop.bias.data, rtol=rtol)
    np.testing.assert_allclose(history.loss, losses, rtol=max(rtol, 1e-11))
    assert not native.weight.grad.any()  # fit keeps its gradients to itself


def test_a_seed_for_each_epoch_is_a_loader_for_each_epoch():
    X, y = problem(rows=100)
    loop, native = Linear(10, 1, dtype=np.float64, seed=0), Linear(10, 1, dtype=np.float64, seed=0)
    criterion, optimizer = MSELoss(), SGD(loop.parameters(), lr=0.01)
    for epoch in range(4):
        for x, t in DataLoader(X, y, batch_size=7, shuffle=True, seed=epoch):
            optimizer.zero_grad()
            criterion(loop(x), t)
            loop.backward(criterion.backward())
            optimizer.step()
    fit(native, X, y, loss=criterion, optimizer=SGD(native.parameters(), lr=0.01), epochs=4, batch_size=7, seed=range(4))
    np.testing.assert_allclose(native.weight.data, loop.weight.data, rtol=1e-12)
    other, _ = run(X, y, epochs=4, batch_size=7, seed=0)
    assert not np.allclose(other.weight.data, native.weight.data, rtol=1e-9)
    with pytest.raises(ValueError, match="seed holds 3 numbers"):
        run(X, y, epochs=4, seed=[1, 2, 3])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "features", "outputs", "batch"), [(20000, 50, 1, 8192), (9000, 100, 3, 9000), (1000, 7, 2, 32)])
def test_the_same_bits_for_every_thread_count_and_run(threads, dtype, rows, features, outputs, batch):
    X, y = problem(rows, features, outputs, dtype)
    model, history = run(X, y, epochs=3, dtype=dtype, batch_size=batch, seed=1)
    gdlib.set_num_threads(1)
    again, history_again = run(X, y, epochs=3, dtype=dtype, batch_size=batch, seed=1)
    np.testing.assert_array_equal(model._arena.data, again._arena.data)
    assert history.loss == history_again.loss


def test_without_a_seed_every_run_is_different():
    X, y = problem()
    assert not np.array_equal(run(X, y)[0].weight.data, run(X, y)[0].weight.data)


def test_gd_is_one_full_step_for_each_epoch():
    X, y = problem(rows=5000, outputs=2)
    model, history = run(X, y, epochs=3, lr=0.1, optimizer=GD)
    theta, bias = (parameter.data.copy() for parameter in Linear(10, 2, dtype=np.float64, seed=0).parameters())
    for epoch in range(3):
        residual = X @ theta.T + bias - y
        assert history.loss[epoch] == pytest.approx((residual**2).mean(), rel=1e-12)
        theta -= 0.1 * 2 / residual.size * residual.T @ X
        bias -= 0.1 * 2 / residual.size * residual.sum(axis=0)
    np.testing.assert_allclose(model.weight.data, theta, rtol=1e-11)
    np.testing.assert_allclose(model.bias.data, bias, rtol=1e-11)
    with pytest.raises(ValueError, match="GD takes all 5000 rows"):
        run(X, y, optimizer=GD, batch_size=32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_auto_lr_is_one_over_the_largest_eigenvalue(bias, reduction):
    X, y = problem(rows=300, features=6, outputs=2)
    X = X * [1, 2, 3, 0.1, 5, 1] + 1
    wide = np.hstack([X, np.ones((300, 1))]) if bias else X
    hessian = 2 * wide.T @ wide / (600 if reduction == "mean" else 1)
    model = Linear(6, 2, bias, dtype=np.float64, seed=0)
    optimizer = GD(model.parameters(), lr="auto")
    history = fit(model, X, y, loss=MSELoss(reduction), optimizer=optimizer, epochs=300)
    assert history.lr[0] == pytest.approx(1 / np.linalg.eigvalsh(hessian)[-1], rel=2e-3)
    assert history.lr[0] == optimizer.param_groups[0]["lr"] == auto_lr(Linear(6, 2, bias, dtype=np.float64), X, MSELoss(reduction))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(history.loss, history.loss[1:], strict=False))


def test_auto_lr_refuses_what_has_no_curvature():
    with pytest.raises(ValueError, match="only zeros"):
        auto_lr(Linear(2, 1, bias=False), np.zeros((3, 2)), MSELoss())
    with pytest.raises(ValueError, match="squares do not fit"):
        auto_lr(Linear(2, 1), np.full((3, 2), 1e30, np.float32), MSELoss())


def test_memory_maps_and_views_are_trained_on_where_they_lie(tmp_path):
    X, y = problem(rows=64)
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    wide = np.zeros((128, 15))
    wide[::2, 2:12] = X
    wanted = run(X, y, seed=3)[0].weight.data
    for view in (mapped, wide[::2, 2:12], X.astype(">f8"), X.tolist(), np.asfortranarray(X)):
        model = Linear(10, 1, dtype=np.float64, seed=0)
        fit(model, view, y[:, 0], loss=MSELoss(), optimizer=SGD(model.parameters(), lr=0.01), epochs=5, seed=3)
        np.testing.assert_array_equal(model.weight.data, wanted)


def test_history():
    X, y = problem()
    model, history = run(X, y, epochs=7, seed=0)
    assert len(history.loss) == 7
    assert history.seconds > 0
    assert history.rows_per_second == pytest.approx(7 * 500 / history.seconds)
    assert model.training_summary["epochs"] == 7
    assert model.training_summary["final_loss"] == history.loss[-1]


def test_history_draws_its_curve(tmp_path):
    pytest.importorskip("matplotlib")
    history = run(*problem(), epochs=30, seed=0)[1]
    axes = history.plot(tmp_path / "curve.svg")
    np.testing.assert_allclose(axes.lines[0].get_ydata(), history.loss)
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_progress_reaches_the_last_epoch(capsys):
    history = run(*problem(), epochs=20, seed=0, progress=True)[1]
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert f"{history.loss[-1]:.4g}" in shown


BAD_CALLS = [
    ({"X": np.ones((4, 3))}, ValueError, r"X has shape \(4, 3\)"),
    ({"X": np.ones(4)}, ValueError, r"One row is X\[None, :\]"),
    ({"X": np.ones((0, 2)), "y": np.ones(0)}, ValueError, "no rows to learn from"),
    ({"y": np.ones(3)}, ValueError, r"y has shape \(3,\); \[4, 1\] or \[4\]"),
    ({"y": np.ones((4, 2))}, ValueError, "y has shape"),
    ({"y": ["a", "b", "c", "d"]}, TypeError, "y holds text"),
    ({"X": np.array([[1, 2]] * 3 + [[1, np.nan]])}, ValueError, "X holds 1 value that is NaN or infinite.*row 3, column 1"),
    ({"X": np.array([[1, 2]] * 3 + [[np.inf, 0]])}, ValueError, "row 3, column 0"),
    ({"y": np.array([1, -np.inf, np.nan, 1])}, ValueError, "y holds 2 values that are NaN or infinite.*-inf.*row 1"),
    ({"X": np.array([[1e200, 1]] * 4)}, ValueError, "too large for float32"),
    ({"epochs": 0}, ValueError, "epochs is 0"),
    ({"epochs": 1.5}, TypeError, "epochs is 1.5"),
    ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ({"batch_size": -1}, ValueError, "batch_size is -1"),
    ({"batch_size": True}, TypeError, "batch_size is True"),
    ({"seed": -1}, ValueError, "seed is -1"),
    ({"seed": "x"}, TypeError, "seed is 'x'"),
    ({"loss": MSELoss("none")}, ValueError, "reduction 'none'"),
    ({"loss": "mse"}, TypeError, "the loss is a str"),
    ({"optimizer": 0.1}, TypeError, "the optimizer is a float"),
    ({"model": None}, TypeError, "the model is a NoneType"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD_CALLS, ids=[words for _, _, words in BAD_CALLS])
def test_bad_input_leaves_the_parameters_untouched(change, error, words):
    model = Linear(2, 1, seed=0)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = model.state_dict()
    call = {"model": model, "X": np.ones((4, 2)), "y": np.ones(4), "loss": MSELoss(), "optimizer": optimizer, "epochs": 3, "batch_size": 2}
    call |= change
    with pytest.raises(error, match=words):
        fit(call.pop("model"), call.pop("X"), call.pop("y"), **call)
    for name, values in model.state_dict().items():
        np.testing.assert_array_equal(values, before[name])
    assert not any(state["momentum_buffer"].any() for state in optimizer.state_dict()["state"].values())


INTERRUPTED = """
import sys, numpy as np, gdlib
X = np.random.default_rng(0).standard_normal((200_000, 50), dtype=np.float32)
model = gdlib.Linear(50, 1, seed=0)
optimizer = getattr(gdlib, sys.argv[1])(model.parameters(), lr=1e-4)
print("ready", flush=True)
try:
    gdlib.fit(model, X, X[:, 0], loss=gdlib.MSELoss(), optimizer=optimizer, epochs=10**7, progress=sys.argv[2] == "bar")
except KeyboardInterrupt:
    print("interrupted", np.isfinite(model.weight.data).all(), flush=True)
"""


@pytest.mark.parametrize("optimizer", ["SGD", "GD"])
@pytest.mark.parametrize("bar", ["bar", "none"])
def test_ctrl_c_ends_a_run_that_would_take_days(optimizer, bar):
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, optimizer, bar], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with child:
        assert child.stdout.readline() == "ready\n"
        threading.Event().wait(0.5)  # well inside the native call
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=30)
    assert out == "interrupted True\n"
    assert child.returncode == 0


def test_fit_runs_beside_other_python_threads():
    """The GIL is released: two runs in threads give what they give alone."""
    X, y = problem(rows=5000)
    alone = run(X, y, epochs=50, seed=0)[0].weight.data
    results = []
    workers = [threading.Thread(target=lambda: results.append(run(X, y, epochs=50, seed=0)[0].weight.data)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3
    for weight in results:
        np.testing.assert_array_equal(weight, alone)


def test_a_first_gradient_of_zero_counts_as_a_first_step():
    model = Linear(1, 1, bias=False, dtype=np.float64, seed=0)
    model.weight.data[:] = 0
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    x = np.ones((1, 1))
    for target in (0.0, 1.0):
        fit(model, x, [target], loss=MSELoss(), optimizer=optimizer, epochs=1, shuffle=False)
    assert model.weight.data[0, 0] == pytest.approx(0.1 * 0.5 * 2)


def test_momentum_is_handed_back_when_a_run_is_interrupted(monkeypatch):
    X, y = problem(rows=2000)
    model = Linear(10, 1, dtype=np.float64, seed=0)
    optimizer = SGD(model.parameters(), lr=1e-6, momentum=0.9)

    class Bar:
        n = 0

        def update(self, epochs):
            raise KeyboardInterrupt

        def set_postfix(self, **_):
            pass

        def close(self):
            pass

    monkeypatch.setattr("gdlib.training.progress_bar", lambda run: Bar())
    with pytest.raises(KeyboardInterrupt):
        fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=10**6, seed=0, progress=True)
    buffer, started = optimizer.momentum_state()[0]
    assert started
    assert buffer.any()


def test_the_bar_counts_finished_epochs(monkeypatch):
    X, y = problem(rows=20000)
    seen = []

    class Bar:
        n = 0

        def update(self, epochs):
            self.n += epochs
            seen.append(self.n)

        def set_postfix(self, loss, refresh):
            seen.append(float(loss))

        def close(self):
            pass

    monkeypatch.setattr("gdlib.training.progress_bar", lambda run: Bar())
    history = run(X, y, epochs=500, lr=1e-4, batch_size=1, seed=0, progress=True)[1]
    assert len(seen) > 3
    for loss, epoch in zip(seen[::2], seen[1::2], strict=True):
        assert loss == pytest.approx(history.loss[epoch - 1], rel=1e-3)
    assert seen[-1] == 500


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"epochs": np.array([3])}, TypeError, "epochs is"),
        ({"epochs": 10**25}, ValueError, "at most"),
        ({"seed": np.array(-3)}, ValueError, "seed is -3"),
        ({"seed": b"x"}, TypeError, "seed is b'x'"),
    ],
    ids=str,
)
def test_odd_numbers_are_named(change, error, words):
    model = Linear(2, 1, seed=0)
    options = {"loss": MSELoss(), "optimizer": SGD(model.parameters(), lr=0.1), "epochs": 1} | change
    with pytest.raises(error, match=words):
        fit(model, np.ones((4, 2)), np.ones(4), **options)


ENDLESS_PASS = """
import numpy as np, gdlib
from gdlib.training import auto_lr
x = np.broadcast_to(np.float32(1), (10**10, 1))  # one number in memory, minutes of work
print("ready", flush=True)
try:
    auto_lr(gdlib.Linear(1, 1), x, gdlib.MSELoss())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_a_single_pass():
    child = subprocess.Popen([sys.executable, "-c", ENDLESS_PASS], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout.readline() == "ready\n"
        threading.Event().wait(0.5)
        child.send_signal(signal.SIGINT)
        try:
            out, _ = child.communicate(timeout=15)
        finally:
            child.kill()
    assert out == "interrupted\n"

"""fit when the loss explodes or is no longer finite: found at the right step, told with advice, and no false alarm."""

import numpy as np
import pytest

from gdlib import GD, SGD, DivergenceError, Linear, MSELoss, fit
from gdlib.datasets import load_diabetes
from gdlib.preprocessing import StandardScaler
from tests.lines import problem, run


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("optimizer", [SGD, GD])
@pytest.mark.parametrize("lr", [3.0, 1e3, 1e30])
def test_divergence_is_an_error_and_finite_parameters_remain(dtype, optimizer, lr):
    X, y = problem(dtype=dtype)
    model = Linear(10, 1, dtype=dtype, seed=0)
    with pytest.raises(DivergenceError, match=r"training diverged: .* in epoch \d+, step \d+, with lr .*largest stable lr") as caught:
        fit(model, X, y, loss=MSELoss(), optimizer=optimizer(model.parameters(), lr=lr), epochs=2000, seed=0)
    assert np.isfinite(model._arena.data).all()
    assert caught.value.lr == lr
    steps_per_epoch = 1 if optimizer is GD else 16
    assert (caught.value.step - 1) // steps_per_epoch + 1 == caught.value.epoch
    run(X, y, dtype=dtype, optimizer=optimizer, lr=0.8 * caught.value.stable_lr, epochs=200, seed=0)


def test_an_explosion_below_the_end_of_the_numbers_is_found_too():
    X, y = problem()
    for target in (y, 0 * y):
        with pytest.raises(DivergenceError, match="the loss has grown to"):
            run(X, target, optimizer=GD, lr=1.0, epochs=40)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_largest_stable_lr_of_gd_is_the_border(momentum):
    X, y = problem()

    def attempt(lr):
        model = Linear(10, 1, dtype=np.float64, seed=0)
        options = {"lr": lr, "momentum": momentum}
        return fit(model, X, y, loss=MSELoss(), optimizer=SGD(model.parameters(), **options), epochs=3000, batch_size=500, shuffle=False)

    with pytest.raises(DivergenceError) as caught:
        attempt(50.0)
    border = caught.value.stable_lr
    assert attempt(0.98 * border).loss[-1] < 0.02
    with pytest.raises(DivergenceError):
        attempt(1.02 * border)


def test_the_last_finite_parameters_are_those_before_the_failing_step():
    X, y = problem(dtype=np.float32)
    options = {"loss": MSELoss(), "batch_size": 32, "shuffle": False}
    failed, replayed = Linear(10, 1, seed=0), Linear(10, 1, seed=0)
    optimizer = SGD(failed.parameters(), lr=1e25)  # the second update leaves float32 at once
    with pytest.raises(DivergenceError) as caught:
        fit(failed, X, y, optimizer=optimizer, epochs=3, **options)
    assert caught.value.epoch == 1
    good = caught.value.step - 1
    assert 0 < good < 5
    with pytest.raises(DivergenceError, match="the last update"):  # which no loss of a shorter run would see
        fit(replayed, X[: 32 * good], y[: 32 * good], optimizer=SGD(replayed.parameters(), lr=1e25), epochs=1, **options)
    np.testing.assert_array_equal(failed._arena.data, replayed._arena.data)


def test_raw_diabetes_data_raises_where_the_peers_return_nonsense():
    data = load_diabetes()
    with pytest.raises(DivergenceError) as caught:
        run(data.X, data.y, lr=0.01, epochs=100, seed=0)
    assert 1e-7 < caught.value.stable_lr < 1e-4
    X = StandardScaler().fit(data.X).transform(data.X)
    history = run(X, data.y, lr=0.01, epochs=100, seed=0)[1]
    assert history.loss[-1] == pytest.approx(2890, rel=0.02)


def test_no_false_alarm_where_the_loss_is_large_or_jumps():
    rng = np.random.default_rng(0)
    X, y = problem()
    run(X, y * 0, lr=0.01, epochs=50, seed=0)  # targets of zero
    run(X, y + 1e6, lr=0.01, epochs=50, seed=0)  # far from the start
    run(X, 1e-12 * y, lr=0.01, epochs=50, seed=0)
    heavy = X * np.exp(3 * rng.standard_normal((500, 1)))  # rows of very different sizes
    run(heavy, (heavy @ rng.standard_normal(10))[:, None], lr=1e-8, epochs=20, seed=0)
    late = np.vstack([np.full((490, 10), 1e-3), np.full((10, 10), 10.0)])  # the first batch is tiny, the last one is not
    run(late, late.sum(axis=1), lr=1e-4, epochs=20, shuffle=False)
    exact = Linear(10, 1, dtype=np.float64, seed=0)  # a start without any error
    fit(exact, X, exact.predict(X), loss=MSELoss(), optimizer=SGD(exact.parameters(), lr=0.01), epochs=5, seed=0)


def test_nan_in_a_model_is_the_models_fault():
    X, y = problem()
    model = Linear(10, 1, dtype=np.float64, seed=0)
    model.weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match="parameters hold NaN"):
        fit(model, X, y, loss=MSELoss(), optimizer=SGD(model.parameters(), lr=0.01), epochs=1)


def stable_lr_of(X, y, outputs=1, **options):
    model = Linear(X.shape[1], outputs, dtype=np.float64, seed=0)
    batch_size = options.pop("batch_size", len(X))
    with pytest.raises(DivergenceError) as caught:
        fit(model, X, y, loss=MSELoss(), optimizer=SGD(model.parameters(), **options), epochs=3000, batch_size=batch_size, shuffle=False)
    return caught.value.stable_lr


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 3.0},
        {"weight_decay": 2.0, "momentum": 0.5},
        {"momentum": 0.8, "dampening": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("outputs", [1, 4])
def test_the_border_of_stability_knows_every_option(options, outputs):
    X, y = problem(outputs=outputs)

    def attempt(lr):
        model = Linear(10, outputs, dtype=np.float64, seed=0)
        optimizer = SGD(model.parameters(), lr=lr, **options)
        return fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=3000, batch_size=500, shuffle=False)

    border = stable_lr_of(X, y, outputs, lr=500.0, **options)
    attempt(0.98 * border)
    with pytest.raises(DivergenceError):
        attempt(1.03 * border)


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_the_stable_lr_of_batches_follows_its_formula(batch_size):
    X, y = problem()
    wide = np.hstack([X, np.ones((500, 1))])
    squares = np.square(wide).sum(axis=1)
    curvature = np.linalg.eigvalsh(2 * wide.T @ wide / 500)[-1]
    wanted = 2 / (curvature * (1 - 1 / batch_size) + 2 * np.mean(squares**2) / np.mean(squares) / batch_size + 0.5)
    assert stable_lr_of(X, y, lr=100.0, batch_size=batch_size, weight_decay=0.5) == pytest.approx(wanted, rel=1e-3)


def test_advice_that_would_not_help_is_not_given():
    X, y = problem(dtype=np.float32)
    with pytest.raises(DivergenceError, match="standardise X and y") as caught:
        run(X, y * np.float32(1e20), dtype=np.float32, lr=0.01)
    assert caught.value.step == 1
    model = Linear(10, 1, dtype=np.float64, seed=0)
    with pytest.raises(DivergenceError, match="leave maximize out"):
        fit(model, X, y, loss=MSELoss(), optimizer=SGD(model.parameters(), lr=1.0, maximize=True), epochs=2000)


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_no_false_alarm_on_the_way_of_a_heavy_ball(momentum):
    """At the border of stability momentum overshoots a thousandfold and still converges."""
    X = np.ones((50, 1))
    y = 2 * X
    lr = (1 + np.sqrt(momentum)) ** 2 / 2.0  # of the Hessian's one eigenvalue, 2
    model = Linear(1, 1, bias=False, dtype=np.float64, seed=0)
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum)
    history = fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=8000, batch_size=50, shuffle=False)
    assert max(history.loss) > 100 * history.loss[0]
    assert history.loss[-1] < 1e-10


def test_the_last_update_is_looked_at_too():
    X, y = problem()
    for optimizer, lr in [(GD, 1e20), (GD, 1e4), (SGD, 1e6)]:
        with pytest.raises(DivergenceError, match="the last update took the loss to") as caught:
            run(X, y, optimizer=optimizer, lr=lr, epochs=1, **({} if optimizer is GD else {"batch_size": 500}))
        assert caught.value.step == 1


@pytest.mark.parametrize(
    ("target", "lr", "momentum"), [(1.0, 1e160, 1.0), (2e153, 10.0, 0.0), (0.0, 1e160, 1.0)], ids=["momentum-1", "huge-y", "constant-y"]
)
def test_the_last_update_is_looked_at_where_no_loss_counts_as_exploded(target, lr, momentum):
    """The limit of the loss is infinite with a momentum of 1, and where 100 times the spread of y is."""
    X = np.array([[1.0], [-1.0]] * 4)
    model = Linear(1, 1, bias=False, dtype=np.float64, seed=0)
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum)
    with pytest.raises(DivergenceError, match="the last update took the loss to inf"):
        fit(model, X, X * target, loss=MSELoss(), optimizer=optimizer, epochs=1, batch_size=8)
    assert np.isfinite(model.weight.data).all()


@pytest.mark.parametrize("quiet", [lambda rows: rows % 16 == 0, lambda rows: rows % 10 != 3], ids=["every-16th", "9-of-10"])
def test_the_last_update_is_looked_at_in_many_rows(quiet):
    """Rows of zeros do not show what the weights have become."""
    X = np.ones((256, 3))
    X[quiet(np.arange(256))] = 0
    model = Linear(3, 1, bias=False, dtype=np.float64, seed=0)
    with pytest.raises(DivergenceError, match="the last update took the loss to"):
        fit(model, X, X[:, :1] * 2 + 1, loss=MSELoss(), optimizer=GD(model.parameters(), lr=1e4), epochs=1)


def test_a_large_mean_does_not_hide_an_explosion():
    X, y = problem()
    model = Linear(10, 1, dtype=np.float64, seed=0)
    model.bias.data[:] = 1000
    with pytest.raises(DivergenceError):
        fit(model, X, y + 1000, loss=MSELoss(), optimizer=GD(model.parameters(), lr=1.0), epochs=30)


def test_a_failed_fit_leaves_momentum_as_it_was():
    X, y = problem(rows=64)
    bad = X.copy()
    bad[3, 3] = np.nan
    options = {"lr": 0.01, "momentum": 0.9, "dampening": 0.5}
    clean, failed = Linear(10, 1, dtype=np.float64, seed=0), Linear(10, 1, dtype=np.float64, seed=0)
    first, second = SGD(clean.parameters(), **options), SGD(failed.parameters(), **options)
    for _ in range(2):  # from a fresh optimizer, and from one that has momentum
        with pytest.raises(ValueError, match="row 3, column 3"):
            fit(failed, bad, y, loss=MSELoss(), optimizer=second, epochs=2, seed=0)
        for model, optimizer in ((clean, first), (failed, second)):
            fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=2, seed=0)
        np.testing.assert_array_equal(failed.weight.data, clean.weight.data)


def test_replayed_momentum_is_that_of_the_step_before():
    X, y = problem(dtype=np.float32)
    model, other = Linear(10, 1, seed=0), Linear(10, 1, seed=0)
    options = {"lr": 1e-3, "momentum": 0.9}
    optimizer, witness = SGD(model.parameters(), **options), SGD(other.parameters(), **options)
    for m, o in ((model, optimizer), (other, witness)):
        fit(m, X, y, loss=MSELoss(), optimizer=o, epochs=1, shuffle=False)
        o.param_groups[0]["lr"] = 1e37
    with pytest.raises(DivergenceError) as caught:
        fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=1, shuffle=False)
    good = caught.value.step - 1
    if good:
        with pytest.raises(DivergenceError):
            fit(other, X[: 32 * good], y[: 32 * good], loss=MSELoss(), optimizer=witness, epochs=1, shuffle=False)
    np.testing.assert_array_equal(model._arena.data, other._arena.data)
    for mine, theirs in zip(optimizer.momentum_state(), witness.momentum_state(), strict=True):
        np.testing.assert_array_equal(mine[0], theirs[0])

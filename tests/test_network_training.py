"""Training of a Sequential: fit and the readable loop, the same bits on any threads, divergence, interruption."""

import itertools
import signal
import threading
import time

import numpy as np
import pytest

import gdlib
from gdlib import GD, SGD, DivergenceError, Linear, MSELoss, ReLU, Sequential, Sigmoid, Tanh, fit
from gdlib.training import auto_lr
from tests.networks import SHAPES, loop, numpy_pass, problem, small


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 2e-4), (np.float64, 1e-10)])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_readable_loop_and_fit_agree(shape, dtype, rtol, options, reduction):
    readable, native = SHAPES[shape](dtype), SHAPES[shape](dtype)
    X, y = problem(outputs=native.out_features, dtype=dtype)
    criterion, lr = MSELoss(reduction), 0.02 if reduction == "mean" else 0.0005
    losses = loop(readable, X, y, SGD(readable.parameters(), lr, **options), criterion, 15, batch_size=32, shuffle=True, seed=0)
    history = fit(native, X, y, loss=criterion, optimizer=SGD(native.parameters(), lr, **options), epochs=15, batch_size=32, seed=0)
    np.testing.assert_allclose(history.loss, losses, rtol=rtol)
    np.testing.assert_allclose(native._arena.data, readable._arena.data, rtol=rtol, atol=rtol * np.abs(native._arena.data).max())
    assert history.loss[-1] < history.loss[0]
    assert not native._arena.grad.any()


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 2e-4), (np.float64, 1e-11)])
@pytest.mark.parametrize("batch_size", [128, 300, 1024])  # 2, 4 and 8 pieces, and what is left of the rows
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_in_pieces(shape, shuffle, batch_size, dtype, rtol):
    """A large batch of a small network is cut into pieces, whose gradients are added."""
    readable, native = SHAPES[shape](dtype), SHAPES[shape](dtype)
    X, y = problem(1090, outputs=native.out_features, dtype=dtype)
    given = {"batch_size": batch_size, "shuffle": shuffle, "seed": 4}
    losses = loop(readable, X, y, SGD(readable.parameters(), 0.05, momentum=0.9), MSELoss(), 3, **given)
    history = fit(native, X, y, loss=MSELoss(), optimizer=SGD(native.parameters(), lr=0.05, momentum=0.9), epochs=3, **given)
    np.testing.assert_allclose(history.loss, losses, rtol=rtol)
    np.testing.assert_allclose(native._arena.data, readable._arena.data, rtol=rtol, atol=rtol * np.abs(native._arena.data).max())


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("batch_size", "widths"), [(100, (301, 200, 23)), (1100, (301, 40, 9)), (70, (48, 600, 208, 1))])
def test_steps_of_wide_layers_and_large_batches(batch_size, widths, momentum, dtype, rtol):
    """Each block of a weight gradient updates its weights at once, several together; batches above a block of depth add up first."""
    rng = np.random.default_rng(5)
    X, y = (rng.standard_normal((1250, width)).astype(dtype) for width in (widths[0], widths[-1]))

    def model():
        layers = [Linear(*pair, dtype=dtype, seed=0) for pair in itertools.pairwise(widths)]
        return Sequential(*(layer for linear in layers for layer in (linear, Tanh())))

    readable, native = model(), model()
    start = native._arena.data.copy()
    criterion, lr = MSELoss(), 0.5 - 0.5 * momentum
    loop(readable, X, y, SGD(readable.parameters(), lr, momentum=momentum), criterion, 2, batch_size=batch_size)
    optimizer = SGD(native.parameters(), lr, momentum=momentum)
    fit(native, X, y, loss=criterion, optimizer=optimizer, epochs=2, batch_size=batch_size, shuffle=False)
    way = np.abs(readable._arena.data - start).max()
    assert way > 1e-3
    np.testing.assert_allclose(native._arena.data, readable._arena.data, rtol=0, atol=rtol * way * 10)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 2e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("rows", "batch_size", "widths", "bias"),
    [
        (750, 300, (70, 1000), True),  # more than 65,536 parameters in one layer, scattered rows, a last batch that is smaller
        (750, 300, (70, 1000), False),
        (2500, 2400, (70, 1000), True),  # three passes, whose gradients are one chain
        (2500, 2400, (5, 9000, 2), True),
        (20_000, 18_000, (5, 40, 2), True),  # and where that would be too long
        (20_000, 18_000, (70, 1000), True),
    ],
)
def test_large_layers_and_batches(rows, batch_size, widths, bias, momentum, dtype, rtol):
    rng = np.random.default_rng(6)
    X, y = (rng.standard_normal((rows, width)).astype(dtype) for width in (widths[0], widths[-1]))
    y *= 10

    def model():
        layers = []
        for pair in itertools.pairwise(widths):
            layers += [Tanh()] * bool(layers) + [Linear(*pair, bias, dtype=dtype, seed=0)]
        return Sequential(*layers)

    readable, native = model(), model()
    start = native._arena.data.copy()
    lr = 2 / widths[-2] if len(widths) > 2 else 20.0
    given = {"batch_size": batch_size, "shuffle": True, "seed": 4}
    losses = loop(readable, X, y, SGD(readable.parameters(), lr, momentum=momentum), MSELoss(), 2, **given)
    history = fit(native, X, y, loss=MSELoss(), optimizer=SGD(native.parameters(), lr, momentum=momentum), epochs=2, **given)
    np.testing.assert_allclose(history.loss, losses, rtol=rtol)
    way = np.abs(readable._arena.data - start).max()
    assert way > 5e-4
    np.testing.assert_allclose(native._arena.data, readable._arena.data, rtol=0, atol=rtol * way * 10)


@pytest.mark.parametrize(("rows", "batch_size", "widths"), [(750, 300, (70, 1000)), (2500, 2400, (70, 1000)), (18_000, 17_000, (5, 40, 2))])
def test_large_layers_and_batches_give_the_same_bits(threads, rows, batch_size, widths):
    """Their update is shared in stretches, one of which has parameters of both groups."""
    rng = np.random.default_rng(6)
    X, y = (rng.standard_normal((rows, width), dtype=np.float32) for width in (widths[0], widths[-1]))

    def run(train):
        model = Sequential(*(Linear(*pair, seed=0) for pair in itertools.pairwise(widths)))
        last = model[-1]
        groups = [{"params": [p for p in model.parameters() if p is not last.bias]}, {"params": last.bias, "lr": 0.02, "momentum": 0.5}]
        train(model, SGD(groups, lr=0.01))
        return model._arena.data

    given = {"batch_size": batch_size, "shuffle": True, "seed": 4}
    native = [run(lambda model, optimizer: fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=2, **given))]
    gdlib.set_num_threads(1)
    native.append(run(lambda model, optimizer: fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=2, **given)))
    assert native[0].tobytes() == native[1].tobytes()
    readable = run(lambda model, optimizer: loop(model, X, y, optimizer, MSELoss(), 2, **given))
    np.testing.assert_allclose(native[0], readable, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "widths"), [(300, (70, 1000)), (2400, (70, 1000)), (600, (2900, 2800)), (17_000, (5, 40, 2))])
def test_an_infinite_loss_changes_nothing(rows, widths):
    """Of the last row of a large step, in one pass and in several."""
    rng = np.random.default_rng(8)
    X, y = (rng.standard_normal((rows, width)) for width in (widths[0], widths[-1]))
    y[-1] = 1e200
    model = Sequential(*(Linear(*pair, dtype=np.float64, seed=0) for pair in itertools.pairwise(widths)))
    before = model._arena.data.copy()
    with pytest.raises(DivergenceError, match="step 1"):
        fit(model, X, y, loss=MSELoss(), optimizer=GD(model.parameters(), lr=0.01), epochs=1)
    np.testing.assert_array_equal(model._arena.data, before)


@pytest.mark.parametrize(("rows", "widths"), [(1024, (2900, 2800)), (1000, (2000, 2000, 2000, 2000))])
def test_an_update_that_waits_for_all_gradients(rows, widths):
    """Of several passes, and of one with more than 8 * 10^9 multiply-adds of weight gradients, which may be interrupted."""
    rng = np.random.default_rng(7)
    X, y = (rng.standard_normal((rows, width), dtype=np.float32) for width in (widths[0], widths[-1]))
    readable, native = (Sequential(*(Linear(*pair, seed=0) for pair in itertools.pairwise(widths))) for _ in range(2))
    start = native._arena.data.copy()
    loop(readable, X, y, SGD(readable.parameters(), 100.0), MSELoss(), 1, batch_size=rows)
    fit(native, X, y, loss=MSELoss(), optimizer=GD(native.parameters(), lr=100.0), epochs=1)
    way = np.abs(readable._arena.data - start).max()
    assert way > 1e-3
    np.testing.assert_allclose(native._arena.data, readable._arena.data, rtol=0, atol=1e-4 * way)


def test_full_batches_of_many_passes():
    """9000 rows take nine native passes: the loss and the step are those of all rows."""
    X, y = problem(9000)
    model = small()
    output, gradients, _ = numpy_pass(model, X, y)
    start = [parameter.data.copy() for parameter in model.parameters()]
    history = fit(model, X, y, loss=MSELoss(), optimizer=GD(model.parameters(), lr=0.5), epochs=1)
    assert history.loss[0] == pytest.approx(((output - y) ** 2).mean(), rel=1e-13)
    for parameter, before, gradient in zip(model.parameters(), start, gradients, strict=True):
        np.testing.assert_allclose(parameter.data, before - 0.5 * gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
# Pieces of a batch, in one pass and in several; products that are cut; each thread some rows, then some outputs; steps too short to share.
@pytest.mark.parametrize(
    ("rows", "hidden", "batch"),
    [(9000, 40, 9000), (9000, 7, 5000), (4000, 64, 701), (1600, 5000, 800), (1500, 9000, 1300), (2000, 120, 101), (1000, 64, 32)],
)
def test_the_same_bits_for_every_thread_count(threads, dtype, rows, hidden, batch):
    X, y = problem(rows, dtype=dtype)

    def run():
        model = small(Sigmoid, dtype, hidden=hidden)
        optimizer = SGD(model.parameters(), lr=4 / (40 + hidden), momentum=0.5)
        history = fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=2, batch_size=batch, seed=1)
        return model._arena.data.tobytes(), history.loss, model.predict(X).tobytes()

    got = run()
    gdlib.set_num_threads(1)
    assert run() == got


def test_rows_of_a_thread_go_through_activations_anywhere(threads):
    """Before the first linear layer, two in a row, and at the end; batches that no number of threads divides."""
    X, y = problem(1500)

    def run():
        layers = [Tanh(), Linear(5, 70, seed=0, dtype=np.float64), ReLU(), Sigmoid(), Linear(70, 70, seed=1, dtype=np.float64), Tanh()]
        model = Sequential(*layers, Linear(70, 2, seed=2, dtype=np.float64), Sigmoid())
        history = fit(model, X, y, loss=MSELoss(), optimizer=SGD(model.parameters(), lr=0.1), epochs=2, batch_size=151, seed=3)
        return model, history.loss

    shared, losses = run()
    gdlib.set_num_threads(1)
    alone, wanted = run()
    assert shared._arena.data.tobytes() == alone._arena.data.tobytes()
    assert losses == wanted


def test_a_lone_linear_in_a_sequential_is_that_linear():
    X, y = problem()
    alone, wrapped = Linear(5, 2, dtype=np.float64, seed=0), SHAPES["one-linear"](np.float64)
    for model in (alone, wrapped):
        fit(model, X, y, loss=MSELoss(), optimizer=SGD(model.parameters(), 0.05, momentum=0.9), epochs=3, seed=0)
    assert alone._arena.data.tobytes() == wrapped._arena.data.tobytes()


def test_groups_and_frozen_layers():
    X, y = problem()
    model = small()
    start = model.state_dict()
    groups = [{"params": model[0].weight, "weight_decay": 0.5}, {"params": model[2].parameters(), "lr": 0.2, "momentum": 0.9}]
    readable = small()
    matching = [{"params": readable[0].weight, "weight_decay": 0.5}, {"params": readable[2].parameters(), "lr": 0.2, "momentum": 0.9}]
    fit(model, X, y, loss=MSELoss(), optimizer=SGD(groups, lr=0.05), epochs=4, seed=2)
    loop(readable, X, y, SGD(matching, lr=0.05), MSELoss(), 4, batch_size=32, shuffle=True, seed=2)
    np.testing.assert_array_equal(model.state_dict()["0.bias"], start["0.bias"])
    np.testing.assert_allclose(model._arena.data, readable._arena.data, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("activation", [ReLU, Tanh, Sigmoid])
@pytest.mark.parametrize("lr", [1e4, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch_size", [32, 203])
def test_divergence_keeps_the_last_finite_parameters(activation, lr, dtype, batch_size):
    X, y = problem(dtype=dtype)
    model = small(activation, dtype)
    with pytest.raises(DivergenceError, match=r"training diverged: .*smaller lr.* The last finite parameters are kept") as caught:
        fit(model, X, 10 * y, loss=MSELoss(), optimizer=SGD(model.parameters(), lr=lr), epochs=100, batch_size=batch_size, seed=0)
    assert caught.value.stable_lr is None
    assert caught.value.lr == lr
    assert np.isfinite(model._arena.data).all()
    assert model.training_summary is None


def test_infinite_weights_that_an_activation_hides_are_found_at_their_step():
    """tanh of an infinite number is 1: the loss stays finite. The step that made it infinite is named, and undone."""
    model = Sequential(Linear(1, 1, dtype=np.float32, seed=0), Tanh(), Linear(1, 1, bias=False, dtype=np.float32, seed=1))
    model.load_state_dict({"0.weight": [[0.5]], "0.bias": [0], "2.weight": [[1]]})
    X, y = np.ones((50, 1), np.float32), np.full((50, 1), 3e5, np.float32)
    groups = [{"params": model[0].parameters(), "lr": 1e36}, {"params": model[2].parameters(), "lr": 1e-30}]
    with pytest.raises(DivergenceError, match="epoch 1, step 1,"):
        fit(model, X, y, loss=MSELoss(), optimizer=SGD(groups, lr=1), epochs=3, batch_size=1, shuffle=False)
    np.testing.assert_array_equal(model[0].weight.data, 0.5)


@pytest.mark.parametrize("activation", [ReLU, Tanh, Sigmoid])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_data_are_named_and_nothing_changes(activation, bad):
    X, y = problem()
    X[77, 3] = bad
    model = small(activation)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = model._arena.data.copy()
    with pytest.raises(ValueError, match=r"X holds 1 value that is NaN or infinite.*row 77, column 3"):
        fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=3, seed=0)
    np.testing.assert_array_equal(model._arena.data, before)
    assert optimizer.state_dict()["state"] == {}


def test_auto_lr_is_for_a_linear():
    X, y = problem()
    model = small()
    before = model._arena.data.copy()
    for call in (
        lambda: fit(model, X, y, loss=MSELoss(), optimizer=GD(model.parameters(), lr="auto"), epochs=1),
        lambda: auto_lr(model, X, MSELoss()),
    ):
        with pytest.raises(ValueError, match=r"lr='auto' goes by the curvature of a Linear.*give a number"):
            call()
    np.testing.assert_array_equal(model._arena.data, before)


def interrupted(train, seconds):
    """Ctrl-C so long after train() began; the CPU seconds from there to its end, which the load of a machine does not lengthen."""
    pressed = []

    def press():
        pressed.append(time.process_time())
        signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(seconds, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        train()
    return time.process_time() - pressed[0]


def wide(rows, hidden):
    """A function that trains a network for some epochs of one step each, and two equal networks."""
    X = np.random.default_rng(0).standard_normal((rows, 1000), dtype=np.float32)

    def train(model, epochs):
        fit(model, X, X[:, :1], loss=MSELoss(), optimizer=GD(model.parameters(), lr=0.01), epochs=epochs)

    return train, *(Sequential(Linear(1000, hidden, seed=0), Tanh(), Linear(hidden, 1, seed=1)) for _ in range(2))


@pytest.mark.parametrize(
    ("rows", "hidden", "epochs"),
    [(60_000, 1000, 100), (60_000, 64, 10_000), (1000, 64, 10**6), (600, 7900, 1000), (1024, 7900, 1000)],
)
def test_ctrl_c_leaves_no_step_half_made(rows, hidden, epochs):
    """In pieces of many passes and of one, and where weights are updated as their gradient is there, or all at the end. It is asked for
    every 50 ms: far less than what is allowed here for each thread, and than what the epochs would take."""
    train, model, whole_steps = wide(rows, hidden)
    assert interrupted(lambda: train(model, epochs), 0.3) < 0.5 * gdlib._core.num_threads()
    for _ in range(20_000):  # 1 to 2000 steps on two cores
        if np.array_equal(whole_steps._arena.data, model._arena.data):
            return
        train(whole_steps, 1)
    pytest.fail("the parameters are not those of whole steps")


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_ctrl_c_does_not_wait_for_the_end_of_a_step(threads):
    """Of 10^11 multiply-adds, a second or more: pressed after a tenth of it, less than half of it follows."""
    train, model, other = wide(60_000, 1000)
    begin, begin_of_cpu = time.perf_counter(), time.process_time()
    train(other, 1)
    step, cpu = time.perf_counter() - begin, time.process_time() - begin_of_cpu
    assert interrupted(lambda: train(model, 100), step / 10) < cpu / 2


def test_a_network_learns_what_a_line_cannot():
    x = np.linspace(-2, 2, 400)[:, None]
    y = np.abs(x)
    line, network = Linear(1, 1, seed=0), Sequential(Linear(1, 16, seed=0), ReLU(), Linear(16, 1, seed=1))
    losses = [
        fit(model, x, y, loss=MSELoss(), optimizer=SGD(model.parameters(), lr=0.05, momentum=0.9), epochs=100, seed=0).loss[-1]
        for model in (line, network)
    ]
    assert losses[0] > 0.3
    assert losses[1] < 1e-3

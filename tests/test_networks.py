"""Sequential and its activations: values, gradients, state, one arena, training, files, and what they refuse."""

import copy
import itertools
import pickle
import signal
import threading
import time

import numpy as np
import pytest

import gdlib
from gdlib import GD, SGD, DataLoader, DivergenceError, Linear, MSELoss, ReLU, Sequential, Sigmoid, Tanh, fit, load, save
from gdlib.preprocessing import StandardScaler
from gdlib.training import auto_lr

FUNCTIONS = {
    ReLU: (lambda x: np.maximum(x, 0), lambda y: (y > 0).astype(float)),
    Tanh: (np.tanh, lambda y: 1 - y * y),
    Sigmoid: (lambda x: 1 / (1 + np.exp(-x)), lambda y: y * (1 - y)),
}


def small(activation=Tanh, dtype=np.float64, seed=0, hidden=8, outputs=2):
    return Sequential(Linear(5, hidden, dtype=dtype, seed=seed), activation(), Linear(hidden, outputs, dtype=dtype, seed=seed + 1))


# Every way in which layers may follow each other.
SHAPES = {
    "usual": lambda dtype: small(ReLU, dtype),
    "activation-last": lambda dtype: Sequential(Linear(5, 4, dtype=dtype, seed=0), Tanh(), Linear(4, 3, dtype=dtype, seed=1), Sigmoid()),
    "activation-first": lambda dtype: Sequential(Sigmoid(), Linear(5, 3, dtype=dtype, seed=0)),
    "two-activations": lambda dtype: Sequential(Linear(5, 9, dtype=dtype, seed=0), Tanh(), ReLU(), Linear(9, 1, dtype=dtype, seed=1)),
    "two-linear": lambda dtype: Sequential(Linear(5, 12, False, dtype=dtype, seed=0), Linear(12, 2, dtype=dtype, seed=1)),
    "one-linear": lambda dtype: Sequential(Linear(5, 2, dtype=dtype, seed=0)),
    "only-a-linear-between": lambda dtype: Sequential(Tanh(), Sigmoid(), Linear(5, 10, dtype=dtype, seed=0), Tanh(), Sigmoid()),
    "nested": lambda dtype: Sequential(
        Sequential(Linear(5, 4, dtype=dtype, seed=0), ReLU()),
        Sequential(Sequential(Linear(4, 8, dtype=dtype, seed=1)), Sigmoid()),
        Linear(8, 2, dtype=dtype, seed=2),
    ),
}


def problem(rows=203, outputs=2, dtype=np.float64):
    rng = np.random.default_rng(3)
    X = rng.standard_normal((rows, 5))
    y = np.sin(X @ rng.standard_normal((5, outputs))) + 0.05 * rng.standard_normal((rows, outputs))
    return X.astype(dtype), y.astype(dtype)


def numpy_pass(model, x, target):
    """Output and gradients of the mean squared error in float64: the readable definition."""
    leaves = [leaf for _, leaf in model._leaves()]
    values = [np.asarray(x, np.float64)]
    for leaf in leaves:
        if isinstance(leaf, Linear):
            bias = 0 if leaf.bias is None else leaf.bias.data.astype(np.float64)
            values.append(values[-1] @ leaf.weight.data.T.astype(np.float64) + bias)
        else:
            values.append(FUNCTIONS[type(leaf)][0](values[-1]))
    g = 2 * (values[-1] - target) / values[-1].size
    gradients = []
    for leaf, before, after in reversed(list(zip(leaves, values, values[1:], strict=False))):
        if isinstance(leaf, Linear):
            gradients = [g.T @ before] + ([] if leaf.bias is None else [g.sum(axis=0)]) + gradients
            g = g @ leaf.weight.data.astype(np.float64)
        else:
            g = g * FUNCTIONS[type(leaf)][1](after)
    return values[-1], gradients, g


def loop(model, X, y, optimizer, criterion, epochs, **options):
    losses = []
    for _ in range(epochs):
        total = 0.0
        for x, t in DataLoader(X, y, **options):
            optimizer.zero_grad()
            loss = criterion(model(x), t)
            total += loss * (len(x) / len(X) if criterion.reduction == "mean" else 1)
            model.backward(criterion.backward())
            optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 2e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_against_numpy(shape, dtype, rtol):
    model = SHAPES[shape](dtype)
    X, y = problem(61, model.out_features, dtype)
    criterion = MSELoss()
    output, gradients, input_gradient = numpy_pass(model, X, y)
    criterion(model(X), y)
    given = criterion.backward()
    kept = given.copy()
    got = model.backward(given)
    np.testing.assert_array_equal(given, kept)  # the caller's array is not worked in
    np.testing.assert_allclose(model.predict(X), output, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(got, input_gradient, rtol=rtol, atol=rtol)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        np.testing.assert_allclose(parameter.grad, gradient, rtol=rtol, atol=rtol, err_msg=parameter.name)
    model.backward(given)  # adds
    np.testing.assert_allclose(model.parameters()[0].grad, 2 * gradients[0], rtol=rtol, atol=2 * rtol)
    model.zero_grad()
    assert not any(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_against_central_differences(shape):
    """In float64 with h = 1e-6: truncation about 1e-12, rounding about 1e-10. No relu of these sits at its corner."""
    model = SHAPES[shape](np.float64)
    X, y = problem(7, model.out_features)
    criterion = MSELoss("sum")
    criterion(model(X), y)
    input_gradient = model.backward(criterion.backward())
    arrays = [(p.data, p.grad, p.name) for p in model.parameters()] + [(X, input_gradient, "x")]
    for array, gradient, name in arrays:
        numeric = np.empty_like(array)
        for place in np.ndindex(array.shape):
            kept = array[place]
            array[place] = kept + 1e-6
            above = criterion(model.predict(X), y)
            array[place] = kept - 1e-6
            numeric[place] = (above - criterion(model.predict(X), y)) / 2e-6
            array[place] = kept
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_have_the_same_bits_in_any_batch_and_call(shape):
    model = SHAPES[shape](np.float32)
    X, _ = problem(4200, dtype=np.float32)  # more than one native pass takes
    whole = model.predict(X)
    np.testing.assert_array_equal(model(X), whole)
    for rows in (1, 7, 64, 4096):
        np.testing.assert_array_equal(model.predict(X[:rows]), whole[:rows])
    np.testing.assert_array_equal(model.predict(X[-5:]), whole[-5:])
    np.testing.assert_array_equal(model.predict(X[::2]), whole[::2])


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (1, 1, 1), (0,), (2, 0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_leading_dimensions(shape, leading):
    model = SHAPES[shape](np.float64)
    x = np.random.default_rng(0).standard_normal((*leading, 5))
    wanted = model.predict(x.reshape(-1, 5)).reshape(*leading, model.out_features)
    for y in (model(x), model.predict(x)):
        assert y.shape == wanted.shape
        np.testing.assert_array_equal(y, wanted)
    assert model.backward(np.ones_like(wanted)).shape == x.shape


def test_anything_that_numpy_can_view_and_x_is_left_alone():
    for shape in SHAPES:
        model = SHAPES[shape](np.float32)
        x = np.arange(20, dtype=np.float32).reshape(4, 5) / 8
        wanted = model.predict(x)
        for given in (x.tolist(), x.astype(np.float64), np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x.astype(">f4")):
            np.testing.assert_array_equal(model.predict(given), wanted)
            np.testing.assert_array_equal(model(given), wanted)
        x.flags.writeable = False
        np.testing.assert_array_equal(model(x), wanted)


def test_layers_are_listed_as_in_pytorch():
    layers = Linear(5, 8, seed=0), ReLU(), Linear(8, 2, seed=1)
    model = Sequential(*layers)
    assert len(model) == 3
    assert list(model) == list(layers)
    assert model[0] is layers[0]
    assert model[-1] is layers[2]
    with pytest.raises(IndexError):
        model[3]
    with pytest.raises(TypeError, match="slice"):
        model[:2]
    assert (model.in_features, model.out_features, model.dtype) == (5, 2, np.float32)
    assert repr(Sequential(Sequential(Linear(1, 1), Tanh()), Sigmoid())) == (
        "Sequential(\n"
        "  (0): Sequential(\n"
        "    (0): Linear(in_features=1, out_features=1, bias=True, dtype=float32)\n"
        "    (1): Tanh()\n"
        "  )\n"
        "  (1): Sigmoid()\n"
        ")"
    )


def test_composing_moves_the_parameters_into_one_arena():
    first, last = Linear(5, 8, seed=0), Linear(8, 2, seed=1)
    objects = first.parameters() + last.parameters()
    before = [parameter.data.copy() for parameter in objects]
    first.weight.grad[:] = 3
    inner = Sequential(first, Tanh())
    model = Sequential(inner, last)
    assert all(got is wanted for got, wanted in zip(model.parameters(), objects, strict=True))
    assert [parameter.name for parameter in objects] == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    assert list(model.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    assert list(first.state_dict()) == ["weight", "bias"]
    for parameter, values in zip(objects, before, strict=True):
        np.testing.assert_array_equal(parameter.data, values)
        assert np.shares_memory(parameter.data, model._arena.data)
        assert np.shares_memory(parameter.grad, model._arena.grad)
    np.testing.assert_array_equal(first.weight.grad, 3)
    assert sum(parameter.data.size for parameter in objects) == model._arena.data.size
    assert model._arena.data.ctypes.data % 64 == 0
    first.weight.data[:] = 0  # a view still
    assert not model.state_dict()["0.0.weight"].any()
    x = np.ones((3, 5), np.float32)
    np.testing.assert_array_equal(inner.predict(x), inner(x))
    last.weight.grad[:] = 1
    inner.zero_grad()  # its own parameters alone
    assert not first.weight.grad.any()
    assert last.weight.grad.all()


def test_a_layer_has_one_place():
    layer, act = Linear(3, 3, seed=0), ReLU()
    for layers in [(layer, layer), (layer, act, act)]:
        with pytest.raises(ValueError, match="already has a place in a Sequential; make a new one"):
            Sequential(*layers)
    model = Sequential(layer, act)
    for taken in (layer, act):
        with pytest.raises(ValueError, match="already has a place"):
            Sequential(Linear(3, 3), taken)
    outer = Sequential(model, Linear(3, 1))
    with pytest.raises(ValueError, match=r"layer 0, Sequential\(.*already has a place"):
        Sequential(model)
    with pytest.raises(ValueError, match="part of a Sequential"):
        fit(layer, np.ones((4, 3)), np.ones((4, 3)), loss=MSELoss(), optimizer=SGD(layer.parameters(), 0.1), epochs=1)
    assert len(outer.parameters()) == 4


def test_a_refused_composition_changes_nothing():
    first, second = Linear(3, 4, seed=0), Linear(5, 1, seed=1)
    arenas = first._arena, second._arena
    with pytest.raises(ValueError, match="gives 4 features and layer 1"):
        Sequential(first, second)
    assert (first._arena, second._arena) == arenas
    assert not arenas[0].vacated
    assert first.weight.name == "weight"
    Sequential(first, ReLU())


def test_an_optimizer_of_before_the_move_says_so():
    layer = Linear(3, 2, seed=0)
    optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    model = Sequential(layer, ReLU())
    X, y = np.ones((4, 3)), np.ones((4, 2))
    for call in (
        optimizer.step,
        optimizer.zero_grad,
        optimizer.state_dict,
        lambda: optimizer.load_state_dict({"state": {}, "param_groups": []}),
        lambda: fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=1),
    ):
        with pytest.raises(RuntimeError, match=r"moved into a Sequential since .*model\.parameters\(\)"):
            call()
    fit(model, X, y, loss=MSELoss(), optimizer=SGD(model.parameters(), lr=0.1), epochs=1)


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        (lambda: (), ValueError, "without a Linear"),
        (lambda: (ReLU(), Tanh()), ValueError, "without a Linear"),
        (lambda: (Linear(3, 4), ReLU(), Linear(5, 1)), ValueError, r"layer 0, Linear\(.*gives 4 features and layer 2, Linear\(.*takes 5"),
        (
            lambda: (Sequential(Linear(3, 4)), Sequential(Tanh(), Linear(3, 4))),
            ValueError,
            r"layer 0\.0, .* gives 4 features and layer 1\.1",
        ),
        (lambda: (Linear(3, 4), Linear(4, 1, dtype=np.float64)), ValueError, "computes in float32 and layer 1, .* in float64"),
        (lambda: ([Linear(3, 4)],), TypeError, r"layer 0 is a list; .*Sequential\(\*layers\)"),
        (lambda: (Linear(3, 4), np.tanh), TypeError, "layer 1 is a ufunc; a Linear, ReLU"),
        (lambda: (ReLU,), TypeError, "layer 0 is a type"),
    ],
)
def test_what_cannot_be_composed_is_named(layers, error, words):
    with pytest.raises(error, match=words):
        Sequential(*layers())


def test_bad_input_is_named():
    for shape in SHAPES:
        model = SHAPES[shape](np.float32)
        for call in (model, model.predict):
            with pytest.raises(ValueError, match=r"x has shape \(2, 4\); \[rows, 5\]"):
                call(np.ones((2, 4)))
            for bad in (np.nan, np.inf, -np.inf):
                x = np.ones((3, 5))
                x[2, 1] = bad
                with pytest.raises(ValueError, match=r"x holds 1 value that is NaN or infinite.*row 2, column 1"):
                    call(x)
            with pytest.raises(TypeError, match="text"):
                call([["a"] * 5])
        with pytest.raises(RuntimeError, match="call the"):
            SHAPES[shape](np.float32).backward(np.ones((1, model.out_features)))
        model(np.ones((4, 5)))
        for wrong in [(4,), (3, model.out_features), (4, model.out_features + 1)]:
            with pytest.raises(ValueError, match="the gradient has shape"):
                model.backward(np.ones(wrong))


def test_an_overflow_of_finite_input_is_a_divergence():
    model = small(Tanh, np.float32)
    model[0].weight.data = np.full((8, 5), 3e38)
    for call in (model, model.predict):
        with pytest.raises(DivergenceError, match="grown too large"):
            call(np.ones((1, 5)))
    model[0].weight.data[0, 0] = np.nan
    for call in (model, model.predict):
        with pytest.raises(DivergenceError, match="weights hold NaN"):
            call(np.ones((1, 5)))


def test_load_state_dict_is_strict_and_all_or_none():
    model, other = small(seed=0), small(seed=5)
    state = other.state_dict()
    for wrong, error, words in [
        ({k: v for k, v in state.items() if k != "2.bias"} | {"1.weight": 0}, KeyError, r"missing \['2.bias'\], unexpected \['1.weight'\]"),
        (state | {"2.bias": np.zeros(3)}, ValueError, "2.bias has shape"),
        (None, TypeError, "state dict is a NoneType"),
    ]:
        before = model.state_dict()
        with pytest.raises(error, match=words):
            model.load_state_dict(wrong)
        for name, values in before.items():
            np.testing.assert_array_equal(model.state_dict()[name], values)
    model.load_state_dict(state)
    x = np.ones((2, 5))
    np.testing.assert_array_equal(model.predict(x), other.predict(x))


def test_activations_alone():
    for activation, (value, slope) in FUNCTIONS.items():
        layer = activation()
        assert layer.parameters() == []
        assert layer.state_dict() == {}
        layer.load_state_dict({})
        for x in (np.linspace(-3, 3, 24).reshape(2, 3, 4), [[1, -2], [3, 4]], np.float32([[0.5, -0.5]]), np.arange(-4.0, 5.0)[::2]):
            y = layer(x)
            np.testing.assert_allclose(y, value(np.asarray(x, float)), rtol=1e-6)
            np.testing.assert_array_equal(layer.predict(x), y)
            np.testing.assert_allclose(layer.backward(np.full(y.shape, 2)), 2 * slope(y), rtol=1e-5, atol=1e-7)
        with pytest.raises(RuntimeError, match="call the layer"):
            activation().backward(np.ones(3))
        with pytest.raises(ValueError, match="the gradient has shape"):
            layer.backward(np.ones(3))
        with pytest.raises(ValueError, match="out does not fit"):
            layer(np.ones(3), out=np.ones(4))
        with pytest.raises(TypeError, match="text"):
            layer(["a"])
        assert repr(layer) == f"{activation.__name__}()"


def twice(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, twice], ids=["deepcopy", "pickle"])
def test_a_copied_model_trains_with_its_copied_optimizer(duplicate):
    model = SHAPES["nested"](np.float64)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    X, y = problem(40)
    criterion = MSELoss()

    def train(model, optimizer):
        loop(model, X, y, optimizer, criterion, 2, batch_size=16)
        fit(model, X, y, loss=criterion, optimizer=optimizer, epochs=2, batch_size=16, seed=0)
        return model.state_dict()

    model.feature_names = list("abcde")
    train(model, optimizer)
    twins = duplicate((model, optimizer))
    assert twins[0].feature_names == list("abcde")
    assert twins[0]._flat_layers[0]._input is None
    assert all(np.shares_memory(parameter.data, twins[0]._arena.data) for parameter in twins[0].parameters())
    for name, values in train(model, optimizer).items():
        assert not np.array_equal(twins[0].state_dict()[name], values)
    for name, values in train(*twins).items():
        np.testing.assert_array_equal(values, model.state_dict()[name])


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


def test_full_batches_of_many_passes():
    """9000 rows take three native passes: the loss and the step are those of all rows."""
    X, y = problem(9000)
    model = small()
    output, gradients, _ = numpy_pass(model, X, y)
    start = [parameter.data.copy() for parameter in model.parameters()]
    history = fit(model, X, y, loss=MSELoss(), optimizer=GD(model.parameters(), lr=0.5), epochs=1)
    assert history.loss[0] == pytest.approx(((output - y) ** 2).mean(), rel=1e-13)
    for parameter, before, gradient in zip(model.parameters(), start, gradients, strict=True):
        np.testing.assert_allclose(parameter.data, before - 0.5 * gradient, rtol=1e-11, atol=1e-13)


@pytest.fixture(params=[1, 2, 3, 5, 8])
def threads(request):
    before = gdlib._core.num_threads()
    gdlib.set_num_threads(request.param)
    yield request.param
    gdlib.set_num_threads(before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "hidden", "batch"), [(9000, 40, 9000), (9000, 7, 5000), (1000, 64, 32)])
def test_the_same_bits_for_every_thread_count(threads, dtype, rows, hidden, batch):
    X, y = problem(rows, dtype=dtype)

    def run():
        model = small(Sigmoid, dtype, hidden=hidden)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.5)
        history = fit(model, X, y, loss=MSELoss(), optimizer=optimizer, epochs=2, batch_size=batch, seed=1)
        return model._arena.data.tobytes(), history.loss, model.predict(X).tobytes()

    got = run()
    gdlib.set_num_threads(1)
    assert run() == got


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
def test_divergence_keeps_the_last_finite_parameters(activation, lr, dtype):
    X, y = problem(dtype=dtype)
    model = small(activation, dtype)
    with pytest.raises(DivergenceError, match=r"training diverged: .*smaller lr.* The last finite parameters are kept") as caught:
        fit(model, X, 10 * y, loss=MSELoss(), optimizer=SGD(model.parameters(), lr=lr), epochs=20, seed=0)
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


def test_ctrl_c_ends_a_large_step():
    """One step of 2 * 10^11 multiply-adds, some seconds: the interrupt is answered inside it, and nothing has changed."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60_000, 1000), dtype=np.float32)
    model = Sequential(Linear(1000, 1000, seed=0), Tanh(), Linear(1000, 1, seed=1))
    before = model._arena.data.copy()
    pressed = []

    def press():
        pressed.append(time.perf_counter())
        signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(0.3, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fit(model, X, X[:, :1], loss=MSELoss(), optimizer=GD(model.parameters(), lr=0.01), epochs=100)
    # 0.2 s is the aim; a machine shared with others may take longer, but not the whole epoch.
    assert time.perf_counter() - pressed[0] < 1.0
    np.testing.assert_array_equal(model._arena.data, before)


def test_threads_share_a_model():
    model = small(dtype=np.float32, hidden=64)
    X, _ = problem(500, dtype=np.float32)
    wanted, wrong = model.predict(X), []

    def work():
        wrong.extend(not np.array_equal(model.predict(X[:n]), wanted[:n]) for n in range(1, 200, 7))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not any(wrong)
    assert model[0]._input is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_network_comes_back(tmp_path, shape, dtype):
    model = SHAPES[shape](dtype)
    X, y = problem(60, model.out_features, dtype)
    fit(model, X, y, loss=MSELoss(), optimizer=SGD(model.parameters(), lr=0.05), epochs=2, seed=0)
    path = tmp_path / "m.safetensors"
    save(model, path, feature_names=list("abcde"))
    again = load(path)
    assert repr(again) == repr(model)
    assert again.feature_names == list("abcde")
    assert again.training_summary["final_loss"] == model.training_summary["final_loss"]
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    fit(again, X, y, loss=MSELoss(), optimizer=SGD(again.parameters(), lr=0.05), epochs=1)


def test_standardisation_folds_into_the_first_layer():
    X, y = problem()
    X = X * [1, 10, 100, 0.1, 5] + [3, -2, 50, 0, 1]
    scaler = StandardScaler().fit(X)
    model = SHAPES["nested"](np.float64)
    fit(model, scaler.transform(X), y, loss=MSELoss(), optimizer=SGD(model.parameters(), lr=0.05), epochs=2, seed=0)
    model.target_names = ["t", "u"]
    before = model.state_dict()
    folded = scaler.fold_into(model)
    np.testing.assert_allclose(folded.predict(X), model.predict(scaler.transform(X)), rtol=1e-10, atol=1e-12)
    assert (folded.target_names, folded.training_summary) == (["t", "u"], model.training_summary)
    for name, values in model.state_dict().items():
        np.testing.assert_array_equal(values, before[name])
    with pytest.raises(ValueError, match="first layer of the model is a Sigmoid"):
        scaler.fold_into(SHAPES["activation-first"](np.float64))
    with pytest.raises(ValueError, match="no bias"):
        scaler.fold_into(SHAPES["two-linear"](np.float64))


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

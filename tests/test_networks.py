"""Sequential and its activations: values, gradients, state, files, and the input that they refuse."""

import copy
import pickle
import threading

import numpy as np
import pytest

from gdlib import SGD, DivergenceError, Linear, MSELoss, ReLU, Sequential, Sigmoid, Tanh, fit, load, save
from gdlib.preprocessing import StandardScaler
from tests.networks import FUNCTIONS, SHAPES, loop, numpy_pass, problem, small


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


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (Linear(3, 5, seed=0), Tanh(), Linear(5, 2, seed=1)),
        lambda: (Linear(3, 5, seed=0), Linear(5, 2, seed=1), Sigmoid()),
        lambda: (Tanh(), Sequential(Linear(3, 5, seed=0), ReLU()), Linear(5, 2, seed=1)),
        lambda: (Linear(3, 2, seed=0),),
    ],
    ids=["linear last", "activation last", "activation first", "one layer"],
)
@pytest.mark.parametrize("shape", [(4,), (2, 2), ()])
def test_results_into_memory_that_is_there(layers, shape):
    """The bits, and the gradients of parameters, are those of new arrays; what is given is left as it was."""
    rng = np.random.default_rng(0)
    x, gradient = rng.standard_normal((*shape, 3)).astype(np.float32), rng.standard_normal((*shape, 2)).astype(np.float32)
    given = x.copy(), gradient.copy()
    plain, model = Sequential(*layers()), Sequential(*layers())
    y, x_gradient = plain(x), plain.backward(gradient)
    out, out_back = np.full((*shape, 2), np.nan, np.float32), np.full((*shape, 3), np.nan, np.float32)
    assert np.shares_memory(model(x, out=out), out)
    assert np.shares_memory(model.backward(gradient, out=out_back), out_back)
    np.testing.assert_array_equal(out, y)
    np.testing.assert_array_equal(out_back, x_gradient)
    np.testing.assert_array_equal(model._arena.grad, plain._arena.grad)
    np.testing.assert_array_equal(x, given[0])
    np.testing.assert_array_equal(gradient, given[1])


def test_an_out_that_does_not_fit_leaves_the_network_as_it_was():
    model = Sequential(Linear(4, 4, seed=0), Tanh(), Linear(4, 4, seed=1))
    x, other, gradient = np.ones((2, 4), np.float32), np.zeros((4, 4), np.float32), np.ones((2, 4), np.float32)
    model(x)
    model.backward(gradient)
    wanted = model._arena.grad.copy()
    model._arena.grad[...] = 0
    for bad in (np.empty((2, 4), np.float32), np.empty((4, 4)), [[0.0] * 4] * 4):
        with pytest.raises(ValueError, match="out does not fit"):
            model(other, out=bad)
    for bad in (np.empty((4, 4), np.float32), np.empty((2, 3), np.float32)):
        with pytest.raises(ValueError, match="out does not fit"):
            model.backward(gradient, out=bad)
    with pytest.raises(ValueError, match="out shares memory with x"):
        model(other, out=other)
    with pytest.raises(ValueError, match="out shares memory with the parameters"):
        model(other, out=model[0].weight.data)
    with pytest.raises(ValueError, match="out shares memory with the gradient"):
        model.backward(gradient, out=gradient)
    model.backward(gradient)  # of the x before
    np.testing.assert_array_equal(model._arena.grad, wanted)


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

"""predict keeps weights laid out between calls: the same bits as without, and never those of weights that have changed since."""

import copy
import pickle
import sys
import threading

import numpy as np
import pytest

import gdlib
from gdlib import _core


def models(dtype=np.float32):
    return [
        gdlib.Linear(37, 20, dtype=dtype, seed=1),
        gdlib.Linear(5, 3, dtype=dtype, seed=1),
        gdlib.Sequential(
            gdlib.Linear(37, 40, dtype=dtype, seed=1), gdlib.Tanh(), gdlib.Linear(40, 9, dtype=dtype, seed=2), gdlib.ReLU(),
            gdlib.Linear(9, 2, dtype=dtype, seed=3),
        ),
    ]  # fmt: skip


def rows(model, n=21):
    return np.random.default_rng(0).standard_normal((n, model.in_features)).astype(model.dtype)


def fresh(model):
    """What a copy without anything kept predicts."""
    return copy.deepcopy(model).predict


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_bits_with_and_without(isa, number, dtype):
    model = models(dtype)[number]
    x = rows(model)
    first = model.predict(x)
    for threads in range(1, 9):
        gdlib.set_num_threads(threads)
        np.testing.assert_array_equal(model.predict(x), first)
        np.testing.assert_array_equal(np.concatenate([model.predict(x[i : i + 1]) for i in range(len(x))]), first)
        np.testing.assert_array_equal(np.concatenate([model.predict(x[:4]), model.predict(x[4:])]), first)
    np.testing.assert_array_equal(model(x), first)


def kept(model):
    """Predict often enough that the weights are laid out; whether they are."""
    for _ in range(3):
        model.predict(rows(model))
    return model._kept is not None


@pytest.mark.parametrize("number", [0, 2])
def test_weights_are_kept_from_the_second_call_on(number):
    model = models()[number]
    model.predict(rows(model))
    assert model._kept is None
    model.predict(rows(model))
    assert model._kept is not None
    predictor = model._kept
    model.predict(rows(model))
    assert model._kept is predictor


def test_few_outputs_have_nothing_to_lay_out():
    assert not kept(models()[1])


def write_in_place(model):
    model.parameters()[0].data[0, 0] += 1


def assign(model):
    model.parameters()[0].data = model.parameters()[0]._data * 2


def load(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def step(model):
    optimizer = gdlib.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad[...] = 1
    optimizer.step()


def train(model):
    x = rows(model)
    y = np.zeros((len(x), model.out_features), model.dtype)
    gdlib.fit(model, x, y, loss=gdlib.MSELoss(), optimizer=gdlib.SGD(model.parameters(), lr=0.01), epochs=1, batch_size=4)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("change", [write_in_place, assign, load, step, train])
def test_a_change_is_seen(number, change):
    model = models()[number]
    assert kept(model)
    before = model.predict(rows(model))
    change(model)
    for _ in range(3):
        after = model.predict(rows(model))
        np.testing.assert_array_equal(after, fresh(model)(rows(model)))
        assert (after != before).any()
    assert kept(model)


@pytest.mark.parametrize("number", [0, 2])
def test_whoever_holds_the_data_may_write_at_any_time(number):
    model = models()[number]
    assert kept(model)
    held = [model.parameters()[0].data, model.parameters()[0].data[1:, 2], memoryview(model.parameters()[1].data)]
    while held:
        assert not kept(model)
        if len(held) > 1:
            held[-2][...] += 1
        np.testing.assert_array_equal(model.predict(rows(model)), fresh(model)(rows(model)))
        held.pop()
    assert kept(model)
    np.testing.assert_array_equal(model.predict(rows(model)), fresh(model)(rows(model)))


def test_an_optimizer_does_not_stand_in_the_way():
    model = models()[2]
    optimizers = [gdlib.SGD(model.parameters(), lr=0.1), gdlib.SGD(model.parameters(), lr=0.1, momentum=0.5)]
    assert kept(model)
    del optimizers
    assert kept(model)


def test_layers_inside_a_sequential_predict_too():
    model = models()[2]
    inner = model[0]
    assert kept(inner)
    before = inner.predict(rows(inner))
    write_in_place(model)
    assert (inner.predict(rows(inner)) != before).any()
    outer = gdlib.Sequential(gdlib.Sequential(gdlib.Linear(4, 16, seed=0), gdlib.ReLU()), gdlib.Linear(16, 8, seed=0))
    assert kept(outer)
    assert kept(outer[0])
    np.testing.assert_array_equal(outer[1].predict(outer[0].predict(rows(outer))), outer.predict(rows(outer)))


def test_copies_and_pickles_keep_their_own():
    model = models()[2]
    assert kept(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        write_in_place(other)
        assert kept(other)
        np.testing.assert_array_equal(other.predict(rows(other)), fresh(other)(rows(other)))
        assert (other.predict(rows(other)) != model.predict(rows(model))).any()


def test_threads_share_a_model():
    model = models()[2]
    x = rows(model, 64)
    wanted = model.predict(x)
    wrong = []

    def ask():
        wrong.extend(n for n in range(1, 65) if (model.predict(x[:n]) != wanted[:n]).any())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_errors_are_those_of_a_model_that_keeps_nothing():
    model = models()[2]
    assert kept(model)
    with pytest.raises(ValueError, match="37"):
        model.predict(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.predict(np.full((2, 37), np.nan, np.float32))
    assert model.predict(rows(model).tolist()).shape == (21, 2)
    assert model.predict(np.zeros((0, 37), np.float32)).shape == (0, 2)
    assert model.predict(rows(model).reshape(3, 7, 37)).shape == (3, 7, 2)


def test_another_kernel_table_is_noticed():
    tables = _core.available_isas()
    if len(tables) < 2:
        pytest.skip("this machine has one kernel table")
    predictor = _core.Predictor([("linear", 3, 9, True)], np.ones(36, np.float32))
    x = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(predictor(x), np.full((1, 9), 4, np.float32))
    now = _core.isa()
    try:
        _core.select_isa(next(name for name in tables if name != now))
        with pytest.raises(ValueError, match="kernel table"):
            predictor(x)
    finally:
        _core.select_isa(now)


class Changing:
    """An array to assign that predicts while it is asked for its values."""

    def __init__(self, model, values):
        self.model, self.values = model, values

    def __array__(self, dtype=None, copy=None):
        assert kept(self.model)
        return self.values


def test_a_prediction_amid_a_change_does_not_outlive_it():
    model = models()[0]
    model.weight.data = Changing(model, np.zeros((20, 37), np.float32))
    np.testing.assert_array_equal(model.predict(rows(model)), np.tile(model.bias.data, (21, 1)))


def test_copies_of_a_parameter_that_come_and_go_hide_nobody():
    model = models()[0]
    copied = copy.copy(model.weight)
    del copied
    assert kept(model)
    held = model.weight.data
    assert not kept(model)
    held[...] = 0
    np.testing.assert_array_equal(model.predict(rows(model)), fresh(model)(rows(model)))


def test_a_layer_that_moves_into_a_sequential_leaves_what_it_kept():
    layer = models()[0]
    for _ in range(50):
        layer.weight.data.sum()
    assert kept(layer)
    model = gdlib.Sequential(layer, gdlib.ReLU(), gdlib.Linear(20, 2, seed=1))
    layer.weight.data = np.zeros((20, 37), np.float32)
    while model._arena.version < 60:
        np.testing.assert_array_equal(layer.predict(rows(layer)), np.tile(layer.bias._data, (21, 1)))
        layer.bias.data.sum()


def test_writers_and_readers_at_once():
    """After a write has ended, nobody is answered from what was there before."""
    model = models()[0]
    x = rows(model, 1)
    stop, before = threading.Event(), sys.getswitchinterval()

    def ask():
        while not stop.is_set():
            model.predict(x)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for number in range(300):
            model.weight.data = np.full((20, 37), number, np.float32)
            np.testing.assert_array_equal(model.predict(x), fresh(model)(x))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)

"""What a Sequential is made of: its layers, the one arena that they share, and what cannot be composed."""

import numpy as np
import pytest

from gdlib import SGD, Linear, MSELoss, ReLU, Sequential, Sigmoid, Tanh, fit


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

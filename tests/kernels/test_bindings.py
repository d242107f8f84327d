"""The border of _core: a wrong array is a TypeError or ValueError that names it, whatever else is right, and never a crash."""

import gc
import sys

import numpy as np
import pytest

from gdlib import _core

ROWS, IN, OUT = 6, 4, 3
LAYERS = [("linear", IN, OUT, True)]


def arrays():
    """A set of arguments that fits, by name."""
    return {
        "x": np.ones((ROWS, IN)),
        "weight": np.ones((OUT, IN)),
        "bias": np.ones(OUT),
        "out": np.zeros((ROWS, OUT)),
        "g": np.ones((ROWS, OUT)),
        "weight_gradient": np.zeros((OUT, IN)),
        "bias_gradient": np.zeros(OUT),
        "input_gradient": np.zeros((ROWS, IN)),
        "target": np.ones((ROWS, OUT)),
        "parameters": np.zeros(OUT * (IN + 1)),
        "momentum": np.zeros(OUT * (IN + 1)),
        "losses": np.zeros(2),
        "epoch_seeds": np.zeros(2, np.uint64),
        "vector": np.ones(5),
        "gradient": np.ones(5),
        "buffer": np.ones(5),
        "sources": np.ones((2, 5)),
    }


def train(a, **changes):
    arguments = {
        "layers": LAYERS,
        "ranges": [(0, OUT * (IN + 1), 0.1, 0.9, 0.0, 0.0, False, False, True)],
        "batch_size": 4,
        "first_step": 0,
        "last_step": 4,
        "mean": True,
        "loss_limit": 0.0,
    }
    names = ("x", "target", "parameters", "momentum", "epoch_seeds", "losses")
    return _core.train(**{name: a[name] for name in names}, **(arguments | changes))


GROUP = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}

# What each function reads, what it writes, and a call.
CALLS = {
    "linear_forward": (["x", "weight", "bias"], ["out"], lambda a: _core.linear_forward(a["x"], a["weight"], a["bias"], a["out"])),
    "linear_backward": (
        ["g", "x", "weight"],
        ["weight_gradient", "bias_gradient", "input_gradient"],
        lambda a: _core.linear_backward(a["g"], a["x"], a["weight"], a["weight_gradient"], a["bias_gradient"], a["input_gradient"]),
    ),
    "squared_error_sum": (["vector", "gradient"], [], lambda a: _core.squared_error_sum(a["vector"], a["gradient"])),
    "squared_error_mean": (["vector", "gradient"], [], lambda a: _core.squared_error_mean(a["vector"], a["gradient"])),
    "squared_error_terms": (["vector", "gradient"], [], lambda a: _core.squared_error_terms(a["vector"], a["gradient"])),
    "squared_error_gradient": (
        ["vector", "gradient"],
        ["buffer"],
        lambda a: _core.squared_error_gradient(a["vector"], a["gradient"], 1.0, a["buffer"]),
    ),
    "sgd_update": (
        ["gradient"],
        ["vector", "buffer"],
        lambda a: _core.sgd_update(a["vector"], a["gradient"], a["buffer"], GROUP, True),
    ),
    "activation_forward": (["gradient"], ["vector"], lambda a: _core.activation_forward("tanh", a["gradient"], a["vector"])),
    "activation_backward": (
        ["gradient", "buffer"],
        ["vector"],
        lambda a: _core.activation_backward("tanh", a["gradient"], a["buffer"], a["vector"]),
    ),
    "network_forward": (["x", "parameters"], [], lambda a: _core.network_forward(LAYERS, a["x"], a["parameters"])),
    "all_finite": (["vector"], [], lambda a: _core.all_finite(a["vector"])),
    "set_zero": ([], ["vector"], lambda a: _core.set_zero(a["vector"])),
    "average": (["sources"], ["vector"], lambda a: _core.average(a["sources"], a["vector"])),
    "train": (["x", "target", "epoch_seeds"], ["parameters", "momentum", "losses"], train),
    "squared_error": (["x", "target", "parameters"], [], lambda a: _core.squared_error(a["x"], a["target"], a["parameters"], LAYERS)),
    "hessian_eigenvalue": (["x"], [], lambda a: _core.hessian_eigenvalue(a["x"], True)),
    "fill_uniform": ([], ["vector"], lambda a: _core.fill_uniform(0, 1.0, a["vector"])),
}
ALONE = {"all_finite", "set_zero", "hessian_eigenvalue", "fill_uniform"}  # one array, whose size is free
CASES = [(name, argument) for name, (reads, writes, _) in CALLS.items() for argument in reads + writes]
WRITTEN = [(name, argument) for name, (_, writes, _) in CALLS.items() for argument in writes]
SIZED = [(name, argument) for name, argument in CASES if name not in ALONE]


def assert_refused(name, argument, replacement, error):
    """The call fails, in words, and writes nothing."""
    a = arrays()
    a[argument] = replacement
    before = {key: np.array(value, copy=True) for key, value in a.items() if isinstance(value, np.ndarray)}
    with pytest.raises(error) as raised:
        CALLS[name][2](a)
    assert len(str(raised.value)) > 10
    assert str(raised.value).endswith(".")
    for key, value in before.items():
        np.testing.assert_array_equal(a[key], value, err_msg=key)


@pytest.mark.parametrize("name", CALLS)
def test_right_arrays_pass(name):
    CALLS[name][2](arrays())


@pytest.mark.parametrize(
    "name", ["linear_forward", "linear_backward", "squared_error_gradient", "activation_forward", "sgd_update", "set_zero"]
)
def test_wrong_numbers_of_arguments(name):
    for count in (0, 20):
        with pytest.raises(TypeError, match=f"^{count} arguments came; [1-9]+[0-9]* are wanted.$"):
            getattr(_core, name)(*[None] * count)
    with pytest.raises(TypeError, match="no keyword arguments"):
        getattr(_core, name)(x=None)


def test_wrong_kinds_of_arguments():
    x = np.ones(3)
    with pytest.raises(TypeError, match="real number"):
        _core.squared_error_gradient(x, x, "1")
    with pytest.raises(TypeError):
        _core.activation_forward(1, x)
    with pytest.raises(ValueError, match="kind 'softmax' is unknown"):
        _core.activation_forward("softmax", x)
    with pytest.raises(TypeError, match="a list came; a dict is wanted"):
        _core.sgd_update(x, x, None, [0.1, 0.9], True)
    group = GROUP | {"momentum": 0.0}
    with pytest.raises(ValueError, match="ambiguous"):
        _core.sgd_update(x, x, None, group | {"nesterov": x}, True)
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        with pytest.raises(KeyError, match=name):
            _core.sgd_update(x, x, x, {key: value for key, value in group.items() if key != name}, True)
        for value in (-0.1, np.inf, np.nan):
            with pytest.raises(ValueError, match=f"{name} is negative or not finite"):
                _core.sgd_update(x, x, x, group | {name: value}, True)
    with pytest.raises(ValueError, match="lr is 0"):
        _core.sgd_update(x, x, None, group | {"lr": 0}, True)
    assert (x == 1).all()


def test_an_option_may_do_anything_when_it_becomes_a_number():
    class Option:
        def __init__(self, act):
            self.act = act

        def __float__(self):
            self.act()
            return 0.5

    group, x = dict(GROUP), np.ones(3)
    group["lr"] = Option(group.clear)
    with pytest.raises(KeyError, match="momentum"):
        _core.sgd_update(x, x, x, group, True)
    assert (x == 1).all()
    x = np.ones(1_000_000)
    with pytest.raises(ValueError, match="gradient has 1000000 elements; 1 are wanted"):
        _core.sgd_update(x, x.copy(), None, {**GROUP, "lr": Option(lambda: x.resize(1, refcheck=False))}, True)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_wrong_dtype(name, argument):
    right = arrays()[argument]
    for dtype in (np.int64, np.float16, np.complex128, np.object_, right.dtype.newbyteorder()):
        assert_refused(name, argument, right.astype(dtype), TypeError)
    if right.dtype == np.float64 and name not in ALONE and argument != "losses":
        assert_refused(name, argument, right.astype(np.float32), TypeError)  # the other arrays are float64


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_no_array(name, argument):
    for thing in ([1.0, 2.0], 3.0, "text", object()):
        assert_refused(name, argument, thing, TypeError)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_not_contiguous(name, argument):
    right = arrays()[argument]
    twice = np.repeat(right, 2, axis=-1)
    assert_refused(name, argument, twice[..., ::2], ValueError)
    assert_refused(name, argument, right[::-1], ValueError)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_not_aligned(name, argument):
    right = arrays()[argument]
    memory = np.zeros(right.nbytes + 1, np.uint8)
    shifted = memory[1:].view(right.dtype).reshape(right.shape)
    assert not shifted.flags.aligned
    assert_refused(name, argument, shifted, TypeError)


@pytest.mark.parametrize(("name", "argument"), SIZED)
def test_wrong_size(name, argument):
    right = arrays()[argument]
    for axis in range(right.ndim):
        if (argument, axis) == ("sources", 0):
            continue  # any number of sources may be averaged
        if (name, argument, axis) == ("network_forward", "x", 0):
            continue  # any number of rows has outputs
        more = np.concatenate([right, right.take([0], axis)], axis)
        less = right.take(range(right.shape[axis] - 1), axis)
        for wrong in (more, less):
            if (name, argument, axis) == ("train", "losses", 0) and wrong is more:
                wrong = np.zeros(0)
            assert_refused(name, argument, np.ascontiguousarray(wrong), ValueError)
    empty = np.zeros((0,) * right.ndim, right.dtype)
    assert_refused(name, argument, empty, ValueError)


@pytest.mark.parametrize("argument", ["x", "weight", "out", "g", "input_gradient"])
def test_wrong_number_of_dimensions(argument):
    right = arrays()[argument]
    name = "linear_forward" if argument == "out" else "linear_backward"
    for shape in (right.size, (1, *right.shape)):
        assert_refused(name, argument, right.reshape(shape), ValueError)


@pytest.mark.parametrize(("name", "argument"), WRITTEN)
def test_read_only_output(name, argument):
    right = arrays()[argument]
    right.flags.writeable = False
    assert_refused(name, argument, right, ValueError)


@pytest.mark.parametrize("name", CALLS)
def test_read_only_inputs_pass(name):
    """As memory maps and other libraries hand them out."""
    reads, _, call = CALLS[name]
    a = arrays()
    for argument in reads:
        a[argument].flags.writeable = False
    call(a)


@pytest.mark.parametrize("name", CALLS)
def test_references_are_given_back(name):
    a = arrays()
    counts = {key: sys.getrefcount(value) for key, value in a.items()}
    for _ in range(5):
        CALLS[name][2](a)
    assert {key: sys.getrefcount(value) for key, value in a.items()} == counts


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"first_step": 3, "last_step": 2},
        {"last_step": 5},  # two epochs have four steps
        {"ranges": [(0, 16, 0.1, 0.0, 0.0, 0.0, False, False, True)]},
        {"ranges": [(3, 2, 0.1, 0.0, 0.0, 0.0, False, False, True)]},
        {"layers": [("linear", IN, OUT, False)]},
        {"layers": []},
        {"layers": [("conv", IN, OUT, True)]},
        {"layers": [("linear", IN, OUT, True), ("relu", OUT, IN, False)]},
        {"layers": [("linear", IN, 2, True), ("linear", OUT, OUT, True)]},
        {"layers": [("linear", IN, 0, True)]},
        {"layers": [("linear", 2**40, 2**40, True)]},
    ],
    ids=str,
)
def test_train_that_does_not_fit(changes):
    with pytest.raises(ValueError, match=r"\w{3}.*\."):
        train(arrays(), **changes)


def test_momentum_needs_a_buffer():
    with pytest.raises(ValueError, match="momentum needs a buffer"):
        train(arrays() | {"momentum": None})


def test_output_of_its_own():
    a = arrays()
    y = _core.linear_forward(a["x"], a["weight"], None)
    assert y.tolist() == [[4.0] * OUT] * ROWS
    assert _core.linear_forward(a["x"], a["weight"], a["bias"], a["out"]) is a["out"]


@pytest.mark.parametrize(
    "array",
    [
        np.array([[1, "two"]], object),
        np.zeros(3, [("number", "f8"), ("thing", object)]),
        np.asfortranarray(np.ones((3, 2))),
        np.array(5.0),
        [1.0, 2.0],
    ],
    ids=["objects", "objects-in-a-structure", "column-major", "no-dimension", "list"],
)
def test_shuffled_batches_refuse(array):
    with pytest.raises((TypeError, ValueError), match=r"array"):
        _core.ShuffledBatches((array,), np.zeros(1, np.uint32), 1, 1)


def test_shuffled_batches_refuse_an_order_that_does_not_fit():
    array, order = np.ones((3, 2)), np.array([0, 1, 3], np.uint32)
    with pytest.raises(IndexError):
        _core.ShuffledBatches((array,), order, 3, 3)
    (batch,) = _core.ShuffledBatches((array,), order, 3, 2)  # the row that does not exist is not asked for
    assert batch[0].shape == (2, 2)
    with pytest.raises(ValueError, match="end"):
        _core.ShuffledBatches((array,), order, 1, 4)
    with pytest.raises(ValueError, match="batch_size"):
        _core.ShuffledBatches((array,), order, 0, 2)
    with pytest.raises(TypeError):
        _core.ShuffledBatches((array,), order.astype(np.int64), 1, 2)


def test_shuffled_batches_are_checked_once_and_for_all():
    array, order = np.arange(8.0).reshape(4, 2), np.array([2, 0, 1, 3], np.uint32)
    batches = _core.ShuffledBatches((array,), order, 4, 4)
    order[:] = 4_000_000_000
    ((batch,),) = batches
    np.testing.assert_array_equal(batch, array[[2, 0, 1, 3]])


def test_networks_whose_size_cannot_be_counted_are_refused():
    layers = [("linear", 2**57, 4, False), ("linear", 4, 2**57, False)] * 16  # 2^64 weights
    for call in (lambda: _core.Predictor(layers, np.zeros(0)), lambda: _core.network_forward(layers, np.zeros((0, 2**57)), np.zeros(0))):
        with pytest.raises(ValueError, match="more weights"):
            call()


def test_shuffled_batches_keep_what_they_read():
    batches = _core.ShuffledBatches((np.arange(6.0).reshape(3, 2),), np.array([2, 0, 1], np.uint32), 2, 3)
    gc.collect()
    first, second = batches
    np.testing.assert_array_equal(first[0], [[4, 5], [0, 1]])
    np.testing.assert_array_equal(second[0], [[2, 3]])
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("in_features", [0, 3])
@pytest.mark.parametrize("out_features", [0, 2, 9])
def test_empty_arrays_as_numpy_makes_them(rows, in_features, out_features):
    """A new array without elements has strides of 0."""
    x, weight, bias = np.ones((rows, in_features)), np.ones((out_features, in_features)), np.full(out_features, 2.0)
    y = _core.linear_forward(x, weight, bias)
    np.testing.assert_array_equal(y, np.full((rows, out_features), in_features + 2.0))
    gradients = np.zeros_like(weight), np.zeros_like(bias), np.full_like(x, np.nan)
    _core.linear_backward(np.ones_like(y), x, weight, *gradients)
    for gradient, wanted in zip(gradients, (rows, rows, out_features), strict=True):
        np.testing.assert_array_equal(gradient, np.full(gradient.shape, wanted))


def test_sum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        _core.squared_error_sum(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="empty"):
        _core.squared_error_mean(np.zeros(0), np.zeros(0))


def test_select_isa_refuses_a_name():
    before = _core.isa()
    with pytest.raises(ValueError, match=r"'sse9'.*scalar"):
        _core.select_isa("sse9")
    assert _core.isa() == before


def test_set_num_threads_refuses_a_number():
    before = _core.num_threads()
    for count in (0, -1, 1025):
        with pytest.raises(ValueError, match="from 1 to 1024"):
            _core.set_num_threads(count)
    assert _core.num_threads() == before

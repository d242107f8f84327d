"""Linear: shapes, dtypes, foreign arrays, state, copies, and what it refuses."""

import copy
import pickle

import numpy as np
import pytest

import gdlib
from gdlib import Linear, Parameter


def test_initial_values_are_uniform_and_the_same_everywhere():
    model = Linear(100, 50, seed=7)
    values = np.concatenate([model.weight.data.ravel(), model.bias.data])
    assert np.abs(values).max() <= 0.1
    assert np.abs(values).max() > 0.0999
    assert abs(values.mean()) < 0.002
    np.testing.assert_allclose(Linear(4, 1, seed=0).weight.data[0], GOLDEN, rtol=1e-6)
    np.testing.assert_array_equal(Linear(4, 1, dtype=np.float64, seed=0).weight.data.astype(np.float32), Linear(4, 1, seed=0).weight.data)


# The published first outputs of SplitMix64 for seed 0, taken as fractions in [-1/2, 1/2).
GOLDEN = [bits / 2**64 - 0.5 for bits in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)]


def test_without_a_seed_every_model_is_different():
    assert not np.array_equal(Linear(10, 1).weight.data, Linear(10, 1).weight.data)


def test_parameters_are_views_into_one_arena():
    model = Linear(10, 3, seed=0)
    weight, bias = model.parameters()
    assert (weight.name, bias.name) == ("weight", "bias")
    assert weight.data.base is bias.data.base
    assert weight.data.ctypes.data % 64 == 0
    assert bias.data.ctypes.data == weight.data.ctypes.data + 30 * 4
    weight.data[:] = 0
    bias.data = [1, 2, 3]
    np.testing.assert_array_equal(model(np.ones((2, 10), np.float32)), [[1, 2, 3], [1, 2, 3]])
    bias.grad += 1.5  # assigns the same array again
    np.testing.assert_array_equal(bias.grad, 1.5)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        bias.data = np.zeros(2)
    assert isinstance(repr(weight), str)


def test_without_a_bias():
    model = Linear(3, 2, bias=False, seed=0)
    assert model.bias is None
    assert len(model.parameters()) == 1
    x = np.eye(3, dtype=np.float32)
    np.testing.assert_array_equal(model(x), model.weight.data.T)
    model.backward(np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(model.weight.grad, 1)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (1, 1, 1, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("outputs", [1, 9])
def test_any_leading_dimensions(shape, outputs):
    model = Linear(5, outputs, dtype=np.float64, seed=0)
    x = np.random.default_rng(0).standard_normal(shape)
    y = model(x)
    assert y.shape == (*shape[:-1], outputs)
    np.testing.assert_allclose(y, x @ model.weight.data.T + model.bias.data, rtol=1e-14)
    g = np.random.default_rng(1).standard_normal(y.shape)
    input_gradient = model.backward(g)
    assert input_gradient.shape == shape
    np.testing.assert_allclose(input_gradient, g @ model.weight.data, rtol=1e-13, atol=1e-14)
    flat_g, flat_x = g.reshape(-1, outputs), x.reshape(-1, 5)
    np.testing.assert_allclose(model.weight.grad, flat_g.T @ flat_x, rtol=1e-13, atol=1e-14)
    model.backward(g)
    np.testing.assert_allclose(model.bias.grad, 2 * flat_g.sum(axis=0), rtol=1e-13, atol=1e-14)
    model.zero_grad()
    assert not model.weight.grad.any()
    assert not model.bias.grad.any()


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.int32),
        lambda x: x.astype(np.uint8),
        lambda x: x > 2,
        lambda x: x.astype(">f4"),
        lambda x: x.astype(np.float16),
        np.asfortranarray,
        lambda x: x.tolist(),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[::-1][::-1],
        lambda x: np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view("f4").reshape(x.shape),
    ],
    ids=["float64", "int32", "uint8", "bool", "big-endian", "float16", "fortran", "list", "strided", "reversed", "unaligned"],
)
def test_anything_that_numpy_can_view(convert):
    x = convert(np.arange(12, dtype=np.float32).reshape(4, 3))
    model = Linear(3, 2, seed=0)
    wanted = np.asarray(x).astype(np.float64) @ model.weight.data.T.astype(np.float64) + model.bias.data
    np.testing.assert_allclose(model.predict(x), wanted, rtol=1e-5)


def test_what_fits_is_not_copied(tmp_path):
    model = Linear(3, 1, seed=0)
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (x[:, :3], x[::2, 3:], np.from_dlpack(x)[:, :3]):
        model(view)
        assert model._input is view
    np.save(tmp_path / "x.npy", x[:, :3])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model(mapped)
    assert model._input is mapped
    np.testing.assert_array_equal(model.predict(mapped), model.predict(x[:, :3]))


class Unshareable:
    """What a tensor of a dtype without a NumPy equal does."""

    def __dlpack__(self, **options):
        raise RuntimeError("Unsupported dtype in DLTensor.")

    def __dlpack_device__(self):
        return (1, 0)


class Capsule:
    """An object that offers its data by DLPack alone, as jax and torch do."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_dlpack():
    x = np.ones((2, 3), np.float32)
    model = Linear(3, 1, seed=0)
    np.testing.assert_array_equal(model(Capsule(x)), model(x))
    model(Capsule(x))
    assert np.shares_memory(model._input, x)


def test_what_dlpack_cannot_share_is_named():
    with pytest.raises(TypeError, match=r"Unshareable that cannot be shared .*float32"):
        Linear(3, 1)(Unshareable())


def test_out():
    model = Linear(3, 2, seed=0)
    x, out = np.ones((4, 3), np.float32), np.empty((4, 2), np.float32)
    assert model(x, out=out) is out
    np.testing.assert_array_equal(out, model(x))
    assert np.shares_memory(model(x.astype(np.float64), out=out), out)
    for bad in (np.empty((2, 4), np.float32), np.empty((4, 2)), [[0.0] * 2] * 4, np.empty((2, 4), np.float32).T):
        with pytest.raises(ValueError, match="out does not fit"):
            model(x, out=bad)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.ones((2, 4)), ValueError, r"shape \(2, 4\); \[rows, 3\]"),
        (1.0, ValueError, "shape"),
        (np.array([["a", "b", "c"]]), TypeError, "text"),
        (np.ones((2, 3), complex), TypeError, "complex"),
        (np.array([[object()] * 3]), TypeError, "Python objects"),
        ([[1, 2, 3], [4, 5]], TypeError, "viewed as an array"),
        (np.zeros(3, "M8[s]"), TypeError, "real numbers"),
        (np.array([[b"1", b"2", b"3"]]), TypeError, "bytes"),
        (np.ma.masked_array([[1.0, 2.0, 3.0]], [[0, 1, 0]]), TypeError, "masked array"),
        (np.array([[1, 2, 3], [4, np.nan, 6]]), ValueError, r"1 value that is NaN or infinite.*nan.*row 1, column 1"),
        (np.array([[1, 2, np.inf]], np.float32), ValueError, "row 0, column 2"),
        (np.array([[1, 2, 1e300]]), ValueError, "too large for float32"),
    ],
)
def test_bad_input_is_named(x, error, words):
    model = Linear(3, 2, seed=0)
    for call in (model, model.predict):
        with pytest.raises(error, match=words):
            call(x)


def test_a_sparse_matrix_is_named():
    class Sparse:
        nnz = 1

        def toarray(self):
            raise AssertionError

    with pytest.raises(TypeError, match=r"sparse.*toarray"):
        Linear(3, 1)(Sparse())


def test_an_infinite_output_of_finite_input_is_a_divergence():
    model = Linear(2, 1, seed=0)
    model.weight.data = np.full((1, 2), 3e38)
    with pytest.raises(gdlib.DivergenceError, match="grown too large"):
        model(np.ones((1, 2)))
    model.weight.data[0, 0] = np.nan
    with pytest.raises(gdlib.DivergenceError, match="weights hold NaN"):
        model.predict(np.ones((1, 2), np.float32))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((0, 1), ValueError), ((1, -1), ValueError), ((1.5, 1), TypeError), ((True, 1), TypeError), (("3", 1), TypeError)],
)
def test_bad_sizes(arguments, error):
    with pytest.raises(error, match="_features is"):
        Linear(*arguments)


def test_bad_options():
    with pytest.raises(TypeError, match="float32 or float64"):
        Linear(1, 1, dtype=np.float16)
    with pytest.raises(ValueError, match="seed"):
        Linear(1, 1, seed=-1)
    with pytest.raises(ValueError, match="seed"):
        Linear(1, 1, seed=2**64)
    with pytest.raises(ValueError, match="memory of any machine"):
        Linear(10**9, 10**9)


def test_backward_wants_a_forward_and_the_right_shape():
    model = Linear(3, 2, seed=0)
    with pytest.raises(RuntimeError, match="call the model"):
        model.backward(np.ones((1, 2)))
    model(np.ones((4, 3)))
    for shape in [(4,), (2, 4), (4, 1), (3, 2), (8,)]:
        with pytest.raises(ValueError, match="the gradient has shape"):
            model.backward(np.ones(shape, np.float32))
    assert not model.weight.grad.any()


def test_state_dict():
    model, other = Linear(3, 2, seed=0), Linear(3, 2, seed=1)
    state = model.state_dict()
    assert list(state) == ["weight", "bias"]
    state["weight"][:] = 5  # a copy
    assert (model.weight.data != 5).all()
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(other.weight.data, model.weight.data)
    before = other.state_dict()
    with pytest.raises(KeyError, match=r"missing \['bias'\], unexpected \['extra'\]"):
        other.load_state_dict({"weight": state["weight"], "extra": 1})
    with pytest.raises(ValueError, match="bias has shape"):
        other.load_state_dict({"weight": np.zeros((2, 3)), "bias": np.zeros(3)})
    with pytest.raises(TypeError, match="text"):
        other.load_state_dict({"weight": np.zeros((2, 3)), "bias": ["a", "b"]})
    with pytest.raises(ValueError, match="bias would hold a number that does not fit float32"):
        other.load_state_dict({"weight": np.zeros((2, 3)), "bias": [0, 1e300]})
    with pytest.raises(TypeError, match="state dict is a NoneType"):
        other.load_state_dict(None)
    with pytest.raises(KeyError, match="unexpected"):
        other.load_state_dict({1: 2, "a": 3})
    for name, values in before.items():
        np.testing.assert_array_equal(other.state_dict()[name], values)


def twice(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, twice], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(duplicate):
    model = Linear(3, 2, dtype=np.float64, seed=0)
    model(np.ones((1, 3)))
    model.backward(np.ones((1, 2)))
    model.feature_names = ["a", "b", "c"]
    twin = duplicate(model)
    np.testing.assert_array_equal(twin.weight.data, model.weight.data)
    np.testing.assert_array_equal(twin.weight.grad, model.weight.grad)
    assert twin.feature_names == ["a", "b", "c"]
    assert twin.weight.data.base is twin.bias.data.base
    assert twin.weight.data.ctypes.data % 64 == 0
    twin.weight.data[:] = 0
    assert model.weight.data.all()
    gdlib.SGD(twin.parameters(), lr=1.0).step()
    assert twin.weight.data.any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, twice], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_still_trains_its_copied_model(duplicate):
    model = Linear(3, 1, dtype=np.float64, seed=0)
    optimizer = gdlib.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, target, criterion = np.eye(3), np.ones((3, 1)), gdlib.MSELoss()

    def train(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            criterion(model(x), target)
            model.backward(criterion.backward())
            optimizer.step()
        gdlib.fit(model, x, target, loss=criterion, optimizer=optimizer, epochs=3, batch_size=3, shuffle=False)
        return model.state_dict()

    train(model, optimizer)
    twins = duplicate((model, optimizer))
    for name, values in train(model, optimizer).items():
        assert not np.array_equal(twins[0].state_dict()[name], values)
    for name, values in train(*twins).items():
        np.testing.assert_array_equal(values, model.state_dict()[name])


@pytest.mark.parametrize("outputs", [1, 4, 8, 40])
def test_a_result_may_not_overlap_what_it_is_computed_from(outputs):
    model = Linear(outputs, outputs, seed=0)
    memory = np.ones((20, outputs), np.float32)
    x = memory[:16]
    before = model.weight.data.copy()
    for out in (x, memory[4:], memory[2:18]):
        with pytest.raises(ValueError, match="out shares memory with x"):
            model(x, out=out)
    with pytest.raises(ValueError, match="out shares memory with weight"):
        model(np.ones((outputs, outputs), np.float32), out=model.weight.data)
    model(x)
    with pytest.raises(ValueError, match="input_gradient shares memory with x"):
        model.backward(np.ones((16, outputs), np.float32), out=x)
    np.testing.assert_array_equal(model.weight.data, before)
    out = np.empty_like(x)
    assert model.backward(np.ones((16, outputs), np.float32), out=out) is out


def test_repr_names_the_sizes():
    assert repr(Linear(3, 2, seed=0)) == "Linear(in_features=3, out_features=2, bias=True, dtype=float32)"
    assert isinstance(Linear(1, 1).weight, Parameter)

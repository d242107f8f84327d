"""The squared error's sum, terms and gradient, and the gradients of a whole layer against central differences."""

import numpy as np
import pytest

from gdlib import _core
from tests import oracle
from tests.kernels.guarded import Guarded, poisoned, values
from tests.kernels.sweep import ALL, past_l3


def pair(n, dtype):
    rng = np.random.default_rng(n)
    return poisoned(values(rng, n, dtype)), poisoned(values(rng, n, dtype))


def test_terms_and_gradient(isa, dtype):
    for n in (*ALL, 1000):
        output, target = pair(n, dtype)
        terms, gradient = _core.squared_error_terms(output, target), _core.squared_error_gradient(output, target, 0.75)
        assert terms.dtype == gradient.dtype == dtype
        oracle.assert_within(terms, oracle.squared_error_terms(output, target), f"terms, n {n}")
        oracle.assert_within(gradient, oracle.squared_error_gradient(output, target, 0.75), f"gradient, n {n}")


def test_results_have_the_shape_of_the_output(isa, dtype):
    output, target = np.ones((3, 4, 5), dtype), np.zeros((3, 4, 5), dtype)
    assert _core.squared_error_terms(output, target).shape == (3, 4, 5)
    assert _core.squared_error_gradient(output, target, 1.0).shape == (3, 4, 5)
    assert _core.squared_error_terms(np.zeros((0, 3), dtype), np.zeros((0, 3), dtype)).shape == (0, 3)
    with pytest.raises(ValueError, match="another shape"):
        _core.squared_error_terms(output, target.ravel())


def test_gradient_into_memory_that_is_there(isa, dtype):
    for n in (*ALL, 40_000):
        output, target = pair(n, dtype)
        out = Guarded(np.zeros(n, dtype))
        assert _core.squared_error_gradient(output, target, 0.75, out.array) is out.array
        out.check()
        assert out.array.tobytes() == _core.squared_error_gradient(output, target, 0.75).tobytes()
    n = past_l3(dtype, 3)  # the result bypasses the caches
    output, target = np.resize(output, n), np.resize(target, n)
    memory = np.zeros(n + 3, dtype)
    _core.squared_error_gradient(output, target, 0.75, memory[1:-2])
    assert memory[1:-2].tobytes() == _core.squared_error_gradient(output, target, 0.75).tobytes()
    assert memory[[0, -2, -1]].tolist() == [0, 0, 0]
    for other in (output, target):
        with pytest.raises(ValueError, match="shares memory"):
            _core.squared_error_gradient(output.copy() if other is target else other, other, 1.0, writable(other))


def writable(array):
    view = array.view()
    view.flags.writeable = True
    return view


@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-3])
def test_scale(isa, dtype, scale):
    output, target = pair(37, dtype)
    scale = float(dtype(scale))
    oracle.assert_within(_core.squared_error_gradient(output, target, scale), oracle.squared_error_gradient(output, target, scale))


def test_sum(isa, dtype):
    """Sizes up to and around a block of 64 registers of 2 to 16 lanes."""
    for n in (*ALL[1:], *(64 * lanes + d for lanes in (2, 4, 8, 16) for d in (-1, 0, 1)), 5000):
        output, target = pair(n, dtype)
        got = np.array(_core.squared_error_sum(output, target))
        oracle.assert_within(got, oracle.squared_error_sum(output, target, n - 1), f"n {n}")


def test_means_are_the_sum_and_the_gradient_over_the_elements(isa, dtype):
    for n in (1, 3, 37, 40_000):
        output, target = pair(n, dtype)
        assert _core.squared_error_mean(output, target) == _core.squared_error_sum(output, target) / n
        got = _core.squared_error_gradient(output, target, None)
        assert got.tobytes() == _core.squared_error_gradient(output, target, 1 / n).tobytes()


def test_sum_of_a_million(isa, dtype):
    """64 terms per lane and the 4 levels of 16 lanes' sum are added in dtype; the rest in double, whatever n is. Equal terms round alike,
    so that the error of a longer float32 sum would show."""
    output, target = np.full(1_000_003, 1.1, dtype), np.zeros(1_000_003, dtype)
    oracle.assert_within(np.array(_core.squared_error_sum(output, target)), oracle.squared_error_sum(output, target, 64 + 4))


def test_a_sum_has_the_same_bits_on_any_threads(isa, dtype):
    """Parts of 16,384 terms are added in their order."""
    output, target = pair(100_003, dtype)
    sums = set()
    for threads in range(1, 9):
        _core.set_num_threads(threads)
        sums.add(_core.squared_error_sum(output, target))
    assert len(sums) == 1
    parts = range(0, 100_003, 1 << 14)
    wanted = 0.0
    for begin in parts:  # not by sum(), which makes up for roundings
        wanted += _core.squared_error_sum(output[begin : begin + (1 << 14)], target[begin : begin + (1 << 14)])
    assert sums == {wanted}


def test_read_only_inputs(isa, dtype):
    output, target = pair(9, dtype)
    assert not output.flags.writeable
    assert _core.squared_error_sum(output, target) > 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (33, 17, 1), (20, 9, 8), (7, 20, 11)], ids=lambda s: "x".join(map(str, s)))
def test_gradients_against_central_differences(isa, shape):
    """The loss is a quadratic of weight and bias, and of x: its central difference has no truncation error, so a wide step may be used."""
    rows, in_features, out_features = shape
    rng = np.random.default_rng(rows)
    x, weight = values(rng, (rows, in_features), np.float64), values(rng, (out_features, in_features), np.float64)
    bias, target = values(rng, out_features, np.float64), values(rng, (rows, out_features), np.float64)

    def loss():
        return _core.squared_error_sum(_core.linear_forward(x, weight, bias), target)

    def central_differences(array, h=0.5):
        gradient = np.empty_like(array)
        for place in np.ndindex(array.shape):
            kept = array[place]
            array[place] = kept + h
            above = loss()
            array[place] = kept - h
            gradient[place] = (above - loss()) / (2 * h)
            array[place] = kept
        return gradient

    # One rounding of the loss, over the step; a hundred of them, and the loss's own sum, stay well below 1e-12 of it.
    tolerance = 1e-12 * (1 + loss())
    upstream = _core.squared_error_gradient(_core.linear_forward(x, weight, bias), target, 1.0)
    gradients = [Guarded(np.zeros_like(array)) for array in (weight, bias, x)]
    _core.linear_backward(upstream, x, weight, *(gradient.array for gradient in gradients))
    for name, array, gradient in zip(("weight", "bias", "x"), (weight, bias, x), gradients, strict=True):
        gradient.check()
        np.testing.assert_allclose(gradient.array, central_differences(array), rtol=0, atol=tolerance, err_msg=name)

    # The fused step takes the same gradient: with lr 1 it is what the parameters lose.
    start = np.concatenate([weight.ravel(), bias])
    after = start.copy()
    ranges = [(0, start.size, 1.0, 0.0, 0.0, 0.0, False, False, True)]
    _core.train(x, target, after, None, [("linear", in_features, out_features, True)], ranges, rows, None, 0, 1, False, 0.0, np.zeros(1))
    wanted = np.concatenate([central_differences(weight).ravel(), central_differences(bias)])
    np.testing.assert_allclose(start - after, wanted, rtol=0, atol=tolerance, err_msg="fused step")

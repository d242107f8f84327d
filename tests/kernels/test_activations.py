"""relu, tanh and sigmoid: their values to 3 units of the last place over the whole range, their derivatives, and what they leave alone."""

from itertools import product

import numpy as np
import pytest

from gdlib import _core
from tests.kernels.guarded import Guarded, poisoned, values
from tests.kernels.sweep import ALL, past_l3

KINDS = ("relu", "tanh", "sigmoid")
ULPS = 3  # the largest error that 10^7 arguments of each type have shown on each table is 2.56
EXTENDED = np.longdouble  # 64 bits of mantissa or more: 11 beyond float64


def activation(kind, x):
    """The definition, in extended precision and in forms that lose nothing: e^-|x| does not overflow, expm1 does not cancel."""
    x = np.asarray(x).astype(EXTENDED)
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "tanh":
        t = np.expm1(-2 * np.abs(x))
        return np.copysign(-t / (2 + t), x)
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def derivative(kind, y):
    y = np.asarray(y).astype(EXTENDED)
    return {"relu": (y > 0).astype(EXTENDED), "tanh": 1 - y * y, "sigmoid": y * (1 - y)}[kind]


def assert_within_ulps(got, wanted, ulps=ULPS):
    unit = np.spacing(np.abs(wanted).astype(got.dtype)).astype(EXTENDED)
    error = np.abs(got.astype(EXTENDED) - wanted) / unit
    worst = int(np.argmax(error))  # NaN counts as the largest
    assert error.max(initial=0) <= ulps, f"{got.ravel()[worst]!r} is {float(error.ravel()[worst])} units from {wanted.ravel()[worst]}"


def whole_range(dtype):
    """Both signs: even steps where the functions bend, every magnitude down to the smallest subnormal, and where results underflow."""
    info = np.finfo(dtype)
    vanishing = 105 if dtype == np.float32 else 747
    magnitudes = np.concatenate(
        [
            np.linspace(0, 1, 20001),
            np.linspace(1, 12, 20001),
            np.linspace(12, vanishing, 20001),
            np.geomspace(float(info.tiny), float(info.max) / 4, 20001),
            float(info.smallest_subnormal) * np.arange(1, 200),
            np.log(2) / 2 * np.arange(1, 2 * vanishing),  # where the reduced argument changes sign and place
        ]
    ).astype(dtype)
    return np.concatenate([magnitudes, -magnitudes])


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_range(isa, dtype, kind):
    x = whole_range(dtype)
    assert_within_ulps(_core.activation_forward(kind, x), activation(kind, x), 0 if kind == "relu" else ULPS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tanh", "sigmoid"])
def test_every_256th_float32(isa, kind):
    for begin in range(0, 0x43000000, 1 << 26):  # up to 128, by their bits
        x = np.arange(begin, min(begin + (1 << 26), 0x43000000), 256, np.uint32).view(np.float32)
        for signed in (x, -x):
            assert_within_ulps(_core.activation_forward(kind, signed), activation(kind, signed))


@pytest.mark.parametrize("kind", KINDS)
def test_small_arguments_of_tanh_and_tails_of_sigmoid_keep_their_digits(isa, dtype, kind):
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.array([tiny, -tiny, 0.0, -0.0, 1e-20, -1e-20], dtype)
    got = _core.activation_forward(kind, x)
    if kind == "tanh":
        np.testing.assert_array_equal(got, x)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(x))
    elif kind == "sigmoid":
        assert (got == 0.5).all()
        low = np.array([-103.0 if dtype == np.float32 else -744.0], dtype)
        assert 0 < _core.activation_forward(kind, low)[0] < np.finfo(dtype).tiny  # a subnormal number, not zero
    else:
        np.testing.assert_array_equal(got, [tiny, 0, 0, 0, x[4], 0])


def test_extremes(isa, dtype):
    largest = np.finfo(dtype).max
    x = np.array([np.inf, -np.inf, largest, -largest], dtype)
    np.testing.assert_array_equal(_core.activation_forward("relu", x), [np.inf, 0, largest, 0])
    np.testing.assert_array_equal(_core.activation_forward("tanh", x), [1, -1, 1, -1])
    np.testing.assert_array_equal(_core.activation_forward("sigmoid", x), [1, 0, 1, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_nan_and_alone(isa, dtype, kind):
    for place in range(37):
        x = np.full(37, 0.5, dtype)
        x[place] = np.nan
        assert np.flatnonzero(np.isnan(_core.activation_forward(kind, x))).tolist() == [place]
        g = np.full(37, 2.0, dtype)
        g[place] = np.nan
        y = np.full(37, 0.5, dtype)
        assert np.flatnonzero(np.isnan(_core.activation_backward(kind, y, g))).tolist() == [place]
    y[3] = np.nan
    assert np.isnan(_core.activation_backward(kind, y, np.full(37, np.nan, dtype))[3])


@pytest.mark.parametrize("kind", KINDS)
def test_tanh_and_sigmoid_never_leave_their_range(isa, dtype, kind):
    y = _core.activation_forward(kind, whole_range(dtype))
    assert y.min() >= (-1 if kind == "tanh" else 0)
    assert kind == "relu" or y.max() <= 1


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_all_sizes(isa, dtype, kind, threads):
    """Each size between canaries and out of NaN; an element has the same bits wherever it lies."""
    _core.set_num_threads(threads)
    rng = np.random.default_rng(5)
    x, g = 3 * values(rng, ALL[-1], dtype), values(rng, ALL[-1], dtype)
    whole, chained = _core.activation_forward(kind, x), None
    assert_within_ulps(whole, activation(kind, x))
    chained = _core.activation_backward(kind, whole, g)
    np.testing.assert_allclose(chained, (g * derivative(kind, whole)).astype(dtype), rtol=0, atol=4 * np.finfo(dtype).eps)
    for n in ALL:
        for begin in {0, ALL[-1] - n}:
            part = slice(begin, begin + n)
            out = Guarded(np.zeros(n, dtype))
            _core.activation_forward(kind, poisoned(x[part]), out.array)
            out.check()
            assert out.array.tobytes() == whole[part].tobytes()
            _core.activation_backward(kind, poisoned(whole[part]), poisoned(g[part]), out.array)
            out.check()
            assert out.array.tobytes() == chained[part].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_bypasses_the_caches(isa, dtype, kind):
    """Results in a caller's memory that no cache holds, where lines do not begin; the bits are those of a new array."""
    n = past_l3(dtype, 2)
    values_there = values(np.random.default_rng(7), 1_000, dtype)
    x = np.resize(values_there, n)
    wanted = _core.activation_forward(kind, values_there)
    chained = _core.activation_backward(kind, wanted, values_there)
    y = np.resize(wanted, n)
    memory = np.zeros(n + 40, dtype)
    calls = [(_core.activation_forward, (kind, x), wanted), (_core.activation_backward, (kind, y, x), chained)]
    for begin, (call, arguments, pattern) in product((1, 15), calls):
        out = memory[begin : begin + n]
        memory[...] = -7
        assert call(*arguments, out) is out
        assert out.tobytes() == np.resize(pattern, n).tobytes()
        assert (memory[:begin] == -7).all()
        assert (memory[begin + n :] == -7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_in_place(isa, dtype, kind):
    rng = np.random.default_rng(6)
    x, g = values(rng, (5, 13), dtype), values(rng, (5, 13), dtype)
    wanted = _core.activation_forward(kind, x)
    both = Guarded(x)
    assert _core.activation_forward(kind, both.array, both.array) is both.array
    both.check()
    assert both.array.tobytes() == wanted.tobytes()
    chained = Guarded(g)
    assert _core.activation_backward(kind, wanted, chained.array, chained.array) is chained.array
    chained.check()
    assert chained.array.tobytes() == _core.activation_backward(kind, wanted, g).tobytes()
    with pytest.raises(ValueError, match="shares memory with y"):
        _core.activation_backward(kind, wanted, g, wanted)
    memory = np.ones(20, dtype)
    with pytest.raises(ValueError, match="shares memory"):
        _core.activation_forward(kind, memory[:15], memory[5:])


@pytest.mark.parametrize("kind", ["tanh", "sigmoid"])
def test_the_derivative_is_that_of_the_value(isa, kind):
    """Central differences in float64: the truncation is h^2 / 6 of the third derivative, at most 2; the rounding 1e-16 / h."""
    x, h = np.linspace(-6, 6, 501), 1e-5
    above, below = _core.activation_forward(kind, x + h), _core.activation_forward(kind, x - h)
    slope = _core.activation_backward(kind, _core.activation_forward(kind, x), np.ones_like(x))
    np.testing.assert_allclose(slope, (above - below) / (2 * h), rtol=0, atol=1e-10)


def test_the_gradient_of_relu_at_zero_is_zero(isa, dtype):
    y = _core.activation_forward("relu", np.array([-1, 0, 2], dtype))
    np.testing.assert_array_equal(_core.activation_backward("relu", y, np.array([np.inf, np.inf, 5], dtype)), [0, 0, 5])


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'gelu' is unknown"):
        _core.activation_forward("gelu", np.ones(3))

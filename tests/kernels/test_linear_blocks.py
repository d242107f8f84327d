"""A linear layer too large for one block, panel or task: against the oracle, and bit for bit across threads and batches."""

import numpy as np
import pytest

from gdlib import _core
from tests import oracle
from tests.kernels.guarded import Guarded, poisoned, values
from tests.kernels.sweep import past_l3

THREADS = range(1, 9)

# (rows, in_features, out_features). A product has panels of up to 3 vectors and strips of up to 8 rows; a block of depth ends at 4 KiB of
# a row, or where two panels fill half of L2; columns of A are laid out anew where its rows are a page or a multiple of 1 KiB apart, and
# with AVX2 and scalar kernels where several blocks of panels read them from beyond L2; there 256 strips of a task's rows meet larger
# blocks of B. A small B whose rows do not begin with lines is copied from 9 strips on there, others from 3 or 65 on, but from 2 on where
# its rows are a multiple of a page apart, or of half a page and it is small. Up to 8 rows with AVX-512, and 4 elsewhere, transpose
# weights in registers. Up to 12 rows, or 8 of a B whose rows are a multiple of a page apart, products of up to 8 steps, and of up to 64
# with a small B, are computed by whole rows in blocks of 16 KiB, of 8 to 64 steps, whose lines are in L1 together, but where columns of A
# are a page apart. Work for threads begins at 60,000 cycles, or at 400,000 if they sleep; the rows of a gradient are cut after 16,384.
# With fewer than 8 outputs a task has 512 KiB of x, at least 64 rows, and as many long rows as a vector has lanes, which fill 16 KiB
# together, are read for 4 and for 2 outputs at once. In a gradient, rows are the depth and in_features the columns; with fewer than 4
# outputs, four rows are read at a time, and 2 KiB of their features. Sums over rows of more than 1 KiB read eight rows at a time, and
# threads share the columns of 1 MB and more.
SHAPES = [
    (95, 255, 9),
    (96, 256, 8),
    (97, 257, 49),
    (193, 40, 97),
    (5, 511, 770),
    (97, 9, 1537),
    (257, 769, 8),
    (513, 130, 10),
    (20, 2050, 100),
    (300, 1100, 256),
    (70, 200, 512),
    (1100, 60, 256),
    (900, 1000, 700),
    (2201, 1001, 400),
    (16500, 9, 9),
    (129, 2049, 1),
    (200, 1111, 3),
    (75, 1029, 2),
    (6, 1100, 300),
    (7, 2048, 40),
    (11, 1000, 200),
    (13, 1024, 70),
    (13, 512, 70),
    (13, 256, 70),
    (10, 256, 40),
    (40, 1024, 20),
    (700, 400, 7),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def layer(shape, dtype):
    rows, in_features, out_features = shape
    rng = np.random.default_rng(rows)
    x = poisoned(values(rng, (rows, in_features), dtype), row_gap=3)
    return x, poisoned(values(rng, (out_features, in_features), dtype)), poisoned(values(rng, out_features, dtype)), rng


def forward(x, weight, bias):
    out = Guarded(np.zeros((x.shape[0], weight.shape[0]), x.dtype))
    assert _core.linear_forward(x, weight, bias, out.array) is out.array
    out.check()
    return out.array


def backward(g, x, weight, weight_contents, bias_contents):
    gradients = [Guarded(weight_contents), Guarded(bias_contents), Guarded(np.zeros(x.shape, x.dtype))]
    _core.linear_backward(g, x, weight, *(gradient.array for gradient in gradients))
    for gradient in gradients:
        gradient.check()
    return [gradient.array for gradient in gradients]


@shapes
def test_forward(isa, dtype, shape):
    x, weight, bias, _ = layer(shape, dtype)
    results = []
    for threads in THREADS:
        _core.set_num_threads(threads)
        results.append(forward(x, weight, bias))
    oracle.assert_within(results[0], oracle.linear_forward(x, weight, bias))
    assert all(result.tobytes() == results[0].tobytes() for result in results)


@shapes
def test_backward(isa, dtype, shape):
    x, weight, bias, rng = layer(shape, dtype)
    g = poisoned(values(rng, (shape[0], shape[2]), dtype))
    contents = values(rng, weight.shape, dtype)
    results = []
    for threads in THREADS:
        _core.set_num_threads(threads)
        results.append(backward(g, x, weight, contents, bias))
    weight_gradient, bias_gradient, input_gradient = results[0]
    oracle.assert_within(weight_gradient, oracle.weight_gradient(g, x, contents), "weight gradient")
    oracle.assert_within(bias_gradient[:, None], oracle.bias_gradient(g, bias), "bias gradient")
    oracle.assert_within(input_gradient, oracle.input_gradient(g, weight), "input gradient")
    for result in results:
        assert [array.tobytes() for array in result] == [array.tobytes() for array in results[0]]


@pytest.mark.parametrize("out_features", [1, 2, 3, 5, 7, 8, 49])
@pytest.mark.parametrize("in_features", [1, 67, 257, 1024, 1100])  # rows of 1,024 fall on one set of L1
def test_row_does_not_depend_on_its_batch(isa, dtype, in_features, out_features):
    x, weight, bias, _ = layer((130, in_features, out_features), dtype)
    batch = forward(x, weight, bias)
    for row in range(130):
        assert forward(x[row : row + 1], weight, bias).tobytes() == batch[row].tobytes()
    for rows in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 95, 96, 97, 129):
        assert forward(x[:rows], weight, bias).tobytes() == batch[:rows].tobytes()
        assert forward(x[130 - rows :], weight, bias).tobytes() == batch[130 - rows :].tobytes()


@pytest.mark.parametrize("out_features", [9, 40, 70])
@pytest.mark.parametrize("in_features", [256, 512, 1024, 1100])  # the weights' rows fall on some sets of L1, or on all
def test_input_gradient_of_a_row_does_not_depend_on_its_batch(isa, dtype, in_features, out_features):
    x, weight, bias, rng = layer((130, in_features, out_features), dtype)
    g = values(rng, (130, out_features), dtype)
    batch = backward(g, x, weight, weight, bias)[2]
    for rows in (1, 4, 5, 8, 9, 12, 13, 16, 17, 24, 25, 64, 65, 129):
        assert backward(g[:rows], x[:rows], weight, weight, bias)[2].tobytes() == batch[:rows].tobytes()
        assert backward(g[130 - rows :], x[130 - rows :], weight, weight, bias)[2].tobytes() == batch[130 - rows :].tobytes()


@pytest.mark.parametrize("in_features", [16, 1104])
def test_an_underflow_keeps_its_sign_in_any_batch(isa, dtype, in_features):
    """Chains of fused multiply-adds end at -0, which the addition of a bias that is not there would turn into 0."""
    tiny = np.finfo(dtype).tiny
    x, weight = np.full((33, in_features), -tiny, dtype), np.full((7, in_features), tiny, dtype)
    batch = _core.linear_forward(x, weight, None)
    assert not batch.any()
    for rows in (1, 2, 3, 8, 17):
        assert _core.linear_forward(x[:rows], weight, None).tobytes() == batch[:rows].tobytes()


def test_rows_may_lie_on_each_other(isa, dtype):
    """A broadcast row has a stride of 0."""
    x, weight, bias, _ = layer((1, 37, 9), dtype)
    repeated = np.broadcast_to(x, (20, 37))
    assert repeated.strides[0] == 0
    for outputs in (3, 9):
        wanted = np.repeat(forward(x, weight[:outputs], bias[:outputs]), 20, axis=0)
        assert forward(repeated, weight[:outputs], bias[:outputs]).tobytes() == wanted.tobytes()


def test_gradients_of_input_and_bias_are_optional(isa, dtype):
    x, weight, bias, rng = layer((33, 21, 5), dtype)
    g, contents = values(rng, (33, 5), dtype), values(rng, (5, 21), dtype)
    wanted, _, _ = backward(g, x, weight, contents, bias)
    weight_gradient = Guarded(contents)
    _core.linear_backward(g, x, weight, weight_gradient.array, None, None)
    weight_gradient.check()
    assert weight_gradient.array.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("in_features", [100, 300])
def test_rows_from_memory(isa, dtype, in_features):
    """More than a quarter of the L3, which is read row by row, with and without a gap: the bits of a few rows in the cache."""
    rows = past_l3(dtype, 4) // in_features + 1
    x, weight, bias, _ = layer((64, in_features, 3), dtype)
    repeated = np.tile(x, (rows // 64 + 1, 1))
    apart = np.full((len(repeated), in_features + 3), np.nan, dtype)
    apart[:, :in_features] = repeated
    for outputs in (1, 3):
        wanted = _core.linear_forward(x, weight[:outputs], bias[:outputs])
        for given in (repeated, apart[:, :in_features]):
            whole = _core.linear_forward(given, weight[:outputs], bias[:outputs])
            assert whole.tobytes() == np.tile(wanted, (rows // 64 + 1, 1)).tobytes()


@pytest.mark.parametrize("out_features", [3, 9])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_output_that_is_not_finite_is_an_error(isa, dtype, out_features, bad):
    x, weight, bias, _ = layer((20, 7, out_features), dtype)
    x = x.copy()
    x[13, 6] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        _core.linear_forward(x, weight, bias)
    assert np.isfinite(_core.linear_forward(x[:13], weight, bias)).all()

"""The largest eigenvalue of the Hessian, by power iteration, against a full eigenvalue decomposition."""

import numpy as np
import pytest

from gdlib import _core
from tests.kernels.guarded import poisoned, values


def largest_eigenvalue(x, has_bias):
    x = np.asarray(x, np.float64)
    if has_bias:
        x = np.column_stack([x, np.ones(len(x))])
    return float(np.linalg.eigvalsh(2 * x.T @ x)[-1])


@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("size", [1, 2, 7, 33, 100])
def test_separated_eigenvalues(isa, dtype, size, has_bias):
    """Singular values that halve: an iteration leaves a sixteenth of the error, so a change below 1e-4 means an error below 1e-5."""
    rng = np.random.default_rng(size)
    left, _ = np.linalg.qr(rng.standard_normal((200, size)))
    right, _ = np.linalg.qr(rng.standard_normal((size, size)))
    x = poisoned((20 * left * 0.5 ** np.arange(size) @ right).astype(dtype), row_gap=3)
    wanted = largest_eigenvalue(x, has_bias)
    got = _core.hessian_eigenvalue(x, has_bias)
    # From below, but for the rounding of a dot product over 200 rows in float32.
    assert wanted * (1 - 1e-4) <= got <= wanted * (1 + 1e-4)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
def test_data_as_they_come(isa, dtype, has_bias):
    """Close eigenvalues stop the iteration early: it still comes within 2%, which is what a learning rate needs."""
    for rows, cols in ((1, 5), (3, 40), (100, 20), (2003, 67)):
        x = values(np.random.default_rng(rows), (rows, cols), dtype) + dtype(0.1)
        wanted = largest_eigenvalue(x, has_bias)
        assert 0.98 * wanted <= _core.hessian_eigenvalue(x, has_bias) <= wanted * (1 + 1e-4)


def test_same_bits_for_every_number_of_threads(isa, dtype):
    x = values(np.random.default_rng(1), (5003, 67), dtype) + dtype(1)  # several tasks; one large eigenvalue: few iterations
    results = set()
    for threads in (1, 2, 3, 7):
        _core.set_num_threads(threads)
        results.add(_core.hessian_eigenvalue(x, True))
    assert len(results) == 1


def test_matrices_without_curvature(isa, dtype):
    assert _core.hessian_eigenvalue(np.zeros((10, 3), dtype), False) == 0.0
    assert _core.hessian_eigenvalue(np.zeros((10, 3), dtype), True) == pytest.approx(20.0, rel=1e-4)
    assert _core.hessian_eigenvalue(np.zeros((10, 0), dtype), True) == pytest.approx(20.0, rel=1e-6)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("width", [3, 100, 1000, 4000])
def test_no_rows(isa, dtype, width, has_bias):
    x = np.ones((5, width), dtype)
    _core.hessian_eigenvalue(x, has_bias)  # leaves something in the memory that the next call gets
    assert _core.hessian_eigenvalue(x[:0], has_bias) == 0.0


def test_no_features(isa, dtype):
    assert _core.hessian_eigenvalue(np.ones((5, 3), dtype)[:, :0], False) == 0.0

"""MSELoss: reductions, gradients, and what it refuses where PyTorch broadcasts."""

import numpy as np
import pytest

import gdlib
from gdlib import MSELoss


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.standard_normal((7, 3)), rng.standard_normal((7, 3))


def test_reductions(pair):
    output, target = pair
    terms = (output - target) ** 2
    assert MSELoss()(output, target) == pytest.approx(terms.mean(), rel=1e-14)
    assert MSELoss("sum")(output, target) == pytest.approx(terms.sum(), rel=1e-14)
    np.testing.assert_allclose(MSELoss("none")(output, target), terms, rtol=1e-14)
    assert type(MSELoss()(output, target)) is float


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_against_finite_differences(pair, reduction):
    output, target = pair
    criterion = MSELoss(reduction)
    criterion(output, target)
    gradient = criterion.backward()
    step = 1e-6
    for place in [(0, 0), (3, 1), (6, 2)]:
        moved = output.copy()
        moved[place] += step
        up = criterion(moved, target)
        moved[place] -= 2 * step
        assert gradient[place] == pytest.approx((up - criterion(moved, target)) / (2 * step), rel=1e-6)


def test_gradient_without_reduction_takes_one(pair):
    output, target = pair
    criterion = MSELoss("none")
    criterion(output, target)
    factor = np.arange(21.0).reshape(7, 3)
    np.testing.assert_allclose(criterion.backward(factor), 2 * (output - target) * factor, rtol=1e-14)
    with pytest.raises(ValueError, match="one gradient for each term"):
        criterion.backward()
    with pytest.raises(ValueError, match=r"the gradient has shape \(7,\)"):
        criterion.backward(np.ones(7))
    mean = MSELoss()
    mean(output, target)
    with pytest.raises(ValueError, match="takes no gradient"):
        mean.backward(factor)


def test_gradient_into_an_array_that_is_there(pair):
    output, target = pair
    criterion, factor = MSELoss(), np.arange(21.0).reshape(7, 3)
    criterion(output, target)
    wanted, out = criterion.backward(), np.empty((7, 3))
    assert criterion.backward(out=out) is out
    assert out.tobytes() == wanted.tobytes()
    for bad in (np.empty((3, 7)), np.empty(21), np.empty((7, 3), np.float32), np.empty((3, 7)).T, [[0.0] * 3] * 7):
        with pytest.raises(ValueError, match=r"out does not fit; a C-contiguous float64 array of shape \(7, 3\)"):
            criterion.backward(out=bad)
    for taken in (output, target):
        before = taken.tobytes()
        with pytest.raises(ValueError, match="out shares memory"):
            criterion.backward(out=taken)
        assert taken.tobytes() == before
    terms = MSELoss("none")
    terms(output, target)
    wanted = terms.backward(factor)
    assert terms.backward(factor, out=factor) is factor  # one result for each gradient: they may share memory
    assert factor.tobytes() == wanted.tobytes()
    with pytest.raises(ValueError, match="out does not fit"):
        terms.backward(factor, out=np.empty(21))
    for taken in (output, target):
        with pytest.raises(ValueError, match="out shares memory"):
            terms.backward(factor, out=taken)


@pytest.mark.parametrize("convert", [np.asfortranarray, lambda a: a.astype(np.float32), lambda a: a.tolist(), lambda a: a.T.copy().T])
def test_layouts_and_dtypes(pair, convert):
    output, target = pair
    loss = MSELoss()
    assert loss(output, convert(target)) == pytest.approx(((output - target) ** 2).mean(), rel=1e-6)
    assert loss.backward().shape == (7, 3)
    assert loss(convert(output), target) == pytest.approx(((output - target) ** 2).mean(), rel=1e-6)
    assert loss.backward().shape == (7, 3)


def test_a_column_and_a_vector_are_not_broadcast():
    with pytest.raises(ValueError, match=r"\(4, 1\) and the target \(4,\).*target\[:, None\]"):
        MSELoss()(np.ones((4, 1)), np.ones(4))
    with pytest.raises(ValueError, match="equal shapes"):
        MSELoss()(np.ones((4, 2)), np.ones((4, 1)))
    with pytest.raises(ValueError, match="equal shapes"):
        MSELoss()(np.ones((2, 6)), np.ones((3, 4)))


def test_refusals():
    with pytest.raises(ValueError, match="one of mean, sum, none"):
        MSELoss("average")
    with pytest.raises(RuntimeError, match="call the criterion"):
        MSELoss().backward()
    with pytest.raises(ValueError, match="a loss of nothing"):
        MSELoss()(np.ones((0, 1)), np.ones((0, 1)))
    with pytest.raises(TypeError, match="the target holds text"):
        MSELoss()(np.ones(2), np.array(["1", "2"]))


def test_what_is_not_finite():
    one, bad = np.ones((2, 1), np.float32), np.array([[1], [np.nan]], np.float32)
    with pytest.raises(ValueError, match=r"the target holds 1 value.*row 1"):
        MSELoss()(one, bad)
    with pytest.raises(gdlib.DivergenceError, match="the output holds NaN"):
        MSELoss()(bad, one)
    with pytest.raises(gdlib.DivergenceError, match="does not fit float32"):
        MSELoss()(np.full((2, 1), 3e38, np.float32), -one)

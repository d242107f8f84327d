"""StandardScaler, and folding it into a layer."""

import numpy as np
import pytest

from gdlib import Linear
from gdlib.preprocessing import StandardScaler

X = np.random.default_rng(0).standard_normal((50, 4)) * [1, 100, 0.01, 0] + [0, 5, 1e3, 7]


def test_standardises():
    scaler = StandardScaler().fit(X)
    z = scaler.transform(X)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(z.std(axis=0), [1, 1, 1, 0], rtol=1e-9)
    assert scaler.scale_[3] == 1


def test_a_constant_column_with_rounding_noise_keeps_scale_one():
    for rows in (1000, 1_000_000):
        assert StandardScaler().fit(np.full((rows, 1), 0.1)).scale_[0] == 1


def test_folding_answers_raw_rows_as_the_model_answers_standardised_ones():
    scaler = StandardScaler().fit(X)
    model = Linear(4, 3, dtype=np.float64, seed=0)
    model.feature_names = ["a", "b", "c", "d"]
    folded = scaler.fold_into(model)
    np.testing.assert_allclose(folded.predict(X), model.predict(scaler.transform(X)), rtol=1e-9)
    assert folded.feature_names == model.feature_names
    z = scaler.transform(X)
    model.feature_ranges = np.stack([z.min(axis=0), z.max(axis=0)], axis=1).tolist()
    raw = np.stack([X.min(axis=0), X.max(axis=0)], axis=1)
    np.testing.assert_allclose(scaler.fold_into(model).feature_ranges, raw, rtol=1e-9)
    with pytest.raises(ValueError, match="bias"):
        scaler.fold_into(Linear(4, 1, bias=False))
    with pytest.raises(ValueError, match="3 features"):
        scaler.fold_into(Linear(3, 1))


def test_refusals():
    with pytest.raises(RuntimeError, match="call fit"):
        StandardScaler().transform(X)
    with pytest.raises(ValueError, match="NaN"):
        StandardScaler().fit(X).transform(np.full((1, 4), np.nan))
    with pytest.raises(ValueError, match="squares do not fit"):
        StandardScaler().fit([[1e200], [-1e200]])
    with pytest.raises(ValueError, match="NaN"):
        StandardScaler().fit([[1.0, np.nan]])
    with pytest.raises(ValueError, match="shape"):
        StandardScaler().fit([1.0, 2.0])
    with pytest.raises(ValueError, match="shape"):
        StandardScaler().fit(X).transform(X[:, :2])

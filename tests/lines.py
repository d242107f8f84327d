"""A linear problem and a run of fit on it: what several test files share."""

import numpy as np

from gdlib import SGD, Linear, MSELoss, fit


def problem(rows=500, features=10, outputs=1, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, features))
    y = X @ rng.standard_normal((features, outputs)) + 0.5 + 0.1 * rng.standard_normal((rows, outputs))
    return X.astype(dtype), y.astype(dtype)


def run(X, y, *, epochs=5, lr=0.01, dtype=np.float64, optimizer=SGD, loss=None, **options):
    model = Linear(X.shape[1], 1 if y.ndim == 1 else y.shape[1], dtype=dtype, seed=0)
    history = fit(model, X, y, loss=loss or MSELoss(), optimizer=optimizer(model.parameters(), lr=lr), epochs=epochs, **options)
    return model, history

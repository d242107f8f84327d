"""Small networks of every shape, data for them, and their definition in NumPy: what several test files share."""

import numpy as np

from gdlib import DataLoader, Linear, ReLU, Sequential, Sigmoid, Tanh

FUNCTIONS = {
    ReLU: (lambda x: np.maximum(x, 0), lambda y: (y > 0).astype(float)),
    Tanh: (np.tanh, lambda y: 1 - y * y),
    Sigmoid: (lambda x: 1 / (1 + np.exp(-x)), lambda y: y * (1 - y)),
}


def small(activation=Tanh, dtype=np.float64, seed=0, hidden=8, outputs=2):
    return Sequential(Linear(5, hidden, dtype=dtype, seed=seed), activation(), Linear(hidden, outputs, dtype=dtype, seed=seed + 1))


# Every way in which layers may follow each other.
SHAPES = {
    "usual": lambda dtype: small(ReLU, dtype),
    "activation-last": lambda dtype: Sequential(Linear(5, 4, dtype=dtype, seed=0), Tanh(), Linear(4, 3, dtype=dtype, seed=1), Sigmoid()),
    "activation-first": lambda dtype: Sequential(Sigmoid(), Linear(5, 3, dtype=dtype, seed=0)),
    "two-activations": lambda dtype: Sequential(Linear(5, 9, dtype=dtype, seed=0), Tanh(), ReLU(), Linear(9, 1, dtype=dtype, seed=1)),
    "two-linear": lambda dtype: Sequential(Linear(5, 12, False, dtype=dtype, seed=0), Linear(12, 2, dtype=dtype, seed=1)),
    "one-linear": lambda dtype: Sequential(Linear(5, 2, dtype=dtype, seed=0)),
    "only-a-linear-between": lambda dtype: Sequential(Tanh(), Sigmoid(), Linear(5, 10, dtype=dtype, seed=0), Tanh(), Sigmoid()),
    "nested": lambda dtype: Sequential(
        Sequential(Linear(5, 4, dtype=dtype, seed=0), ReLU()),
        Sequential(Sequential(Linear(4, 8, dtype=dtype, seed=1)), Sigmoid()),
        Linear(8, 2, dtype=dtype, seed=2),
    ),
}


def problem(rows=203, outputs=2, dtype=np.float64):
    rng = np.random.default_rng(3)
    X = rng.standard_normal((rows, 5))
    y = np.sin(X @ rng.standard_normal((5, outputs))) + 0.05 * rng.standard_normal((rows, outputs))
    return X.astype(dtype), y.astype(dtype)


def numpy_pass(model, x, target):
    """Output and gradients of the mean squared error in float64: the readable definition."""
    leaves = [leaf for _, leaf in model._leaves()]
    values = [np.asarray(x, np.float64)]
    for leaf in leaves:
        if isinstance(leaf, Linear):
            bias = 0 if leaf.bias is None else leaf.bias.data.astype(np.float64)
            values.append(values[-1] @ leaf.weight.data.T.astype(np.float64) + bias)
        else:
            values.append(FUNCTIONS[type(leaf)][0](values[-1]))
    g = 2 * (values[-1] - target) / values[-1].size
    gradients = []
    for leaf, before, after in reversed(list(zip(leaves, values, values[1:], strict=False))):
        if isinstance(leaf, Linear):
            gradients = [g.T @ before] + ([] if leaf.bias is None else [g.sum(axis=0)]) + gradients
            g = g @ leaf.weight.data.astype(np.float64)
        else:
            g = g * FUNCTIONS[type(leaf)][1](after)
    return values[-1], gradients, g


def loop(model, X, y, optimizer, criterion, epochs, **options):
    losses = []
    for _ in range(epochs):
        total = 0.0
        for x, t in DataLoader(X, y, **options):
            optimizer.zero_grad()
            loss = criterion(model(x), t)
            total += loss * (len(x) / len(X) if criterion.reduction == "mean" else 1)
            model.backward(criterion.backward())
            optimizer.step()
        losses.append(total)
    return losses

"""The reference program: 10,000 x 10 float32, batches of 32, shuffled anew in each of 100 epochs, SGD with lr 0.01."""

import functools
from functools import partial
from typing import Any

import numpy as np

import gdlib
from benchmarks import machine, peers
from benchmarks.measure import Contender, Group, Run
from benchmarks.peers import Regression

ROWS, FEATURES, EPOCHS, BATCH_SIZE, LR = 10_000, 10, 100, 32, 0.01
STEPS = -(-ROWS // BATCH_SIZE)  # an epoch
SLOW_EPOCHS = 2  # for PyTorch: 100 epochs take seconds, and every epoch the same
FLOPS = 4 * ROWS * FEATURES  # an epoch: a multiply-add for each number of X in the output, another in the gradient


@functools.cache
def problem() -> Regression:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((ROWS, FEATURES), dtype=np.float32)
    y = X @ rng.standard_normal((FEATURES, 1), dtype=np.float32) + np.float32(0.1) * rng.standard_normal((ROWS, 1), dtype=np.float32)
    design = np.column_stack([X, np.ones(ROWS)]).astype(np.float64)
    fitted = design @ np.linalg.lstsq(design, y.astype(np.float64))[0]
    return Regression(X, y, right=float(np.mean((fitted - y) ** 2)))


def check(problem: Regression, parameters: Any) -> None:
    """The loss over all rows, in float64, is within 5 % of the noise floor: that of the least-squares fit."""
    weight, bias = (np.asarray(value, np.float64).ravel() for value in parameters)
    loss = float(np.mean((problem.X @ weight + bias - problem.y[:, 0]) ** 2))
    assert loss <= 1.05 * problem.right, f"the final loss is {loss:.3g}; at most 1.05 * {problem.right:.3g} is right"


def gdlib_fit(problem: Regression) -> Run:
    def run() -> Any:
        model = gdlib.Linear(FEATURES, 1, seed=0)
        optimizer = gdlib.SGD(model.parameters(), lr=LR)
        seeds = range(EPOCHS)  # a new order for each epoch, as PyTorch has it
        loss, batch_size = gdlib.MSELoss(), BATCH_SIZE
        gdlib.fit(model, problem.X, problem.y, loss=loss, optimizer=optimizer, epochs=EPOCHS, batch_size=batch_size, seed=seeds)
        return [parameter.data for parameter in model.parameters()]

    return run


def gdlib_loop(problem: Regression) -> Run:
    def run() -> Any:
        model = gdlib.Linear(FEATURES, 1, seed=0)
        criterion = gdlib.MSELoss()
        optimizer = gdlib.SGD(model.parameters(), lr=LR)
        for epoch in range(EPOCHS):
            for x, y in gdlib.DataLoader(problem.X, problem.y, batch_size=BATCH_SIZE, shuffle=True, seed=epoch):
                optimizer.zero_grad()
                _loss = criterion(model(x), y)
                model.backward(criterion.backward())
                optimizer.step()
        return [parameter.data for parameter in model.parameters()]

    return run


def _peer(name: str, function: Any, epochs: int = EPOCHS, variant: str = "", **options: Any) -> Contender:
    return Contender(name, partial(function, epochs=epochs, lr=LR, batch_size=BATCH_SIZE, **options), epochs, variant)


def _pytorch(name: str, function: Any, **options: Any) -> list[Contender]:
    return peers.pytorch(name, partial(function, epochs=SLOW_EPOCHS, lr=LR, batch_size=BATCH_SIZE, **options), SLOW_EPOCHS)


GROUPS = [
    Group(
        "Reference program",
        "epoch",
        [
            Contender("gdlib fit", gdlib_fit, EPOCHS),
            Contender("gdlib readable loop", gdlib_loop, EPOCHS),
            _peer("NumPy loop", peers.numpy_loop),
            *_pytorch("PyTorch loop", peers.pytorch_loop, batches="DataLoader"),
            *_pytorch("PyTorch without DataLoader", peers.pytorch_loop, batches="shuffled"),
            *_pytorch("PyTorch by hand", peers.pytorch_by_hand),
            *(_peer("scikit-learn SGDRegressor", peers.sklearn_sgd, variant=dtype, dtype=dtype) for dtype in ("float32", "float64")),
            _peer("JAX jit(scan), in order", peers.jax_scan, variant="an epoch a call"),
            _peer("JAX jit(scan), in order", peers.jax_scan, variant="all epochs in one call", epochs_a_call=EPOCHS),
            machine.fma_peak("float32", 1, FLOPS),
        ],
        problem,
        check,
        f"An epoch is {STEPS} steps (10,000 for scikit-learn, one for each row; {ROWS // BATCH_SIZE} for JAX). Every run starts with a new "
        f"model, and its final loss must be within 5 % of the noise floor. A run is {EPOCHS} epochs; PyTorch's, {SLOW_EPOCHS}.",
        FLOPS,
        4 * ROWS * (FEATURES + 1),
        rounds=9,
    )
]


def test_reference(time_contender: None) -> None: ...

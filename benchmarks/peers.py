"""Least squares by gradient descent as the peers' users write it: a Linear(features, 1), mean squared error, plain SGD.

Each function prepares arrays and compiled code outside the timing, and returns a run of some epochs from a fresh model; the run returns
(weight, bias) for the check. A peer is imported when it is prepared, so that one that is not installed is only left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.measure import Contender, Run


@dataclass(frozen=True)
class Regression:
    """X [rows, features] and y [rows, 1] from a linear model with noise, and what the check compares a result with."""

    X: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]
    right: Any = None


@contextmanager
def pytorch_threads(count: int) -> Iterator[None]:
    import torch

    torch.set_num_threads(count)  # one setting for the whole process
    yield


@contextmanager
def inference_mode(threads: int = machine.THREADS) -> Iterator[None]:
    """Around the runs: as a decorator it would cost each of them a microsecond."""
    import torch

    with pytorch_threads(threads), torch.inference_mode():
        yield


def pytorch(name: str, prepare: Any, work: float = 1.0, form: str = "", around: Any = pytorch_threads) -> list[Contender]:
    """With one thread and with all: the report keeps the faster."""
    return [
        Contender(name, prepare, work, ", ".join(filter(None, [form, machine.plural(threads)])), partial(around, threads))
        for threads in machine.THREAD_COUNTS
    ]


def pytorch_loop(problem: Regression, epochs: int, lr: float, batch_size: int, batches: str) -> Run:
    """The tutorials' loop over a DataLoader, over batches of the "shuffled" tensors, or over those of the tensors "in order"."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    X, y = torch.from_numpy(problem.X), torch.from_numpy(problem.y)
    loader = DataLoader(TensorDataset(X, y), batch_size=batch_size, shuffle=True)

    def epoch() -> Any:
        if batches == "DataLoader":
            return loader
        rows, targets = pytorch_shuffled(X, y) if batches == "shuffled" else (X, y)
        return zip(rows.split(batch_size), targets.split(batch_size), strict=True)

    def run() -> Any:
        model = torch.nn.Linear(X.shape[1], 1, dtype=X.dtype)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        criterion = torch.nn.MSELoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(epochs):
            for x, target in epoch():
                optimizer.zero_grad()
                loss = criterion(model(x), target)
                loss.backward()
                optimizer.step()
        return model.weight.detach().numpy(), model.bias.detach().numpy()

    return run


def pytorch_shuffled(X: Any, y: Any) -> Any:
    """Rows by `index_select`, which takes a third of the time of X[order]."""
    import torch

    order = torch.randperm(len(X))
    return X.index_select(0, order), y.index_select(0, order)


def pytorch_by_hand(problem: Regression, epochs: int, lr: float, batch_size: int, shuffle: bool = True) -> Run:
    """The gradient written out, without autograd and modules."""
    import torch

    X, y = torch.from_numpy(problem.X), torch.from_numpy(problem.y[:, 0])

    @torch.inference_mode()
    def run() -> Any:
        weight, bias = torch.zeros(X.shape[1], dtype=X.dtype), torch.zeros((), dtype=X.dtype)
        for _ in range(epochs):
            rows, targets = pytorch_shuffled(X, y) if shuffle else (X, y)
            for x, target in zip(rows.split(batch_size), targets.split(batch_size), strict=True):
                residual = torch.mv(x, weight).add_(bias).sub_(target)
                _loss = torch.dot(residual, residual) / len(residual)
                residual.mul_(2 * lr / len(residual))
                weight.sub_(torch.mv(x.T, residual))
                bias.sub_(residual.sum())
        return weight.numpy(), bias.numpy()

    return run


def numpy_loop(problem: Regression, epochs: int, lr: float, batch_size: int, shuffle: bool = True) -> Run:
    """One permutation an epoch, batches as views, arithmetic in place; vectors, as there is one output.

    Rows by `take` into an array that is there already, which takes half the time of X[order].
    """
    X, y = problem.X, problem.y[:, 0]
    rng = np.random.default_rng(0)
    into, into_targets = (np.empty_like(X), np.empty(len(y), y.dtype)) if shuffle else (X, y)

    def run() -> Any:
        weight, bias = np.zeros(X.shape[1], X.dtype), X.dtype.type(0)
        rows, targets = X, y
        for _ in range(epochs):
            if shuffle:
                order = rng.permutation(len(X))
                rows, targets = X.take(order, 0, into, mode="clip"), y.take(order, 0, into_targets, mode="clip")
            for begin in range(0, len(X), batch_size):
                x = rows[begin : begin + batch_size]
                residual = x @ weight
                residual += bias
                residual -= targets[begin : begin + batch_size]
                _loss = residual @ residual / len(residual)
                residual *= 2 * lr / len(residual)
                weight -= residual @ x
                bias -= residual.sum()
        return weight, bias

    return run


def sklearn_sgd(problem: Regression, epochs: int, lr: float, batch_size: int, dtype: str, shuffle: bool = True) -> Run:
    """SGDRegressor steps after every row; eta0 = 2 lr / batch_size makes an epoch the same length of descent."""
    from sklearn.linear_model import SGDRegressor

    X, y = problem.X.astype(dtype, copy=False), problem.y[:, 0].astype(dtype)
    options: Any = {"penalty": None, "learning_rate": "constant", "tol": None, "random_state": 0}

    def run() -> Any:
        model = SGDRegressor(eta0=2 * lr / batch_size, max_iter=epochs, shuffle=shuffle, **options)
        model.fit(X, y)
        return model.coef_, model.intercept_

    return run


def jax_scan(problem: Regression, epochs: int, lr: float, batch_size: int, epochs_a_call: int = 1, shuffle: bool = False) -> Run:
    """An epoch of full batches as one compiled scan, in order or of rows that are shuffled within it; those of an incomplete batch are left
    out. Several epochs a call are a scan of scans.
    """
    import jax
    import jax.numpy as jnp

    batches = len(problem.X) // batch_size
    rows = batches * batch_size

    def in_batches(array: Any) -> Any:
        return array.reshape(batches, batch_size, *array.shape[1:])

    arrays = problem.X, problem.y[:, 0]
    data = tuple(jnp.asarray(array if shuffle else in_batches(array[:rows])) for array in arrays)  # a part of an array would be a copy

    def loss(parameters: Any, x: Any, target: Any) -> Any:
        return jnp.mean((x @ parameters[0] + parameters[1] - target) ** 2)

    def step(parameters: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(parameters, *batch)
        return jax.tree.map(lambda p, g: p - lr * g, parameters, gradient), value

    @jax.jit
    def call(parameters: Any, data: Any, keys: Any) -> Any:
        def epoch(before: Any, key: Any) -> Any:
            if not shuffle:
                return jax.lax.scan(step, before, data)
            order = jax.random.permutation(key, len(problem.X))[:rows]
            return jax.lax.scan(step, before, tuple(in_batches(array[order]) for array in data))

        return jax.lax.scan(epoch, parameters, keys)

    keys = list(jax.random.split(jax.random.key(0), epochs).reshape(epochs // epochs_a_call, epochs_a_call))

    def run() -> Any:
        parameters: Any = (jnp.zeros(problem.X.shape[1]), jnp.zeros(()))
        for some in keys:
            parameters, _losses = call(parameters, data, some)
        parameters = jax.block_until_ready(parameters)
        return np.asarray(parameters[0]), np.asarray(parameters[1])

    return run

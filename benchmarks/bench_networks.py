"""Training steps of networks, Linear and ReLU in turn, mean squared error, plain SGD: whole epochs over the same batches in order.

A run goes on from the parameters that the one before left, for everyone alike; the first one, from equal parameters, is checked.
"""

import functools
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

import gdlib
from benchmarks import machine, peers
from benchmarks.measure import Contender, Group, Run, UnavailableError

# widths, batch, steps of an epoch: enough that what a run does once does not count
NETWORKS = (
    ((13, 64, 64, 1), 32, 1024),
    ((13, 64, 64, 1), 256, 256),
    ((784, 512, 10), 128, 64),
    ((784, 512, 512, 10), 128, 64),
    ((1024, 1024, 1024, 1024), 512, 16),
)
# Larger layers than the aims name, and two lone ones of more than 65,536 parameters.
LARGER = (
    ((2048, 2048, 512), 1024, 4),
    ((4096, 4096, 1000), 256, 4),
    ((2000, 2000), 512, 8),
    ((784, 100), 128, 64),
)
LR = 0.05
# Of the way that each array of parameters has gone in float64. Rounding takes 1e-5; a hidden unit that is off for a row instead of on,
# as its input is next to zero, some 1e-3; a gradient that is wrong or missing, 1.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Problem:
    X: np.ndarray[Any, Any]  # [rows, in], rows being a multiple of the batch
    y: np.ndarray[Any, Any]
    start: list[np.ndarray[Any, Any]]  # weight [out, in] and bias [out] of each layer in turn
    batch_size: int

    @functools.cached_property
    def right(self) -> list[np.ndarray[Any, Any]]:
        """The parameters after an epoch in float64."""
        parameters: list[np.ndarray[Any, Any]] = numpy_network(self, "float64")()
        return parameters


@functools.lru_cache(maxsize=1)
def problem(widths: tuple[int, ...], batch_size: int, steps: int) -> Problem:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((batch_size * steps, widths[0]), dtype=np.float32)
    target = X @ (rng.standard_normal((widths[0], widths[-1]), dtype=np.float32) / np.float32(np.sqrt(widths[0])))
    start = []
    for inputs, outputs in pairwise(widths):
        bound = 1 / np.sqrt(inputs)
        start += [rng.uniform(-bound, bound, shape).astype(np.float32) for shape in ((outputs, inputs), (outputs,))]
    return Problem(X, target + np.float32(0.1) * rng.standard_normal(target.shape, dtype=np.float32), start, batch_size)


def check(problem: Problem, parameters: Any) -> None:
    """Each weight and bias agrees with float64, but for TOLERANCE of the way that it has gone."""
    for number, (start, right, found) in enumerate(zip(problem.start, problem.right, parameters, strict=True)):
        error = float(np.linalg.norm(np.asarray(found, np.float64) - right) / np.linalg.norm(right - start))
        assert error < TOLERANCE, f"array {number} of the parameters is off by {error:.2g} of the way that it has gone"


def gdlib_fit(problem: Problem) -> Run:
    try:
        from gdlib import ReLU, Sequential
    except ImportError:
        raise UnavailableError("this gdlib has no Sequential") from None
    layers: list[Any] = []
    for weight in problem.start[::2]:
        layers += [ReLU()] * bool(layers) + [gdlib.Linear(*weight.shape[::-1], seed=0)]
    model, loss = Sequential(*layers), gdlib.MSELoss()
    for parameter, value in zip(model.parameters(), problem.start, strict=True):
        parameter.data = value
    optimizer = gdlib.SGD(model.parameters(), lr=LR)
    X, y, size = problem.X, problem.y, problem.batch_size

    def run() -> Any:
        gdlib.fit(model, X, y, loss=loss, optimizer=optimizer, epochs=1, batch_size=size, shuffle=False)
        return [parameter.data for parameter in model.parameters()]

    return run


def numpy_network(problem: Problem, dtype: str) -> Run:
    parameters = [array.astype(dtype) for array in problem.start]
    weights, biases, size = parameters[::2], parameters[1::2], problem.batch_size
    X, y = problem.X.astype(dtype, copy=False), problem.y.astype(dtype, copy=False)
    lr, scale = X.dtype.type(LR), X.dtype.type(2 / (size * y.shape[1]))

    def run() -> Any:
        for begin in range(0, len(X), size):
            values = [X[begin : begin + size]]
            for weight, bias in zip(weights, biases, strict=True):
                output = values[-1] @ weight.T
                output += bias
                values.append(np.maximum(output, 0, out=output) if len(values) < len(weights) else output)
            gradient = values.pop()
            gradient -= y[begin : begin + size]
            _loss = np.vdot(gradient, gradient) / gradient.size
            gradient *= scale
            for weight, bias, value in zip(weights[::-1], biases[::-1], values[::-1], strict=True):
                through = None if weight is weights[0] else (gradient @ weight) * (value > 0)
                step = gradient.T @ value
                step *= lr
                weight -= step
                bias -= lr * gradient.sum(axis=0)
                gradient = through
        return parameters

    return run


def pytorch_loop(problem: Problem, fused: bool) -> Run:
    """The training loop of the tutorials over batches that are there already, without a DataLoader."""
    import torch

    layers: list[Any] = []
    for weight in problem.start[::2]:
        layers += [torch.nn.ReLU()] * bool(layers) + [torch.nn.Linear(*weight.shape[::-1])]
    model, criterion = torch.nn.Sequential(*layers), torch.nn.MSELoss()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), problem.start, strict=True):
            parameter.copy_(torch.from_numpy(value))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=fused)
    inputs, targets = (torch.from_numpy(array).split(problem.batch_size) for array in (problem.X, problem.y))

    def run() -> Any:
        for x, target in zip(inputs, targets, strict=True):
            optimizer.zero_grad()
            loss = criterion(model(x), target)
            loss.backward()
            optimizer.step()
        return [parameter.detach().numpy() for parameter in model.parameters()]

    return run


def jax_scan(problem: Problem) -> Run:
    """An epoch as one compiled scan, which takes its parameters' memory over."""
    import jax
    import jax.numpy as jnp

    def loss(parameters: Any, x: Any, target: Any) -> Any:
        for weight, bias in parameters[:-1]:
            x = jnp.maximum(x @ weight + bias, 0)
        weight, bias = parameters[-1]
        return jnp.mean((x @ weight + bias - target) ** 2)

    def step(parameters: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(parameters, *batch)
        return jax.tree.map(lambda p, g: p - LR * g, parameters, gradient), value

    epoch = jax.jit(lambda parameters, batches: jax.lax.scan(step, parameters, batches), donate_argnums=0)
    batches = tuple(jnp.asarray(array.reshape(-1, problem.batch_size, array.shape[1])) for array in (problem.X, problem.y))
    # Weights are [in, out], as JAX's own libraries have them: a copy of the transposed ones.
    parameters = [(jnp.array(weight.T), jnp.array(bias)) for weight, bias in zip(problem.start[::2], problem.start[1::2], strict=True)]

    def run() -> Any:
        nonlocal parameters
        parameters, _losses = jax.block_until_ready(epoch(parameters, batches))
        return parameters

    return run


def check_any_layout(problem: Problem, parameters: Any) -> None:
    """JAX's (weight [in, out], bias) pairs become weight [out, in], bias, ..., which costs its runs nothing."""
    if isinstance(parameters[0], tuple):
        parameters = [array for weight, bias in parameters for array in (np.asarray(weight).T, np.asarray(bias))]
    check(problem, parameters)


def flops_and_bytes(widths: tuple[int, ...], batch_size: int) -> tuple[float, float]:
    """Of a step. Three products for each layer, but for the first, whose input needs no gradient. Every parameter is read and written."""
    products = [2.0 * batch_size * inputs * outputs for inputs, outputs in pairwise(widths)]
    parameters = sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))
    return 3 * sum(products) - products[0], 4.0 * (2 * parameters + batch_size * (widths[0] + widths[-1]))


def _group(widths: tuple[int, ...], batch_size: int, steps: int) -> Group:
    flops, moved = flops_and_bytes(widths, batch_size)
    contenders = [
        Contender("gdlib fit", gdlib_fit, steps),
        Contender("NumPy", partial(numpy_network, dtype="float32"), steps),
        *peers.pytorch("PyTorch", partial(pytorch_loop, fused=False), steps),
        *peers.pytorch("PyTorch", partial(pytorch_loop, fused=True), steps, "fused SGD"),
        Contender("JAX jit(scan)", jax_scan, steps),
        machine.fma_peak("float32", machine.THREADS, flops),
    ]
    note = f"A run is an epoch of {steps} steps in order; the parameters after the first agree with float64 to {TOLERANCE:g} of their way."
    title = f"Network {'-'.join(map(str, widths))}, batch {batch_size}"
    prepare = partial(problem, widths, batch_size, steps)
    return Group(title, "step", contenders, prepare, check_any_layout, note, flops, moved, "GFLOP")


AIMED = [_group(*network) for network in NETWORKS]
LARGE = AIMED[2:]
GROUPS = [*AIMED, *(_group(*network) for network in LARGER)]


def test_networks(time_contender: None) -> None: ...

"""Calls of one layer, forward and backward, against the same arithmetic in NumPy and PyTorch."""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import gdlib
from benchmarks import machine
from benchmarks.measure import Contender, Group, Run

# rows, in, out: the reference program's layer for one row and a batch, then layers of small to large networks.
SHAPES = ((1, 10, 1), (32, 10, 1), (128, 784, 512), (512, 1024, 1024), (1, 4096, 4096), (256, 4096, 4096), (2048, 2048, 2048))


@dataclass(frozen=True)
class Layer:
    x: np.ndarray[Any, Any]
    weight: np.ndarray[Any, Any]
    bias: np.ndarray[Any, Any]
    gradient: np.ndarray[Any, Any]  # with respect to the output


@functools.lru_cache(maxsize=1)
def problem(rows: int, in_features: int, out_features: int) -> Layer:
    rng = np.random.default_rng(0)
    shapes = ((rows, in_features), (out_features, in_features), (out_features,), (rows, out_features))
    return Layer(*(rng.standard_normal(shape, dtype=np.float32) for shape in shapes))


def check(layer: Layer, results: Any) -> None:
    """Sums of products of standard normal numbers, in float64: off by at most 8 epsilon for each product, and for the last roundings.

    One result is the output; three are the gradients of input, weight and bias.
    """
    x, weight, bias, gradient = (np.asarray(array, np.float64) for array in (layer.x, layer.weight, layer.bias, layer.gradient))
    if len(results) == 1:
        right = [(x @ weight.T + bias, len(weight.T))]
    else:
        right = [(gradient @ weight, len(weight)), (gradient.T @ x, len(x)), (gradient.sum(axis=0), len(x))]
    for result, (expected, depth) in zip(results, right, strict=True):
        error = float(np.abs(np.asarray(result, np.float64) - expected).max())
        bound = 8 * float(np.finfo(np.float32).eps) * (depth + 8)
        assert error < bound, f"an error of {error:.2g}; below {bound:.2g} is right"


def gdlib_layer(layer: Layer, backward: bool) -> Run:
    model = gdlib.Linear(*layer.weight.shape[::-1], seed=0)
    model.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x, gradient, gradients = layer.x, layer.gradient, [parameter.grad for parameter in model.parameters()]
    model(x)
    return (lambda: (model.backward(gradient), *gradients)) if backward else (lambda: (model(x),))


def numpy_layer(layer: Layer, backward: bool) -> Run:
    x, weight, bias, gradient = layer.x, layer.weight, layer.bias, layer.gradient
    into, into_bias = np.zeros_like(weight), np.zeros_like(bias)  # gradients add up, as in gdlib and PyTorch

    def run_forward() -> Any:
        output = x @ weight.T
        output += bias
        return (output,)

    def run_backward() -> Any:
        return gradient @ weight, np.add(into, gradient.T @ x, out=into), np.add(into_bias, gradient.sum(axis=0), out=into_bias)

    return run_backward if backward else run_forward


def pytorch_layer(layer: Layer, backward: bool) -> Run:
    import torch

    model = torch.nn.Linear(*layer.weight.shape[::-1])
    model.load_state_dict({"weight": torch.from_numpy(layer.weight), "bias": torch.from_numpy(layer.bias)})
    x, gradient = torch.from_numpy(layer.x), torch.from_numpy(layer.gradient)
    if not backward:
        return torch.inference_mode()(lambda: (model(x),))
    output = model(x.requires_grad_())

    def run() -> Any:
        x.grad = None  # the gradient of the input is a new array each time, as in gdlib and NumPy
        output.backward(gradient, retain_graph=True)
        return x.grad, model.weight.grad, model.bias.grad

    return run


def _group(shape: tuple[int, int, int], backward: bool) -> Group:
    contenders = [
        Contender("gdlib", partial(gdlib_layer, backward=backward)),
        Contender("NumPy", partial(numpy_layer, backward=backward)),
        *(
            Contender("PyTorch", partial(pytorch_layer, backward=backward), variant=machine.plural(threads), threads=threads)
            for threads in machine.THREAD_COUNTS
        ),
    ]
    flops = (4 if backward else 2) * shape[0] * shape[1] * shape[2]
    if flops > 1e6 and shape[0] > 1:  # less is bound by the call, and a single row by reading the weights
        contenders.append(machine.fma_peak("float32", machine.THREADS, flops))
    title = f"Linear {'backward' if backward else 'forward'}, {shape[0]} row{'s' if shape[0] > 1 else ''}, {shape[1]} -> {shape[2]}"
    return Group(title, "call", contenders, partial(problem, *shape), check)


GROUPS = [_group(shape, backward) for shape in SHAPES for backward in (False, True)]


def test_layers(time_contender: None) -> None: ...

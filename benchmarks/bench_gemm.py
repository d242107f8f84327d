"""One dense layer's matrix products on shapes of small to large networks: forward with bias, and the gradients of weight, bias and input.

Everyone writes into arrays that are there already, and adds the gradients of weight and bias to what they hold: gdlib by `out=` and
`.grad`, NumPy (OpenBLAS) and PyTorch (MKL) by their functions' `out=`, with scratch arrays where they need some. No autograd, no modules.
"""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import gdlib
from benchmarks import machine, peers
from benchmarks.measure import Contender, Group, Run

# batch, in, out
SHAPES = (
    (128, 784, 512),
    (128, 512, 512),
    (512, 1024, 1024),
    (2048, 2048, 2048),
    (256, 4096, 4096),
    (4096, 256, 64),
    (1000, 37, 11),
    (1, 4096, 4096),
)
DTYPES = ("float32", "float64")
FORWARD, GRADIENTS = "forward", "gradients"
PREDICT = "gdlib predict"


@dataclass(frozen=True)
class Layer:
    x: np.ndarray[Any, Any]
    weight: np.ndarray[Any, Any]
    bias: np.ndarray[Any, Any]
    gradient: np.ndarray[Any, Any]  # with respect to the output

    @functools.cached_property
    def right(self) -> dict[str, list[Any]]:
        x, weight, bias, gradient = (np.asarray(array, np.float64) for array in (self.x, self.weight, self.bias, self.gradient))
        return {FORWARD: [x @ weight.T + bias], GRADIENTS: [gradient @ weight, gradient.T @ x, gradient.sum(axis=0)]}


@functools.lru_cache(maxsize=1)
def problem(rows: int, in_features: int, out_features: int, dtype: str) -> Layer:
    rng = np.random.default_rng(0)
    shapes = ((rows, in_features), (out_features, in_features), (out_features,), (rows, out_features))
    return Layer(*(rng.standard_normal(shape, dtype=np.dtype(dtype)) for shape in shapes))


def check(part: str, layer: Layer, results: Any) -> None:
    """Sums of products of standard normal numbers: off by at most 8 epsilon for each product, and for the last roundings.

    One result is the output; three are the gradients of input, weight and bias, the latter two added to zeros by the first run. For
    float64 NumPy's product is the judge: two right results differ by the roundings of both, which the bound leaves room for.
    """
    depths = {FORWARD: [layer.x.shape[1]], GRADIENTS: [len(layer.weight), len(layer.x), len(layer.x)]}[part]
    for result, right, depth in zip(results, layer.right[part], depths, strict=True):
        error = float(np.abs(np.asarray(result, np.float64) - right).max())
        bound = 8 * float(np.finfo(layer.x.dtype).eps) * (depth + 8)
        assert error < bound, f"an error of {error:.2g}; below {bound:.2g} is right"


def linear_gradients(layer: Layer) -> Run:
    """gdlib's gradients of weight and bias, added to `.grad`, and of the input."""
    model, into = _model(layer), np.empty_like(layer.x)
    model(layer.x)
    gradients = [parameter.grad for parameter in model.parameters()]
    return lambda: (model.backward(layer.gradient, out=into), *gradients)


def linear_forward(layer: Layer) -> Run:
    model, into = _model(layer), np.empty_like(layer.gradient)
    return lambda: (model(layer.x, out=into),)


def linear_predict(layer: Layer) -> Run:
    """The form for inference, which keeps packed weights from the second call on; its output is a new array."""
    model = _model(layer)
    model.predict(layer.x)
    return lambda: (model.predict(layer.x),)


def _model(layer: Layer) -> gdlib.Linear:
    model = gdlib.Linear(*layer.weight.shape[::-1], dtype=layer.x.dtype, seed=0)
    model.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    return model


def numpy_layer(layer: Layer, part: str) -> Run:
    x, weight, bias, gradient = layer.x, layer.weight, layer.bias, layer.gradient
    output, into_input, into_weight, into_bias = np.empty_like(gradient), np.empty_like(x), np.zeros_like(weight), np.zeros_like(bias)
    scratch, bias_scratch = np.empty_like(weight), np.empty_like(bias)
    by_output = np.matmul if len(weight) > 1 else np.multiply  # a product of a column and a row goes past OpenBLAS

    def forward() -> Any:
        np.matmul(x, weight.T, out=output)
        return (np.add(output, bias, out=output),)

    def gradients() -> Any:
        np.matmul(gradient.T, x, out=scratch)
        np.add(into_weight, scratch, out=into_weight)
        np.add(into_bias, np.add.reduce(gradient, axis=0, out=bias_scratch), out=into_bias)
        by_output(gradient, weight, out=into_input)
        return into_input, into_weight, into_bias

    return forward if part == FORWARD else gradients


def pytorch_layer(layer: Layer, part: str) -> Run:
    """`addmm` adds the bias, and to the gradients, within the product."""
    import torch

    x, weight, bias, gradient = (torch.from_numpy(array) for array in (layer.x, layer.weight, layer.bias, layer.gradient))
    output, into_input, into_weight, into_bias = map(zeros_like, (gradient, x, weight, bias))

    def forward() -> Any:
        return (torch.addmm(bias, x, weight.t(), out=output),)

    def gradients() -> Any:
        torch.addmm(into_weight, gradient.t(), x, out=into_weight)
        into_bias.add_(gradient.sum(0))
        return torch.mm(gradient, weight, out=into_input), into_weight, into_bias

    return forward if part == FORWARD else gradients


def zeros_like(tensor: Any) -> Any:
    """In NumPy's memory, whose pages are as large as gdlib's; PyTorch's own are small."""
    import torch

    return torch.from_numpy(np.zeros_like(tensor.numpy()))


def pytorch_linear(layer: Layer) -> Run:
    import torch
    from torch.nn import functional

    x, weight, bias = (torch.from_numpy(array) for array in (layer.x, layer.weight, layer.bias))
    return lambda: (functional.linear(x, weight, bias),)


def contenders(part: str) -> list[Contender]:
    return [
        Contender("gdlib", linear_forward if part == FORWARD else linear_gradients),
        Contender("NumPy", partial(numpy_layer, part=part)),
        *peers.pytorch("PyTorch", partial(pytorch_layer, part=part), form="addmm, mm", around=peers.inference_mode),
        *(peers.pytorch("PyTorch", pytorch_linear, form="linear", around=peers.inference_mode) if part == FORWARD else []),
    ]


def _group(shape: tuple[int, int, int], dtype: str, part: str) -> Group:
    rows, inputs, outputs = shape
    size, products = np.dtype(dtype).itemsize, 1 if part == FORWARD else 2
    flops = 2.0 * products * rows * inputs * outputs
    moved = rows * inputs + inputs * outputs + rows * outputs  # forward: all of them once
    if part == GRADIENTS:
        moved += rows * inputs + 2 * inputs * outputs  # the input's gradient is written; the weight's read and written
    if rows > 1:
        limits = [machine.fma_peak(dtype, machine.THREADS, flops)]
    else:  # each weight is used once, and the limit is reading them
        limits = machine.reading("as many bytes read once", lambda layer: layer.weight, machine.THREADS, inputs * outputs / moved)
        limits += machine.writing(machine.THREADS, moved * size) if part == GRADIENTS else []
    timed = [*contenders(part), *([Contender(PREDICT, linear_predict)] if part == FORWARD else []), *limits]
    title, layer = f"{part}, {rows} x {inputs} -> {outputs} {dtype}", partial(problem, *shape, dtype)
    return Group(title, "call", timed, layer, partial(check, part), "", flops, moved * size, "GFLOP", dtype)


GROUPS = [_group(shape, dtype, part) for dtype in DTYPES for shape in SHAPES for part in (FORWARD, GRADIENTS)]


def test_gemm(time_contender: None) -> None: ...

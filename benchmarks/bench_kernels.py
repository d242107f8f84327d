"""Kernels one by one on arrays larger than a cache: activations, the loss, the update, averages, and layers of few outputs.

Each array is read or written once, so that memory is the limit. Results are written in place or into arrays that are there already, where a
library takes them, and NumPy's and PyTorch's arrays lie in NumPy's memory.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import gdlib
from benchmarks import bench_gemm as gemm
from benchmarks import machine, peers
from benchmarks.measure import Contender, Group, Run
from gdlib import _core

ELEMENTS, MODELS = 16_000_000, 4
LAYERS = ((500_000, 100, 1), (500_000, 100, 3))  # rows, in, out
LR, MOMENTUM = 1e-3, 0.9
FORWARD, BACKWARD = ", forward", ", backward"
LOSS, UPDATE, UPDATE_WITH_MOMENTUM = "MSELoss", "SGD, step", "SGD with momentum, step"
AVERAGE, FINITE = f"average of {MODELS} models", "search for NaN and infinity"
READING = (LOSS + FORWARD, FINITE)  # and little else: no result of many elements
ACTIVATIONS = {"ReLU": gdlib.ReLU, "Tanh": gdlib.Tanh, "Sigmoid": gdlib.Sigmoid}
PLAIN, FUSED, BY_HAND = "plain", "fused", "by hand"  # PyTorch's forms


@dataclass(frozen=True)
class Kernel:
    """`flops` of an element, float32 and float64: those of the formula, tanh and sigmoid as gdlib's kernels sum their series.

    A division or a comparison is one.
    """

    name: str
    flops: tuple[float, float]
    moved: float  # arrays that are read or written, of ELEMENTS each
    forms: Sequence[str] = (PLAIN,)


KERNELS = (
    Kernel("ReLU" + FORWARD, (1, 1), 2),
    Kernel("ReLU" + BACKWARD, (1, 1), 3),
    Kernel("Tanh" + FORWARD, (29, 39), 2),
    Kernel("Tanh" + BACKWARD, (3, 3), 3),
    Kernel("Sigmoid" + FORWARD, (30, 40), 2),
    Kernel("Sigmoid" + BACKWARD, (3, 3), 3),
    Kernel(LOSS + FORWARD, (3, 3), 2, (PLAIN, BY_HAND)),
    Kernel(LOSS + BACKWARD, (3, 3), 3, (PLAIN, BY_HAND)),
    Kernel(UPDATE, (2, 2), 3, (PLAIN, FUSED, BY_HAND)),
    Kernel(UPDATE_WITH_MOMENTUM, (4, 4), 5, (PLAIN, FUSED, BY_HAND)),
    Kernel(AVERAGE, (1, 1), 1 + 1 / MODELS),
    Kernel(FINITE, (2, 2), 1, (PLAIN, BY_HAND)),
)


@dataclass(frozen=True)
class Arrays:
    x: np.ndarray[Any, Any]
    g: np.ndarray[Any, Any]


@functools.lru_cache(maxsize=1)
def problem(dtype: str) -> Arrays:
    rng = np.random.default_rng(0)
    return Arrays(*(rng.standard_normal(ELEMENTS, np.dtype(dtype)) for _ in range(2)))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


@functools.lru_cache(maxsize=1)
def right(kernel: str, dtype: str) -> Any:
    """The result in float64; an update's is the parameters after a step, with momentum after a second one."""
    x, g = (array.astype(np.float64) for array in (problem(dtype).x, problem(dtype).g))
    results: dict[str, Run] = {
        "ReLU" + FORWARD: lambda: np.maximum(x, 0),
        "ReLU" + BACKWARD: lambda: g * (x > 0),
        "Tanh" + FORWARD: lambda: np.tanh(x),
        "Tanh" + BACKWARD: lambda: g * (1 - np.tanh(x) ** 2),
        "Sigmoid" + FORWARD: lambda: sigmoid(x),
        "Sigmoid" + BACKWARD: lambda: g * sigmoid(x) * (1 - sigmoid(x)),
        LOSS + FORWARD: lambda: np.mean((x - g) ** 2),
        LOSS + BACKWARD: lambda: 2 / ELEMENTS * (x - g),
        UPDATE: lambda: x - LR * g,
        UPDATE_WITH_MOMENTUM: lambda: x - LR * (2 + MOMENTUM) * g,
        AVERAGE: lambda: x.reshape(MODELS, -1).mean(axis=0),
        FINITE: lambda: True,
    }
    return results[kernel]()


def check(kernel: str, arrays: Arrays, result: Any) -> None:
    """All elements, to 64 epsilon of the largest; the loss to 10,000, since BLAS adds 16 million squares up in their own type."""
    expected = right(kernel, str(arrays.x.dtype))
    tolerance = (10_000 if kernel == LOSS + FORWARD else 64) * np.finfo(arrays.x.dtype).eps * np.max(np.abs(expected))
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=0, atol=tolerance, err_msg=kernel)


def gdlib_kernel(arrays: Arrays, kernel: str) -> Run:
    x, g, into, criterion = arrays.x, arrays.g, np.empty_like(arrays.x), gdlib.MSELoss()
    if kernel in (UPDATE, UPDATE_WITH_MOMENTUM):
        model = gdlib.Linear(ELEMENTS, 1, bias=False, dtype=x.dtype, seed=0)
        model.weight.data[0], model.weight.grad[0] = x, g
        step = gdlib.SGD(model.parameters(), lr=LR, momentum=MOMENTUM if kernel == UPDATE_WITH_MOMENTUM else 0.0).step
        if kernel == UPDATE_WITH_MOMENTUM:
            step()
        return lambda: (step(), model.weight.data[0])[1]
    if kernel == AVERAGE:
        models, mean = x.reshape(MODELS, -1), into[: ELEMENTS // MODELS]
        return lambda: (_core.average(models, mean), mean)[1]
    if kernel == FINITE:
        return partial(_core.all_finite, x)
    if kernel == LOSS + FORWARD:
        return partial(criterion, x, g)
    if kernel == LOSS + BACKWARD:
        criterion(x, g)
        return partial(criterion.backward, out=into)
    layer = ACTIVATIONS[kernel.partition(",")[0]]()
    if kernel.endswith(FORWARD):
        return partial(layer, x, out=into)
    layer(x)
    return partial(layer.backward, g, out=into)


def numpy_kernel(arrays: Arrays, kernel: str, form: str) -> Run:
    x, g, into, number = arrays.x, arrays.g, np.empty_like(arrays.x), arrays.x.dtype.type
    parameter, buffer, lr, momentum, found = x.copy(), np.zeros_like(x), number(LR), number(MOMENTUM), np.empty(x.shape, bool)
    zero, one, scale, models, mean = number(0), number(1), number(2 / x.size), x.reshape(MODELS, -1), into[: ELEMENTS // MODELS]
    activation = {"ReLU": partial(np.maximum, zero), "Tanh": np.tanh, "Sigmoid": sigmoid}.get(kernel.partition(",")[0])
    y = activation(x) if activation and kernel.endswith(BACKWARD) else x

    def logistic() -> Any:
        np.exp(np.negative(x, out=into), out=into)
        return np.divide(one, np.add(into, one, out=into), out=into)

    def loss() -> Any:
        np.subtract(x, g, out=into)
        return into @ into / into.size

    def step(d: Any) -> Any:
        return np.subtract(parameter, np.multiply(d, lr, out=into), out=parameter)

    def step_with_momentum() -> Any:
        return step(np.add(np.multiply(buffer, momentum, out=buffer), g, out=buffer))

    if kernel == UPDATE_WITH_MOMENTUM:
        step_with_momentum()
    finite = {PLAIN: lambda: np.isfinite(x, out=found).all(), BY_HAND: lambda: np.isfinite(np.add.reduce(x))}  # scikit-learn's first look
    return {
        "ReLU" + FORWARD: lambda: np.maximum(x, zero, out=into),
        "ReLU" + BACKWARD: lambda: np.multiply(g, np.sign(y, out=into), out=into),
        "Tanh" + FORWARD: lambda: np.tanh(x, out=into),
        "Tanh" + BACKWARD: lambda: np.multiply(np.subtract(one, np.square(y, out=into), out=into), g, out=into),
        "Sigmoid" + FORWARD: logistic,
        "Sigmoid" + BACKWARD: lambda: np.multiply(np.multiply(np.subtract(one, y, out=into), y, out=into), g, out=into),
        LOSS + FORWARD: loss,
        LOSS + BACKWARD: lambda: np.multiply(np.subtract(x, g, out=into), scale, out=into),
        UPDATE: lambda: step(g),
        UPDATE_WITH_MOMENTUM: step_with_momentum,
        AVERAGE: lambda: np.divide(np.add.reduce(models, axis=0, out=mean), number(MODELS), out=mean),
        FINITE: finite[form if kernel == FINITE else PLAIN],
    }[kernel]


def pytorch_kernel(arrays: Arrays, kernel: str, form: str) -> Run:
    """The operators that autograd and modules call, which take a result's place; torch.optim.SGD, or tensors by hand."""
    import torch
    from torch.nn import functional

    x, g = torch.from_numpy(arrays.x), torch.from_numpy(arrays.g)
    into, buffer = gemm.zeros_like(x), gemm.zeros_like(x)
    parameter, aten, one = gemm.zeros_like(x).copy_(x), torch.ops.aten, torch.ones((), dtype=x.dtype)
    momentum = MOMENTUM if kernel == UPDATE_WITH_MOMENTUM else 0.0
    models, mean, mean_reduction = x.view(MODELS, -1), into[: ELEMENTS // MODELS], 1
    forward = {"ReLU": torch.relu, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid}.get(kernel.partition(",")[0])
    y = gemm.zeros_like(x).copy_(forward(x)) if forward and kernel.endswith(BACKWARD) else x
    leaf = torch.nn.Parameter(parameter)
    leaf.grad = g
    optimizer = torch.optim.SGD([leaf], lr=LR, momentum=momentum, fused=form == FUSED)

    def by_hand(momentum: float) -> Any:
        return parameter.add_(buffer.mul_(momentum).add_(g) if momentum else g, alpha=-LR)

    def loss() -> Any:
        torch.sub(x, g, out=into)
        return torch.dot(into, into) / len(into)

    calls: dict[str, dict[str, Run]] = {
        "ReLU" + FORWARD: {PLAIN: lambda: torch.clamp_min(x, 0, out=into)},
        "ReLU" + BACKWARD: {PLAIN: lambda: aten.threshold_backward.grad_input(g, y, 0, grad_input=into)},
        "Tanh" + FORWARD: {PLAIN: lambda: torch.tanh(x, out=into)},
        "Tanh" + BACKWARD: {PLAIN: lambda: aten.tanh_backward.grad_input(g, y, grad_input=into)},
        "Sigmoid" + FORWARD: {PLAIN: lambda: torch.sigmoid(x, out=into)},
        "Sigmoid" + BACKWARD: {PLAIN: lambda: aten.sigmoid_backward.grad_input(g, y, grad_input=into)},
        LOSS + FORWARD: {PLAIN: lambda: functional.mse_loss(x, g), BY_HAND: loss},
        LOSS + BACKWARD: {
            PLAIN: lambda: aten.mse_loss_backward.grad_input(one, x, g, mean_reduction, grad_input=into),
            BY_HAND: lambda: torch.sub(x, g, out=into).mul_(2 / len(into)),
        },
        AVERAGE: {PLAIN: lambda: torch.mean(models, 0, out=mean)},
        FINITE: {PLAIN: lambda: torch.isfinite(x).all(), BY_HAND: lambda: torch.isfinite(x.sum())},
    }
    if kernel in calls:
        return calls[kernel][form]
    update = partial(by_hand, momentum) if form == BY_HAND else lambda: (optimizer.step(), parameter)[1]
    if momentum:
        update()
        if form != BY_HAND:  # the optimizer has made one of its own, in small pages
            optimizer.state[leaf]["momentum_buffer"] = buffer.copy_(g)
    return update


def numpy_vectors(layer: gemm.Layer, part: str) -> Run:
    """A layer of few outputs by products of a matrix and a vector, which read x once for each output."""
    x, weight, bias, gradient = layer.x, layer.weight, layer.bias, layer.gradient
    output, into_input, into_weight, into_bias = map(np.zeros_like, (gradient, x, weight, bias))
    by_output = np.matmul if len(weight) > 1 else np.multiply

    def forward() -> Any:
        for k, row in enumerate(weight):
            np.add(x @ row, bias[k], out=output[:, k])
        return (output,)

    def gradients() -> Any:
        for k in range(len(weight)):
            into_weight[k] += gradient[:, k] @ x
        np.add(into_bias, gradient.sum(axis=0), out=into_bias)
        by_output(gradient, weight, out=into_input)
        return into_input, into_weight, into_bias

    return forward if part == gemm.FORWARD else gradients


def pytorch_vectors(layer: gemm.Layer, part: str) -> Run:
    """The same."""
    import torch

    x, weight, bias, gradient = (torch.from_numpy(array) for array in (layer.x, layer.weight, layer.bias, layer.gradient))
    output, into_input, into_weight, into_bias = map(gemm.zeros_like, (gradient, x, weight, bias))

    def forward() -> Any:
        for k, row in enumerate(weight):
            torch.addmv(bias[k], x, row, out=output[:, k])
        return (output,)

    def gradients() -> Any:
        for k, column in enumerate(gradient.t()):
            torch.addmv(into_weight[k], x.t(), column, out=into_weight[k])
        into_bias.add_(gradient.sum(0))
        by_output = torch.mm if len(weight) > 1 else torch.mul
        return by_output(gradient, weight, out=into_input), into_weight, into_bias

    return forward if part == gemm.FORWARD else gradients


def _group(kernel: Kernel, dtype: str) -> Group:
    numpy_forms = {form: form for form in kernel.forms} if kernel.name == FINITE else {"": PLAIN}
    size = kernel.moved * ELEMENTS * np.dtype(dtype).itemsize
    contenders = [
        Contender("gdlib", partial(gdlib_kernel, kernel=kernel.name)),
        *(
            Contender("NumPy", partial(numpy_kernel, kernel=kernel.name, form=form), variant=variant)
            for variant, form in numpy_forms.items()
        ),
        *(
            contender
            for form in kernel.forms
            for contender in peers.pytorch(
                "PyTorch", partial(pytorch_kernel, kernel=kernel.name, form=form), form=form, around=peers.inference_mode
            )
        ),
        *machine.bandwidth(machine.THREADS, size),
        *([] if kernel.name in READING else machine.writing(machine.THREADS, size)),
    ]
    flops = ELEMENTS * kernel.flops[dtype == "float64"]
    title, arrays, judge = f"{kernel.name} {dtype}", partial(problem, dtype), partial(check, kernel.name)
    return Group(title, "call", contenders, arrays, judge, "", flops, size, "GB", dtype)


def _layer(rows: int, inputs: int, outputs: int, part: str, dtype: str) -> Group:
    passes = 1 if part == gemm.FORWARD else 2  # the input is read; its gradient is written
    size = rows * (passes * inputs + outputs) * np.dtype(dtype).itemsize
    contenders = [
        *gemm.contenders(part),
        Contender("NumPy", partial(numpy_vectors, part=part), variant="output by output"),
        *peers.pytorch("PyTorch", partial(pytorch_vectors, part=part), form="mv", around=peers.inference_mode),
        *machine.bandwidth(machine.THREADS, size),
        *(machine.writing(machine.THREADS, size) if part == gemm.GRADIENTS else []),
    ]
    title, work = f"Linear({inputs}, {outputs}), {rows:,} rows, {part} {dtype}", partial(gemm.problem, rows, inputs, outputs, dtype)
    flops = 2 * passes * rows * inputs * outputs
    return Group(title, "call", contenders, work, partial(gemm.check, part), "", flops, size, "GB", dtype)


GROUPS = [
    group
    for dtype in gemm.DTYPES
    for group in (
        *(_group(kernel, dtype) for kernel in KERNELS),
        *(_layer(*layer, part, dtype) for layer in LAYERS for part in (gemm.FORWARD, gemm.GRADIENTS)),
    )
]


def test_kernels(time_contender: None) -> None: ...

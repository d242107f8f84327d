"""Single calls on the reference program's layer, Linear(10, 1), for one row and for a batch: here the trip into native code is the cost."""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import gdlib
from benchmarks import peers
from benchmarks.measure import Contender, Group, Run
from gdlib import _core

FEATURES, LR, ROWS = 10, 0.01, (1, 32)
FORWARD, PREDICT, LOSS, LOSS_BACKWARD = "model(x)", "model.predict(x)", "criterion(output, target)", "criterion.backward()"
BACKWARD, UPDATE, STEP = "model.backward(gradient)", "optimizer.step()", "a training step"
CALLS = (FORWARD, PREDICT, LOSS, LOSS_BACKWARD, BACKWARD, UPDATE, STEP)


@dataclass(frozen=True)
class Batch:
    x: np.ndarray[Any, Any]
    weight: np.ndarray[Any, Any]
    bias: np.ndarray[Any, Any]
    target: np.ndarray[Any, Any]


@functools.cache
def problem(rows: int) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(*(rng.standard_normal(shape, dtype=np.float32) for shape in ((rows, FEATURES), (1, FEATURES), (1,), (rows, 1))))


def check(call: str, batch: Batch, results: Any) -> None:
    """The first run of a call, against float64: sums of at most 32 products of standard normal numbers, to rounding in float32.

    `results` is the output, the loss, or the gradient of an input; for steps, a function that returns the parameters.
    """
    x, weight, bias, target = (np.asarray(array, np.float64) for array in (batch.x, batch.weight, batch.bias, batch.target))
    output = x @ weight.T + bias
    gradient = 2 / output.size * (output - target)
    stepped = (weight - LR * gradient.T @ x, bias - LR * gradient.sum(axis=0))
    loss = np.mean((output - target) ** 2)
    single = {FORWARD: output, PREDICT: output, LOSS: loss, LOSS_BACKWARD: gradient, BACKWARD: gradient @ weight}
    pairs = zip(results(), stepped, strict=True) if call in (UPDATE, STEP) else [(results, single[call])]
    for result, expected in pairs:
        np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=1e-5, atol=1e-5, err_msg=call)


def gdlib_call(batch: Batch, call: str) -> Run:
    x, target = batch.x, batch.target
    model, criterion = gdlib.Linear(FEATURES, 1, seed=0), gdlib.MSELoss()
    model.load_state_dict({"weight": batch.weight, "bias": batch.bias})
    optimizer = gdlib.SGD(model.parameters(), lr=LR)
    output = model(x)
    criterion(output, target)
    gradient = criterion.backward()
    model.backward(gradient)

    def parameters() -> Any:
        return [parameter.data for parameter in model.parameters()]

    def update() -> Any:
        optimizer.step()
        return parameters

    def step() -> Any:
        optimizer.zero_grad()
        criterion(model(x), target)
        model.backward(criterion.backward())
        optimizer.step()
        return parameters

    return {
        FORWARD: partial(model, x),
        PREDICT: partial(model.predict, x),
        LOSS: partial(criterion, output, target),
        LOSS_BACKWARD: criterion.backward,
        BACKWARD: partial(model.backward, gradient),
        UPDATE: update,
        STEP: step,
    }[call]


def numpy_call(batch: Batch, call: str, reused: bool) -> Run:
    """With new arrays for the results, or `reused` ones. Gradients are written over, which takes less than zeroing and adding up."""
    x, target, weight, bias = batch.x, batch.target, batch.weight.copy(), batch.bias.copy()
    transposed, scale, lr = weight.T, np.float32(2 / target.size), np.float32(LR)
    weight_gradient, bias_gradient = np.empty_like(weight), np.empty_like(bias)
    kept_output, kept_gradient, kept_input = np.empty_like(target), np.empty_like(target), np.empty_like(x)

    def forward() -> Any:
        if not reused:
            return x @ transposed + bias
        np.matmul(x, transposed, out=kept_output)
        return np.add(kept_output, bias, out=kept_output)

    def loss(output: Any) -> Any:
        residual = (output - target).ravel()
        return residual @ residual / residual.size

    def loss_backward(output: Any) -> Any:
        if not reused:
            return scale * (output - target)
        np.subtract(output, target, out=kept_gradient)
        return np.multiply(kept_gradient, scale, out=kept_gradient)

    def parameter_gradients(gradient: Any) -> None:
        np.matmul(gradient.T, x, out=weight_gradient)
        np.add.reduce(gradient, axis=0, out=bias_gradient)

    def backward(gradient: Any) -> Any:
        parameter_gradients(gradient)
        return np.matmul(gradient, weight, out=kept_input) if reused else gradient @ weight

    def parameters() -> Any:
        return weight, bias

    def update() -> Any:
        np.subtract(weight, lr * weight_gradient, out=weight)
        np.subtract(bias, lr * bias_gradient, out=bias)
        return parameters

    def step() -> Any:
        output = forward()
        loss(output)
        parameter_gradients(loss_backward(output))
        return update()

    output = x @ transposed + bias
    gradient = scale * (output - target)
    backward(gradient)
    return {
        FORWARD: forward,
        PREDICT: forward,
        LOSS: partial(loss, output),
        LOSS_BACKWARD: partial(loss_backward, output),
        BACKWARD: partial(backward, gradient),
        UPDATE: update,
        STEP: step,
    }[call]


def pytorch_call(batch: Batch, call: str, fused: bool) -> Run:
    """Modules, autograd and torch.optim.SGD, plain or `fused`."""
    import torch

    model, criterion = torch.nn.Linear(FEATURES, 1), torch.nn.MSELoss()
    model.load_state_dict({"weight": torch.from_numpy(batch.weight), "bias": torch.from_numpy(batch.bias)})
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=fused)
    x, target = torch.from_numpy(batch.x), torch.from_numpy(batch.target)
    x_with_gradient = x.clone().requires_grad_()
    output = model(x_with_gradient)
    loss = criterion(output, target)
    (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
    output.backward(gradient, retain_graph=True)

    def forward() -> Any:
        return model(x).detach()

    def loss_forward() -> Any:
        return criterion(output, target).detach()

    def backward() -> Any:
        x_with_gradient.grad = None
        output.backward(gradient, retain_graph=True)
        return x_with_gradient.grad

    def parameters() -> Any:
        return [parameter.detach() for parameter in model.parameters()]

    def update() -> Any:
        optimizer.step()
        return parameters

    def step() -> Any:
        optimizer.zero_grad()
        criterion(model(x), target).backward()
        optimizer.step()
        return parameters

    return {
        FORWARD: forward,
        PREDICT: forward,
        LOSS: loss_forward,
        LOSS_BACKWARD: lambda: torch.autograd.grad(loss, output, retain_graph=True)[0],
        BACKWARD: backward,
        UPDATE: update,
        STEP: step,
    }[call]


def pytorch_by_hand(batch: Batch, call: str) -> Run:
    """Tensors and functions in inference mode, gradients written out; as in NumPy's they are written over."""
    import torch
    from torch.nn import functional

    x, target = torch.from_numpy(batch.x), torch.from_numpy(batch.target)
    weight, bias = torch.from_numpy(batch.weight.copy()), torch.from_numpy(batch.bias.copy())
    scale, weight_gradient, bias_gradient = 2 / target.numel(), torch.empty_like(weight), torch.empty_like(bias)

    def loss_backward(output: Any) -> Any:
        return torch.sub(output, target).mul_(scale)

    def parameter_gradients(gradient: Any) -> None:
        torch.mm(gradient.t(), x, out=weight_gradient)
        torch.sum(gradient, 0, out=bias_gradient)

    def backward(gradient: Any) -> Any:
        parameter_gradients(gradient)
        return torch.mm(gradient, weight)

    def parameters() -> Any:
        return weight, bias

    def update() -> Any:
        weight.sub_(weight_gradient, alpha=LR)
        bias.sub_(bias_gradient, alpha=LR)
        return parameters

    def step() -> Any:
        output = functional.linear(x, weight, bias)
        functional.mse_loss(output, target)
        parameter_gradients(loss_backward(output))
        return update()

    output = functional.linear(x, weight, bias)
    gradient = loss_backward(output)
    backward(gradient)
    return {
        FORWARD: partial(functional.linear, x, weight, bias),
        PREDICT: partial(functional.linear, x, weight, bias),
        LOSS: partial(functional.mse_loss, output, target),
        LOSS_BACKWARD: partial(loss_backward, output),
        BACKWARD: partial(backward, gradient),
        UPDATE: update,
        STEP: step,
    }[call]


def _group(call: str, rows: int) -> Group:
    contenders = [
        Contender("gdlib", partial(gdlib_call, call=call)),
        Contender("NumPy", partial(numpy_call, call=call, reused=False), variant="new arrays"),
        Contender("NumPy", partial(numpy_call, call=call, reused=True), variant="out="),
        Contender("PyTorch", partial(pytorch_call, call=call, fused=False), variant="autograd"),
        Contender("PyTorch", partial(pytorch_by_hand, call=call), variant="by hand, inference mode", around=peers.inference_mode),
        Contender("a native call that does nothing", lambda _: _core.num_threads, limit=True),
    ]
    if call in (UPDATE, STEP):
        contenders.append(Contender("PyTorch", partial(pytorch_call, call=call, fused=True), variant="autograd, fused SGD"))
    title = f"{call}, {rows} row{'s' if rows > 1 else ''}"
    return Group(title, "call", contenders, partial(problem, rows), partial(check, call))


GROUPS = [_group(call, rows) for rows in ROWS for call in CALLS]


def test_calls(time_contender: None) -> None: ...

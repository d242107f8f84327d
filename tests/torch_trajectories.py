"""The models, options of SGD and data of the pinned trajectories; run as a program, it computes them anew with PyTorch.

`python -P tests/torch_trajectories.py` writes tests/data/torch_sgd.json, of a Linear, and torch_networks.json: the loss of every step and
the final parameters, in float32 and float64. The suite needs no PyTorch; where it is installed, the pins are compared with a live run too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

PINS = Path(__file__).with_name("data") / "torch_sgd.json"
NETWORK_PINS = PINS.with_name("torch_networks.json")
ROWS, FEATURES, OUTPUTS, BATCH, EPOCHS = 50, 3, 2, 16, 10
OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.05},
    {"lr": 0.05, "weight_decay": 0.1},
    {"lr": 0.02, "momentum": 0.9},
    {"lr": 0.02, "momentum": 0.9, "dampening": 0.5},
    {"lr": 0.02, "momentum": 0.9, "nesterov": True},
    {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    {"lr": 0.02, "momentum": 0.5, "dampening": 0.25, "weight_decay": 0.05},
    {"lr": 0.001, "maximize": True},
    {"lr": 0.001, "maximize": True, "momentum": 0.5, "weight_decay": 0.05},
]
# Layers, the options of SGD for the weights, and those for the biases where they differ. A number is the width of a Linear.
NETWORKS: list[tuple[list[int | str], dict[str, Any], dict[str, Any]]] = [
    ([8, "ReLU", OUTPUTS], {"lr": 0.05, "momentum": 0.9}, {}),
    (
        [5, "Tanh", 9, "Tanh", OUTPUTS],
        {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.01},
        {"lr": 0.05, "weight_decay": 0},
    ),
    (["Tanh", 6, "Sigmoid", OUTPUTS], {"lr": 0.2, "momentum": 0.5, "dampening": 0.25}, {"lr": 0.1, "momentum": 0}),
]


def data(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """X, y, and the weight and bias to start from: sines, so that no random generator has to agree."""
    count = np.arange(1.0, 1.0 + ROWS * FEATURES)
    X = np.sin(count * 1.7).reshape(ROWS, FEATURES) * [1.0, 2.0, 0.5]
    y = X @ np.array([[1.0, -2.0], [0.5, 0.25], [3.0, -1.0]]) + [0.5, -1.5] + 0.1 * np.cos(np.arange(ROWS * OUTPUTS)).reshape(ROWS, OUTPUTS)
    weight = np.cos(np.arange(6.0)).reshape(OUTPUTS, FEATURES) / 2
    return X.astype(dtype), y.astype(dtype), weight.astype(dtype), np.array([0.1, -0.2], dtype)


def torch_run(dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's loss at each step, and its final parameters."""
    import torch

    X, y, weight, bias = map(torch.from_numpy, data(dtype))
    model = torch.nn.Linear(FEATURES, OUTPUTS, dtype=X.dtype)
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.copy_(bias)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    losses = []
    for _ in range(EPOCHS):
        for begin in range(0, ROWS, BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(X[begin : begin + BATCH]), y[begin : begin + BATCH])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {"losses": losses, "weight": model.weight.tolist(), "bias": model.bias.tolist()}


def network_state(number: int, dtype: str) -> dict[str, np.ndarray]:
    """The parameters that a network starts from, by key: sines again."""
    state: dict[str, np.ndarray] = {}
    width, count = FEATURES, 0
    for place, layer in enumerate(NETWORKS[number][0]):
        if isinstance(layer, int):
            for name, shape in (("weight", (layer, width)), ("bias", (layer,))):
                size = int(np.prod(shape))
                values = np.sin(1.3 * np.arange(count + 1, count + 1 + size)) / np.sqrt(width)
                state[f"{place}.{name}"] = values.reshape(shape).astype(dtype)
                count += size
            width = layer
    return state


def build(library: Any, number: int, **options: Any) -> Any:
    """The network of PyTorch's nn, or of gdlib, whose names are the same."""
    width, layers = FEATURES, []
    for layer in NETWORKS[number][0]:
        layers.append(library.Linear(width, layer, **options) if isinstance(layer, int) else getattr(library, layer)())
        width = layer if isinstance(layer, int) else width
    return library.Sequential(*layers)


def groups(model: Any, number: int) -> list[dict[str, Any]]:
    """The parameter groups of a network's optimizer: weights, and biases."""
    _, options, of_biases = NETWORKS[number]
    parameters = dict(model.named_parameters())
    weights, biases = ([parameters[name] for name in parameters if name.endswith(end)] for end in ("weight", "bias"))
    return [{"params": weights, **options}, {"params": biases, **options, **of_biases}]


def torch_network_run(dtype: str, number: int) -> dict[str, Any]:
    """PyTorch's loss at each step of a network, and its final parameters by key."""
    import torch

    X, y = map(torch.from_numpy, data(dtype)[:2])
    model = build(torch.nn, number, dtype=X.dtype)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in network_state(number, dtype).items()})
    optimizer = torch.optim.SGD(groups(model, number), lr=1.0)
    losses = []
    for _ in range(EPOCHS):
        for begin in range(0, ROWS, BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(X[begin : begin + BATCH]), y[begin : begin + BATCH])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {"losses": losses, **{name: values.tolist() for name, values in model.state_dict().items()}}


if __name__ == "__main__":
    networks = {dtype: [torch_network_run(dtype, number) for number in range(len(NETWORKS))] for dtype in ("float32", "float64")}
    NETWORK_PINS.write_text(json.dumps(networks, indent=None, separators=(",", ":")) + "\n")
    runs = {dtype: [torch_run(dtype, options) for options in OPTIONS] for dtype in ("float32", "float64")}
    PINS.write_text(json.dumps(runs, indent=None, separators=(",", ":")) + "\n")

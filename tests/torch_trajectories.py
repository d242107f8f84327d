"""The options of SGD and the data of the pinned trajectories; run as a program, it computes them anew with PyTorch.

`python -P tests/torch_trajectories.py` writes tests/data/torch_sgd.json: the loss of every step and the final parameters, in float32 and
float64. The suite needs no PyTorch; where it is installed, the pins are compared with a live run too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

PINS = Path(__file__).with_name("data") / "torch_sgd.json"
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


if __name__ == "__main__":
    runs = {dtype: [torch_run(dtype, options) for options in OPTIONS] for dtype in ("float32", "float64")}
    PINS.write_text(json.dumps(runs, indent=None, separators=(",", ":")) + "\n")

"""gdlib: train and serve linear models and small networks on a CPU, with native kernels and no autograd."""

from importlib import import_module
from typing import Any

from gdlib.config import set_num_threads, show_config
from gdlib.data import DataLoader
from gdlib.errors import DivergenceError
from gdlib.history import History
from gdlib.losses import MSELoss
from gdlib.nn import Linear, ReLU, Sequential, Sigmoid, Tanh
from gdlib.optim import GD, SGD
from gdlib.parameters import Parameter
from gdlib.serialization import load, save
from gdlib.training import fit

__version__ = "0.1.0"

__all__ = [
    "GD",
    "SGD",
    "DataLoader",
    "DivergenceError",
    "History",
    "Linear",
    "MSELoss",
    "Parameter",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Tanh",
    "fit",
    "load",
    "save",
    "set_num_threads",
    "show_config",
]


def __getattr__(name: str) -> Any:
    # Processes and servers cost more to import than the engine: they come when they are asked for.
    if name in ("distributed", "serve"):
        return import_module(f"gdlib.{name}")
    raise AttributeError(f"module 'gdlib' has no attribute {name!r}")

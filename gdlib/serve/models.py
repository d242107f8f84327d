"""What serving needs of a model, and gdlib's own as one. Other formats adapt themselves to the same protocol (onnx.py)."""

import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gdlib import serialization
from gdlib.serve.protocol import Signature
from gdlib.serve.tensors import DATATYPE_NAMES, ProtocolError, TensorSpec, check_finite

INPUT_NAME, OUTPUT_NAME = "input", "output"
MAX_WEIGHTS = 10_000  # of a linear model that tells them: 200 KB as text
QUICK_BYTES = 2**16  # of a model's file: its weights fit the innermost cache or nearly, and a row takes some microseconds
Arrays = dict[str, NDArray[Any]]
_FACTS = ("feature_units", "target_units", "feature_ranges")  # that a predictor may have besides its names


class ServedModel(Protocol):
    """A model that answers requests. Any thread may call `predict`, several at once."""

    platform: str
    signature: Signature
    parameters: dict[str, Any]  # of the model's metadata: names, units and what else describes it
    quick: bool  # whether a few rows take no longer than some microseconds, always

    def predict(self, arrays: Arrays) -> Arrays:
        """The outputs by name. Raises ProtocolError when these inputs have no answer."""


class Predictor(Protocol):
    """What `gdlib.Linear` and `gdlib.Sequential` have."""

    in_features: int
    out_features: int
    dtype: np.dtype[Any]
    feature_names: list[str] | None
    target_names: list[str] | None

    def predict(self, x: Any, /) -> NDArray[Any]: ...


class NativeModel:
    """A gdlib model: one input [rows, in_features], one output [rows, out_features]."""

    platform = "gdlib"

    def __init__(self, model: Predictor, *, quick: bool = False) -> None:
        self._model = model
        self.quick = quick
        self._datatype = DATATYPE_NAMES[model.dtype]
        self.signature = Signature(
            (TensorSpec(INPUT_NAME, self._datatype, (-1, model.in_features)),),
            (TensorSpec(OUTPUT_NAME, self._datatype, (-1, model.out_features)),),
            model.feature_names,
        )
        self._where = self.signature.where[INPUT_NAME]
        facts = {name: getattr(model, name, None) for name in ("feature_names", "target_names", *_FACTS)}
        facts["training"] = getattr(model, "training_summary", None)
        self.parameters = {key: value for key, value in facts.items() if value is not None} | _weights(model)

    def predict(self, arrays: Arrays) -> Arrays:
        try:
            return {OUTPUT_NAME: self._model.predict(arrays[INPUT_NAME])}
        except ValueError:  # it takes finite numbers only, and looks at each; here the first other one gets its name
            check_finite(arrays[INPUT_NAME], self._where)
            raise
        except ArithmeticError:  # finite input, infinite output
            raise ProtocolError(f"An output is too large for {self._datatype}: send smaller values.") from None


def _weights(model: Predictor) -> dict[str, Any]:
    """`weight` [out][in] and `bias` [out] of a model that is one linear layer of a moderate size: what explains its answers."""
    layers: list[Any] = getattr(model, "architecture", list)()
    if [layer[0] for layer in layers] != ["linear"] or model.in_features * model.out_features > MAX_WEIGHTS:
        return {}
    weight, *bias = getattr(model, "state_dict", dict)().values()
    return {"weight": weight.tolist(), "bias": bias[0].tolist() if bias else [0.0] * model.out_features}


def load_native(path: Path) -> ServedModel:
    """The model in a file that `gdlib.save` wrote. Raises what `gdlib.load` raises."""
    return NativeModel(load_copy(path), quick=path.stat().st_size <= QUICK_BYTES)


def load_copy(path: Path) -> Predictor:
    """`gdlib.load` of a copy in memory: it maps the file, and one that somebody cuts short meanwhile would end the process (SIGBUS)."""
    if not hasattr(os, "memfd_create"):  # not Linux
        return serialization.load(path)
    descriptor = os.memfd_create("gdlib-model")
    copy = f"/proc/self/fd/{descriptor}"
    try:
        with open(path, "rb") as file, open(descriptor, "wb", closefd=False) as memory:
            shutil.copyfileobj(file, memory, 2**20)
        return serialization.load(copy)
    except ValueError as error:
        raise ValueError(str(error).replace(copy, str(path))) from None
    finally:
        os.close(descriptor)

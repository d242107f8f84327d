"""ONNX models, computed by onnxruntime: trees, ensembles and networks made elsewhere, served beside gdlib's own."""

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdlib.serve.models import Arrays, ServedModel
from gdlib.serve.protocol import Signature
from gdlib.serve.tensors import BYTES, DTYPES, ProtocolError, TensorSpec, of_objects

logger = logging.getLogger(__name__)

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(string)": BYTES,
    **{f"tensor(int{bits})": f"INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"tensor(uint{bits})": f"UINT{bits}" for bits in (8, 16, 32, 64)},
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}


def _keep(item: object, increment: Any = ctypes.pythonapi.Py_IncRef, as_object: Any = ctypes.py_object) -> None:
    """Let an object live on for good. The functions are bound here because modules are empty when the interpreter ends."""
    increment(as_object(item))


class OnnxModel:
    """A model in an .onnx file, with the inputs and outputs that it declares."""

    platform = "onnxruntime_onnx"  # the protocol's name for it
    quick = False

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ImportError("an .onnx file needs the package onnxruntime: pip install gdlib[onnx].") from None
        self._process = os.getpid()
        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = False  # an arena keeps the memory of the largest request for good
        options.log_severity_level = 4  # what fails is raised as well, and needs no second line
        # Threads that spin between requests would take the cores from the server's own.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base
            logger.warning("onnxruntime cannot load %s: %s", path, _one_line(error))
            raise ValueError(f"{path} is no ONNX model that onnxruntime can run; the server's log says why.") from None
        self.signature = Signature(
            tuple(_spec(node, path) for node in self._session.get_inputs()),
            tuple(_spec(node, path) for node in self._session.get_outputs()),
        )
        self._texts = [spec.name for spec in self.signature.inputs if spec.datatype == BYTES]
        self._names = [spec.name for spec in self.signature.outputs]
        self.parameters: dict[str, Any] = {}

    def __del__(self, getpid: Callable[[], int] = os.getpid, keep: Callable[[object], None] = _keep) -> None:
        # Freeing a session waits for its threads, which a forked child does not have: there it stays until the process ends.
        if hasattr(self, "_session") and getpid() != self._process:
            keep(self._session)

    def predict(self, arrays: Arrays) -> Arrays:
        for name in self._texts:
            arrays[name] = _decode(arrays[name])
        try:
            outputs = self._session.run(self._names, arrays)
        except Exception as error:  # among others sizes that the model's own nodes find to disagree
            logger.warning("onnxruntime could not run a model: %s", _one_line(error))
            raise ProtocolError("The model cannot compute an answer for these inputs: check their sizes and values.") from None
        return {name: _as_array(output) for name, output in zip(self._names, outputs, strict=True)}


def load_onnx(path: Path) -> ServedModel:
    """The model in an .onnx file. Raises ValueError for a file that cannot be served, ImportError without onnxruntime."""
    return OnnxModel(path)


def _spec(node: Any, path: Path) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        advice = "; export a classifier with zipmap=False" if "map" in node.type else ""
        raise ValueError(f"{path} has {node.name!r} of type {node.type}, which is no tensor that the protocol knows{advice}.")
    return TensorSpec(node.name, datatype, tuple(size if isinstance(size, int) else -1 for size in node.shape))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _decode(array: NDArray[Any]) -> NDArray[Any]:
    try:
        return of_objects([item.decode("utf-8") for item in array.flat]).reshape(array.shape)
    except UnicodeDecodeError:
        raise ProtocolError("A value of a BYTES input is not UTF-8 text: send text.") from None


def _as_array(output: Any) -> NDArray[Any]:
    array = np.asarray(output)
    if array.dtype == DTYPES[BYTES]:
        return of_objects([str(item).encode("utf-8", "surrogatepass") for item in array.flat]).reshape(array.shape)
    return array

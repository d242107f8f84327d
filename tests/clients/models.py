"""The models that the clients ask: gdlib's own in both datatypes, and one in ONNX with text, integers and halves."""

from pathlib import Path

import numpy as np

from gdlib import Linear, ReLU, Sequential, save

FEATURES = ["area", "rooms"]
WEIGHT, BIAS = [[2.0, 30.0]], [5.0]


def house(dtype: str = "float32", bias: float = BIAS[0]) -> Linear:
    """price = 2 area + 30 rooms + 5, exact for small integers."""
    model = Linear(2, 1, seed=0, dtype=dtype)
    model.load_state_dict({"weight": np.array(WEIGHT, dtype), "bias": np.array([bias], dtype)})
    return model


def network() -> Sequential:
    return Sequential(Linear(3, 8, seed=0), ReLU(), Linear(8, 2, seed=1))


def write(root: Path) -> Path:
    """The folder of models: house (FP32), house64 (FP64, two versions), network, and mixed if the package onnx is there."""
    save(house(), root / "house" / "1" / "model.safetensors", feature_names=FEATURES, target_names=["price"])
    save(house("float64"), root / "house64" / "1" / "model.safetensors", feature_names=FEATURES)
    save(house("float64", bias=6.0), root / "house64" / "2" / "model.safetensors", feature_names=FEATURES)
    save(network(), root / "network" / "1" / "model.safetensors")
    (root / "mixed" / "1").mkdir(parents=True)
    (root / "mixed" / "1" / "model.onnx").write_bytes(_mixed())
    return root


def _mixed() -> bytes:
    """text, flag and half as they are; count and value doubled."""
    from onnx import TensorProto, helper

    types = {
        "text": TensorProto.STRING,
        "count": TensorProto.INT64,
        "value": TensorProto.FLOAT,
        "half": TensorProto.FLOAT16,
        "flag": TensorProto.BOOL,
    }
    nodes = [
        helper.make_node("Add", [name, name], [f"{name}_out"])
        if name in ("count", "value")
        else helper.make_node("Identity", [name], [f"{name}_out"])
        for name in types
    ]
    inputs = [helper.make_tensor_value_info(name, kind, ["rows"]) for name, kind in types.items()]
    outputs = [helper.make_tensor_value_info(f"{name}_out", kind, ["rows"]) for name, kind in types.items()]
    graph = helper.make_graph(nodes, "mixed", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content

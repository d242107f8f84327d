"""ONNX models made here by hand: what they declare, what they compute, every kind of tensor, and files that cannot be served."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gdlib.serve.app import App
from gdlib.serve.onnx import load_onnx
from gdlib.serve.repository import Repository
from gdlib.serve.tensors import ProtocolError

pytest.importorskip("onnxruntime", reason="ONNX models are an extra: pip install gdlib[onnx]")
onnx = pytest.importorskip("onnx", reason="the package onnx makes the models of these tests")

OPSETS = {"": 17, "ai.onnx.ml": 3}
WEIGHT = np.arange(6, dtype=np.float32).reshape(3, 2)


def value(name: str, kind: str, shape: list[Any] | None) -> Any:
    return onnx.helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape)


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, np.ndarray] | None = None) -> bytes:
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
    content: bytes = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return content


def linear(weight: np.ndarray = WEIGHT, kind: str = "FLOAT") -> bytes:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    rows, columns = weight.shape
    return model([node], [value("x", kind, ["rows", rows])], [value("y", kind, ["rows", columns])], {"w": weight})


def tree() -> bytes:
    """10 where x[0] <= 0.5, else 20; a missing x[0] goes with the greater."""
    node = onnx.helper.make_node(
        "TreeEnsembleRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        n_targets=1,
        nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2],
        nodes_featureids=[0, 0, 0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_values=[0.5, 0.0, 0.0],
        nodes_truenodeids=[1, 0, 0],
        nodes_falsenodeids=[2, 0, 0],
        nodes_missing_value_tracks_true=[0, 0, 0],
        target_treeids=[0, 0],
        target_nodeids=[1, 2],
        target_ids=[0, 0],
        target_weights=[10.0, 20.0],
    )
    return model([node], [value("x", "FLOAT", [None, 2])], [value("y", "FLOAT", [None, 1])])


def zipmap() -> bytes:
    node = onnx.helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_strings=["no", "yes"])
    inner = onnx.helper.make_map_type_proto(onnx.TensorProto.STRING, onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, []))
    output = onnx.helper.make_value_info("y", onnx.helper.make_sequence_type_proto(inner))
    return model([node], [value("x", "FLOAT", [None, 2])], [output])


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], Any]:
    def make(content: bytes) -> Any:
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        return load_onnx(path)

    return make


@pytest.fixture
def serve(tmp_path: Path, call: Any) -> Callable[[bytes], Callable[..., Any]]:
    """A client of an application that serves these bytes as model `m`."""

    def make(content: bytes) -> Callable[..., Any]:
        path = tmp_path / "models" / "m" / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        app = App(Repository(tmp_path / "models"))
        return lambda *arguments, **environ: call(app, *arguments, **environ)

    return make


Load = Callable[[bytes], Any]
Serve = Callable[[bytes], Callable[..., Any]]


def infer(client: Any, *tensors: dict[str, Any], **more: Any) -> Any:
    return client("POST", "/v2/models/m/infer", {"inputs": list(tensors), **more})


class TestComputing:
    def test_linear(self, load: Load) -> None:
        x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
        loaded = load(linear())
        np.testing.assert_allclose(loaded.predict({"x": x})["y"], x @ WEIGHT, rtol=1e-5, atol=1e-6)
        assert loaded.platform == "onnxruntime_onnx"
        assert [spec.describe() for spec in loaded.signature.inputs] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
        assert [spec.describe() for spec in loaded.signature.outputs] == [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}]

    def test_a_tree_takes_missing_values(self, serve: Serve) -> None:
        client = serve(tree())
        tensor = {"name": "x", "shape": [4, 2], "datatype": "FP32", "data": [0.5, 0, 0.6, 0, None, 0, -1, None]}
        assert infer(client, tensor).json["outputs"] == [
            {"name": "y", "datatype": "FP32", "shape": [4, 1], "data": [10.0, 20.0, 20.0, 10.0]}
        ]

    @pytest.mark.parametrize(
        ("kind", "datatype", "dtype"),
        [
            ("BOOL", "BOOL", "bool"),
            *((f"INT{bits}", f"INT{bits}", f"int{bits}") for bits in (8, 16, 32, 64)),
            *((f"UINT{bits}", f"UINT{bits}", f"uint{bits}") for bits in (8, 16, 32, 64)),
            ("FLOAT16", "FP16", "float16"),
            ("FLOAT", "FP32", "float32"),
            ("DOUBLE", "FP64", "float64"),
        ],
    )
    def test_every_datatype(self, load: Load, kind: str, datatype: str, dtype: str) -> None:
        node = onnx.helper.make_node("Identity", ["x"], ["y"])
        loaded = load(model([node], [value("x", kind, [None, 2])], [value("y", kind, [None, 2])]))
        assert loaded.signature.inputs[0].datatype == loaded.signature.outputs[0].datatype == datatype
        x = np.array([[0, 1], [1, 0]], dtype)
        answer = loaded.predict({"x": x})["y"]
        assert answer.dtype == x.dtype
        np.testing.assert_array_equal(answer, x)

    def test_half_precision_over_http(self, serve: Serve) -> None:
        client = serve(linear(WEIGHT.astype(np.float16), "FLOAT16"))
        raw = np.ones((2, 3), "<f2").tobytes()
        head = b'{"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP16", "parameters": {"binary_data_size": 12}}], '
        head += b'"parameters": {"binary_data_output": true}}'
        reply = client("POST", "/v2/models/m/infer", head + raw, HTTP_INFERENCE_HEADER_CONTENT_LENGTH=str(len(head)))
        assert reply.status == 200
        tail = reply.body[int(reply.headers["Inference-Header-Content-Length"]) :]
        np.testing.assert_array_equal(np.frombuffer(tail, "<f2").reshape(2, 2), np.ones((2, 3)) @ WEIGHT)
        tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 1, 1]}
        reply = infer(client, tensor)
        assert reply.status == 400
        assert "FP16 has no form in JSON" in reply.json["error"]

    def test_texts(self, serve: Serve) -> None:
        encoder = onnx.helper.make_node(
            "LabelEncoder", ["x"], ["n"], domain="ai.onnx.ml", keys_strings=["a", "é"], values_int64s=[1, 2], default_int64=-1
        )
        same = onnx.helper.make_node("Identity", ["x"], ["t"])
        client = serve(model([encoder, same], [value("x", "STRING", [None])], [value("n", "INT64", [None]), value("t", "STRING", [None])]))
        tensor = {"name": "x", "shape": [3], "datatype": "BYTES", "data": ["é", "other", "a"]}
        outputs = infer(client, tensor).json["outputs"]
        assert [output["data"] for output in outputs] == [[2, -1, 1], ["é", "other", "a"]]
        assert [output["datatype"] for output in outputs] == ["INT64", "BYTES"]
        raw = b"\1\0\0\0\xff"
        head = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}]}'
        reply = client("POST", "/v2/models/m/infer", head + raw, HTTP_INFERENCE_HEADER_CONTENT_LENGTH=str(len(head)))
        assert reply.status == 400
        assert "not UTF-8 text" in reply.json["error"]

    def test_several_inputs_and_outputs(self, serve: Serve) -> None:
        nodes = [onnx.helper.make_node("Add", ["a", "b"], ["sum"]), onnx.helper.make_node("Sub", ["a", "b"], ["difference"])]
        client = serve(
            model(
                nodes,
                [value("a", "FLOAT", [None, 2]), value("b", "FLOAT", [None, 2])],
                [value("sum", "FLOAT", [None, 2]), value("difference", "FLOAT", [None, 2])],
            )
        )
        a, b = ({"name": name, "shape": [1, 2], "datatype": "FP32", "data": data} for name, data in (("a", [5, 7]), ("b", [1, 2])))
        assert [output["data"] for output in infer(client, b, a).json["outputs"]] == [[6.0, 9.0], [4.0, 5.0]]
        only = infer(client, a, b, outputs=[{"name": "difference"}]).json["outputs"]
        assert [(output["name"], output["data"]) for output in only] == [("difference", [4.0, 5.0])]
        reply = infer(client, a)
        assert (reply.status, reply.json["error"]) == (400, "The request's inputs are 'a': send exactly 'a', 'b'.")

    def test_sizes_that_the_model_itself_refuses(self, serve: Serve, caplog: Any) -> None:
        node = onnx.helper.make_node("Add", ["a", "b"], ["y"])
        client = serve(model([node], [value("a", "FLOAT", [None]), value("b", "FLOAT", [None])], [value("y", "FLOAT", [None])]))
        a, b = ({"name": name, "shape": [size], "datatype": "FP32", "data": [1.0] * size} for name, size in (("a", 2), ("b", 3)))
        reply = infer(client, a, b)
        assert (reply.status, reply.json) == (
            400,
            {"error": "The model cannot compute an answer for these inputs: check their sizes and values."},
        )
        assert "\n" not in caplog.records[-1].getMessage()

    def test_a_scalar(self, serve: Serve) -> None:
        client = serve(model([onnx.helper.make_node("Neg", ["x"], ["y"])], [value("x", "FLOAT", [])], [value("y", "FLOAT", [])]))
        reply = infer(client, {"name": "x", "shape": [], "datatype": "FP32", "data": [2]})
        assert reply.json["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [], "data": [-2.0]}]

    def test_several_threads(self, load: Load) -> None:
        loaded = load(linear())
        rows = [np.full((1, 3), i, np.float32) for i in range(64)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda x: loaded.predict({"x": x})["y"], rows))
        np.testing.assert_array_equal(np.concatenate(answers), np.concatenate(rows) @ WEIGHT)

    def test_metadata_and_configuration(self, serve: Serve) -> None:
        client = serve(linear())
        assert client("GET", "/v2/models/m").json["platform"] == "onnxruntime_onnx"
        config = client("GET", "/v2/models/m/config").json
        assert config["backend"] == "onnxruntime"
        assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 3]}]


class TestFiles:
    def test_truncated_at_every_eighth(self, tmp_path: Path) -> None:
        content = linear(np.ones((30, 20), np.float32))
        for part in range(9):
            folder = tmp_path / "m" / str(part)
            folder.mkdir(parents=True)
            (folder / "model.onnx").write_bytes(content[: len(content) * part // 8])
        repository = Repository(tmp_path)
        assert repository.versions("m") == ["8"]
        for part in range(8):
            reason = repository.get("m", str(part)).reason
            assert reason == f"m/{part}/model.onnx is no ONNX model that onnxruntime can run; the server's log says why."

    def test_replaced_by_a_broken_one_and_mended(self, tmp_path: Path) -> None:
        path = tmp_path / "m" / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(linear())
        repository = Repository(tmp_path, settle_seconds=0.0)
        old = repository.get("m").model
        assert old is not None
        path.write_bytes(linear()[:-30])
        repository.refresh()
        entry = repository.get("m")
        assert entry.model is old
        assert "the one before it serves on" in entry.reason
        assert old.predict({"x": np.ones((1, 3), np.float32)})["y"].shape == (1, 2)
        path.write_bytes(linear(WEIGHT * 2))
        repository.refresh()
        model = repository.get("m").model
        assert model is not None
        np.testing.assert_array_equal(model.predict({"x": np.ones((1, 3), np.float32)})["y"], 2 * WEIGHT.sum(0, keepdims=True))

    def test_weights_that_come_after_the_model(self, tmp_path: Path) -> None:
        path = tmp_path / "m" / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        proto = onnx.load_from_string(linear(np.ones((300, 20), np.float32)))
        onnx.save_model(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        weights = path.with_name("weights.bin")
        content = weights.read_bytes()
        weights.unlink()
        repository = Repository(tmp_path, settle_seconds=0.0)
        assert repository.get("m").model is None
        weights.write_bytes(content)
        repository.refresh()
        model = repository.get("m").model
        assert model is not None
        np.testing.assert_array_equal(model.predict({"x": np.ones((1, 300), np.float32)})["y"], np.full((1, 20), 300, np.float32))

    def test_weights_from_outside_are_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "models" / "m" / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        proto = onnx.load_from_string(linear(np.ones((300, 20), np.float32)))
        onnx.save_model(proto, path, save_as_external_data=True, location="weights.data", size_threshold=0)
        assert Repository(tmp_path / "models").get("m").model is not None
        path.with_name("weights.data").rename(tmp_path / "w.d")
        content = path.read_bytes().replace(b"weights.data", b"../../../w.d")
        assert (path.parent / "../../../w.d").exists()
        path.write_bytes(content)
        assert Repository(tmp_path / "models").get("m").model is None

    def test_a_zipmap_is_refused_with_advice(self, load: Load) -> None:
        with pytest.raises(ValueError, match=r"'y' of type .*map.*, which is no tensor .*; export a classifier with zipmap=False\."):
            load(zipmap())

    @pytest.mark.parametrize("content", [b"", b"text", b"\0" * 100, linear() + b"\xff"])
    def test_no_model(self, load: Load, content: bytes, caplog: Any) -> None:
        with pytest.raises(ValueError, match="is no ONNX model that onnxruntime can run"):
            load(content)
        assert "onnxruntime cannot load" in caplog.text

    def test_an_operator_that_nobody_knows(self, load: Load) -> None:
        node = onnx.helper.make_node("Nothing", ["x"], ["y"])
        with pytest.raises(ValueError, match="is no ONNX model that onnxruntime can run"):
            load(model([node], [value("x", "FLOAT", [1])], [value("y", "FLOAT", [1])]))

    def test_without_onnxruntime(self, tmp_path: Path, monkeypatch: Any) -> None:
        import sys

        path = tmp_path / "m" / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(linear())
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert Repository(tmp_path).get("m").reason == "an .onnx file needs the package onnxruntime: pip install gdlib[onnx]."

    def test_the_memory_is_free(self, tmp_path: Path) -> None:
        path = tmp_path / "m" / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(linear())
        repository = Repository(tmp_path)
        loaded = repository.get("m").model
        assert loaded is not None
        alive = weakref.ref(loaded._session)  # type: ignore[attr-defined]
        del loaded
        repository.unload("m")
        gc.collect()
        assert alive() is None


def test_errors_of_a_model_are_the_clients(load: Load) -> None:
    with pytest.raises(ProtocolError, match="cannot compute an answer"):
        load(linear()).predict({"x": np.ones((2, 4), np.float32)})

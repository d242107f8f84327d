"""No path and no body, however malformed, gives a 500; and what was saved answers as it predicts."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gdlib
from gdlib.serve import create_app

TENSOR = {"name": "input", "shape": [2, 3], "datatype": "FP64", "data": [1, 0, 0, 0, 1, 2]}
INFER = "/v2/models/a/infer"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NUMBERS = st.lists(st.floats() | st.integers() | st.none(), min_size=6, max_size=6)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "name": JSON | st.just("output"),
        "shape": JSON | st.lists(st.integers(-2, 4), max_size=3),
        "datatype": JSON | st.sampled_from(["FP32", "FP64", "INT8", "UINT64", "BYTES"]),
        "data": JSON | NUMBERS,
        "parameters": JSON,
    },
)
REQUESTS = st.builds(
    lambda tensor, more: {"inputs": [TENSOR | tensor], **more},
    FIELDS,
    st.fixed_dictionaries(
        {}, optional={"id": JSON, "outputs": JSON | st.lists(FIELDS), "parameters": JSON, "inputs": JSON | st.lists(FIELDS)}
    ),
)
BODIES = (
    st.binary(max_size=200)
    | st.text(alphabet='{}[]":,0123456789eE+-.aNulIfinty\\ ').map(str.encode)
    | (JSON | REQUESTS).map(json.dumps).map(str.encode)
)


@pytest.fixture(scope="module")
def app(tmp_path_factory: Any) -> Any:
    root = tmp_path_factory.mktemp("models")
    gdlib.save(gdlib.Linear(3, 2, dtype=np.float32, seed=0), root / "a" / "1" / "model.safetensors", feature_names=["x", "y", "z"])
    return create_app(root)


class TestNoBodyBreaksIt:
    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(body=BODIES)
    @example(body=json.dumps({"inputs": [TENSOR]}).encode())
    @example(body=json.dumps({"inputs": [TENSOR | {"data": [3e38] * 6}]}).encode())
    @example(body=json.dumps({"inputs": [TENSOR | {"data": [10**400] * 6}]}).encode())
    def test_bodies(self, app: Any, call: Any, body: bytes) -> None:
        for path in (INFER, "/v2/repository/index"):
            reply = call(app, "POST", path, body)
            assert reply.status in (200, 400, 501)
            assert reply.status == 200 or set(reply.json) == {"error"}

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(path=st.text(st.characters(max_codepoint=255)).map("/{}".format), method=st.sampled_from(["GET", "HEAD", "POST", "PUT"]))
    def test_paths(self, app: Any, call: Any, path: str, method: str) -> None:
        for full in (path, "/v2" + path, "/v2/models" + path, "/v2/models/a" + path, "/v2/models/a/versions" + path):
            assert call(app, method, full).status in (200, 400, 404, 405, 501)

    def test_a_saved_model_answers_as_it_predicts(self, app: Any, call: Any) -> None:
        X = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
        wanted = gdlib.Linear(3, 2, dtype=np.float32, seed=0).predict(X)
        for data in (X.tolist(), X.ravel().tolist()):
            reply = call(app, "POST", INFER, {"inputs": [{"name": "input", "shape": [20, 3], "datatype": "FP32", "data": data}]})
            tensor = reply.json["outputs"][0]
            np.testing.assert_array_equal(np.array(tensor["data"], np.float32).reshape(tensor["shape"]), wanted)

    def test_a_saved_network_answers_as_it_predicts(self, tmp_path: Any, call: Any) -> None:
        model = gdlib.Sequential(gdlib.Linear(3, 9, seed=0), gdlib.Tanh(), gdlib.Linear(9, 2, seed=1), gdlib.Sigmoid())
        gdlib.save(model, tmp_path / "net" / "1" / "model.safetensors", target_names=["u", "v"])
        app = create_app(tmp_path)
        described = call(app, "GET", "/v2/models/net").json
        assert (described["inputs"][0]["shape"], described["outputs"][0]["shape"]) == ([-1, 3], [-1, 2])
        assert described["parameters"] == {"target_names": ["u", "v"]}
        X = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
        tensor = {"name": "input", "shape": [20, 3], "datatype": "FP32", "data": X.ravel().tolist()}
        answer = call(app, "POST", "/v2/models/net/infer", {"inputs": [tensor]}).json["outputs"][0]
        np.testing.assert_array_equal(np.array(answer["data"], np.float32).reshape(answer["shape"]), model.predict(X))

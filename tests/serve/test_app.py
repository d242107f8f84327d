"""The routes, statuses and error texts, through the WSGI validator; and that no body, however malformed, gives a 500."""

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gdlib
from gdlib.serve import create_app
from gdlib.serve.app import MAX_JSON_BYTES

Make = Callable[[dict[str, str]], Callable[..., Any]]
GET_PATHS = ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/a", "/v2/models/a/versions/1", "/v2/models/a/ready"]
POST_PATHS = ["/v2/repository/index", "/v2/models/a/infer", "/v2/models/a/versions/1/infer"]
TENSOR = {"name": "input", "shape": [2, 3], "datatype": "FP64", "data": [1, 0, 0, 0, 1, 2]}
INFER = "/v2/models/a/infer"


@pytest.fixture
def one(client: Make) -> Callable[..., Any]:
    return client({"a/1": "{}"})


@pytest.fixture
def several(client: Make) -> Callable[..., Any]:
    names = json.dumps({"feature_names": ["x", "y", "z"], "dtype": "float32"})
    return client({"a/1": "{}", "a/2": names, "bad/1": "{}", "bad/2": "broken"})


class TestHealthAndMetadata:
    def test_server(self, one: Any) -> None:
        reply = one("GET", "/v2")
        assert reply.status == 200
        assert reply.json["name"] == "gdlib"
        assert isinstance(reply.json["version"], str)
        assert reply.json["extensions"] == []

    def test_healthy(self, one: Any) -> None:
        for path in ("/v2/health/live", "/v2/health/ready"):
            reply = one("GET", path)
            assert (reply.status, reply.json) == (200, {"live": True, "ready": True})
        assert one("GET", "/v2/models/a/ready").json == {"name": "a", "ready": True}

    @pytest.mark.parametrize("files", [{}, {"a/1": "broken"}, {"a/1": "{}", "b/1": "crash"}])
    def test_alive_but_not_ready(self, client: Make, files: dict[str, str]) -> None:
        call = client(files)
        assert call("GET", "/v2/health/live").status == 200
        reply = call("GET", "/v2/health/ready")
        assert (reply.status, reply.json) == (503, {"live": True, "ready": False})

    def test_model(self, several: Any) -> None:
        assert several("GET", "/v2/models/a").json == {
            "name": "a",
            "versions": ["1", "2"],
            "platform": "gdlib",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}],
            "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 2]}],
            "parameters": {"feature_names": ["x", "y", "z"]},
        }
        first = several("GET", "/v2/models/a/versions/1").json
        assert first["inputs"][0]["datatype"] == "FP64"
        assert first["parameters"] == {}

    def test_unavailable(self, several: Any) -> None:
        reply = several("GET", "/v2/models/bad")
        assert reply.status == 503
        assert reply.json["error"].startswith("Model 'bad' version 2 is not available: bad")
        assert several("POST", "/v2/models/bad/infer", {"inputs": [TENSOR]}).status == 503
        assert several("GET", "/v2/models/bad/ready")[0] == 503
        assert several("GET", "/v2/models/bad/versions/1/ready").json == {"name": "bad", "ready": True}
        assert several("POST", "/v2/models/bad/versions/1/infer", {"inputs": [TENSOR]}).status == 200
        assert several("GET", "/v2/health/ready").status == 503

    def test_index(self, several: Any) -> None:
        full = several("POST", "/v2/repository/index").json
        assert [(entry["name"], entry["version"], entry["state"]) for entry in full] == [
            ("a", "1", "READY"),
            ("a", "2", "READY"),
            ("bad", "1", "READY"),
            ("bad", "2", "UNAVAILABLE"),
        ]
        assert "save the model again" in full[3]["reason"]
        assert several("POST", "/v2/repository/index", b"").json == full
        assert several("POST", "/v2/repository/index", {"ready": False}).json == full
        assert several("POST", "/v2/repository/index", {"ready": True}).json == full[:3]
        assert several("POST", "/v2/repository/index", b"[").status == 400


class TestRouting:
    @pytest.mark.parametrize("path", GET_PATHS)
    def test_head_is_get_without_the_body(self, one: Any, path: str) -> None:
        get, head = one("GET", path), one("HEAD", path)
        assert head.status == get.status == 200
        assert head.headers == get.headers
        assert head.body == b""

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
    @pytest.mark.parametrize("path", GET_PATHS + POST_PATHS)
    def test_methods(self, one: Any, method: str, path: str) -> None:
        allowed = ["GET", "HEAD"] if path in GET_PATHS else ["POST"]
        reply = one(method, path)
        if method in allowed:
            assert reply.status != 405
        else:
            assert reply.status == 405
            assert reply.headers["Allow"] == ", ".join(allowed)
            assert method == "HEAD" or reply.json["error"].endswith(f"use {' or '.join(allowed)}.")

    @pytest.mark.parametrize(
        "path",
        [
            "/",
            "/v1",
            "/v2/",
            "//v2",
            "/V2",
            "/v2/health",
            "/v2/health/live/",
            "/v2/models",
            "/v2/models/",
            "/v2/models//ready",
            "/v2/models/a/b/infer",
            "/v2/models/a/stats",
            "/v2/models/a/versions",
            "/v2/models/a/versions/1/config",
            "/v2/models/a/ready/x",
        ],
    )
    def test_unknown_paths(self, one: Any, path: str) -> None:
        reply = one("GET", path)
        assert reply.status == 404
        assert reply.json["error"].startswith("Unknown path")

    @pytest.mark.parametrize("name", ["b", "..", ".", "a\0", "a\n", "stats", "%2e%2e", "\xc3\xa9", pytest.param("x" * 5000, id="long")])
    @pytest.mark.parametrize("rest", ["", "/ready", "/versions/1"])
    def test_unknown_models(self, one: Any, name: str, rest: str) -> None:
        reply = one("GET", f"/v2/models/{name}{rest}")
        assert reply.status == 404
        assert reply.json["error"].startswith("Request for unknown model: ")
        assert len(reply.body) < 500

    @pytest.mark.parametrize("version", ["2", "01", "-1", "1.0", "..", "\u0663", pytest.param("9" * 5000, id="5000 digits")])
    def test_unknown_versions(self, one: Any, version: str) -> None:
        path = f"/v2/models/a/versions/{version}".encode().decode("latin-1")
        assert one("GET", path).json["error"].startswith("Request for unknown model: 'a' version '")

    def test_query_strings_and_types_do_not_matter(self, one: Any) -> None:
        plain = one("POST", INFER, {"inputs": [TENSOR]})
        for change in ({"QUERY_STRING": "a=b&c"}, {"CONTENT_TYPE": "text/plain"}, {"HTTP_ACCEPT": "image/png"}, {"CONTENT_TYPE": "x"}):
            assert one("POST", INFER, {"inputs": [TENSOR]}, **change) == plain
        assert plain.status == 200

    @pytest.mark.parametrize("path", ["/v2", "/nothing", "/v2/models/b", INFER])
    def test_headers(self, one: Any, path: str) -> None:
        reply = one("GET", path)
        assert reply.headers["Content-Type"] == "application/json"
        assert reply.headers["Content-Length"] == str(len(reply.body))
        assert reply.headers["X-Content-Type-Options"] == "nosniff"

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"])
    def test_loopback_hosts(self, one: Any, host: str) -> None:
        assert one("GET", "/v2/health/live", HTTP_HOST=host).status == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "127.0.0.1@evil", "0.0.0.0", "::1", "[::1", "a, localhost"],
    )
    def test_other_hosts_are_refused(self, one: Any, host: str) -> None:
        reply = one("GET", "/v2/health/live", HTTP_HOST=host)
        assert reply.status == 421
        assert "use one of 127.0.0.1, [::1], localhost" in reply.json["error"]

    def test_a_missing_host_is_refused(self, one: Any) -> None:
        assert one("GET", "/v2/health/live", HTTP_HOST=None).status == 400


class TestInfer:
    def test_an_answer(self, one: Any) -> None:
        reply = one("POST", INFER, {"id": "7", "inputs": [TENSOR], "outputs": [{"name": "output"}]})
        tensor = {"name": "output", "datatype": "FP64", "shape": [2, 2], "data": [0.0, 11.0, 5.0, 36.0]}
        assert (reply.status, reply.json) == (200, {"model_name": "a", "model_version": "1", "id": "7", "outputs": [tensor]})

    def test_versions(self, several: Any) -> None:
        assert several("POST", INFER, {"inputs": [TENSOR]}).json["model_version"] == "2"
        old = several("POST", "/v2/models/a/versions/1/infer", {"inputs": [TENSOR]}).json
        assert (old["model_version"], old["outputs"][0]["datatype"]) == ("1", "FP64")

    def test_a_strange_id_comes_back(self, one: Any) -> None:
        body = b'{"id": "\\ud800 \xc3\xa9 \\u0000", "inputs": [' + json.dumps(TENSOR).encode() + b"]}"
        assert one("POST", INFER, body).json["id"] == "\ud800 é \0"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"datatype": "FP16"}, "datatype is 'FP16'"),
            ({"shape": [2, 4]}, "send rows of 3 features"),
            ({"data": [1, 2]}, "'data' holds 2 values"),
            ({"data": [[1, 2, 3], [4]]}, "Row 1 of 'data'"),
            ({"data": [1, 2, 3, 4, "5", 6]}, "feature 'y' is a string"),
            ({"data": [1, 2, 3, 4, True, 6]}, "feature 'y' is a boolean"),
            ({"data": [1, 2, 3, 4, None, 6]}, "Row 1, feature 'y' is NaN or null"),
            ({"data": [1, 2, 3, 4, float("nan"), 6]}, "Row 1, feature 'y' is NaN or null"),
            ({"data": [1, 2, 3, 4, 5, float("inf")]}, "Row 1, feature 'z' is infinite"),
            ({"data": [1, 2, 3, 4, 5, 1e39]}, "Row 1, feature 'z' is infinite, or too large for FP32"),
            ({"name": "x"}, "only input is 'input'"),
            ({"parameters": {"binary_data_size": 48}}, "binary tensor extension"),
        ],
    )
    def test_bad_tensors(self, several: Any, change: dict[str, Any], words: str) -> None:
        reply = several("POST", INFER, {"inputs": [TENSOR | change]})
        assert reply.status == 400
        assert words in reply.json["error"]

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"", "not valid JSON"),
            (b"\xff\xfe", "UTF-8"),
            (b'{"id": "a", "id": "b"}', "same key twice"),
            pytest.param(b"[" * 500_000, "nests too deeply", id="depth"),
            pytest.param(b'{"id":' * 500_000, "nests too deeply", id="depth of objects"),
            pytest.param(b'{"inputs": [{"data": ' + b"[" * 300 + b"]" * 300 + b"}]}", "'name' is missing", id="depth below the limit"),
            pytest.param(b'{"inputs": ' + b"9" * 100_000 + b"}", "digits", id="digits"),
        ],
    )
    def test_bad_bodies(self, one: Any, body: bytes, words: str) -> None:
        reply = one("POST", INFER, body)
        assert reply.status == 400
        assert words in reply.json["error"]

    def test_the_binary_extension_is_refused_by_name(self, one: Any) -> None:
        reply = one("POST", INFER, b"{}" + bytes(48), HTTP_INFERENCE_HEADER_CONTENT_LENGTH="2")
        assert reply.status == 400
        assert "binary tensor extension, which is not supported" in reply.json["error"]

    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br, gzip"])
    def test_compressed_bodies_are_refused_by_name(self, one: Any, encoding: str) -> None:
        reply = one("POST", INFER, b"\x1f\x8b", HTTP_CONTENT_ENCODING=encoding)
        assert reply.status == 400
        assert "uncompressed" in reply.json["error"]
        assert one("POST", INFER, {"inputs": [TENSOR]}, HTTP_CONTENT_ENCODING="Identity").status == 200

    @pytest.mark.parametrize("length", [None, ""])
    def test_a_missing_length(self, one: Any, length: str | None) -> None:
        reply = one("POST", INFER, {"inputs": [TENSOR]}, CONTENT_LENGTH=length)
        assert reply.status == 400
        assert "Content-Length header is missing" in reply.json["error"]

    @pytest.mark.parametrize("length", ["abc", "-1", "+5", "1.5", "1_0", " 5", "\u0665", "5, 5"])
    def test_an_invalid_length(self, one: Any, length: str) -> None:
        reply = one("POST", INFER, {"inputs": [TENSOR]}, validate=False, CONTENT_LENGTH=length)
        assert reply.status == 400
        assert "not a number" in reply.json["error"]

    @pytest.mark.parametrize("length", [str(MAX_JSON_BYTES + 1), "1" + "0" * 18, pytest.param("9" * 5000, id="5000 digits")])
    def test_too_large(self, one: Any, length: str) -> None:
        reply = one("POST", INFER, {"inputs": [TENSOR]}, validate=False, CONTENT_LENGTH=length)
        assert reply.status == 413
        assert f"larger than {MAX_JSON_BYTES} bytes" in reply.json["error"]

    def test_the_largest_body(self, one: Any) -> None:
        body = json.dumps({"inputs": [TENSOR]}).encode()
        assert one("POST", INFER, body + b" " * (MAX_JSON_BYTES - len(body))).status == 200
        assert one("POST", INFER, body + b" " * (MAX_JSON_BYTES + 1 - len(body))).status == 413

    def test_a_body_cut_short(self, one: Any) -> None:
        reply = one("POST", INFER, b'{"inputs"', CONTENT_LENGTH="100")
        assert reply.status == 400
        assert "shorter than its Content-Length" in reply.json["error"]

    def test_an_output_that_overflows(self, client: Make) -> None:
        call = client({"a/1": json.dumps({"dtype": "float64"})})
        with np.errstate(over="ignore", invalid="ignore"):
            reply = call("POST", INFER, {"inputs": [TENSOR | {"data": [0, 0, 0, 1e308, 1e308, 1e308]}]})
        assert reply.status == 400
        assert "output of row 1 is not finite" in reply.json["error"]

    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (ValueError("x has a wrong shape."), 400, "x has a wrong shape."),
            (ArithmeticError("the weights are too large."), 400, "An output is too large for FP64: send smaller values."),
            (RuntimeError("a secret"), 500, "Internal error: the server's log says more."),
            (RecursionError("a secret"), 500, "Internal error: the server's log says more."),
            (MemoryError(), 500, "Internal error: the server's log says more."),
        ],
    )
    def test_a_model_that_fails(
        self, one: Any, fake_model: Any, monkeypatch: Any, caplog: Any, error: Exception, status: int, message: str
    ) -> None:
        def predict(self: Any, x: Any) -> Any:
            raise error

        monkeypatch.setattr(fake_model, "predict", predict)
        with caplog.at_level(logging.ERROR):
            reply = one("POST", INFER, {"inputs": [TENSOR]})
        assert (reply.status, reply.json) == (status, {"error": message})
        assert ("Traceback" in caplog.text) == (status == 500)


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
            assert reply.status in (200, 400)
            assert reply.status == 200 or set(reply.json) == {"error"}

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(path=st.text(st.characters(max_codepoint=255)).map("/{}".format), method=st.sampled_from(["GET", "HEAD", "POST", "PUT"]))
    def test_paths(self, app: Any, call: Any, path: str, method: str) -> None:
        for full in (path, "/v2" + path, "/v2/models" + path, "/v2/models/a" + path, "/v2/models/a/versions" + path):
            assert call(app, method, full).status in (200, 400, 404, 405)

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

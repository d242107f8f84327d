"""The routes, statuses, headers and error texts, through the WSGI validator."""

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gdlib.serve.app import App, create_app
from gdlib.serve.bodies import MAX_JSON_BYTES
from gdlib.serve.repository import Repository

Make = Callable[[dict[str, str]], Callable[..., Any]]
GET_PATHS = [
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/a",
    "/v2/models/a/versions/1",
    "/v2/models/a/ready",
    "/v2/models/a/config",
    "/v2/models/a/stats",
    "/v2/models/stats",
    "/metrics",
    "/openapi.json",
    "/",
]
POST_PATHS = [
    "/v2/repository/index",
    "/v2/models/a/infer",
    "/v2/models/a/versions/1/infer",
    "/v2/repository/models/a/load",
    "/v2/repository/models/a/unload",
]
TENSOR = {"name": "input", "shape": [2, 3], "datatype": "FP64", "data": [1, 0, 0, 0, 1, 2]}
INFER = "/v2/models/a/infer"


@pytest.fixture
def several(client: Make) -> Callable[..., Any]:
    names = json.dumps({"feature_names": ["x", "y", "z"], "dtype": "float32"})
    return client({"a/1": "{}", "a/2": names, "bad/1": "{}", "bad/2": "broken"})


class TestRouting:
    @pytest.mark.parametrize("path", GET_PATHS)
    def test_head_is_get_without_the_body(self, one: Any, path: str) -> None:
        get, head = one("GET", path, HTTP_X_REQUEST_ID="i"), one("HEAD", path, HTTP_X_REQUEST_ID="i")
        assert head.status == get.status == 200
        assert head.headers.keys() == get.headers.keys()
        if path != "/metrics":  # where the first request counts in the second
            assert head.headers == get.headers
        assert head.body == b""
        assert get.headers["Content-Length"] == str(len(get.body))

    @pytest.mark.parametrize("path", ["/nothing", "/v2/models/b", INFER])
    def test_head_of_an_error_has_no_body_either(self, one: Any, path: str) -> None:
        reply = one("HEAD", path)
        assert reply.status in (404, 405)
        assert reply.body == b""
        assert int(reply.headers["Content-Length"]) > 0

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
            "/v2/models/a/stat",
            "/v2/models/a/versions",
            "/v2/models/a/versions/1/configs",
            "/v2/models/a/infer/",
            "/v2/models/a/\ninfer",
            "/v2/models/a/infer\n",
            "/v2/repository",
            "/v2/repository/models/a",
            "/v2/repository/models/a/reload",
            "/v2/repository/models/a/b/load",
            "/metrics/",
            "/openapi.yaml",
            "/v2/models/a/ready/x",
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_unknown_paths(self, one: Any, method: str, path: str) -> None:
        reply = one(method, path)
        assert reply.status == 404
        assert reply.json["error"].startswith("Unknown path")

    @pytest.mark.parametrize(
        "path",
        [
            "/v2/systemsharedmemory/status",
            "/v2/cudasharedmemory/region/a/register",
            "/v2/trace/setting",
            "/v2/logging",
            "/v2/models/a/trace/setting",
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_extensions_that_are_not_here(self, one: Any, method: str, path: str) -> None:
        reply = one(method, path)
        assert reply.status == 501
        assert reply.json["error"].startswith("This server has no such extension; it has binary_tensor_data, ")

    @pytest.mark.parametrize("name", ["b", "..", ".", "a\0", "a\n", "*", "%2e%2e", "\xc3\xa9", pytest.param("x" * 5000, id="long")])
    @pytest.mark.parametrize("rest", ["", "/ready", "/config", "/stats", "/versions/1", "/versions/1/stats"])
    def test_unknown_models(self, one: Any, name: str, rest: str) -> None:
        reply = one("GET", f"/v2/models/{name}{rest}")
        assert reply.status == 404
        assert reply.json["error"].startswith("Request for unknown model: ")
        assert len(reply.body) < 500

    @pytest.mark.parametrize("version", ["2", "01", "-1", "1.0", "..", "\u0663", pytest.param("9" * 5000, id="5000 digits")])
    def test_unknown_versions(self, one: Any, version: str) -> None:
        path = f"/v2/models/a/versions/{version}".encode().decode("latin-1")
        assert one("GET", path).json["error"].startswith("Request for unknown model: 'a' version '")

    def test_long_texts_of_clients_are_not_remembered(self, models_dir: Any, loaders: Any, call: Any) -> None:
        name = "x" * 255
        app = App(Repository(models_dir({f"{name}/1": "{}"}), loaders), allowed_hosts=("h" * 300,))
        assert call(app, "GET", f"/v2/models/{name}", HTTP_HOST="h" * 300).status == 200
        assert call(app, "GET", f"/v2/models/{'y' * 10_000}", HTTP_HOST="h" * 300).status == 404
        assert call(app, "GET", "/v2", HTTP_HOST="z" * 10_000).status == 421
        assert [cache.cache_info().currsize for cache in (app._route, app._allows_host)] == [0, 0]

    def test_query_strings_and_types_do_not_matter(self, one: Any) -> None:
        plain = one("POST", INFER, {"inputs": [TENSOR]}, HTTP_X_REQUEST_ID="i")
        for change in ({"QUERY_STRING": "a=b&c"}, {"CONTENT_TYPE": "text/plain"}, {"HTTP_ACCEPT": "image/png"}, {"CONTENT_TYPE": "x"}):
            assert one("POST", INFER, {"inputs": [TENSOR]}, HTTP_X_REQUEST_ID="i", **change) == plain
        assert plain.status == 200

    @pytest.mark.parametrize("path", ["/v2", "/nothing", "/v2/models/b", INFER])
    def test_headers(self, one: Any, path: str) -> None:
        reply = one("GET", path)
        assert reply.headers["Content-Type"] == "application/json"
        assert reply.headers["Content-Length"] == str(len(reply.body))
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert "Server" not in reply.headers
        assert not any(name.startswith("Access-Control") for name in reply.headers), "no page of another origin reads an answer"

    @pytest.mark.parametrize("path", ["/v2/health/live", "/nothing"])
    def test_request_ids(self, one: Any, path: str) -> None:
        assert one("GET", path, HTTP_X_REQUEST_ID="my-id.1:2_3").headers["X-Request-Id"] == "my-id.1:2_3"
        given = {one("GET", path).headers["X-Request-Id"] for _ in range(3)}
        assert len(given) == 3
        for sent in ("a b", "x" * 65, "a\r\nSet-Cookie: x", "é", "", "\0"):
            reply = one("GET", path, HTTP_X_REQUEST_ID=sent)
            assert reply.headers["X-Request-Id"] not in given | {sent}
            assert "Set-Cookie" not in reply.headers

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
        assert "call this server by one of 127.0.0.1, [::1], localhost" in reply.json["error"]

    def test_names_of_a_public_server_are_not_told(self, models_dir: Any, loaders: Any, call: Any) -> None:
        app = App(Repository(models_dir({"a/1": "{}"}), loaders), allowed_hosts=["localhost", "secret.example"])
        reply = call(app, "GET", "/v2/health/live", HTTP_HOST="evil.example")
        assert (reply.status, "secret" in reply.json["error"]) == (421, False)
        assert call(app, "GET", "/v2/health/live", HTTP_HOST="secret.example:80").status == 200

    @pytest.mark.parametrize("host", ["models.example:8443", "::1", "", "a b", "http://models.example"])
    def test_an_allowed_host_is_a_name_alone(self, tmp_path: Any, host: str) -> None:
        with pytest.raises(ValueError, match="pass names and addresses without ports, IPv6 in brackets"):
            create_app(tmp_path, allowed_hosts=["localhost", host])

    @pytest.mark.parametrize("path", ["/v2/health/live", "/nothing", INFER])
    def test_a_missing_host_is_refused(self, one: Any, path: str) -> None:
        reply = one("GET", path, validate=False, HTTP_HOST="")
        assert reply.status == 400
        assert "The Host header is ''" in reply.json["error"]

    def test_names_of_its_own(self, models_dir: Any, loaders: Any, call: Any) -> None:
        app = App(Repository(models_dir({"a/1": "{}"}), loaders), allowed_hosts=("Models.Example", "[fe80::1]"))
        for host, status in {
            "models.example:80": 200,
            "MODELS.EXAMPLE": 200,
            "[fe80::1]:1": 200,
            "localhost": 421,
            "x.models.example": 421,
        }.items():
            assert call(app, "GET", "/v2/health/live", HTTP_HOST=host).status == status


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
        body = b'{"id": "\xc3\xa9 \\u0000 \\\\", "inputs": [' + json.dumps(TENSOR).encode() + b"]}"
        assert one("POST", INFER, body).json["id"] == "é \0 \\"
        reply = one("POST", INFER, body.replace(b"\\u0000", b"\\ud800"))
        assert reply.status == 400
        assert "lone surrogates" in reply.json["error"]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"datatype": "FP128"}, "datatype is 'FP128'"),
            ({"datatype": "FP16"}, "FP16 has no form in JSON"),
            ({"shape": [2, 4]}, "send rows of 3 features"),
            ({"data": [1, 2]}, "'data' holds 2 values"),
            ({"data": [[1, 2, 3], [4]]}, "Row 1 of 'data'"),
            ({"data": [1, 2, 3, 4, "5", 6]}, "feature 'y' is a string"),
            ({"data": [1, 2, 3, 4, True, 6]}, "feature 'y' is a boolean"),
            ({"data": [1, 2, 3, 4, None, 6]}, "Row 1, feature 'y' is NaN or null"),
            ({"data": [1, 2, 3, 4, float("nan"), 6]}, "Row 1, feature 'y' is NaN or null"),
            ({"data": [1, 2, 3, 4, 5, float("inf")]}, "Row 1, feature 'z' is infinite"),
            ({"data": [1, 2, 3, 4, 5, 1e39]}, "Row 1, feature 'z' is infinite, or too large for FP32"),
            ({"name": "u"}, "only input is 'input'"),
            ({"parameters": {"binary_data_size": 48}}, "has both 'data' and 'binary_data_size'"),
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

    def test_extensions_that_a_request_may_name(self, one: Any) -> None:
        for parameters in ({"shared_memory_region": "r"}, {"shared_memory_region": "r", "binary_data_size": 48}):
            reply = one("POST", INFER, {"inputs": [TENSOR | {"parameters": parameters}]})
            assert reply.status == 501
            assert "shared memory" in reply.json["error"]
        reply = one("POST", INFER, {"inputs": [TENSOR], "outputs": [{"name": "output", "parameters": {"classification": 2}}]})
        assert reply.status == 501
        assert "the classification extension" in reply.json["error"]

    def test_unknown_encodings_are_refused_by_name(self, one: Any) -> None:
        for encoding in ("br", "br, gzip", "gzip, gzip", "x\n"):
            reply = one("POST", INFER, b"\x1f\x8b", HTTP_CONTENT_ENCODING=encoding)
            assert reply.status == 415
            assert reply.headers["Accept-Encoding"] == "gzip, deflate"
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
        assert "A value is infinite, and JSON has no form for it" in reply.json["error"]

    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (ValueError("a secret"), 500, "Internal error: the server's log says more."),
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

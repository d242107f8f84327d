"""The Open Inference Protocol v2 over HTTP, as a WSGI application: routes, statuses and error texts.

Any WSGI server can run it. A route is chosen by path and method alone: widely used clients send neither Content-Type nor Accept.
Every answer is JSON. An error is {"error": "<one sentence>"}, and what is unexpected is logged and answered with a fixed text.

Source: Open Inference Protocol v2, "HTTP/REST", and Triton's model repository extension for the index.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from importlib import metadata
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from gdlib.serve import protocol
from gdlib.serve.protocol import ProtocolError
from gdlib.serve.repository import Model, ModelVersion, Repository

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 8 * 2**20  # parsed JSON takes some 10 to 40 times its size in memory
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")

Answer = tuple[HTTPStatus, Any]
Route = tuple[tuple[str, ...], Callable[[WSGIEnvironment], Answer]]  # the methods allowed, the handler
GET, POST = ("GET", "HEAD"), ("POST",)
_MODEL_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/(ready|infer))?")


class HTTPError(Exception):
    """A request that is answered with `status` and one sentence."""

    def __init__(self, status: HTTPStatus, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


def create_app(models_dir: str | os.PathLike[str], *, allowed_hosts: Sequence[str] = LOOPBACK_HOSTS) -> WSGIApplication:
    """A WSGI application that serves models_dir/<name>/<version>/model.safetensors, the highest version by default.

    Models are loaded now; one that cannot be is reported by the index and by readiness, and the others are served. Requests whose
    Host header, without its port, is not in `allowed_hosts` are refused, so that a web page cannot reach a local service through a
    name of its own. Raises NotADirectoryError when `models_dir` is no folder.
    """
    return App(Repository(models_dir), allowed_hosts)


class App:
    """The application over a repository; `create_app` is the usual way to one."""

    def __init__(self, repository: Repository, allowed_hosts: Sequence[str] = LOOPBACK_HOSTS) -> None:
        self._repository = repository
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._routes: dict[str, Route] = {
            "/v2": (GET, self._server_metadata),
            "/v2/health/live": (GET, self._live),
            "/v2/health/ready": (GET, self._ready),
            "/v2/repository/index": (POST, self._index),
        }

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        headers: tuple[tuple[str, str], ...] = ()
        try:
            status, answer = self._answer(environ)
        except HTTPError as error:
            status, answer, headers = error.status, {"error": str(error)}, error.headers
        except ProtocolError as error:
            status, answer = HTTPStatus.BAD_REQUEST, {"error": str(error)}
        except Exception:
            logger.exception("A request failed.")
            status, answer = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "Internal error: the server's log says more."}
        body = json.dumps(answer, allow_nan=False, separators=(",", ":")).encode("ascii")
        common = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("X-Content-Type-Options", "nosniff")]
        start_response(f"{status.value} {status.phrase}", [*headers, *common])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

    def _answer(self, environ: WSGIEnvironment) -> Answer:
        self._check_host(environ.get("HTTP_HOST", ""))
        path = environ.get("PATH_INFO", "")
        allowed, handler = self._route(path)
        if environ["REQUEST_METHOD"] not in allowed:
            message = f"The method is not allowed for {protocol.shorten(path)}: use {' or '.join(allowed)}."
            raise HTTPError(HTTPStatus.METHOD_NOT_ALLOWED, message, ("Allow", ", ".join(allowed)))
        return handler(environ)

    def _route(self, path: str) -> Route:
        if path in self._routes:
            return self._routes[path]
        found = _MODEL_PATH.fullmatch(path)
        if found is None:
            raise HTTPError(HTTPStatus.NOT_FOUND, f"Unknown path {protocol.shorten(path)}: the protocol's paths begin at /v2.")
        name, version, action = found.groups()
        if action == "infer":
            return POST, partial(self._infer, name, version)
        return GET, partial(self._model_ready if action == "ready" else self._model_metadata, name, version)

    def _check_host(self, header: str) -> None:
        host = re.sub(r":[0-9]*\Z", "", header).lower()
        if host not in self._allowed_hosts:
            status = HTTPStatus.MISDIRECTED_REQUEST if header else HTTPStatus.BAD_REQUEST
            raise HTTPError(status, f"The Host header is {protocol.shorten(header)}: use one of {', '.join(sorted(self._allowed_hosts))}.")

    def _server_metadata(self, environ: WSGIEnvironment) -> Answer:
        try:
            version = metadata.version("gdlib")
        except metadata.PackageNotFoundError:  # run from a source tree
            version = "unknown"
        return HTTPStatus.OK, {"name": "gdlib", "version": version, "extensions": []}

    def _live(self, environ: WSGIEnvironment) -> Answer:
        return HTTPStatus.OK, {"live": True, "ready": self._repository.ready()}

    def _ready(self, environ: WSGIEnvironment) -> Answer:
        ready = self._repository.ready()
        return HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, {"live": True, "ready": ready}

    def _index(self, environ: WSGIEnvironment) -> Answer:
        body = _read_body(environ) if environ.get("CONTENT_LENGTH") else b""
        only_ready = protocol.parse_json(body).get("ready") is True if body else False
        return HTTPStatus.OK, [
            {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
            for entry in self._repository.index()
            if entry.model is not None or not only_ready
        ]

    def _model_metadata(self, name: str, version: str | None, environ: WSGIEnvironment) -> Answer:
        _, model = self._loaded(name, version)
        datatype = protocol.DATATYPE_NAMES[model.dtype]
        names = {"feature_names": model.feature_names, "target_names": model.target_names}
        return HTTPStatus.OK, {
            "name": name,
            "versions": self._repository.versions(name),
            "platform": "gdlib",
            "inputs": [{"name": protocol.INPUT_NAME, "datatype": datatype, "shape": [-1, model.in_features]}],
            "outputs": [{"name": protocol.OUTPUT_NAME, "datatype": datatype, "shape": [-1, model.out_features]}],
            "parameters": {key: value for key, value in names.items() if value is not None},
        }

    def _model_ready(self, name: str, version: str | None, environ: WSGIEnvironment) -> Answer:
        ready = self._find(name, version).model is not None
        return HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, {"name": name, "ready": ready}

    def _infer(self, name: str, version: str | None, environ: WSGIEnvironment) -> Answer:
        entry, model = self._loaded(name, version)
        if "HTTP_INFERENCE_HEADER_CONTENT_LENGTH" in environ:
            raise ProtocolError("The request uses the binary tensor extension, which is not supported: send the values as JSON in 'data'.")
        request = protocol.parse_json(_read_body(environ))
        X, identifier = protocol.decode_request(request, model.in_features, model.dtype, model.feature_names)
        try:
            output = model.predict(X)
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        except ArithmeticError:  # finite input, infinite output
            raise ProtocolError(f"An output is too large for {protocol.DATATYPE_NAMES[model.dtype]}: send smaller values.") from None
        return HTTPStatus.OK, protocol.encode_response(name, entry.version, output, identifier)

    def _find(self, name: str, version: str | None) -> ModelVersion:
        try:
            return self._repository.get(name, version)
        except KeyError:
            which = protocol.shorten(name) + ("" if version is None else f" version {protocol.shorten(version)}")
            raise HTTPError(HTTPStatus.NOT_FOUND, f"Request for unknown model: {which} is not found.") from None

    def _loaded(self, name: str, version: str | None) -> tuple[ModelVersion, Model]:
        entry = self._find(name, version)
        if entry.model is None:
            which = f"{name!r} version {entry.version}" if entry.version else repr(name)
            raise HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, f"Model {which} is not available: {entry.reason}")
        return entry, entry.model


def _read_body(environ: WSGIEnvironment) -> bytes:
    encoding = environ.get("HTTP_CONTENT_ENCODING", "identity")
    if encoding.lower() != "identity":
        raise ProtocolError(f"The Content-Encoding is {protocol.shorten(encoding)}: send the body uncompressed.")
    length = environ.get("CONTENT_LENGTH") or ""
    if not (length.isascii() and length.isdecimal()):
        raise ProtocolError("The Content-Length header is missing or not a number: send the body's length in bytes.")
    # Compared as text first: Python refuses to read integers of thousands of digits.
    size = int(length) if len(length) < 20 else MAX_JSON_BYTES + 1
    if size > MAX_JSON_BYTES:
        message = f"The body is larger than {MAX_JSON_BYTES} bytes: send fewer rows in one request."
        raise HTTPError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
    body: bytes = environ["wsgi.input"].read(size)
    if len(body) < size:
        raise ProtocolError("The body is shorter than its Content-Length: send all of it.")
    return body

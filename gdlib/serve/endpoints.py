"""What each endpoint of the protocol answers.

Source: Open Inference Protocol v2, "HTTP/REST"; Triton's model repository, statistics and model configuration extensions.
"""

from collections.abc import Callable
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter_ns
from typing import Any

from gdlib.serve import description, protocol
from gdlib.serve.bodies import read_body, read_optional_body
from gdlib.serve.exchange import BINARY, Answer, Exchange, HTTPError
from gdlib.serve.keys import ADMIN, METRICS
from gdlib.serve.metrics import Metrics, Record, in_order, prometheus_text
from gdlib.serve.models import ServedModel
from gdlib.serve.parsing import parse_json
from gdlib.serve.protocol import UnsupportedError
from gdlib.serve.repository import ModelVersion, Repository, StateError
from gdlib.serve.tensors import ProtocolError, checked, shorten

EXTENSIONS = ["binary_tensor_data", "model_repository", "statistics", "model_configuration", "parameters"]
RETRY_AFTER = ("Retry-After", "1")  # seconds


class Endpoints:
    """The handlers over a repository. `keyed`: whether keys are wanted. `admin`: whether models are loaded and unloaded by request."""

    def __init__(
        self, repository: Repository, metrics: Metrics, *, keyed: bool, admin: bool, max_in_flight: int, log_lines_lost: Callable[[], int]
    ) -> None:
        self.draining = False
        self._repository = repository
        self._metrics = metrics
        self._keyed = keyed
        self._admin = admin
        self._max_in_flight = max_in_flight
        self._log_lines_lost = log_lines_lost

    def server(self, exchange: Exchange) -> Answer:
        return Answer({"name": "gdlib", "version": _version(), "extensions": EXTENSIONS})

    def live(self, exchange: Exchange) -> Answer:
        return Answer({"live": True, "ready": self._is_ready()})

    def ready(self, exchange: Exchange) -> Answer:
        ready = self._is_ready()
        return Answer({"live": True, "ready": ready}, 200 if ready else 503)

    def _is_ready(self) -> bool:
        return not self.draining and self._repository.ready()

    def openapi(self, exchange: Exchange) -> Answer:
        return Answer(description.openapi(_version(), keys=self._keyed))

    def index(self, exchange: Exchange) -> Answer:
        only_ready = _field(read_optional_body(exchange.environ), "ready", bool)
        self._repository.sync()
        return Answer(
            [
                {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
                for entry in self._repository.index()
                if (entry.model is not None or not only_ready) and _may_see(exchange, entry.name)
            ]
        )

    def load(self, name: str, exchange: Exchange) -> Answer:
        self._check_admin(exchange)
        if _field(read_optional_body(exchange.environ), "parameters", dict):
            raise UnsupportedError("Models are loaded from the server's folder as they are there: send no configuration and no files.")
        exchange.model = name
        try:
            entry = self._repository.load(name)
        except KeyError:
            raise _unknown(name, None) from None
        except StateError:
            raise _state_lost() from None
        except OSError:
            raise HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, "The models folder cannot be read: try again when it is back.") from None
        if entry.reason:  # an older file or version may serve on, but what was asked for did not come about
            which = shorten(name) + (f" version {entry.version}" if entry.version else "")
            raise ProtocolError(f"failed to load {which}: {entry.reason}")
        return Answer({})

    def unload(self, name: str, exchange: Exchange) -> Answer:
        self._check_admin(exchange)
        _field(read_optional_body(exchange.environ), "parameters", dict)  # about models that this one is made of, and there are none
        exchange.model = name
        try:
            self._repository.unload(name)
        except KeyError:
            raise _unknown(name, None) from None
        except StateError:
            raise _state_lost() from None
        return Answer({})

    def metadata(self, name: str, version: str | None, exchange: Exchange) -> Answer:
        entry, model = self._loaded(name, version, exchange)
        return Answer(
            {
                "name": name,
                "versions": self._repository.versions(name) or [entry.version],  # it may have gone since
                "platform": model.platform,
                "inputs": [spec.describe() for spec in model.signature.inputs],
                "outputs": [spec.describe() for spec in model.signature.outputs],
                "parameters": model.parameters,
            }
        )

    def model_ready(self, name: str, version: str | None, exchange: Exchange) -> Answer:
        ready = self._find(name, version, exchange).model is not None and not self.draining
        return Answer({"name": name, "ready": ready}, 200 if ready else 503)

    def config(self, name: str, version: str | None, exchange: Exchange) -> Answer:
        model = self._loaded(name, version, exchange)[1]
        return Answer(description.model_config(name, model.platform, model.signature))

    def statistics(self, name: str | None, version: str | None, exchange: Exchange) -> Answer:
        if name is not None:
            self._find(name, version, exchange)
        _check_shared(exchange, self._metrics.shared)
        records, _ = self._metrics.collect()
        served = [(entry.name, entry.version) for entry in self._repository.index() if entry.model is not None]
        keys = {*served, *records} if name is None else {key for key in {*served, *records} if key[0] == name and version in (None, key[1])}
        shown = sorted((key for key in keys if _may_see(exchange, key[0])), key=in_order)
        return Answer({"model_stats": [records.get(key, Record()).statistics(*key) for key in shown]})

    def prometheus(self, exchange: Exchange) -> Answer:
        if exchange.key is not None and not exchange.key.allows(METRICS):
            raise _forbidden(METRICS)
        _check_shared(exchange, self._metrics.shared)
        records, responses = self._metrics.collect()
        ready = {(entry.name, entry.version): entry.model is not None for entry in self._repository.index() if entry.version}
        gauges = [
            ("in_flight", "Inference requests being answered by this process.", self._metrics.in_flight),
            ("access_log_lines_lost", "Lines of the access log that could not be written by this process.", self._log_lines_lost()),
        ]
        return Answer(prometheus_text(records, responses, gauges, ready).encode(), content_type="text/plain; version=0.0.4; charset=utf-8")

    def infer(self, name: str, version: str | None, exchange: Exchange) -> Answer:
        entry, model = self._loaded(name, version, exchange)
        exchange.version = entry.version
        if not self._metrics.enter(self._max_in_flight):
            message = f"{self._max_in_flight} requests are being answered already: send this one again in a moment."
            raise HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, message, RETRY_AFTER)
        begin = perf_counter_ns()
        try:
            body, json_length = read_body(exchange.environ)
            exchange.bytes_in = len(body)
            if json_length == len(body):
                request = protocol.decode_json(body, model.signature)
            else:
                request = protocol.decode_binary(body[:json_length], memoryview(body)[json_length:], model.signature)
            read = perf_counter_ns()
            arrays = model.predict(request.arrays)
            computed = perf_counter_ns()
            answer, json_length_out = protocol.encode(name, entry.version, arrays, request.outputs, request.identifier)
            exchange.rows = request.rows
        except BaseException:
            self._metrics.failed(name, entry.version, perf_counter_ns() - begin)
            raise
        self._metrics.succeeded(name, entry.version, request.rows, (read - begin, computed - read, perf_counter_ns() - computed))
        if json_length_out is None:
            return Answer(answer)
        return Answer(answer, 200, BINARY, (("Inference-Header-Content-Length", str(json_length_out)),))

    def _find(self, name: str, version: str | None, exchange: Exchange) -> ModelVersion:
        exchange.model = name
        if exchange.key is not None and not exchange.key.allows_model(name):
            raise _forbidden(f"models:{name}")
        self._repository.sync(name)
        try:
            return self._repository.get(name, version)
        except KeyError:
            raise _unknown(name, version) from None

    def _loaded(self, name: str, version: str | None, exchange: Exchange) -> tuple[ModelVersion, ServedModel]:
        entry = self._find(name, version, exchange)
        if entry.model is None:
            which = f"{name!r} version {entry.version}" if entry.version else repr(name)
            raise HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, f"Model {which} is not available: {entry.reason}", RETRY_AFTER)
        return entry, entry.model

    def _check_admin(self, exchange: Exchange) -> None:
        if not self._admin:
            raise HTTPError(HTTPStatus.FORBIDDEN, "Loading and unloading by request is switched off: start the server with --admin.")
        if exchange.key is None or not exchange.key.allows(ADMIN):
            raise _forbidden(ADMIN)
        _check_shared(exchange, self._repository.shared)


def _check_shared(exchange: Exchange, shared: bool) -> None:
    """What one of several processes knows or does would be a part of the truth."""
    environ = exchange.environ
    many = environ.get("wsgi.multiprocess") or environ.get("SERVER_SOFTWARE") == "Granian"  # which says False whatever it runs
    if many and not shared:
        message = "This server may run several processes, which share nothing: give them a common folder, GDLIB_STATE_DIR, for this."
        raise HTTPError(HTTPStatus.NOT_IMPLEMENTED, message)


def _field(body: bytes, key: str, wanted: type) -> Any:
    """A field of a body that may be empty, as the field may be null or missing."""
    value = parse_json(body).get(key) if body else None
    return wanted() if value is None else checked(value, wanted, f"'{key}'")


def _may_see(exchange: Exchange, model: str) -> bool:
    return exchange.key is None or exchange.key.allows_model(model)


def _state_lost() -> HTTPError:
    message = "The folder that the processes share, GDLIB_STATE_DIR, cannot be written, and nothing was changed: try again when it can."
    return HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, message)


def _forbidden(scope: str) -> HTTPError:
    return HTTPError(HTTPStatus.FORBIDDEN, f"The key does not have the scope {shorten(scope)}: use one that has.")


def _unknown(name: str, version: str | None) -> HTTPError:
    which = shorten(name) + ("" if version is None else f" version {shorten(version)}")
    return HTTPError(HTTPStatus.NOT_FOUND, f"Request for unknown model: {which} is not found.")


def _version() -> str:
    try:
        return version("gdlib")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"

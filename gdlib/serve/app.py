"""The Open Inference Protocol v2 over HTTP, as a WSGI application: routes, rights, statuses and error texts.

Any WSGI server can run it. A route is chosen by path and method alone: widely used clients send neither Content-Type nor Accept.
An error is {"error": "<one sentence>"}, and what is unexpected is logged and answered with a fixed text.

Source: Open Inference Protocol v2, "HTTP/REST"; Triton's model repository, statistics and model configuration extensions.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from time import perf_counter_ns
from typing import NamedTuple
from wsgiref.types import StartResponse, WSGIEnvironment

import orjson

from gdlib.serve import page
from gdlib.serve.access_log import AccessLog, RequestIds
from gdlib.serve.background import Background
from gdlib.serve.batching import load_batched
from gdlib.serve.bodies import pack
from gdlib.serve.endpoints import EXTENSIONS, Endpoints
from gdlib.serve.exchange import Answer, Exchange, HTTPError
from gdlib.serve.keys import Key, KeyFile
from gdlib.serve.metrics import Metrics
from gdlib.serve.protocol import UnsupportedError
from gdlib.serve.repository import LOADERS, NATIVE_FILE, Repository
from gdlib.serve.tensors import ProtocolError, shorten

logger = logging.getLogger(__name__)

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MAX_IN_FLIGHT = 64  # inference requests at once; each may hold a body of 64 MiB
MAX_BATCH_WINDOW = 1.0  # seconds
WATCH_SECONDS = 1.0  # between two looks at the folder; a look at a hundred versions takes about 2 ms
MAX_REMEMBERED, MAX_REMEMBERED_TEXT = 1024, 256  # paths and Host headers, which clients choose freely; characters of each
MAX_QUICK_BYTES = 4096  # some two hundred numbers in JSON
_LOCAL_PEERS = {"127.0.0.1", "::1", "::ffff:127.0.0.1", "", "localhost"}  # the last two are what servers say for a Unix socket
_STATUS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_MODEL_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/(ready|infer|config|stats))?")
_INFER_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_QUICK_PATHS = {"/v2/health/live", "/v2/health/ready"}
_REPOSITORY_PATH = re.compile(r"/v2/repository/models/([^/]+)/(load|unload)")
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
_OTHER_EXTENSIONS = re.compile(r"/v2/(?:systemsharedmemory|cudasharedmemory|trace|logging|models/[^/]+/trace)(?:/.*)?")

Handler = Callable[[Exchange], Answer]
GET, POST = ("GET", "HEAD"), ("POST",)


class Route(NamedTuple):
    methods: tuple[str, ...]
    handler: Handler
    open: bool = False  # answered without a key


def create_app(
    models_dir: str | os.PathLike[str],
    *,
    keys: str | os.PathLike[str] | None = None,
    admin: bool = False,
    allowed_hosts: Sequence[str] = LOOPBACK_HOSTS,
    access_log: str | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    max_in_flight: int = MAX_IN_FLIGHT,
    batch_window: float = 0.0,
) -> "App":
    """A WSGI application that serves models_dir/<name>/<version>/model.safetensors or model.onnx, the highest version by default.

    Models are loaded now, and again whenever their files change; one that cannot be is reported by the index, and the others are served.
    Requests whose Host header, without its port, is not in `allowed_hosts` are refused, so that a web page cannot reach a local service
    through a name of its own. With `keys`, a file of `gdlib keys`, all but health, the page and the API's description wants one of
    them; `admin` lets keys of that scope load and unload models. `access_log` is a file for one JSON line a request, "-" standard
    output. Concurrent requests to a wide model wait up to `batch_window` seconds for each other and are computed together; 0 is never, and
    0.0005 a good start. Several processes give the same answers about themselves, and unload together, when they share a `state_dir`.

    Raises NotADirectoryError when `models_dir` is no folder, ValueError for `admin` without `keys`, and what reading the keys raises.
    """
    if admin and keys is None:
        raise ValueError("admin needs keys: pass a file of keys, one of them with the scope 'admin'.")
    for host in allowed_hosts:
        if not _HOST.fullmatch(host):
            raise ValueError(f"an allowed host is {host!r}: pass names and addresses without ports, IPv6 in brackets.")
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight is {max_in_flight}: pass 1 or more.")
    if not 0 <= batch_window <= MAX_BATCH_WINDOW:
        raise ValueError(f"batch_window is {batch_window}: pass seconds, 0 to {MAX_BATCH_WINDOW}.")
    loaders = dict(LOADERS)
    if batch_window:
        loaders[NATIVE_FILE] = partial(load_batched, window=batch_window)
    state = None if state_dir is None else Path(state_dir)
    if state is not None:
        state.mkdir(parents=True, exist_ok=True)
    return App(
        Repository(models_dir, loaders, state_file=state and state / "repository.json"),
        keys=None if keys is None else KeyFile(keys),
        admin=admin,
        allowed_hosts=allowed_hosts,
        access_log=None if access_log is None else AccessLog(access_log),
        metrics=Metrics(state),
        max_in_flight=max_in_flight,
    )


class App:
    """The application over a repository; `create_app` is the usual way to one."""

    def __init__(
        self,
        repository: Repository,
        *,
        keys: KeyFile | None = None,
        admin: bool = False,
        allowed_hosts: Sequence[str] = LOOPBACK_HOSTS,
        access_log: AccessLog | None = None,
        metrics: Metrics | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        self.repository = repository
        self._keys = keys
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._access_log = access_log
        self._metrics = metrics or Metrics()
        self._ids = RequestIds()
        self._background = Background(
            watch_seconds, (repository.refresh, self._metrics.flush), (repository.forked, self._metrics.forked, self._ids.forked)
        )
        lost = (lambda: 0) if access_log is None else access_log.lines_lost
        self._endpoints = Endpoints(
            repository, self._metrics, keyed=keys is not None, admin=admin, max_in_flight=max_in_flight, log_lines_lost=lost
        )
        to = self._endpoints
        self._routes = {
            "/v2": Route(GET, to.server),
            "/v2/health/live": Route(GET, to.live, open=True),
            "/v2/health/ready": Route(GET, to.ready, open=True),
            "/v2/models/stats": Route(GET, partial(to.statistics, None, None)),
            "/v2/repository/index": Route(POST, to.index),
            "/metrics": Route(GET, to.prometheus),
            "/openapi.json": Route(GET, to.openapi, open=True),
            **{path: Route(GET, handler, open=True) for path, handler in page.handlers().items()},
        }
        self._model_routes = {
            None: (GET, to.metadata),
            "ready": (GET, to.model_ready),
            "config": (GET, to.config),
            "stats": (GET, to.statistics),
            "infer": (POST, to.infer),
        }
        self._repository_routes = {"load": to.load, "unload": to.unload}
        # What a client says again and again is looked at once: it saves 1.5 us of some 20 that a request takes.
        self._route = lru_cache(MAX_REMEMBERED)(self._find_route)
        self._allows_host = lru_cache(MAX_REMEMBERED)(self._find_host)

    def watch(self) -> None:
        """Watch the folder from now on, not only from the first request on: for servers that do not fork after this."""
        self._background.ensure()

    def drain(self) -> None:
        """Say from now on that no more requests are wanted, and answer those that come all the same."""
        self._endpoints.draining = True

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        begin = perf_counter_ns()
        self._background.ensure()
        exchange = Exchange(environ)
        try:
            answer = self._answer(exchange)
            if type(answer.body) is not bytes:
                answer = answer._replace(body=orjson.dumps(answer.body))
        except HTTPError as error:
            answer = Answer({"error": str(error)}, error.status, headers=error.headers)
        except UnsupportedError as error:
            answer = Answer({"error": str(error)}, 501)
        except ProtocolError as error:
            answer = Answer({"error": str(error)}, 400)
        except Exception:
            logger.exception("A request failed.")
            answer = Answer({"error": "Internal error: the server's log says more."}, 500)
        body, status, content_type, more = answer
        if type(body) is not bytes:
            body = orjson.dumps(body)
        request_id = self._ids.get(environ.get("HTTP_X_REQUEST_ID"))
        headers = [("Content-Type", content_type), ("X-Content-Type-Options", "nosniff"), ("X-Request-Id", request_id), *more]
        accepted = environ.get("HTTP_ACCEPT_ENCODING")
        if accepted:
            body, encoding = pack(body, accepted)
            if encoding is not None:
                headers += [("Content-Encoding", encoding), ("Vary", "Accept-Encoding")]
        headers.append(("Content-Length", str(len(body))))
        self._metrics.responded(status)
        if self._access_log is not None:
            self._log(self._access_log, exchange, request_id, status, len(body), begin)
        start_response(_STATUS[status], headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

    def is_quick(self, path: str, size: int) -> bool:
        """Whether a request with a body of `size` bytes takes less time than handing it to another thread: some 40 us."""
        if size > MAX_QUICK_BYTES or self.repository.shared:  # with others to follow it may have to wait
            return False
        found = _INFER_PATH.fullmatch(path)
        if found is None:
            return path in _QUICK_PATHS
        try:
            model = self.repository.get(*found.groups()).model
        except KeyError:
            return True  # to say so
        return model is None or model.quick

    def refused(self, status: int, environ: WSGIEnvironment, bytes_out: int) -> list[tuple[str, str]]:
        """Count and log an answer that the server itself gave, and give the headers that every answer has.

        `environ` holds what the server knows of the request, which may be nothing.
        """
        request_id = self._ids.get(environ.get("HTTP_X_REQUEST_ID"))
        self._metrics.responded(status)
        if self._access_log is not None:
            self._log(self._access_log, Exchange(environ), request_id, status, bytes_out, perf_counter_ns())
        return [("X-Content-Type-Options", "nosniff"), ("X-Request-Id", request_id)]

    def _answer(self, exchange: Exchange) -> Answer:
        environ = exchange.environ
        host = environ.get("HTTP_HOST", "")
        if not (self._allows_host if len(host) <= MAX_REMEMBERED_TEXT else self._find_host)(host):
            status = HTTPStatus.MISDIRECTED_REQUEST if host else HTTPStatus.BAD_REQUEST
            # Which names a server is known by is nobody's business who does not know one.
            names = (
                f"one of {', '.join(sorted(self._allowed_hosts))}"
                if self._allowed_hosts <= set(LOOPBACK_HOSTS)
                else "a name that it allows"
            )
            raise HTTPError(status, f"The Host header is {shorten(host)}: call this server by {names}.")
        if self._keys is None and environ.get("REMOTE_ADDR") not in _LOCAL_PEERS:
            raise HTTPError(HTTPStatus.FORBIDDEN, "Without keys this server answers its own machine only: give it a file of `gdlib keys`.")
        path = environ.get("PATH_INFO", "")
        route = (self._route if len(path) <= MAX_REMEMBERED_TEXT else self._find_route)(path)
        if environ["REQUEST_METHOD"] not in route.methods:
            message = f"The method is not allowed for {shorten(path)}: use {' or '.join(route.methods)}."
            raise HTTPError(HTTPStatus.METHOD_NOT_ALLOWED, message, ("Allow", ", ".join(route.methods)))
        if self._keys is not None and not route.open:
            exchange.key = self._authenticate(self._keys, environ.get("HTTP_AUTHORIZATION", ""))
        return route.handler(exchange)

    def _find_route(self, path: str) -> Route:
        if path in self._routes:
            return self._routes[path]
        found = _MODEL_PATH.fullmatch(path)
        if found is not None:
            name, version, action = found.groups()
            methods, handler = self._model_routes[action]
            return Route(methods, partial(handler, name, version))
        found = _REPOSITORY_PATH.fullmatch(path)
        if found is not None:
            name, action = found.groups()
            return Route(POST, partial(self._repository_routes[action], name))
        if _OTHER_EXTENSIONS.fullmatch(path):
            raise HTTPError(HTTPStatus.NOT_IMPLEMENTED, f"This server has no such extension; it has {', '.join(EXTENSIONS)}.")
        raise HTTPError(HTTPStatus.NOT_FOUND, f"Unknown path {shorten(path)}: the protocol's paths begin at /v2.")

    def _find_host(self, header: str) -> bool:
        return re.sub(r":[0-9]*\Z", "", header).lower() in self._allowed_hosts

    def _authenticate(self, keys: KeyFile, header: str) -> Key:
        scheme, _, secret = header.partition(" ")
        key = keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            message = "The request holds no key that is in force: send the header 'Authorization: Bearer <key>'."
            raise HTTPError(HTTPStatus.UNAUTHORIZED, message, ("WWW-Authenticate", "Bearer"))
        return key

    def _log(self, log: AccessLog, exchange: Exchange, request_id: str, status: int, bytes_out: int, begin: int) -> None:
        environ = exchange.environ
        log.write(
            id=request_id,
            remote=environ.get("REMOTE_ADDR"),
            key=exchange.key and exchange.key.name,
            method=environ.get("REQUEST_METHOD"),
            path=environ.get("PATH_INFO", ""),
            status=int(status),
            ms=round((perf_counter_ns() - begin) / 1e6, 3),
            model=exchange.model,
            version=exchange.version,
            rows=exchange.rows,
            bytes_in=exchange.bytes_in,
            bytes_out=bytes_out,
        )

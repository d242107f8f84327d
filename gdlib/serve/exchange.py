"""One HTTP request and its answer, as the handlers see them."""

from http import HTTPStatus
from typing import Any, NamedTuple
from wsgiref.types import WSGIEnvironment

from gdlib.serve.keys import Key

JSON = "application/json"  # exactly: a widely used client compares it as text
BINARY = "application/octet-stream"


class HTTPError(Exception):
    """A request that is answered with `status` and one sentence."""

    def __init__(self, status: HTTPStatus, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class Answer(NamedTuple):
    """What goes back: `body` is bytes, or what becomes JSON."""

    body: Any
    status: int = 200
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class Exchange:
    """One request on its way: what its handler needs, and what the access log tells of it."""

    key: Key | None = None
    model: str | None = None
    version: str | None = None
    rows: int | None = None
    bytes_in: int | None = None

    def __init__(self, environ: WSGIEnvironment) -> None:
        self.environ = environ

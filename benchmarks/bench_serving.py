"""What a request costs: in the application itself, and over HTTP beside MLServer and a WSGI application that answers a constant."""

import io
import json
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np

from benchmarks import servers
from benchmarks.measure import Contender, Group, Run
from gdlib.serve import create_app

LARGE = 1000  # rows
CONSTANT, DEFAULT, SINGLE = "waitress, constant answer", "MLServer", "MLServer, no workers"


def in_process(_: Any, body: bytes, requests: int, json_length: int | None = None) -> Run:
    """The WSGI callable with requests that a server has read: from the body's bytes to the answer's. Gives the last answer."""
    app = create_app(servers.folder() / "models")
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": servers.INFER,
        "HTTP_HOST": "localhost",
        "REMOTE_ADDR": "127.0.0.1",
        "CONTENT_LENGTH": str(len(body)),
    }
    if json_length is not None:
        environ["HTTP_INFERENCE_HEADER_CONTENT_LENGTH"] = str(json_length)

    def run() -> bytes:
        for _ in repeat(None, requests):
            answer = app({**environ, "wsgi.input": io.BytesIO(body)}, lambda status, headers: None)[0]
        return answer

    return run


def check_json(count: int, _: Any, answer: bytes) -> None:
    """Also of MLServer, whose outputs may be nested or flat."""
    output = np.ravel(json.loads(answer)["outputs"][0]["data"])
    np.testing.assert_allclose(output, servers.model().predict(servers.rows(count))[:, 0], rtol=1e-12)


def check_binary(count: int, _: Any, answer: bytes) -> None:
    output = np.frombuffer(answer[-8 * count :])
    np.testing.assert_array_equal(output, servers.model().predict(servers.rows(count))[:, 0])


def over_http(_: Any, server: Any) -> Run:
    return servers.asking(server, servers.request("POST", servers.INFER, servers.json_body(1), Content_Type="application/json"))


def app_group(title: str, count: int, binary: bool) -> Group:
    body, length = servers.binary_body(count) if binary else (servers.json_body(count), None)
    requests = 10_000 // (10 if count > 1 else 1)  # some tenths of a second: shorter runs measure how a core wakes up
    contender = Contender("gdlib", partial(in_process, body=body, requests=requests, json_length=length), work=requests)
    return Group(title, "request", [contender], check=partial(check_binary if binary else check_json, count), rounds=15)


APP_JSON = app_group("In the application: one row, JSON", 1, binary=False)
APP_BINARY = app_group("In the application: one row, binary", 1, binary=True)
LARGE_JSON = app_group("In the application: 1,000 rows, JSON", LARGE, binary=False)
LARGE_BINARY = app_group("In the application: 1,000 rows, binary", LARGE, binary=True)
HTTP = Group(
    "Over HTTP, one row, JSON, one connection",
    "request",
    [
        Contender("gdlib serve", partial(over_http, server=servers.gdlib_server)),
        Contender(SINGLE, partial(over_http, server=partial(servers.mlserver, workers=False))),
        Contender(DEFAULT, partial(over_http, server=partial(servers.mlserver, workers=True))),
        Contender(CONSTANT, partial(over_http, server=servers.bare_waitress), limit=True),
    ],
    check=partial(check_json, 1),
    rounds=31,
)
GROUPS = [APP_JSON, APP_BINARY, LARGE_JSON, LARGE_BINARY, HTTP]


def test_serving(time_contender: None) -> None: ...

"""What clients may hold of the server: no thread, and bounded memory and time. All on real sockets, with limits made small."""

import contextlib
import http.client
import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gdlib
from gdlib.serve.access_log import AccessLog
from gdlib.serve.app import App, create_app
from gdlib.serve.bodies import MAX_BYTES
from gdlib.serve.repository import Repository
from gdlib.serve.server import Server

pytest.importorskip("waitress", reason="the server is an extra: pip install gdlib[serve]")
from gdlib.serve import channels
from tests.waiting import TIMEOUT, wait_until

REQUEST = json.dumps({"inputs": [{"name": "input", "shape": [1, 3], "datatype": "FP64", "data": [1, 0, 0]}]}).encode()
INFER = b"POST /v2/models/a/infer HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
BIG = b"x" * 24 * 2**20  # more than sockets buffer on both ends


@pytest.fixture
def app(models_dir: Any, loaders: Any, tmp_path: Path) -> App:
    return App(Repository(models_dir({"a/1": "{}"}), loaders), access_log=AccessLog(str(tmp_path / "access.log")))


def big_app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    body = BIG if environ["PATH_INFO"] == "/big" else b"{}"
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


@contextlib.contextmanager
def connected(server: Server, *sent: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as client:
        for data in sent:
            client.sendall(data)
        yield client


def answer(client: socket.socket, method: str = "GET") -> tuple[int, http.client.HTTPMessage, bytes]:
    response = http.client.HTTPResponse(client, method=method)
    response.begin()
    with response:
        return response.status, response.headers, response.read()


def answers(client: socket.socket, number: int) -> list[bytes]:
    """Bodies of answers to requests that were sent together."""
    bodies = []
    with client.makefile("rb") as stream:
        for _ in range(number):
            assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
            bodies.append(stream.read(int(http.client.parse_headers(stream)["Content-Length"])))
    return bodies


def is_alive(server: Server) -> bool:
    with connected(server, LIVE) as client:
        return answer(client)[0] == 200


def is_closed(client: socket.socket) -> bool:
    """Whether the server has ended the connection; waits until it does."""
    try:
        while client.recv(2**16):
            pass
    except ConnectionError:
        pass
    return True


def unsent(server: Server) -> int:
    return sum(channel.total_outbufs_len for channel in list(server._waitress.active_channels.values()))


def holds_nothing(channel: channels.Channel) -> bool:
    """Whether all answers are sent, and no longer in memory."""
    return not channel.requests and not channel.total_outbufs_len and all(buffer.buf is None for buffer in channel.outbufs)


def test_clients_that_take_no_answers_hold_no_thread() -> None:
    with Server(big_app, port=0, threads=1) as server, contextlib.ExitStack() as stack:
        request = b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n"
        greedy = [stack.enter_context(connected(server, request * 5)) for _ in range(3)]
        wait_until(lambda: sum(channel.parked for channel in list(server._waitress.active_channels.values())) == len(greedy))
        assert is_alive(server)
        assert unsent(server) < 4 * len(BIG), "the requests behind the first one of each connection wait"
        assert answers(greedy[0], 5) == [BIG] * 5, "and are answered when the client takes the answers"
        wait_until(lambda: any(holds_nothing(channel) for channel in list(server._waitress.active_channels.values())))
        greedy[0].sendall(LIVE)
        assert answer(greedy[0])[0] == 200


def test_a_request_that_waits_is_seen_though_all_is_sent(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_UNSENT_BYTES", -1)
    with Server(app, port=0) as server, connected(server, LIVE) as client:
        wait_until(lambda: any(channel.parked for channel in list(server._waitress.active_channels.values())))
        monkeypatch.undo()
        assert answer(client)[0] == 200


def test_a_client_that_does_not_take_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(big_app, port=0) as server, connected(server, b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
        wait_until(lambda: unsent(server) > 0)
        monkeypatch.setattr(channels, "SLOW_SECONDS", -1000)
        wait_until(lambda: not server._waitress.active_channels)
        assert is_closed(client)


def test_no_inference_while_too_much_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_HELD_BYTES", 2 * channels.MAX_UNSENT_BYTES)
    with Server(big_app, port=0) as server:
        with connected(server, b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
            wait_until(lambda: unsent(server) > channels.MAX_HELD_BYTES and server._waitress._too_much_unsent)
            with connected(server, INFER + b"Content-Length: 2\r\n\r\n{}") as other:
                status, headers, body = answer(other)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert "send this request again in a moment" in json.loads(body)["error"]
            assert is_alive(server), "only inference is refused"
            assert answer(client)[2] == BIG
        wait_until(lambda: not server._waitress._too_much_unsent)
        with connected(server, INFER + b"Content-Length: 2\r\n\r\n{}") as other:
            assert answer(other)[0] == 200


@pytest.mark.parametrize(
    ("request_line", "length"), [(GET, b""), (b"POST /v2/repository/index HTTP/1.1\r\nHost: localhost\r\n", b"Content-Length: 0\r\n")]
)
def test_expectations_without_a_body(app: App, request_line: bytes, length: bytes) -> None:
    with Server(app, port=0) as server, connected(server, request_line + length + b"Expect: 100-continue\r\n\r\n") as client:
        status, _, body = answer(client)
        assert (status, type(json.loads(body))) == (200, dict if request_line == GET else list)
        client.sendall(LIVE)
        assert json.loads(answer(client)[2]) == {"live": True, "ready": True}, "the next request is one of its own"


def test_an_expectation_with_a_body(app: App) -> None:
    with (
        Server(app, port=0) as server,
        connected(server, INFER + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(REQUEST)) as client,
    ):
        assert client.recv(25, socket.MSG_WAITALL) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(REQUEST)
        assert answer(client)[0] == 200


def test_an_expectation_above_the_limit(app: App) -> None:
    with (
        Server(app, port=0) as server,
        connected(server, INFER + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (MAX_BYTES + 1)) as client,
    ):
        status, headers, _ = answer(client)
        assert (status, headers["Connection"]) == (413, "close")
        assert is_closed(client)


@pytest.mark.parametrize(
    "head",
    [
        INFER + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        INFER + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        b"POST /v2 HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["length first", "length last", "HTTP/1.0"],
)
def test_two_lengths(app: App, head: bytes) -> None:
    with Server(app, port=0) as server, connected(server, head + b"0\r\n\r\n" + LIVE) as client:
        status, headers, body = answer(client)
        assert (status, headers["Connection"]) == (400, "close")
        assert "Transfer-Encoding" in json.loads(body)["error"]
        assert client.recv(1) == b"", "what follows is no request"


def test_no_temporary_files(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*arguments: Any, **options: Any) -> Any:
        raise OSError("Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with Server(app, port=0) as server, connected(server, INFER + b"Content-Length: %d\r\n\r\n" % 2**22, REQUEST.ljust(2**22)) as client:
        assert answer(client)[0] == 200
        chunks = b"".join(b"%x\r\n%s\r\n" % (2**20, part) for part in [REQUEST.ljust(2**20), b" " * 2**20]) + b"0\r\n\r\n"
        client.sendall(INFER + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert answer(client)[0] == 200


@pytest.mark.parametrize(
    "how", [b"Content-Length: 4000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n3D0900\r\n"], ids=["length", "chunked"]
)
def test_more_body_than_all_may_hold(app: App, monkeypatch: pytest.MonkeyPatch, how: bytes) -> None:
    monkeypatch.setattr(channels, "MAX_HELD_BYTES", 3_000_000)
    with Server(app, port=0) as server, connected(server, INFER + b"Content-Length: 2500000\r\n\r\n", b" " * 2_000_000) as first:
        wait_until(lambda: server._waitress.held_bodies() == 2_000_000)
        with connected(server, INFER + how, b" " * 4_000_000) as second:  # sent whole: no reset hides the answer
            status, headers, body = answer(second)
            assert (status, headers["Retry-After"], headers["Connection"]) == (503, "1", "close")
            assert "send this request again in a moment" in json.loads(body)["error"]
            wait_until(lambda: server._waitress.held_bodies() == 2_000_000)
        monkeypatch.setattr(channels, "MAX_HELD_BYTES", 1_000_000)
        with connected(server, INFER + b"Content-Length: %d\r\n\r\n" % len(REQUEST), REQUEST[:10]) as small:
            wait_until(lambda: server._waitress.held_bodies() == 2_000_010)
            small.sendall(REQUEST[10:])
            assert answer(small)[0] == 200, "small bodies are always taken"
        monkeypatch.setattr(channels, "MAX_HELD_BYTES", 3_000_000)
        first.sendall(REQUEST.rjust(500_000))
        assert answer(first)[0] == 200
        wait_until(lambda: server._waitress.held_bodies() == 0)


@pytest.mark.parametrize(
    ("sent", "path"), [(b"GET /v2 HT", ""), (INFER + b"Content-Length: 9\r\n\r\n{", "/v2/models/a/infer")], ids=["header", "body"]
)
def test_a_request_that_does_not_arrive(app: App, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sent: bytes, path: str) -> None:
    with Server(app, port=0) as server, connected(server, LIVE) as kept, connected(server, sent) as client:
        assert answer(kept)[0] == 200
        monkeypatch.setattr(channels, "SLOW_SECONDS", -1000)
        status, _, body = answer(client)
        assert status == 408
        assert "took too long to arrive" in json.loads(body)["error"]
        assert is_closed(client)
        monkeypatch.undo()
        kept.sendall(LIVE)
        assert answer(kept)[0] == 200, "between requests there is more time"
    line = json.loads((tmp_path / "access.log").read_text().splitlines()[1])
    assert (line["status"], line["path"]) == (408, path)


def test_slow_is_what_is_below_a_rate() -> None:
    limit, rate = channels.SLOW_SECONDS, channels.SLOW_BYTES
    assert not channels._is_slow(limit, 0)
    assert channels._is_slow(limit + 1, 0)
    assert not channels._is_slow(limit + 1, rate)
    assert channels._is_slow(limit + 1.5, rate)


def test_a_full_house_makes_room(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_CONNECTIONS", 3)
    with Server(app, port=0) as server, connected(server, LIVE) as oldest, connected(server, INFER) as half, connected(server) as silent:
        assert answer(oldest)[0] == 200
        wait_until(lambda: len(server._waitress.active_channels) == 3)
        oldest.sendall(LIVE)
        assert answer(oldest)[0] == 200
        with connected(server, LIVE) as fresh:
            assert server._waitress._longest_idle() is None, "nobody has been idle for long enough: it waits"
            monkeypatch.setattr(channels, "FULL_IDLE_SECONDS", 0)
            assert answer(fresh)[0] == 200
            assert is_closed(silent), "the one that was idle for the longest"
            half.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(REQUEST), REQUEST))
            assert answer(half)[0] == 200, "one that is sending is not idle"
            oldest.sendall(LIVE)
            assert answer(oldest)[0] == 200


@pytest.mark.parametrize(
    ("sent", "status", "method", "path"),
    [
        (INFER + b"X-Request-Id: mine\r\nContent-Length: %d\r\n\r\n" % (MAX_BYTES + 1), 413, "POST", "/v2/models/a/infer"),
        (GET + b"X-Request-Id: mine\r\nTransfer-Encoding: gzip\r\n\r\n", 501, "GET", "/v2"),
        (GET + b"X-Request-Id: mine\r\nContent-Length: x\r\n\r\n", 400, "GET", "/v2"),
        (GET + b"X: " + b"x" * channels.MAX_HEADER_BYTES + b"\r\n\r\n", 431, None, ""),
        (b"nonsense\r\n\r\n", 400, None, ""),
    ],
    ids=["413", "501", "400", "431", "nonsense"],
)
def test_refusals_are_counted_and_logged(app: App, tmp_path: Path, sent: bytes, status: int, method: str | None, path: str) -> None:
    with Server(app, port=0) as server:
        with connected(server, sent) as client:
            got, headers, body = answer(client)
        assert (got, headers["X-Content-Type-Options"], headers["Connection"]) == (status, "nosniff", "close")
        if b"mine" in sent:
            assert headers["X-Request-Id"] == "mine"
        (line,) = map(json.loads, (tmp_path / "access.log").read_text().splitlines())
        assert (line["id"], line["status"], line["remote"]) == (headers["X-Request-Id"], status, "127.0.0.1")
        assert (line.get("method"), line["path"], line["bytes_out"]) == (method, path, len(body))
        with connected(server, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
            assert f'responses_total{{status="{status}"}} 1' in answer(client)[2].decode()


def test_a_client_that_still_sends_reads_the_refusal(app: App) -> None:
    with Server(app, port=0) as server, connected(server, INFER + b"Content-Length: %d\r\n\r\n" % (MAX_BYTES + 1)) as client:
        wait_until(lambda: all(channel.lingers_until is not None for channel in server._waitress.active_channels.values()))
        client.sendall(b" " * 2**22)
        assert answer(client)[0] == 413
        assert client.recv(1) == b""


def test_a_client_that_sends_on_and_on_is_cut_off(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "LINGER_SECONDS", -1000)
    with Server(app, port=0) as server, connected(server, b"nonsense\r\n\r\n") as client:
        assert answer(client)[0] == 400
        wait_until(lambda: not server._waitress.active_channels)


def test_the_loop_answers_what_is_quick_and_threads_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gdlib.save(gdlib.Linear(3, 2, seed=0), tmp_path / "small" / "1" / "model.safetensors")
    gdlib.save(gdlib.Linear(100, 400, seed=0), tmp_path / "wide" / "1" / "model.safetensors")
    app = create_app(tmp_path)
    answered: list[tuple[str, bool]] = []
    call = App.__call__

    def note(self: App, environ: Any, start_response: Any) -> Any:
        answered.append((environ["PATH_INFO"], threading.current_thread().name == "gdlib-serve"))
        return call(self, environ, start_response)

    monkeypatch.setattr(App, "__call__", note)

    def body(rows: int, features: int) -> str:
        data = [1.0] * (rows * features)
        return json.dumps({"inputs": [{"name": "input", "shape": [rows, features], "datatype": "FP32", "data": data}]})

    requests = [
        ("GET", "/v2/health/live", None, True),
        ("POST", "/v2/models/small/infer", body(1, 3), True),
        ("POST", "/v2/models/small/versions/1/infer", body(1, 3), True),
        ("POST", "/v2/models/nothing/infer", body(1, 3), True),
        ("POST", "/v2/models/small/infer", body(1000, 3), False),
        ("POST", "/v2/models/wide/infer", body(1, 100), False),
        ("GET", "/v2/models/small", None, False),
        ("GET", "/metrics", None, False),
    ]
    with Server(app, port=0) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        for method, path, content, _ in requests:
            connection.request(method, path, content)
            response = connection.getresponse()
            response.read()
            assert response.status == (404 if "nothing" in path else 200)
        connection.close()
        # Pipelined: in order, whoever answers.
        with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as client:
            paths = ["/v2/health/live", "/v2/models/small", "/v2/health/ready", "/v2", "/v2/health/live"]
            client.sendall("".join(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n" for path in paths).encode())
            bodies = []
            reader = client.makefile("rb")
            for _ in paths:
                size = 0
                while (line := reader.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        size = int(line.split(b":")[1])
                bodies.append(json.loads(reader.read(size)))
            reader.close()
        assert [next(iter(answer)) for answer in bodies] == ["live", "name", "live", "name", "live"]
        assert [bodies[1]["name"], bodies[3]["name"]] == ["small", "gdlib"]
    assert answered[: len(requests)] == [(path, quick) for _, path, _, quick in requests]

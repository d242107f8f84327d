"""The server on real sockets: a free port, limits, errors in JSON, and an end that loses no request in flight."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gdlib.serve.app import App
from gdlib.serve.bodies import MAX_BYTES, MAX_JSON_BYTES
from gdlib.serve.keys import add_key
from gdlib.serve.repository import Repository
from gdlib.serve.server import Server, serve

pytest.importorskip("waitress", reason="the server is an extra: pip install gdlib[serve]")
from gdlib.serve.channels import MAX_HEADER_BYTES
from tests.waiting import TIMEOUT, wait_until

REQUEST = json.dumps({"inputs": [{"name": "input", "shape": [1, 3], "datatype": "FP64", "data": [1, 0, 0]}]})


@pytest.fixture
def app(models_dir: Any, loaders: Any) -> App:
    return App(Repository(models_dir({"a/1": "{}"}), loaders))


def connect(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
    connection.request(method, path, body)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT).close()
    except OSError:
        return True
    return False


def test_starts_on_a_free_port_answers_and_stops(app: App) -> None:
    with Server(app, port=0, threads=2) as server:
        assert server.port > 0
        assert server.url == f"http://127.0.0.1:{server.port}"
        connection = connect(server)
        assert ask(connection, "GET", "/v2/health/ready") == (200, {"live": True, "ready": True})
        status, answer = ask(connection, "POST", "/v2/models/a/infer?x=1", REQUEST)
        assert (status, answer["outputs"][0]["data"]) == (200, [0.0, 11.0])
        connection.request("HEAD", "/v2")
        response = connection.getresponse()
        assert response.read() == b""
        assert response.getheader("Server") == "gdlib"
        assert ask(connection, "GET", "/v2")[0] == 200, "the connection is kept"
    connection.close()
    assert is_refused(server.port)
    wait_until(lambda: not any(thread.name.startswith(("waitress", "gdlib-serve")) for thread in threading.enumerate()))


def test_the_folder_is_watched_without_any_request(models_dir: Any, loaders: Any) -> None:
    root = models_dir({"a/1": "{}"})
    app = App(Repository(root, loaders, settle_seconds=0.0), watch_seconds=0.01)
    with Server(app, port=0):
        (root / "a" / "2").mkdir()
        (root / "a" / "2" / "model.safetensors").write_text("{}")
        wait_until(lambda: app.repository.get("a").version == "2")


def test_two_servers_side_by_side(app: App) -> None:
    with Server(app, port=0) as first, Server(app, port=0) as second:
        for server in (first, second):
            connection = connect(server)
            assert ask(connection, "GET", "/v2")[0] == 200
            connection.close()
        assert first.port != second.port


def test_closing_is_possible_at_any_time(app: App) -> None:
    server = Server(app, port=0)
    server.close()
    server.close()
    server.stop()
    server.run()
    assert is_refused(server.port)


def test_a_port_that_is_taken(app: App) -> None:
    with Server(app, port=0) as server, pytest.raises(OSError, match="already in use"):
        Server(app, port=server.port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_addresses_need_keys(app: App, tmp_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match=r"there are no keys: use 127\.0\.0\.1, ::1 or localhost, or add keys"):
        Server(app, host=host, port=0)
    with pytest.raises(ValueError, match="there are no keys"):
        serve(tmp_path, host=host, port=0)


@pytest.mark.parametrize("host", ["", "example.com", "localhost.example.com", "127.0.0.1:80"])
def test_names_are_no_addresses(app: App, tmp_path: Path, host: str) -> None:
    for public in (False, True):
        with pytest.raises(ValueError, match="pass an IP address of this machine, or localhost"):
            Server(app, host=host, port=0, public=public)


def test_all_addresses_with_keys(models_dir: Any, tmp_path: Path) -> None:
    root, keys = models_dir({}), tmp_path / "keys.json"
    secret = add_key(keys, "tester", ["models:*"])
    with pytest.raises(ValueError, match="pass the names that they do as allowed_hosts"):
        serve(root, host="0.0.0.0", port=0, keys=keys)
    seen: list[int] = []

    def visit(server: Server) -> None:
        def ask_and_stop() -> None:
            connection = connect(server)
            for headers in ({}, {"Authorization": f"Bearer {secret}"}):
                for host in ("me.example", "other.example"):
                    connection.request("GET", "/v2", headers={"Host": host} | headers)
                    response = connection.getresponse()
                    response.read()
                    seen.append(response.status)
            connection.close()
            server.stop()

        threading.Thread(target=ask_and_stop).start()

    serve(root, host="0.0.0.0", port=0, keys=keys, allowed_hosts=["me.example"], grace=0, ready=visit)
    assert seen == [401, 421, 200, 421]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "[::1]"])
def test_loopback_names(app: App, host: str) -> None:
    try:
        server = Server(app, host=host, port=0)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with server:
        address = "::1" if ":" in host else "127.0.0.1"
        connection = http.client.HTTPConnection(address, server.port, timeout=TIMEOUT)
        assert ask(connection, "GET", "/v2")[0] == 200
        connection.close()


@pytest.mark.parametrize("option", [{"threads": 0}, {"port": -1}, {"port": 65536}])
def test_wrong_options(app: App, option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(option))} is .*: pass "):
        Server(app, **({"port": 0} | option))


def test_without_waitress(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "waitress", None)
    with pytest.raises(ImportError, match=r"pip install gdlib\[serve\]"):
        Server(app, port=0)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"POST /v2/models/a/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MAX_BYTES + 1}\r\n\r\n", 413),
        (f"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX: {'x' * MAX_HEADER_BYTES}\r\n\r\n", 431),
        ("POST /v2/models/a/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        ("POST /v2/models/a/infer HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        ("POST /v2/models/a/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        ("GET /v2 HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n", 400),
        ("GET /v2 HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        ("GET /v2 HTTP/1.1\r\n\r\n", 400),
        ("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ("GET /v2/models/..%2f..%2fa HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ("nonsense\r\n\r\n", 400),
    ],
    ids=["body", "headers", "length", "no length", "transfer", "header", "host", "no host", "traversal", "quoted traversal", "nonsense"],
)
def test_every_error_is_json(app: App, head: str, status: int) -> None:
    with Server(app, port=0) as server, socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as client:
        client.sendall(head.encode("latin-1"))
        response = http.client.HTTPResponse(client)
        response.begin()
        assert response.status == status
        assert response.getheader("Content-Type") == "application/json"
        assert list(json.loads(response.read())) == ["error"]
        response.close()


def test_the_largest_body(app: App) -> None:
    with Server(app, port=0) as server:
        connection = connect(server)
        assert ask(connection, "POST", "/v2/models/a/infer", REQUEST.ljust(MAX_JSON_BYTES))[0] == 200
        connection.close()


def test_a_chunked_body(app: App) -> None:
    with Server(app, port=0) as server:
        connection = connect(server)
        connection.request("POST", "/v2/models/a/infer", iter([REQUEST[:20].encode(), REQUEST[20:].encode()]), encode_chunked=True)
        assert connection.getresponse().status == 200
        connection.close()


def test_stalled_bodies_hold_no_thread(app: App) -> None:
    with Server(app, port=0, threads=1) as server:
        stalled = [socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) for _ in range(8)]
        for client in stalled:
            client.sendall(b"POST /v2/models/a/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        connection = connect(server)
        assert ask(connection, "GET", "/v2/health/live")[0] == 200
        connection.close()
        for client in stalled:
            client.close()


@pytest.fixture
def held(fake_model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Predictions set the first event, and wait for the second."""
    entered, leave = threading.Event(), threading.Event()
    predict = fake_model.predict

    def slow(self: Any, x: Any) -> Any:
        entered.set()
        leave.wait(TIMEOUT)
        return predict(self, x)

    monkeypatch.setattr(fake_model, "predict", slow)
    return entered, leave


def test_close_finishes_the_request_in_flight(app: App, held: tuple[threading.Event, threading.Event]) -> None:
    entered, leave = held
    with Server(app, port=0) as server:
        idle, busy = connect(server), connect(server)
        assert ask(idle, "GET", "/v2")[0] == 200
        busy.request("POST", "/v2/models/a/infer", REQUEST)
        assert entered.wait(TIMEOUT)
        closer = threading.Thread(target=server.close)
        closer.start()
        wait_until(lambda: is_refused(server.port))
        assert idle.sock.recv(1) == b"", "idle connections are closed while the busy one goes on"
        leave.set()
        response = busy.getresponse()
        assert (response.status, json.loads(response.read())["outputs"][0]["data"]) == (200, [0.0, 11.0])
        closer.join(TIMEOUT)
        assert not closer.is_alive()
        idle.close()
        busy.close()


def test_in_its_grace_a_server_answers_but_is_not_ready(app: App) -> None:
    server = Server(app, port=0, grace=TIMEOUT)
    thread = threading.Thread(target=server.run)
    thread.start()
    kept, fresh = connect(server), connect(server)
    assert ask(kept, "GET", "/v2/health/ready") == (200, {"live": True, "ready": True})
    server.stop()
    wait_until(lambda: server.draining)
    for connection in (kept, fresh):
        connection.request("POST", "/v2/models/a/infer", REQUEST)
        response = connection.getresponse()
        assert (response.status, response.getheader("Connection")) == (200, "close")
        assert json.loads(response.read())["outputs"][0]["data"] == [0.0, 11.0]
        assert ask(connection, "GET", "/v2/health/ready") == (503, {"live": True, "ready": False}), "on a new connection"
        connection.close()
    server.stop()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert is_refused(server.port)


def test_more_requests_than_may_wait_are_told_to_come_again(
    app: App, held: tuple[threading.Event, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gdlib.serve.channels.MAX_QUEUED", 2)
    entered, leave = held
    with Server(app, port=0, threads=1) as server:
        clients = [connect(server) for _ in range(6)]
        for waiting, client in enumerate(clients):
            client.request("POST", "/v2/models/a/infer", REQUEST)
            assert entered.wait(TIMEOUT)
            wait_until(lambda waiting=waiting: server.queued == waiting)
        health = connect(server)
        health.request("GET", "/v2/health/live")
        leave.set()
        responses = [client.getresponse() for client in clients]
        assert [response.status for response in responses] == [200] * 3 + [503] * 3
        assert [response.getheader("Retry-After") for response in responses] == [None] * 3 + ["1"] * 3
        assert "send this one again in a moment" in json.loads(responses[-1].read())["error"]
        assert health.getresponse().status == 200, "only inference is refused"
        for client in (*clients, health):
            client.close()


def test_a_request_that_never_ends_is_given_up(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdlib.serve.server.DRAIN_SECONDS", 0.0)
    with Server(app, port=0) as server:
        stalled = connect(server)
        stalled.putrequest("POST", "/v2/models/a/infer")
        stalled.putheader("Content-Length", "100")
        stalled.endheaders(b"{")
        other = connect(server)
        assert ask(other, "GET", "/v2")[0] == 200, "the loop has seen the stalled request by now"
        other.close()
    assert stalled.sock.recv(1) == b""
    stalled.close()


CHILD = """
import sys
from gdlib.serve import server

def app(environ, start_response):
    print("entered", flush=True)
    sys.stdin.readline()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", "2")])
    return [b"{}"]

server.create_app = lambda models_dir, **options: app
server.serve("unused", port=0, grace=0, ready=lambda running: print(running.port, flush=True))
print("ended", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_request_in_flight(number: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            port = int(child.stdout.readline())
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
            connection.request("GET", "/")
            assert child.stdout.readline() == "entered\n"
            child.send_signal(number)
            wait_until(lambda: is_refused(port))
            child.stdin.write("go on\n")
            child.stdin.flush()
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b"{}")
            connection.close()
            assert child.stdout.readline() == "ended\n"
            assert child.wait(TIMEOUT) == 0
            assert "Traceback" not in child.stderr.read()
        finally:
            child.kill()


def test_serve_restores_the_handlers_and_needs_no_main_thread(models_dir: Any, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    root = models_dir({})
    seen: list[int] = []

    def stop(server: Server) -> None:
        seen.append(server.port)
        server.stop()

    serve(root, port=0, ready=stop)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    thread = threading.Thread(target=serve, args=(root,), kwargs={"port": 0, "ready": stop})
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert len(seen) == 2
    with pytest.raises(NotADirectoryError):
        serve(tmp_path / "nothing", port=0)

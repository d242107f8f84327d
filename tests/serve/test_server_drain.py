"""The end of a server: whatever was sent on a connection before the port closed is answered."""

import errno
import http.client
import json
import select
import socket
import sys
import threading
from typing import Any

import pytest

from gdlib.serve.app import App
from gdlib.serve.repository import Repository
from gdlib.serve.server import Server

pytest.importorskip("waitress", reason="the server is an extra: pip install gdlib[serve]")
from gdlib.serve import channels
from tests.waiting import TIMEOUT, wait_until

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLIENTS = 40


@pytest.fixture
def app(models_dir: Any, loaders: Any) -> App:
    return App(Repository(models_dir({"a/1": "{}"}), loaders))


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT)


def read(client: socket.socket) -> tuple[int, str | None]:
    response = http.client.HTTPResponse(client)
    response.begin()
    with response:
        assert json.loads(response.read())["live"] is True
        return response.status, response.headers["Connection"]


@pytest.mark.parametrize("room", [channels.MAX_CONNECTIONS, 3], ids=["all at once", "a few at a time"])
def test_connections_that_wait_to_be_accepted_are_answered(app: App, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(channels, "MAX_CONNECTIONS", room)
    server = Server(app, port=0)
    clients = [connect(server) for _ in range(CLIENTS)]  # it listens, and nobody accepts
    for client in clients:
        client.sendall(LIVE)
    server.stop()
    server.run()  # all of its life is its end
    for client in clients:
        with client:
            assert read(client) == (200, "close")
            assert client.recv(1) == b""


def test_a_request_on_its_way_is_answered(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdlib.serve.server.QUIET_SECONDS", TIMEOUT)
    with Server(app, port=0) as server, connect(server) as kept, connect(server) as fresh:
        kept.sendall(LIVE)
        assert read(kept) == (200, None)
        closed = threading.Event()
        close_listener = server._waitress.close_listener
        monkeypatch.setattr(server._waitress, "close_listener", lambda: (close_listener(), closed.set()))
        server.stop()
        assert closed.wait(TIMEOUT)
        for client in (kept, fresh):
            client.sendall(LIVE)
            assert read(client) == (200, "close")


def test_what_has_arrived_makes_a_connection_not_idle(app: App) -> None:
    server = Server(app, port=0)
    with connect(server) as client:
        wait_until(lambda: server._waitress.accept_waiting() and len(server._waitress.active_channels) == 1)
        (channel,) = server._waitress.active_channels.values()
        assert channel.is_idle(0)
        assert not channel.is_idle(TIMEOUT)
        client.sendall(LIVE)
        wait_until(lambda: not channel.is_idle(0))
        server.stop()
        server.run()
        assert read(client) == (200, "close")


@pytest.mark.skipif(sys.platform != "linux", reason="only there can a listening socket refuse more without closing")
def test_no_connection_begins_once_it_refuses_more(app: App) -> None:
    server = Server(app, port=0)
    with connect(server) as before, socket.socket() as after:
        server._waitress.refuse_more()
        after.setblocking(False)
        assert after.connect_ex(("127.0.0.1", server.port)) != 0, "on loopback connections are made at once, or not"
        before.sendall(LIVE)
        server.stop()
        server.run()
        assert read(before) == (200, "close"), "one that had begun lives on"
        assert select.select([], [after], [], TIMEOUT)[1], "the system tries again"
        assert after.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


def test_a_client_that_never_asks_does_not_hold_the_end_up(app: App) -> None:
    with Server(app, port=0) as server, connect(server) as silent:
        wait_until(lambda: len(server._waitress.active_channels) == 1)
        server.close()
        assert silent.recv(1) == b""


def test_under_load_no_request_is_lost(app: App) -> None:
    """Clients on fresh and on kept connections that go on until nobody takes their connections."""
    lost: list[str] = []
    answered = threading.Semaphore(0)

    def load(server: Server, keeps: bool) -> None:
        while True:
            try:
                client = connect(server)
            except ConnectionError:
                return  # nobody listens
            with client:
                again = True
                while again:
                    try:
                        client.sendall(LIVE)
                        again = read(client)[1] != "close" and keeps
                    except (OSError, http.client.HTTPException) as error:
                        lost.append(repr(error))
                        return
                    answered.release()

    server = Server(app, port=0)
    runner = threading.Thread(target=server.run)
    clients = [threading.Thread(target=load, args=(server, number % 2 == 0)) for number in range(8)]
    for thread in (runner, *clients):
        thread.start()
    for _ in range(200):
        assert answered.acquire(timeout=TIMEOUT)
    server.stop()
    for thread in (runner, *clients):
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert not lost

"""A small server for the application: waitress with limits, on loopback unless there are keys, that loses no request when it stops.

waitress receives a request whole before a thread sees it, so stalled clients hold no thread; `gdlib.serve.channels` bounds what they may
hold. waitress's own shutdown drops requests in flight; `Server` runs its event loop and drains instead: it answers what was sent on every
connection that was made before the port closed. Several processes and TLS are deliberately not here.
"""

import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Self
from wsgiref.types import WSGIApplication

from gdlib.serve.app import LOOPBACK_HOSTS, App, create_app

POLL_SECONDS = 0.1  # how soon an idle server sees that it should stop
DRAIN_SECONDS = 10.0  # well inside the 30 s that process managers grant
HANDSHAKE_SECONDS = 0.1  # for connections that had begun when the server stopped to take new ones
QUIET_SECONDS = 1.0  # a connection without traffic for so long is closed while draining; on others a request may be on its way


class Server:
    """A WSGI application on `host` and `port` (0: a free one). It listens from construction on, and answers once it runs.

    `run` serves in the caller's thread until `stop` is called. As a context manager it serves in a background thread::

        with Server(create_app("models"), port=0) as server:
            urllib.request.urlopen(server.url + "/v2/health/ready")

    `public` allows addresses other than loopback. For the first `grace` seconds of its end it goes on accepting connections, while an
    `App` says that it is not ready, so that a load balancer turns away before connections are refused. Raises ImportError without
    waitress, ValueError for an address that is not allowed or an impossible port, OSError for one that is taken.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        threads: int = 4,
        public: bool = False,
        grace: float = 0.0,
    ) -> None:
        try:
            from waitress import wasyncore

            from gdlib.serve.channels import Listener
        except ImportError:
            raise ImportError("Serving needs the package waitress: pip install gdlib[serve].") from None
        if threads < 1:
            raise ValueError(f"threads is {threads}: pass 1 or more.")
        if not 0 <= port <= 65535:
            raise ValueError(f"port is {port}: pass 0 for a free one, or 1 to 65535.")
        address = _address(host, public)
        listener = socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.port: int = listener.getsockname()[1]
        self.url = f"http://{_netloc(address)}:{self.port}"
        self._asyncore = wasyncore
        self._map: dict[int, Any] = {}
        refused, is_quick = (app.refused, app.is_quick) if isinstance(app, App) else (None, _never)
        self._waitress = Listener(app, listener, threads, self._map, refused, is_quick)
        self._app = app
        self._grace = grace
        self._stops = 0  # calls of stop
        self._running = threading.Lock()
        self._closed = False

    def run(self) -> None:
        """Serve until `stop`, then finish the requests in flight, for at most DRAIN_SECONDS, and close."""
        with self._running:
            if isinstance(self._app, App) and not self._stops:
                self._app.watch()
            self._waitress.loop_thread = threading.get_ident()
            try:
                while not self._stops:
                    self._poll()
                if not self._closed:
                    self._drain()
            finally:
                self._release()

    def stop(self) -> None:
        """Ask `run` to end, the second time without more grace. Any thread and any signal handler may call it, any number of times."""
        self._stops += 1

    @property
    def draining(self) -> bool:
        """Whether it was asked to stop and has begun to."""
        return bool(self._waitress.draining)

    @property
    def queued(self) -> int:
        """Requests that wait for a thread."""
        return len(self._waitress.task_dispatcher.queue)

    def close(self) -> None:
        """Stop, wait until `run` has ended in whichever thread it runs, and free the port."""
        self.stop()
        with self._running:
            self._release()

    def __enter__(self) -> Self:
        threading.Thread(target=self.run, name="gdlib-serve", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _poll(self) -> None:
        self._asyncore.loop(timeout=POLL_SECONDS, use_poll=True, map=self._map, count=1)

    def _drain(self) -> None:
        self._waitress.draining = True
        if isinstance(self._app, App):
            self._app.drain()
        end_of_grace = time.monotonic() + self._grace
        while self._stops < 2 and time.monotonic() < end_of_grace:
            self._poll()
        self._waitress.refuse_more()
        begin = time.monotonic()
        while not (self._waitress.accept_waiting() and time.monotonic() >= begin + HANDSHAKE_SECONDS) and not self._is_late(begin):
            self._poll()
        self._waitress.close_listener()
        channels = self._waitress.active_channels
        while channels and not self._is_late(begin):
            self._poll()
            for channel in list(channels.values()):
                if channel.is_idle(QUIET_SECONDS):
                    channel.handle_close()

    def _is_late(self, begin: float) -> bool:
        return time.monotonic() >= begin + DRAIN_SECONDS

    def _release(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._waitress.task_dispatcher.shutdown(timeout=1)
        for channel in list(self._waitress.active_channels.values()):
            channel.handle_close()
        self._asyncore.close_all(self._map)


def serve(
    models_dir: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int = 4,
    keys: str | os.PathLike[str] | None = None,
    admin: bool = False,
    allowed_hosts: Sequence[str] = (),
    access_log: str | None = None,
    batch_window: float = 0.0,
    grace: float = 1.0,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Serve the models in `models_dir` until SIGTERM or SIGINT; then finish the requests in flight and return.

    `ready` is called with the server once it listens: `server.url` and `server.port` say where. A second signal acts as if this
    function had not caught the first. An address other than loopback needs `keys` and, where it stands for all addresses, the
    `allowed_hosts` that clients know the server by. Raises what `Server` and `create_app` raise.
    """
    address = _address(host, public=keys is not None)
    if ipaddress.ip_address(address).is_unspecified and not allowed_hosts:
        raise ValueError(f"host is {host!r}, which is no name that clients use: pass the names that they do as allowed_hosts.")
    app = create_app(
        models_dir,
        keys=keys,
        admin=admin,
        allowed_hosts=(*LOOPBACK_HOSTS, _netloc(address), *allowed_hosts),
        access_log=access_log,
        batch_window=batch_window,
    )
    server = Server(app, host=host, port=port, threads=threads, public=keys is not None, grace=grace)
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def on_signal(number: int, frame: FrameType | None) -> None:
        server.stop()
        restore()

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # else one warning for every request that waits for a thread
    try:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                previous[number] = signal.signal(number, on_signal)
        if ready is not None:
            ready(server)
        server.run()
    finally:
        restore()
        server.close()


def _never(path: str, size: int) -> bool:
    return False


def _address(host: str, public: bool) -> str:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
    except ValueError:
        raise ValueError(f"host is {host!r}: pass an IP address of this machine, or localhost.") from None
    if not (address.is_loopback or public):
        raise ValueError(f"host is {host!r}, which others can reach, and there are no keys: use 127.0.0.1, ::1 or localhost, or add keys.")
    return str(address)


def _netloc(address: str) -> str:
    return f"[{address}]" if ":" in address else address

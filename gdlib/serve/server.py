"""A small server for the application: waitress with limits, loopback only, that finishes its requests before it stops.

waitress receives a request whole before a thread sees it, so stalled clients hold no thread. Its own shutdown drops requests in
flight; `Server` runs its event loop and drains instead. Processes, keys and TLS are deliberately not here.
"""

import ipaddress
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self
from wsgiref.types import WSGIApplication

from gdlib.serve.app import LOOPBACK_HOSTS, create_app
from gdlib.serve.bodies import MAX_BYTES

POLL_SECONDS = 0.1  # how soon an idle server sees that it should stop
DRAIN_SECONDS = 10.0  # well inside the 30 s that process managers grant
IDLE_SECONDS = 300  # clients pool connections and do not send a POST again when one was closed
MAX_CONNECTIONS = 256  # each may hold three file descriptors, and a process often has 1,024
MAX_HEADER_BYTES = 32 * 2**10


class Server:
    """A WSGI application on `host` and `port` (0: a free one). It listens from construction on, and answers once it runs.

    `run` serves in the caller's thread until `stop` is called. As a context manager it serves in a background thread::

        with Server(create_app("models"), port=0) as server:
            urllib.request.urlopen(server.url + "/v2/health/ready")

    Raises ImportError without waitress, ValueError for an address other than loopback or an impossible port, OSError for one that is
    taken.
    """

    def __init__(self, app: WSGIApplication, *, host: str = "127.0.0.1", port: int = 8000, threads: int = 4) -> None:
        try:
            from waitress import wasyncore
            from waitress.server import create_server
        except ImportError:
            raise ImportError("Serving needs the package waitress: pip install gdlib[serve].") from None
        if threads < 1:
            raise ValueError(f"threads is {threads}: pass 1 or more.")
        if not 0 <= port <= 65535:
            raise ValueError(f"port is {port}: pass 0 for a free one, or 1 to 65535.")
        address = _loopback(host)
        listener = socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.port: int = listener.getsockname()[1]
        self.url = f"http://{_netloc(address)}:{self.port}"
        self._asyncore = wasyncore
        self._map: dict[int, Any] = {}
        self._waitress = create_server(
            app,
            map=self._map,
            sockets=[listener],
            threads=threads,
            ident="gdlib",
            max_request_body_size=MAX_BYTES + 1,  # waitress refuses at its limit, the application above its own
            max_request_header_size=MAX_HEADER_BYTES,
            channel_timeout=IDLE_SECONDS,
            connection_limit=MAX_CONNECTIONS,
        )
        self._waitress.channel_class = _channel_class()
        self._stopping = False
        self._running = threading.Lock()
        self._closed = False

    def run(self) -> None:
        """Serve until `stop`, then finish the requests in flight, for at most DRAIN_SECONDS, and close."""
        with self._running:
            try:
                while not self._stopping:
                    self._poll()
                if not self._closed:
                    self._drain()
            finally:
                self._release()

    def stop(self) -> None:
        """Ask `run` to end. Any thread and any signal handler may call it, any number of times."""
        self._stopping = True

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
        # Only the listening socket: the threads wake the loop through the server's trigger until they are done.
        self._asyncore.dispatcher.close(self._waitress)
        deadline = time.monotonic() + DRAIN_SECONDS
        channels = self._waitress.active_channels
        while channels and time.monotonic() < deadline:
            self._poll()  # before the check, so that what has already arrived counts as in flight
            for channel in channels.values():
                if not channel.requests and channel.request is None and not channel.total_outbufs_len:
                    channel.will_close = True

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
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Serve the models in `models_dir` until SIGTERM or SIGINT; then finish the requests in flight and return.

    `ready` is called with the server once it listens: `server.url` and `server.port` say where. A second signal acts as if this
    function had not caught the first. Raises what `Server` and `create_app` raise.
    """
    app = create_app(models_dir, allowed_hosts=(*LOOPBACK_HOSTS, _netloc(_loopback(host))))
    server = Server(app, host=host, port=port, threads=threads)
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


def _loopback(host: str) -> str:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
    except ValueError:
        address = None
    if address is None or not address.is_loopback:
        raise ValueError(f"host is {host!r}: there are no access keys yet, so use 127.0.0.1, ::1 or localhost.")
    return str(address)


def _netloc(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _channel_class() -> Any:
    """waitress's channel, with the protocol's JSON for the errors that waitress finds before it calls the application."""
    from waitress.channel import HTTPChannel
    from waitress.task import ErrorTask

    def execute(task: Any) -> None:
        error = task.request.error
        body = json.dumps({"error": f"{error.reason}: {error.body}."}).encode()
        task.status = f"{error.code} {error.reason}"
        task.response_headers.append(("Content-Type", "application/json"))
        task.content_length = len(body)
        task.set_close_on_finish()
        task.write(body)

    return type("Channel", (HTTPChannel,), {"error_task_class": type("JSONErrorTask", (ErrorTask,), {"execute": execute})})

"""waitress's connections as `gdlib.serve.server` wants them: bounded in memory and time, with errors as the protocol's JSON.

No thread ever waits for a client: requests are received whole before one sees them, and answers are kept until they are sent. What that
holds is bounded here, and so is the time of clients that send or take too slowly. A request that takes less than handing it to a thread
would is answered by the loop itself. It needs waitress, which an installation may lack.
"""

import contextlib
import ctypes
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import Error

from gdlib.serve.bodies import MAX_BYTES
from gdlib.serve.endpoints import RETRY_AFTER

IDLE_SECONDS = 300  # clients pool connections and do not send a POST again when one was closed
FULL_IDLE_SECONDS = 5  # the same when there is no room for another connection; a request may be on its way to a new one
MAX_CONNECTIONS = 256  # a process often may have 1,024 file descriptors
MAX_QUEUED = 128  # inference requests that wait for a thread; the next ones are told to come again
MAX_HEADER_BYTES = 32 * 2**10
MAX_HELD_BYTES = 256 * 2**20  # of all bodies together, and of all answers that clients have not taken yet
SMALL_BODY_BYTES = 64 * 2**10  # never refused for what others hold: all connections together hold 16 MiB of such
MAX_UNSENT_BYTES = 2**20  # of answers to a connection: its next request waits until it has taken them
SLOW_SECONDS, SLOW_BYTES = 60, 64 * 2**10  # a request must arrive, and an answer be taken, in so many seconds, and one for so many bytes
LINGER_SECONDS = 2  # a client that still sends would find its connection reset, and not the error, if it were closed at once
_NO_LIMIT = sys.maxsize
_SO_ATTACH_FILTER = 26


class BusyError(Error):  # type: ignore[misc]
    code = 503
    reason = "Service Unavailable"


class SlowError(Error):  # type: ignore[misc]
    code = 408
    reason = "Request Timeout"


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """A request that is being received."""

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.begun = time.monotonic()

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        if self.completed:  # without a body, or refused: told to continue, waitress would take the next request for the body
            self.expect_continue = False
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        # RFC 9112, 6.1 and 6.3: others may see another end of such a request. waitress leaves the header to HTTP/1.0.
        if "TRANSFER_ENCODING" in self.headers or (self.chunked and "CONTENT_LENGTH" in self.headers):
            raise ParsingError("the Transfer-Encoding goes neither with a Content-Length nor with HTTP/1.0, send one of them")

    def held(self) -> int:
        """Bytes of the body that are in memory."""
        return 0 if self.body_rcv is None else len(self.body_rcv)


class Task(WSGITask):  # type: ignore[misc]
    """An answer of the application: the last of its connection once the server is about to end."""

    def build_response_header(self) -> bytes:
        if self.channel.server.draining:
            self.set_close_on_finish()
        header: bytes = super().build_response_header()
        return header


class JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """An answer of waitress's own, which ends its connection."""

    def execute(self) -> None:
        error = self.request.error
        body = json.dumps({"error": f"{error.reason}: {error.body.rstrip('.')}."}).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
            self.response_headers.append(RETRY_AFTER)
        refused = self.channel.server.refused
        if refused is not None:
            self.response_headers += refused(error.code, self._environ(), len(body))
        self.content_length = len(body)
        self.set_close_on_finish()
        self.channel.lingers = True
        self.write(body)

    def _environ(self) -> dict[str, str]:
        """What is known of a request that may not have been one."""
        environ = {"REMOTE_ADDR": self.channel.addr[0]}
        request_id = self.request.headers.get("X_REQUEST_ID")
        if request_id is not None:
            environ["HTTP_X_REQUEST_ID"] = request_id
        # For a header that is too large waitress makes a request up.
        if self.request.error.code != HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE and hasattr(self.request, "path"):
            environ |= {"REQUEST_METHOD": self.request.command, "PATH_INFO": self.request.path}
        return environ


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection."""

    parser_class, task_class, error_task_class = Parser, Task, JSONErrorTask

    request: Parser | None
    requests: list[Parser]
    outbufs: list[Any]
    close_when_flushed: bool

    quick = False  # the next request is for the loop to answer
    parked = False  # the next request waits until the client has taken enough of the answers before it
    lingers = False  # after the answer the client may go on sending for a moment, into the void
    lingers_until: float | None = None
    answers_begun = 0.0  # when the first byte of the answers that are not sent was written,
    answers_length = 0  # and how many bytes were from there on

    def received(self, data: bytes) -> bool:
        if self.lingers_until is not None:
            return False
        good: bool = super().received(data)
        self.serve_quick()
        request = self.request
        if request is not None and request.held() > SMALL_BODY_BYTES and self.server.held_bodies() > MAX_HELD_BYTES:
            self._refuse(BusyError("too many bodies are being received, send this request again in a moment"))
        return good

    def serve_quick(self) -> None:
        """Answer the requests that the listener has left to the loop. waitress holds a lock of this channel where it hands them over."""
        while self.quick:
            self.quick = False
            self.service()
            if self.connected and self.writable():
                self.handle_write()  # at once, not when the loop comes round

    def write_soon(self, data: Any) -> int:
        if not self.total_outbufs_len:
            self.answers_begun, self.answers_length = time.monotonic(), 0
        self.answers_length += len(data)
        written: int = super().write_soon(data)
        if self.total_outbufs_len > MAX_UNSENT_BYTES:
            self.server.note_unsent()
        return written

    def writable(self) -> bool:
        return bool(self.parked or super().writable())

    def handle_write(self) -> None:
        if self.lingers and self.close_when_flushed:
            self._flush_exception(self._flush_some)
            if self.connected and not self.total_outbufs_len and not self.will_close:
                self.close_when_flushed = False
                self.lingers_until = time.monotonic() + LINGER_SECONDS
                self.socket.shutdown(socket.SHUT_WR)
            return
        super().handle_write()
        if self.parked and self.connected and self.total_outbufs_len <= MAX_UNSENT_BYTES:
            self.parked = False
            self.server.add_task(self)
            self.serve_quick()

    def _flush_some(self, do_close: bool = True) -> bool:
        sent: bool = super()._flush_some(do_close=do_close)
        if not self.total_outbufs_len and self.outbufs[0].buf is not None:  # an idle connection would keep its last answer in memory
            self.outbufs[0].close()
            self.outbufs = [OverflowableBuffer(self.adj.outbuf_overflow)]
        return sent

    def check_pace(self, now: float) -> None:
        """Give up on a client that sends or takes too slowly."""
        # Closed at once: `will_close` waits until the client takes something.
        if self.lingers_until is not None:
            if now > self.lingers_until:
                self.handle_close()
        elif self.total_outbufs_len:
            if _is_slow(now - self.answers_begun, self.answers_length - self.total_outbufs_len):
                self.handle_close()
        elif self.request is not None and not self.requests and _is_slow(now - self.request.begun, self.request.body_bytes_received):
            self._refuse(SlowError("the request took too long to arrive, send it faster"))

    def is_idle(self, seconds: float) -> bool:
        """Whether nothing has been going on for so long, and nothing has arrived just now."""
        if self.requests or self.request is not None or self.total_outbufs_len or time.time() - self.last_activity < seconds:
            return False
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except OSError:  # nothing has arrived, or the connection is broken
            return True

    def _refuse(self, error: Error) -> None:
        """Answer the request that is being received, without the rest of it."""
        with self.requests_lock:
            request, self.request = self.request, None
            assert request is not None  # only the loop's thread sets it, and this is that
            request.close()
            request.error = error
            self.requests.append(request)
            if len(self.requests) == 1:
                self.server.add_task(self)


def _is_slow(seconds: float, moved: int) -> bool:
    return seconds > SLOW_SECONDS + moved / SLOW_BYTES


class Listener(TcpWSGIServer):  # type: ignore[misc]
    """The listening socket and its connections. `refused` counts an answer of waitress's own, and gives the headers for it.

    `is_quick(path, bytes)` says which requests take so little that the loop answers them.
    """

    channel_class = Channel
    loop_thread: int | None = None  # who runs the loop
    draining = False  # every answer from now on says that its connection ends

    def __init__(
        self,
        app: Any,
        listener: socket.socket,
        threads: int,
        map: dict[int, Any],
        refused: Callable[[int, dict[str, str], int], list[tuple[str, str]]] | None,
        is_quick: Callable[[str, int], bool],
    ) -> None:
        self.refused = refused
        self._is_quick = is_quick
        self._too_much_unsent = False
        self._none_waits = False
        dispatcher = ThreadedTaskDispatcher()
        dispatcher.set_thread_count(threads)
        adjustments = Adjustments(
            sockets=[listener],
            ident="gdlib",
            max_request_body_size=MAX_BYTES + 1,  # waitress refuses at its limit, the application above its own
            max_request_header_size=MAX_HEADER_BYTES,
            inbuf_overflow=_NO_LIMIT,  # no temporary files: there may be no folder to write to
            outbuf_overflow=_NO_LIMIT,
            outbuf_high_watermark=_NO_LIMIT,  # no thread waits there
            recv_bytes=2**16,
            channel_timeout=IDLE_SECONDS,
            cleanup_interval=1,
            connection_limit=_NO_LIMIT,  # `readable` has its own
        )
        adjustments.send_bytes = 2**14  # the head of an answer leaves together with its body; as an argument it is deprecated
        where = (listener.family, listener.type, listener.proto, listener.getsockname())
        super().__init__(app, map, True, listener, dispatcher=dispatcher, adj=adjustments, bind_socket=False, sockinfo=where)

    def add_task(self, channel: Channel) -> None:
        request = channel.requests[0]
        if channel.total_outbufs_len > MAX_UNSENT_BYTES:
            channel.parked = True
            return
        if request.error is None and request.path.endswith("/infer"):
            if len(self.task_dispatcher.queue) >= MAX_QUEUED:
                request.error = BusyError("too many requests wait already, send this one again in a moment")
            elif self._too_much_unsent:
                request.error = BusyError("too many answers have not been taken yet, send this request again in a moment")
        if request.error is None and threading.get_ident() == self.loop_thread and self._is_quick(request.path, request.content_length):
            channel.quick = True
        else:
            super().add_task(channel)

    def pull_trigger(self) -> None:
        if threading.get_ident() != self.loop_thread:  # which needs no waking
            super().pull_trigger()

    def maintenance(self, now: float) -> None:
        super().maintenance(now)
        self.note_unsent()
        for channel in list(self.active_channels.values()):
            channel.check_pace(time.monotonic())

    def held_bodies(self) -> int:
        """Bytes of all bodies in memory, received in part or whole."""
        requests = [request for channel in list(self.active_channels.values()) for request in (channel.request, *channel.requests)]
        return sum(request.held() for request in requests if request is not None)

    def note_unsent(self) -> None:
        """Look whether clients leave so much untaken that there should be no more answers for now."""
        self._too_much_unsent = sum(channel.total_outbufs_len for channel in list(self.active_channels.values())) > MAX_HELD_BYTES

    def readable(self) -> bool:
        return bool(super().readable() and (len(self.active_channels) < MAX_CONNECTIONS or self._longest_idle() is not None))

    def handle_accept(self) -> None:
        if len(self.active_channels) >= MAX_CONNECTIONS:
            idle = self._longest_idle()
            if idle is None:
                return
            idle.handle_close()
        super().handle_accept()

    def accept(self) -> Any:
        self._none_waits = True
        found = super().accept()
        self._none_waits = found is None
        return found

    def accept_waiting(self) -> bool:
        """Accept the connections that wait, as many as there is room for. Returns whether none is left."""
        self._none_waits = False
        while not self._none_waits and (len(self.active_channels) < MAX_CONNECTIONS or self._longest_idle() is not None):
            self.handle_accept()
        return self._none_waits

    def refuse_more(self) -> None:
        """Let no more connections begin, where the system can; those that have begun come to `accept_waiting`."""
        if sys.platform == "linux":
            # Closing the socket would reset connections that wait to be accepted and may have sent their request. A filter of four
            # instructions drops whatever has the flag SYN: such clients knock again in a second, and are then refused.
            code = struct.pack("=" + "HBBI" * 4, 0x30, 0, 0, 13, 0x45, 0, 1, 2, 0x06, 0, 0, 0, 0x06, 0, 0, 0xFFFFFFFF)
            buffer = ctypes.create_string_buffer(code)
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(buffer)))

    def close_listener(self) -> None:
        """Only the listening socket: connections go on, and the threads wake the loop through this server's trigger."""
        wasyncore.dispatcher.close(self)

    def _longest_idle(self) -> Channel | None:
        channels = sorted(self.active_channels.values(), key=lambda channel: channel.last_activity)
        return next((channel for channel in channels if channel.is_idle(FULL_IDLE_SECONDS)), None)

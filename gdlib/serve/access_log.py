"""The access log: one JSON object a line, written with one system call, so that lines of several processes do not mix.

A line that cannot be written (a full disk, a closed pipe) is counted and lost; the request it tells of is answered all the same.
"""

import os
import re
import secrets
import sys
import threading
import time
import weakref
from itertools import count
from typing import Any

import orjson

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_MAX_TEXT = 256  # characters of what a client chooses freely


class AccessLog:
    """Appends to the file at `path`, which is made if need be; "-" is standard output. Raises OSError when it cannot be opened."""

    def __init__(self, path: str) -> None:
        if path == "-":
            self._descriptor = sys.stdout.fileno()
        else:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            weakref.finalize(self, os.close, self._descriptor).atexit = False  # requests may still end then
        self._lock = threading.Lock()
        self._lost = 0
        self._torn = False  # the last line was written in part: the next one must not go on where it ends

    def write(self, **fields: Any) -> None:
        """One line: the time, and those of the fields that are not None."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        line = {"time": f"{stamp}.{int(now % 1 * 1000):03d}Z"}
        line |= {key: _plain(value) if isinstance(value, str) else value for key, value in fields.items() if value is not None}
        text = b"\n" * self._torn + orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        try:
            written = os.write(self._descriptor, text)
        except OSError:
            written = 0
        if written == len(text):
            self._torn = False
            return
        with self._lock:
            self._lost += 1
            self._torn = self._torn or written > 0

    def lines_lost(self) -> int:
        """How many lines could not be written."""
        return self._lost


def _plain(text: str) -> str:
    # Escaped, no byte of a client's can steer the terminal that shows the log, or be no text at all.
    text = text[:_MAX_TEXT]
    return text if text.isascii() else text.encode("ascii", "backslashreplace").decode()


class RequestIds:
    """The id of each request: the client's own if it has a fit one, else a fresh one."""

    def __init__(self) -> None:
        self._count = count(1)
        self.forked()

    def forked(self) -> None:
        """Go on with a prefix of its own in a child process: the parent counts on with the one before."""
        self._prefix = secrets.token_hex(4)

    def get(self, sent: str | None) -> str:
        if sent and _REQUEST_ID.fullmatch(sent):
            return sent
        return f"{self._prefix}-{next(self._count):x}"

"""What an application does between requests, in a thread of its own."""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

Task = Callable[[], None]


class Background:
    """Runs `tasks` every `seconds`, from the first `ensure` on until this object is gone.

    A forked child has none of its parent's threads: there `ensure` runs the tasks `forked`, once, and starts a thread anew. It asks for the
    process's number each time, since Python's hooks for forks are not called where a server written in C forks.
    """

    def __init__(self, seconds: float, tasks: Sequence[Task], forked: Sequence[Task]) -> None:
        self._seconds = seconds
        self._tasks = tasks
        self._forked = forked
        self._process = os.getpid()
        self._runs_in: int | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        weakref.finalize(self, self._stopping.set)

    def ensure(self) -> None:
        """Start the thread unless this process has it."""
        if self._runs_in != os.getpid():
            self._start()

    def _start(self) -> None:
        with self._lock:
            if self._runs_in == os.getpid():
                return
            if os.getpid() != self._process:
                self._process = os.getpid()
                for task in self._forked:
                    task()
            # The thread knows the tasks but not this object, which would then never be gone.
            arguments = (self._seconds, self._tasks, self._stopping)
            try:
                threading.Thread(target=_run, args=arguments, name="gdlib-background", daemon=True).start()
            except RuntimeError as error:  # no more threads: requests go on, and the next one tries again
                logger.error("The folder is not watched for now: %s", error)
            else:
                self._runs_in = os.getpid()


def _run(seconds: float, tasks: Sequence[Task], stopping: threading.Event) -> None:
    while not stopping.wait(seconds):
        for task in tasks:
            try:
                task()
            except Exception:  # the next time may go well, and nobody else would try
                logger.exception("A task in the background failed.")

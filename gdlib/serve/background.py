"""What an application does between requests, in a thread of its own."""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial

logger = logging.getLogger(__name__)

Task = Callable[[], None]


class Background:
    """Runs `tasks` every `seconds`, from the first `ensure` on until this object is gone.

    A forked child has none of its parent's threads: there `ensure` runs the tasks `forked`, once, and starts a thread anew.
    """

    def __init__(self, seconds: float, tasks: Sequence[Task], forked: Sequence[Task]) -> None:
        self._seconds = seconds
        self._tasks = tasks
        self._forked = forked
        self._runs = False
        self._is_child = False  # of the process that made this or ran it, and not yet told
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        weakref.finalize(self, self._stopping.set)
        os.register_at_fork(after_in_child=partial(_in_child, weakref.ref(self)))  # asking for the process at each request costs 0.2 us

    def ensure(self) -> None:
        """Start the thread unless this process has it."""
        if not self._runs:
            self._start()

    def in_child(self) -> None:
        """Notice that this process was forked."""
        self._runs, self._is_child = False, True
        self._lock = threading.Lock()  # the parent's may have been held by a thread that is not here

    def _start(self) -> None:
        with self._lock:
            if self._runs:
                return
            if self._is_child:
                self._is_child = False
                for task in self._forked:
                    task()
            # The thread knows the tasks but not this object, which would then never be gone.
            arguments = (self._seconds, self._tasks, self._stopping)
            try:
                threading.Thread(target=_run, args=arguments, name="gdlib-background", daemon=True).start()
            except RuntimeError as error:  # no more threads: requests go on, and the next one tries again
                logger.error("The folder is not watched for now: %s", error)
            else:
                self._runs = True


def _in_child(background: "weakref.ref[Background]") -> None:
    alive = background()
    if alive is not None:
        alive.in_child()


def _run(seconds: float, tasks: Sequence[Task], stopping: threading.Event) -> None:
    while not stopping.wait(seconds):
        for task in tasks:
            try:
                task()
            except Exception:  # the next time may go well, and nobody else would try
                logger.exception("A task in the background failed.")

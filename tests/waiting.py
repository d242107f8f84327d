"""Waiting for what other threads and processes do, without measuring time: a test that would wait for ever fails instead."""

import threading
from collections.abc import Callable

TIMEOUT = 60  # seconds until a hung test fails; nothing waits that long


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns once the condition is true."""
    pause = threading.Event()
    for _ in range(TIMEOUT * 100):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("the condition never came true")

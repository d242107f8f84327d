"""The thread between requests: one in each process, that survives its tasks' failures and ends with its owner."""

import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from gdlib.serve.background import Background
from tests.waiting import TIMEOUT


class Counted:
    """A task that counts its runs, and lets a test wait for one more than there were."""

    def __init__(self, error: Exception | None = None) -> None:
        self.runs = 0
        self._error = error
        self._ran = threading.Condition()

    def __call__(self) -> None:
        with self._ran:
            self.runs += 1
            self._ran.notify_all()
        if self._error is not None:
            raise self._error

    def wait(self, more: int = 1) -> None:
        with self._ran:
            wanted = self.runs + more
            assert self._ran.wait_for(lambda: self.runs >= wanted, TIMEOUT)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gdlib-background"]


@pytest.fixture(autouse=True)
def others() -> list[threading.Thread]:
    """The threads that other tests have left, which end when their applications are collected."""
    gc.collect()
    return threads()


@pytest.fixture
def mine(others: list[threading.Thread]) -> Callable[[], list[threading.Thread]]:
    return lambda: [thread for thread in threads() if thread not in others]


def test_it_starts_with_the_first_call_and_once(mine: Any) -> None:
    task = Counted()
    background = Background(0.001, (task,), ())
    assert mine() == []
    for _ in range(5):
        background.ensure()
    assert len(mine()) == 1
    assert mine()[0].daemon
    task.wait(3)


def test_many_threads_start_it_once(mine: Any) -> None:
    background = Background(1000, (), ())
    barrier = threading.Barrier(8)

    def go() -> None:
        barrier.wait(TIMEOUT)
        background.ensure()

    starters = [threading.Thread(target=go) for _ in range(8)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(TIMEOUT)
    assert len(mine()) == 1


def test_a_task_that_fails_stops_neither_itself_nor_the_others(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Counted(RuntimeError("a fault")), Counted()
    background = Background(0.001, (bad, good), ())
    background.ensure()
    good.wait(3)
    assert bad.runs >= 3
    assert "a fault" in caplog.text
    del background


def test_it_ends_with_its_owner(mine: Any) -> None:
    task = Counted()
    background = Background(0.001, (task,), ())
    background.ensure()
    task.wait()
    (thread,) = mine()
    del background
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_it_ends_with_its_owner_however_long_it_would_wait(mine: Any) -> None:
    background = Background(10_000, (), ())
    background.ensure()
    (thread,) = mine()
    del background
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_a_child_starts_anew(mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the parent, whether it ran there or not, and in the child's own child once more."""
    for ran in (True, False):
        forked = Counted()
        background = Background(1000, (), (forked,))
        before = len(mine())
        if ran:
            background.ensure()
        assert forked.runs == 0
        for generation, process in enumerate((-1, -2), 1):
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda process=process: process)
                background.ensure()
                background.ensure()
            assert forked.runs == generation
        assert len(mine()) - before == 2 + ran
        del background
        for thread in mine():
            thread.join(TIMEOUT)


def test_where_no_thread_can_be_had_the_next_call_tries_again(
    mine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    background = Background(1000, (), ())

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        background.ensure()
    assert "not watched for now: can't start new thread" in caplog.text
    assert mine() == []
    background.ensure()
    assert len(mine()) == 1

"""Fixtures of several test files."""

import signal

import pytest

import gdlib

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; the tests of Ctrl-C would wait for it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=range(1, 9))
def threads(request):
    before = gdlib._core.num_threads()
    gdlib.set_num_threads(request.param)
    yield request.param
    gdlib.set_num_threads(before)

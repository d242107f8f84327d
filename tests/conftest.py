"""Fixtures of several test files."""

import pytest

import gdlib


@pytest.fixture(params=[1, 2, 3, 5, 8])
def threads(request):
    before = gdlib._core.num_threads()
    gdlib.set_num_threads(request.param)
    yield request.param
    gdlib.set_num_threads(before)

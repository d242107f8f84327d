"""Every kernel test asks for `isa`, and so runs on each kernel table that this machine has."""

import numpy as np
import pytest

from gdlib import _core


@pytest.fixture(params=_core.available_isas())
def isa(request):
    previous = _core.isa()
    _core.select_isa(request.param)
    assert _core.isa() == request.param
    yield request.param
    _core.select_isa(previous)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def restore_threads():
    previous = _core.num_threads()
    yield
    _core.set_num_threads(previous)

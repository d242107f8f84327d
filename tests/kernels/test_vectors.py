"""Kernels on flat vectors: the update in every combination of its options, the search for NaN and infinity, the average."""

from itertools import product

import numpy as np
import pytest

from gdlib import _core
from tests import oracle
from tests.kernels.guarded import MARGIN, Guarded, poisoned, values
from tests.kernels.sweep import ALL, LARGEST

OPTIONS = [
    dict(zip(("momentum", "dampening", "weight_decay", "nesterov", "maximize", "first_step"), choice, strict=True))
    for choice in product((0.0, 0.9), (0.0, 0.3), (0.0, 0.05), (False, True), (False, True), (False, True))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(name for name, value in options.items() if value) or "plain")
def test_sgd_update(isa, dtype, options):
    rng = np.random.default_rng(21)
    parameter, gradient, buffer = (values(rng, LARGEST, dtype) for _ in range(3))
    has_momentum = options["momentum"] != 0
    wanted, wanted_buffer = oracle.sgd_update(parameter, gradient, buffer if has_momentum else None, lr=0.1, **options)
    for n in ALL:
        # A first step must not read the buffer.
        before = np.full(n, np.nan, dtype) if options["first_step"] else buffer[:n]
        got, got_buffer = Guarded(parameter[:n]), Guarded(before)
        group = {"lr": 0.1, **options}
        _core.sgd_update(got.array, poisoned(gradient[:n]), got_buffer.array if has_momentum else None, group, options["first_step"])
        got.check()
        got_buffer.check()
        oracle.assert_within(got.array, oracle.Interval(wanted.low[:n], wanted.high[:n]), f"parameter, n {n}")
        if has_momentum:
            oracle.assert_within(got_buffer.array, oracle.Interval(wanted_buffer.low[:n], wanted_buffer.high[:n]), f"buffer, n {n}")
        else:
            assert got_buffer.array.tobytes() == before.tobytes()


def test_sgd_update_of_a_long_vector(isa, dtype):
    rng = np.random.default_rng(22)
    parameter, gradient, buffer = (values(rng, 100_003, dtype) for _ in range(3))
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "nesterov": True, "maximize": False}
    wanted = oracle.sgd_update(parameter, gradient, buffer, **options, first_step=False)
    _core.sgd_update(parameter, gradient, buffer, options, False)
    oracle.assert_within(parameter, wanted[0])
    oracle.assert_within(buffer, wanted[1])


def test_all_finite_at_every_place(isa, dtype):
    limits = np.finfo(dtype)
    cases = [(np.nan, False), (np.inf, False), (-np.inf, False), (limits.max, True), (limits.min, True), (limits.smallest_subnormal, True)]
    for n in ALL:
        # In the midst of NaN: reading too far is found out as well.
        memory = np.full(MARGIN + n + MARGIN, np.nan, dtype)
        x = memory[MARGIN : MARGIN + n]
        x[...] = -1.5
        assert _core.all_finite(x), f"n {n}"
        for place in range(n):
            for value, finite in cases:
                x[place] = value
                assert _core.all_finite(x) is finite, f"{value} at {place} of {n}"
            x[place] = -1.5


def test_all_finite_is_not_fooled(isa, dtype):
    """Sums of large values overflow, opposite infinities cancel to NaN, and any shape will do."""
    assert _core.all_finite(np.full((10, 1000), np.finfo(dtype).max))
    assert not _core.all_finite(np.array([[np.inf, -np.inf]] * 500, dtype))
    x = np.zeros(100_003, dtype)
    assert _core.all_finite(x)
    for place in (0, 16_383, 16_384, -1):  # where parts for threads begin and end
        x[place] = np.inf
        assert not _core.all_finite(x)
        x[place] = 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_average(isa, dtype, count):
    """Addition and division round alike everywhere: the bits are those of the same sums in NumPy."""
    rng = np.random.default_rng(count)
    for n in (*ALL, 40_003):
        sources = poisoned(values(rng, (count, n), dtype), row_gap=n % 3)
        total = sources[0].copy()
        for source in sources[1:]:
            total += source
        mean = Guarded(np.zeros(n, dtype))
        _core.average(sources, mean.array)
        mean.check()
        assert mean.array.tobytes() == (total / dtype(count)).tobytes(), f"n {n}"


def test_average_across_sources_is_refused(isa, dtype):
    memory = np.ones(40, dtype)
    before = memory.tobytes()
    with pytest.raises(ValueError, match="mean shares memory with sources"):
        _core.average(memory[:30].reshape(3, 10), memory[5:15])
    assert memory.tobytes() == before


def test_average_into_a_source(isa, dtype):
    for n in ALL:
        for into in range(3):
            sources = values(np.random.default_rng(n), (3, n), dtype)
            wanted = ((sources[0] + sources[1]) + sources[2]) / dtype(3)
            others = [sources[k].copy() for k in range(3) if k != into]
            _core.average(sources, sources[into])
            assert sources[into].tobytes() == wanted.tobytes()
            assert [sources[k].tobytes() for k in range(3) if k != into] == [other.tobytes() for other in others]

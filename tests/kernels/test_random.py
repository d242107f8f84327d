"""Random numbers and orders: pinned values, the same on every platform and ISA; whether they look random; rows taken in such an order."""

from collections import Counter

import numpy as np
import pytest

from gdlib import _core
from tests import oracle
from tests.kernels.guarded import Guarded


def chi_square(observed):
    observed = np.asarray(observed, np.float64)
    return float(np.sum((observed - observed.mean()) ** 2) / observed.mean())


def uniform(seed, bound, n, dtype):
    out = Guarded(np.zeros(n, dtype))
    _core.fill_uniform(seed, bound, out.array)
    out.check()
    return out.array


def test_splitmix64_of_seed_0():
    """The published first outputs of SplitMix64, through the interval [-1, 1)."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [oracle.random_bits(0, i) for i in range(3)] == published
    golden = [0.7666216164272852, -0.13694400590298006, -0.9471324568148045]
    assert [2 * ((bits >> 11) / 2**53) - 1 for bits in published] == golden
    assert uniform(0, 1.0, 3, np.float64).tolist() == golden


@pytest.mark.parametrize("seed", [0, 1, 42, 2**63, 2**64 - 1])
def test_uniform(isa, seed):
    for n in (0, 1, 5, 1000):
        wanted = np.array(oracle.uniform(seed, 0.3, n))
        got = uniform(seed, 0.3, n, np.float64)
        assert got.tobytes() == wanted.tobytes()
        assert uniform(seed, 0.3, n, np.float32).tobytes() == wanted.astype(np.float32).tobytes()


def test_uniform_is_uniform(dtype):
    n, bound = 100_000, 2.0
    x = uniform(3, bound, n, dtype).astype(np.float64)
    assert x.min() >= -bound
    assert x.max() < bound
    # Five standard errors of the mean and of the mean square; 64 bins within the 1e-5 tail of 63 degrees of freedom.
    assert abs(x.mean()) < 5 * bound / np.sqrt(3 * n)
    assert abs(np.mean(x**2) - bound**2 / 3) < 5 * bound**2 * np.sqrt(4 / 45 / n)
    assert chi_square(np.histogram(x, 64, (-bound, bound))[0]) < 122


@pytest.mark.parametrize(
    ("seed", "order"),
    [
        (0, [2, 6, 8, 3, 7, 4, 0, 5, 9, 1]),
        (1, [2, 1, 0]),
        (2**64 - 1, [13, 11, 7, 15, 8, 2, 12, 3, 1, 10, 4, 18, 6, 0, 14, 5, 9, 16, 17, 19]),
    ],
)
def test_pinned_orders(isa, seed, order):
    assert _core.shuffle_order(seed, len(order)).tolist() == order


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**64 - 1])
def test_order_against_python(isa, seed):
    for rows in (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 128, 129, 1023, 1024, 1025, 10_000):
        order = _core.shuffle_order(seed, rows)
        assert order.dtype == np.uint32
        assert order.tolist() == oracle.shuffle_order(seed, rows), f"rows {rows}"


def test_order_is_a_permutation(isa):
    for rows in (*range(201), 255, 256, 257, 1023, 1024, 1025, 10_000, 65_535, 65_536, 65_537, 2**20 + 1):
        for seed in range(3):
            order = _core.shuffle_order(seed, rows)
            assert np.array_equal(np.sort(order), np.arange(rows)), f"rows {rows}, seed {seed}"


def test_orders_of_three_rows_are_equally_frequent():
    counts = Counter(tuple(_core.shuffle_order(seed, 3).tolist()) for seed in range(6000))
    assert len(counts) == 6
    assert chi_square(list(counts.values())) < 25.7  # the 1e-4 tail of 5 degrees of freedom


@pytest.mark.parametrize("rows", [5, 64, 100, 442])
def test_every_row_goes_everywhere(rows):
    """How often each of the first five rows, and the last, lies in each fifth of the order."""
    trials = 5000
    counts = np.zeros((rows, 5))
    for seed in range(trials):
        places = np.argsort(_core.shuffle_order(seed, rows))
        counts[np.arange(rows), places * 5 // rows] += 1
    share = np.bincount(np.arange(rows) * 5 // rows) / rows * trials
    for row in (0, 1, 2, 3, 4, rows - 1):
        assert np.sum((counts[row] - share) ** 2 / share) < 23.5, f"row {row}"  # the 1e-4 tail of 4 degrees of freedom


def test_neighbours_do_not_stay_together():
    """The distance between rows that follow each other in an order, in 50 classes."""
    rows, counts = 1000, np.zeros(50)
    for seed in range(100):
        order = _core.shuffle_order(seed, rows).astype(np.int64)
        counts += np.bincount(np.diff(order) % rows * 50 // rows, minlength=50)
    counts[0] *= 20 / 19  # a distance of 0 cannot occur
    assert chi_square(counts) < 98  # about the 1e-4 tail of 49 degrees of freedom, 94


DTYPES = ["?", "u1", "i2", "f4", "f8", "c16", "S5", "U3", "M8[s]", [("a", "i4"), ("b", "f8", (2,))]]


@pytest.mark.parametrize("row_shape", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_shuffled_batches(kind, row_shape):
    rng = np.random.default_rng(5)
    itemsize = np.dtype(kind).itemsize
    count = 11 * int(np.prod(row_shape))
    # Letters make valid text, numbers and structures alike; a bool must be 0 or 1.
    letters = rng.integers(97, 122, count * itemsize, dtype=np.uint8) % (2 if kind == "?" else 255)
    if kind == "U3":
        letters = letters.astype(np.uint32)[: count * 3]
    array = np.frombuffer(letters.tobytes(), kind).reshape(11, *row_shape)
    order = _core.shuffle_order(8, 11)
    for size, end in ((1, 11), (4, 11), (11, 11), (20, 11), (3, 7), (3, 0)):
        begins = range(0, end, size)
        batches = list(_core.ShuffledBatches((array, array[::-1].copy()), order, size, end))
        assert len(batches) == len(begins)
        for begin, (taken, other) in zip(begins, batches, strict=True):
            rows = order[begin : min(begin + size, end)]
            assert taken.dtype == array.dtype
            assert taken.shape == (len(rows), *row_shape)
            assert np.array_equal(taken, array[rows])
            assert np.array_equal(other, array[::-1][rows])


def test_shuffled_batches_may_repeat_and_drop():
    array = np.arange(12.0).reshape(6, 2)
    order = np.array([5, 5, 0, 3], np.uint32)
    ((taken,),) = _core.ShuffledBatches((array,), order, 4, 4)
    assert np.array_equal(taken, array[order])


def test_shuffled_batches_of_nothing():
    assert list(_core.ShuffledBatches((np.zeros((0, 3)),), np.zeros(0, np.uint32), 1, 0)) == []

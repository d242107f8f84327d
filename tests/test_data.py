"""DataLoader: batches, orders, and what it refuses."""

import numpy as np
import pytest

from gdlib import DataLoader


def test_in_order_batches_are_views():
    X, y = np.arange(20).reshape(10, 2), np.arange(10)
    loader = DataLoader(X, y, batch_size=4)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    np.testing.assert_array_equal(batches[2][0], X[8:])
    assert all(np.shares_memory(x, X) and np.shares_memory(t, y) for x, t in batches)
    assert len(list(DataLoader(X, y, batch_size=4, drop_last=True))) == len(DataLoader(X, batch_size=4, drop_last=True)) == 2


@pytest.mark.parametrize("arrays", [1, 2, 3])
def test_shuffled_batches_hold_every_row_once(arrays):
    columns = [np.arange(101) * (k + 1) for k in range(arrays)]
    batches = [batch if arrays > 1 else (batch,) for batch in DataLoader(*columns, batch_size=8, shuffle=True, seed=3)]
    joined = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    np.testing.assert_array_equal(np.sort(joined[0]), np.arange(101))
    assert not np.array_equal(joined[0], np.arange(101))
    for k, column in enumerate(joined):
        np.testing.assert_array_equal(column, joined[0] * (k + 1))
    assert [len(batch[0]) for batch in batches] == [8] * 12 + [5]


# Bytes of a row: none, short ones that are copied in two pieces, from each end of the ranges on, parts of a line, lines, a page and more.
@pytest.mark.parametrize("width", [0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 32, 33, 40, 63, 64, 65, 100, 400, 4096, 12_000])
@pytest.mark.parametrize(("rows", "batch_size", "drop_last"), [(1, 1, False), (200, 64, False), (200, 64, True), (200, 300, False)])
def test_shuffled_rows_of_every_length(width, rows, batch_size, drop_last):
    x = np.random.default_rng(0).integers(0, 256, (rows, width), np.uint8)
    batches = list(DataLoader(x, np.arange(rows), batch_size=batch_size, shuffle=True, seed=0, drop_last=drop_last))
    for found, order in batches:
        np.testing.assert_array_equal(found, x[order])
    assert len(batches) == (rows // batch_size if drop_last else -(-rows // batch_size))


def test_a_seed_fixes_the_order_and_none_does_not():
    x = np.arange(1000)

    def order(seed):
        return np.concatenate(list(DataLoader(x, batch_size=100, shuffle=True, seed=seed)))

    loader = DataLoader(x, batch_size=1000, shuffle=True, seed=5)
    np.testing.assert_array_equal(order(5), next(iter(loader)))
    np.testing.assert_array_equal(next(iter(loader)), next(iter(loader)))
    assert not np.array_equal(order(5), order(6))
    fresh = DataLoader(x, batch_size=1000, shuffle=True)
    assert not np.array_equal(next(iter(fresh)), next(iter(fresh)))


def test_layouts():
    x = np.asfortranarray(np.arange(12.0).reshape(4, 3))
    np.testing.assert_array_equal(np.sort(np.concatenate(list(DataLoader(x, batch_size=3, shuffle=True))), axis=0), x)
    rows = next(iter(DataLoader(np.zeros((5, 2, 3), np.int8), batch_size=2, shuffle=True)))
    assert rows.shape == (2, 2, 3)
    assert rows.dtype == np.int8


@pytest.mark.parametrize(
    ("arrays", "options", "error", "words"),
    [
        ((), {}, ValueError, "no arrays"),
        ((np.ones(3), np.ones(4)), {}, ValueError, "equal numbers of rows"),
        ((np.ones((0, 2)),), {}, ValueError, "at least 1"),
        ((np.float64(1),), {}, ValueError, "equal numbers of rows"),
        ((np.ones(3),), {"batch_size": 0}, ValueError, "batch_size is 0"),
        ((np.ones(3),), {"batch_size": 2.0}, TypeError, "batch_size is 2.0"),
        ((np.ones(3),), {"seed": -1}, ValueError, "seed is -1"),
        ((np.array(["a"]),), {}, TypeError, "text"),
    ],
)
def test_refusals(arrays, options, error, words):
    with pytest.raises(error, match=words):
        DataLoader(*arrays, **options)

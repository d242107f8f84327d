"""Arrays -> batches. Orders come from the engine, so that the readable loop and `fit` see the same batches for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gdlib import _core, validation

if TYPE_CHECKING:
    import numpy.typing as npt


def draw_order(seed: int | None, rows: int) -> npt.NDArray[np.uint32]:
    """The order of 0 ... rows - 1 that belongs to a seed, the same on every machine; a fresh one for None."""
    if rows >= 2**32:
        raise ValueError(f"{rows} rows cannot be shuffled; at most {2**32 - 1} can.")
    return _core.shuffle_order(validation.fresh_seed() if seed is None else seed, rows)


class DataLoader:
    """Iterates over one or more arrays of equal length in batches: a tuple of arrays each time (of one array, the array itself).

    In order, a batch is a view; shuffled, a copy of its rows. A seed fixes the order: every pass with that seed sees the same one, as
    `fit` does in every epoch (give `fit` one seed per epoch, and the loader of each epoch the same one, to shuffle anew). With seed None
    each pass draws a new order. The last batch may be smaller; `drop_last` leaves it out. Follows torch.utils.data.DataLoader, except
    that its batches are taken by index and nothing is collated.

    Raises ValueError for no arrays, unequal or zero lengths, and a batch_size below 1.
    """

    def __init__(self, *arrays: Any, batch_size: int = 1, shuffle: bool = False, seed: int | None = None, drop_last: bool = False) -> None:
        if not arrays:
            raise ValueError("a DataLoader got no arrays; pass at least one, such as DataLoader(X, y).")
        self.arrays = tuple(validation.as_array(array, f"array {i}") for i, array in enumerate(arrays))
        lengths = [len(array) if array.ndim else -1 for array in self.arrays]
        if min(lengths) < 1 or len(set(lengths)) > 1:
            raise ValueError(
                f"the arrays have shapes {[array.shape for array in self.arrays]}; equal numbers of rows, at least 1, are wanted."
            )
        self.rows = lengths[0]
        self.batch_size = validation.as_count(batch_size, "batch_size")
        self.shuffle = shuffle
        self.seed = None if seed is None else validation.as_seed(seed)
        self.drop_last = drop_last
        if shuffle:
            self.arrays = tuple(np.ascontiguousarray(array) for array in self.arrays)

    def __len__(self) -> int:
        """Batches in a pass."""
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        size, end = self.batch_size, min(len(self) * self.batch_size, self.rows)
        batches: Iterator[tuple[Any, ...]]
        if self.shuffle:
            batches = _core.ShuffledBatches(self.arrays, draw_order(self.seed, self.rows), size, end)
        else:
            batches = (tuple([array[begin : begin + size] for array in self.arrays]) for begin in range(0, end, size))
        return batches if len(self.arrays) > 1 else (batch[0] for batch in batches)

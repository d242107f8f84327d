"""Memory around the arrays of a test: inputs lie in NaN, so that reading too far poisons the result; outputs lie between canaries."""

from functools import cache

import numpy as np

# Elements on each side: more than a register (16 float32) or a row of a GEMM tile (48); odd, so that starts fall on every alignment.
MARGIN = 61
CANARY = -7.25e9


def values(rng, shape, dtype):
    """Numbers of magnitude 0.5 to 1.5 and either sign: an element dropped or counted twice moves a sum by far more than rounding."""
    return (rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape)).astype(dtype)


def poisoned(array, row_gap=0):
    """A read-only copy of a vector or matrix in the middle of NaN; a row_gap > 0 puts NaN between the rows as well."""
    array = np.asarray(array)
    rows, cols = array.shape if array.ndim == 2 else (1, array.size)
    stride = cols + row_gap
    memory = np.full(MARGIN + rows * stride + MARGIN, np.nan, array.dtype)
    inside = memory[MARGIN : MARGIN + rows * stride].reshape(rows, stride)[:, :cols]
    inside[...] = array
    inside.flags.writeable = False
    return inside if array.ndim == 2 else inside[0]


class Guarded:
    """A writable copy of `contents` between canaries: `array` is the copy, `check()` fails when something was written beside it."""

    def __init__(self, contents):
        contents = np.asarray(contents)
        self._memory = np.full(MARGIN + contents.size + MARGIN, CANARY, contents.dtype)
        self.array = self._memory[MARGIN : MARGIN + contents.size].reshape(contents.shape)
        self.array[...] = contents

    def check(self):
        canary = self._memory.dtype.type(CANARY)
        assert (self._memory[:MARGIN] == canary).all(), "written before the start of an output"
        assert (self._memory[self._memory.size - MARGIN :] == canary).all(), "written past the end of an output"


class Layout:
    """Matrices [height, width] for each width, one after the other in a flat memory, with canaries before, between and after them.

    Each matrix is the upper left corner of a table with `cols` columns, so that one gather from the table gives what all of them should
    hold: the cost of a comparison is shared by a whole row of shapes.
    """

    def __init__(self, height, widths, table_rows, cols):
        self.shapes = [(height, width) for width in widths]
        self.canary = table_rows * cols  # the table's place behind its last element
        margin = np.full(MARGIN, self.canary)
        pieces, self.starts, at = [], [], 0
        for width in widths:
            pieces += [margin, (np.arange(height)[:, None] * cols + np.arange(width)).ravel()]
            self.starts.append(at + MARGIN)
            at += MARGIN + height * width
        self.index = np.concatenate([*pieces, margin])

    def gather(self, table):
        return np.append(table.ravel(), table.dtype.type(CANARY))[self.index]

    def views(self, memory):
        return [memory[s : s + h * w].reshape(h, w) for s, (h, w) in zip(self.starts, self.shapes, strict=True)]

    def check(self, memory, wanted, what):
        low, high = self.gather(wanted.low), self.gather(wanted.high)
        inside = (low <= memory) & (memory <= high)  # false for NaN
        if inside.all():
            return
        first = int(np.argmin(inside))
        number = max(0, int(np.searchsorted(self.starts, first, side="right")) - 1)
        place = "a canary near" if self.index[first] == self.canary else f"element {first - self.starts[number]} of"
        raise AssertionError(
            f"{what}: {place} the output of shape {self.shapes[number]} is {memory[first]!r}, wanted {low[first]!r} to {high[first]!r}"
        )


@cache
def layout(height, widths, table_rows, cols):
    """A Layout, kept: a sweep asks for the same ones at every depth."""
    return Layout(height, widths, table_rows, cols)

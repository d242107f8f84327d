"""The sizes of the exhaustive tests: every triple of sizes from 0 to 67, or for a quick run the triples near a boundary of some kernel.

67 is more than four float32 registers of 512 bits, a GEMM tile's width (48) and a task's smallest number of rows (64), with a remainder.
"""

import pytest

from gdlib import _core

LARGEST = 67
ALL = tuple(range(LARGEST + 1))
# Around each power of two, and the switch at 8 outputs between the kernels for few outputs and GEMM.
BOUNDARY = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 66, 67)


def third_sizes(first, second, exhaustive):
    """The sizes of the third dimension to run with these two. In the quick run every size meets all boundary sizes of the other two."""
    if exhaustive:
        return ALL
    return [(), BOUNDARY, ALL][(first in BOUNDARY) + (second in BOUNDARY)]


def past_l3(dtype, arrays):
    """How many elements each of some arrays must have for the L3 not to hold them together. Skips where that is much memory."""
    l3 = _core.cache_bytes()[1]
    if l3 > 128 << 20:
        pytest.skip(f"an L3 of {l3 >> 20} MiB takes too much memory and time to fill")
    return l3 // (arrays * dtype().itemsize) + 1

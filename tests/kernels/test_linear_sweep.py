"""linear_forward and linear_backward over all small sizes, against the float64 oracle, between canaries and NaN.

An element's oracle depends on the summed dimension alone: one table of 67 x 67 elements per depth serves every shape of that depth.
"""

import numpy as np
import pytest

from gdlib import _core
from tests import oracle
from tests.kernels.guarded import CANARY, layout, poisoned, values
from tests.kernels.sweep import ALL, LARGEST, third_sizes

sizes = pytest.mark.parametrize(
    "exhaustive", [pytest.param(False, id="boundary-sizes"), pytest.param(True, id="all-sizes", marks=pytest.mark.slow)]
)


@sizes
def test_forward(isa, dtype, exhaustive):
    rng = np.random.default_rng(1)
    x, weight = values(rng, (LARGEST, LARGEST), dtype), values(rng, (LARGEST, LARGEST), dtype)
    bias = values(rng, LARGEST, dtype)
    biases = [poisoned(bias[:out]) for out in ALL]
    for depth in ALL:
        weights = [poisoned(weight[:out, :depth]) for out in ALL]
        tables = [oracle.linear_forward(x[:, :depth], weight[:, :depth], b) for b in (bias, None)]
        for rows in ALL:
            outs = third_sizes(depth, rows, exhaustive)
            if not outs:
                continue
            without_bias = (depth + rows) % 2
            batch = poisoned(x[:rows, :depth], row_gap=5 * (rows % 3))
            place = layout(rows, outs, LARGEST, LARGEST)
            memory = np.full(place.index.size, CANARY, dtype)
            for out, y in zip(outs, place.views(memory), strict=True):
                _core.linear_forward(batch, weights[out], None if without_bias else biases[out], y)
            place.check(memory, tables[without_bias], f"rows {rows}, in_features {depth}")


@sizes
def test_backward(isa, dtype, exhaustive):
    rng = np.random.default_rng(2)
    g, x, weight, contents = (values(rng, (LARGEST, LARGEST), dtype) for _ in range(4))
    bias_contents = values(rng, LARGEST, dtype)
    weights = [[poisoned(weight[:out, :width]) for width in ALL] for out in ALL]
    input_tables = [oracle.input_gradient(g[:, :out], weight[:out]) for out in ALL]
    for rows in ALL:
        batches = [poisoned(x[:rows, :width], row_gap=5 * (rows % 3)) for width in ALL]
        weight_table = oracle.weight_gradient(g[:rows], x[:rows], contents)
        bias_table = oracle.bias_gradient(g[:rows], bias_contents)
        for out in ALL:
            widths = third_sizes(rows, out, exhaustive)
            if not widths:
                continue
            upstream = poisoned(g[:rows, :out])
            place, bias_place = layout(out, widths, LARGEST, LARGEST), layout(out, (1,) * len(widths), LARGEST, 1)
            input_place = layout(rows, widths, LARGEST, LARGEST)
            memory, bias_memory = place.gather(contents), bias_place.gather(bias_contents)
            input_memory = np.full(input_place.index.size, CANARY, dtype)
            without_bias = (rows + out) % 2
            views = zip(widths, place.views(memory), bias_place.views(bias_memory), input_place.views(input_memory), strict=True)
            for width, into, bias_into, input_into in views:
                bias_into = None if without_bias else bias_into
                _core.linear_backward(upstream, batches[width], weights[out][width], into, bias_into, input_into)
            what = f"rows {rows}, out_features {out}"
            place.check(memory, weight_table, f"weight gradient, {what}")
            if not without_bias:
                bias_place.check(bias_memory, bias_table, f"bias gradient, {what}")
            input_place.check(input_memory, input_tables[out], f"input gradient, {what}")

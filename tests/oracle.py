"""What the kernels must compute, in NumPy float64 and plain Python, with the error that a correct kernel may make.

Every sum of rounded operations obeys |error| <= gamma_k * (the same sum over absolute values), gamma_k = k u / (1 - k u), where u is the
unit roundoff and k the most roundings that one term passes through (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3). A sum
of n products has k <= n whatever the order of its additions: one rounding for the product, and at most n - 1 for the additions, because
an addition of zero is exact and each other one joins two parts that hold at least one term. Fused multiply-adds only take roundings away.

An oracle returns an Interval: the lowest and the highest value of the kernel's dtype that are right, its own rounding counted.
The integers at the end are independent implementations, bit for bit.
"""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    low: np.ndarray
    high: np.ndarray


def gamma(roundings, dtype):
    unit = np.finfo(dtype).eps / 2
    return roundings * unit / (1 - roundings * unit)


def interval(value, magnitude, roundings, dtype):
    """[value - error, value + error], rounded outward to dtype; it counts the kernel's roundings in dtype, the oracle's in float64."""
    error = (gamma(roundings, dtype) + gamma(roundings, np.float64)) * np.asarray(magnitude, np.float64)
    low, high = np.asarray(value - error).astype(dtype), np.asarray(value + error).astype(dtype)
    return Interval(np.nextafter(low, dtype(-np.inf)), np.nextafter(high, dtype(np.inf)))


def assert_within(got, wanted, what="result"):
    """Fails for NaN, and names the worst place."""
    got = np.asarray(got)
    assert got.shape == wanted.low.shape, f"{what}: shape {got.shape}, wanted {wanted.low.shape}"
    inside = (wanted.low <= got) & (got <= wanted.high)
    if not inside.all():
        place = tuple(np.argwhere(~inside)[0])
        raise AssertionError(
            f"{what}: {np.count_nonzero(~inside)} of {inside.size} elements are wrong; at {place} it is {got[place]!r}, "
            f"wanted {wanted.low[place]!r} to {wanted.high[place]!r}"
        )


def _float64(*arrays):
    return [None if a is None else np.asarray(a, np.float64) for a in arrays]


def linear_forward(x, weight, bias):
    """x weight^T + bias; in_features roundings for the products and their sum, one for the bias."""
    dtype = x.dtype.type
    x, weight, bias = _float64(x, weight, bias)
    value, magnitude = x @ weight.T, np.abs(x) @ np.abs(weight).T
    if bias is not None:
        value, magnitude = value + bias, magnitude + np.abs(bias)
    return interval(value, magnitude, x.shape[1] + 1, dtype)


def weight_gradient(g, x, contents):
    """contents + g^T x; rows roundings for the sum, one to round a sum of tasks from double, one to add it to the contents."""
    dtype = x.dtype.type
    g, x, contents = _float64(g, x, contents)
    return interval(contents + g.T @ x, np.abs(contents) + np.abs(g).T @ np.abs(x), x.shape[0] + 2, dtype)


def bias_gradient(g, contents):
    """contents + the column sums of g."""
    return weight_gradient(g, np.ones((g.shape[0], 1), g.dtype), contents[:, None])


def input_gradient(g, weight):
    """g weight."""
    return linear_forward(g, np.ascontiguousarray(weight.T), None)


class Step(NamedTuple):
    weight: Interval  # weight - gradient
    bias: Interval  # bias - gradient
    loss: Interval  # the sum of squared residuals, in float64


def linear_step(x, target, weight, bias):
    """One step of gradient descent with lr 1 on the sum of squared errors, after 0, 1, 2, ... rows (first axis of every result).

    The residual takes in_features + 2 roundings (products and their sum, bias, target); the gradient doubles it exactly, multiplies it by x
    and sums over the rows: at most `rows` more; a sum of tasks is rounded once from double, and the update rounds once. A squared residual
    has twice the residual's, one for the square, and one for each addition.
    """
    dtype = x.dtype.type
    x, target, weight, bias = _float64(x, target, weight, bias)
    rows, in_features = x.shape
    value, magnitude = x @ weight.T - target, np.abs(x) @ np.abs(weight).T + np.abs(target)
    if bias is not None:
        value, magnitude = value + bias, magnitude + np.abs(bias)

    def after_each_row(terms):
        return np.concatenate([np.zeros((1, *terms.shape[1:])), np.cumsum(terms, axis=0)])

    roundings = in_features + 2 + rows + 2
    weights = interval(
        weight - 2 * after_each_row(value[:, :, None] * x[:, None, :]),
        np.abs(weight) + 2 * after_each_row(magnitude[:, :, None] * np.abs(x)[:, None, :]),
        roundings,
        dtype,
    )
    start = np.zeros(weight.shape[0]) if bias is None else bias
    biases = interval(start - 2 * after_each_row(value), np.abs(start) + 2 * after_each_row(magnitude), roundings, dtype)
    # The sum is returned in double, but its terms and the sums of a vector's lanes carry the kernel's roundoff.
    roundings = 2 * (in_features + 2) + 1 + rows * weight.shape[0]
    loss, size = after_each_row(value**2).cumsum(axis=1), after_each_row(magnitude**2).cumsum(axis=1)
    error = (gamma(roundings, dtype) + gamma(roundings, np.float64)) * size
    return Step(weights, biases, Interval(loss - error, loss + error))


def squared_error_terms(output, target):
    """(output - target)^2. The difference of two exact numbers is rounded relative to itself: it counts twice, its square once."""
    dtype = output.dtype.type
    output, target = _float64(output, target)
    value = (output - target) ** 2
    return interval(value, value, 3, dtype)


def squared_error_gradient(output, target, scale):
    """scale * 2 (output - target): the scale, the difference and the product are rounded, the doubling is exact."""
    dtype = output.dtype.type
    output, target = _float64(output, target)
    value = scale * 2 * (output - target)
    return interval(value, np.abs(value), 3, dtype)


def squared_error_sum(output, target, roundings_of_sum):
    """The sum of the terms, a float64, given the most additions in the kernel's dtype that one term passes through."""
    dtype = output.dtype.type
    output, target = _float64(output, target)
    value = np.sum((output - target) ** 2)
    error = (gamma(3 + roundings_of_sum, dtype) + gamma(3 + output.size, np.float64)) * value
    return Interval(value - error, value + error)


def sgd_step(parameter, gradient, buffer, *, lr, momentum, dampening, weight_decay, nesterov, maximize, first_step):
    """PyTorch's SGD in the arrays' own dtype; returns (parameter, buffer). A buffer of None: no momentum."""
    d = (-gradient if maximize else gradient) + weight_decay * parameter
    if buffer is not None:
        buffer = d if first_step else momentum * buffer + (1 - dampening) * d
        d = d + momentum * buffer if nesterov else buffer
    return parameter - lr * d, buffer


def sgd_update(parameter, gradient, buffer, **options):
    """Intervals of parameter and buffer after a step. The longest way: the decay's product and sum, 1 - dampening, its product and the sum
    of the buffer, the product and sum of Nesterov's look-ahead, the product and sum of the update: 9 roundings."""
    dtype = parameter.dtype.type
    # A kernel gets its hyperparameters in its own dtype.
    options = {name: value if isinstance(value, bool) else float(dtype(value)) for name, value in options.items()}
    arrays = _float64(parameter, gradient, buffer)
    value = sgd_step(*arrays, **options)
    # The same step with every term made positive.
    sizes = [None if a is None else np.abs(a) for a in arrays]
    magnitude = sgd_step(*sizes, **(options | {"lr": -options["lr"], "maximize": False}))
    return [v if v is None else interval(v, m, 9, dtype) for v, m in zip(value, magnitude, strict=True)]


MASK64 = (1 << 64) - 1


def random_bits(seed, counter):
    """The counter-th output of SplitMix64 (Steele, Lea and Flood 2014), whose state starts at seed."""
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def uniform(seed, bound, n):
    """Numbers in [-bound, bound) from the upper 53 bits of n outputs."""
    return [bound * (2 * ((random_bits(seed, i) >> 11) / 2**53) - 1) for i in range(n)]


def shuffle_order(seed, rows):
    """0 ... 2^bits - 1 through five rounds of multiply, add and xor-shift; the numbers below rows, in that order. At least 6 bits."""
    bits = max(6, (rows - 1).bit_length())
    mask, shift = (1 << bits) - 1, (bits + 1) // 2
    keys = [random_bits(seed, r) for r in range(5)]
    keys = [((key & 0xFFFFFFFF) | 1, key >> 32) for key in keys]
    order = []
    for number in range(1 << bits):
        for multiplier, addend in keys:
            number = (number * multiplier + addend) & mask
            number ^= number >> shift
        if number < rows:
            order.append(number)
    return order

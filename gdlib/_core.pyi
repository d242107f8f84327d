"""
The native kernels of gdlib. Use the gdlib package: these functions check types and sizes only.
"""

from __future__ import annotations
import collections.abc
import numpy.typing
import typing

__all__: list[str] = [
    "Predictor",
    "ShuffledBatches",
    "activation_backward",
    "activation_forward",
    "all_finite",
    "available_isas",
    "average",
    "cache_bytes",
    "compiler",
    "cpu_features",
    "few_outputs",
    "fill_uniform",
    "hessian_eigenvalue",
    "isa",
    "linear_backward",
    "linear_forward",
    "network_forward",
    "num_threads",
    "openmp_enabled",
    "select_isa",
    "set_num_threads",
    "set_zero",
    "sgd_update",
    "shuffle_order",
    "squared_error",
    "squared_error_gradient",
    "squared_error_mean",
    "squared_error_sum",
    "squared_error_terms",
    "train",
]

class ShuffledBatches:
    """
    Iterates over batches: for each array a new one of its rows in the order, up to end.
    """
    def __init__(
        self,
        arrays: tuple[numpy.typing.NDArray[typing.Any], ...],
        order: numpy.typing.NDArray[typing.Any],
        batch_size: typing.SupportsInt | typing.SupportsIndex,
        end: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def __iter__(self) -> collections.abc.Iterator[tuple[numpy.typing.NDArray[typing.Any], ...]]: ...
    def __next__(self) -> tuple[numpy.typing.NDArray[typing.Any], ...]: ...

class Predictor:
    """
    A frozen copy of a network, laid out for predictions; threads may share it.
    """
    def __call__(self, x: numpy.typing.NDArray[typing.Any]) -> numpy.typing.NDArray[typing.Any]:
        """
        The outputs of x[rows, in_features].
        """
    def __init__(
        self,
        layers: collections.abc.Sequence[
            tuple[str, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, bool]
        ],
        parameters: numpy.typing.NDArray[typing.Any],
    ) -> None: ...

def activation_backward(
    kind: str,
    y: numpy.typing.NDArray[typing.Any],
    g: numpy.typing.NDArray[typing.Any],
    out: numpy.typing.NDArray[typing.Any] | None = None,
    /,
) -> numpy.typing.NDArray[typing.Any]:
    """
    g times the activation's derivative where its output is y; out may be g.
    """

def activation_forward(
    kind: str, x: numpy.typing.NDArray[typing.Any], out: numpy.typing.NDArray[typing.Any] | None = None, /
) -> numpy.typing.NDArray[typing.Any]:
    """
    relu, tanh or sigmoid of every element; out may be x.
    """

def all_finite(x: numpy.typing.NDArray[typing.Any], /) -> bool:
    """
    True when no element is NaN or infinite.
    """

def available_isas() -> list[str]:
    """
    The kernel tables that this machine can run, slowest first.
    """

def average(sources: numpy.typing.NDArray[typing.Any], mean: numpy.typing.NDArray[typing.Any], /) -> None:
    """
    mean[n] = the mean of the rows of sources[count, n], added in order; mean may be one.
    """

def cache_bytes() -> tuple[int, int]:
    """
    A core's L2, and the L3 that it shares.
    """

def compiler() -> str:
    """
    The compiler's version text.
    """

def cpu_features() -> list[str]:
    """
    Features of this CPU that some kernel table needs.
    """

def fill_uniform(
    seed: typing.SupportsInt | typing.SupportsIndex,
    bound: typing.SupportsFloat | typing.SupportsIndex,
    out: numpy.typing.NDArray[typing.Any],
) -> None:
    """
    Fills out with numbers uniform in [-bound, bound], in place.
    """

def hessian_eigenvalue(x: numpy.typing.NDArray[typing.Any], has_bias: bool) -> float:
    """
    The largest eigenvalue of 2 [x 1]^T [x 1] (without bias, 2 x^T x).
    """

def isa() -> str:
    """
    The kernel table in use.
    """

def linear_backward(
    g: numpy.typing.NDArray[typing.Any],
    x: numpy.typing.NDArray[typing.Any],
    weight: numpy.typing.NDArray[typing.Any],
    weight_gradient: numpy.typing.NDArray[typing.Any],
    bias_gradient: numpy.typing.NDArray[typing.Any] | None,
    input_gradient: numpy.typing.NDArray[typing.Any] | None = None,
    /,
) -> numpy.typing.NDArray[typing.Any]:
    """
    weight_gradient += g^T x and bias_gradient += column sums of g, in place; returns the gradient of x, g weight, into `input_gradient` when one is given.
    """

def linear_forward(
    x: numpy.typing.NDArray[typing.Any],
    weight: numpy.typing.NDArray[typing.Any],
    bias: numpy.typing.NDArray[typing.Any] | None,
    out: numpy.typing.NDArray[typing.Any] | None = None,
    /,
) -> numpy.typing.NDArray[typing.Any]:
    """
    y[rows, out] = x weight^T + bias, into `out` when one is given.
    """

def network_forward(
    layers: collections.abc.Sequence[
        tuple[str, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, bool]
    ],
    x: numpy.typing.NDArray[typing.Any],
    parameters: numpy.typing.NDArray[typing.Any],
) -> numpy.typing.NDArray[typing.Any]:
    """
    The outputs of layers (kind, in_features, out_features, has_bias), one after the other.
    """

def num_threads() -> int:
    """
    Threads that a call may use.
    """

def openmp_enabled() -> bool:
    """
    True when the extension was built with OpenMP.
    """

def select_isa(name: str) -> None:
    """
    Forces a kernel table; not while another thread computes.
    """

def set_num_threads(count: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Sets the threads that a call may use.
    """

def set_zero(x: numpy.typing.NDArray[typing.Any], /) -> None:
    """
    x = 0, in place.
    """

def sgd_update(
    parameter: numpy.typing.NDArray[typing.Any],
    gradient: numpy.typing.NDArray[typing.Any],
    momentum_buffer: numpy.typing.NDArray[typing.Any] | None,
    group: dict[str, typing.Any],
    first_step: bool,
    /,
) -> None:
    """
    PyTorch's SGD step on flat vectors, in place, with the options of a group.
    """

def shuffle_order(
    seed: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex
) -> numpy.typing.NDArray[typing.Any]:
    """
    The pseudo-random order of 0 ... rows - 1 that belongs to a seed.
    """

def squared_error(
    x: numpy.typing.NDArray[typing.Any],
    target: numpy.typing.NDArray[typing.Any],
    parameters: numpy.typing.NDArray[typing.Any],
    layers: collections.abc.Sequence[
        tuple[str, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, bool]
    ],
) -> float:
    """
    The sum of squared errors of a model over all rows.
    """

def squared_error_gradient(
    output: numpy.typing.NDArray[typing.Any],
    target: numpy.typing.NDArray[typing.Any],
    scale: float | None,
    out: numpy.typing.NDArray[typing.Any] | None = None,
    /,
) -> numpy.typing.NDArray[typing.Any]:
    """
    scale * 2 (output - target), into `out` when one is given; a scale of None is 1 / elements.
    """

def squared_error_mean(output: numpy.typing.NDArray[typing.Any], target: numpy.typing.NDArray[typing.Any], /) -> float:
    """
    mean of (output - target)^2, carried in double.
    """

def squared_error_sum(output: numpy.typing.NDArray[typing.Any], target: numpy.typing.NDArray[typing.Any], /) -> float:
    """
    sum of (output - target)^2, carried in double.
    """

def squared_error_terms(
    output: numpy.typing.NDArray[typing.Any], target: numpy.typing.NDArray[typing.Any], /
) -> numpy.typing.NDArray[typing.Any]:
    """
    (output - target)^2, element by element.
    """

def train(
    x: numpy.typing.NDArray[typing.Any],
    target: numpy.typing.NDArray[typing.Any],
    parameters: numpy.typing.NDArray[typing.Any],
    momentum: numpy.typing.NDArray[typing.Any] | None,
    layers: collections.abc.Sequence[
        tuple[str, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, bool]
    ],
    ranges: collections.abc.Sequence[
        tuple[
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsFloat | typing.SupportsIndex,
            typing.SupportsFloat | typing.SupportsIndex,
            typing.SupportsFloat | typing.SupportsIndex,
            typing.SupportsFloat | typing.SupportsIndex,
            bool,
            bool,
            bool,
        ]
    ],
    batch_size: typing.SupportsInt | typing.SupportsIndex,
    epoch_seeds: numpy.typing.NDArray[typing.Any] | None,
    first_step: typing.SupportsInt | typing.SupportsIndex,
    last_step: typing.SupportsInt | typing.SupportsIndex,
    mean: bool,
    loss_limit: typing.SupportsFloat | typing.SupportsIndex,
    losses: numpy.typing.NDArray[typing.Any],
    progress: collections.abc.Callable[[int], typing.Any] | None = None,
) -> tuple[str, int]:
    """
    Advances the parameters from first_step to last_step in one call; returns (stop, steps_done), where stop is 'finished', 'non_finite' or 'above_limit'. progress(epochs done) is called now and then.
    """

few_outputs: int = 8

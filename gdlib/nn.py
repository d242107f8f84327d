"""Layers with explicit gradients, under PyTorch's names. Every parameter of a model is a view into one flat vector (its arena)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gdlib import _core, validation
from gdlib.errors import DivergenceError

if TYPE_CHECKING:
    import numpy.typing as npt

_LARGEST_BYTES = 2**47  # what a process can address
LINE_BYTES = 64  # vector loads of a whole cache line never straddle two


def aligned_zeros(size: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A flat vector of zeros that starts on a cache line."""
    raw = np.zeros(size * dtype.itemsize + LINE_BYTES, np.uint8)
    start = -raw.ctypes.data % LINE_BYTES
    return raw[start : start + size * dtype.itemsize].view(dtype)


class Arena:
    """One contiguous vector of parameters and one of their gradients: an update, an average or a save is one call over it."""

    __slots__ = ("data", "grad")

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self.data = aligned_zeros(size, dtype)
        self.grad = aligned_zeros(size, dtype)

    def __getstate__(self) -> Any:
        return self.data, self.grad

    def __setstate__(self, state: Any) -> None:
        self.__init__(state[0].size, state[0].dtype)  # type: ignore[misc]  # a copy is aligned too
        self.data[:], self.grad[:] = state


class Parameter:
    """Learnable numbers: `.data` and `.grad` are NumPy arrays that the engine reads and writes in place; `.name` is their key.

    Assigning to `.data` or `.grad` copies the values in; a shape that differs, or a number that does not fit the dtype, is a ValueError.
    A copy or a pickle of several parameters, of a model, or of a model with its optimizer, keeps them tied to one arena.
    """

    __slots__ = ("_data", "_grad", "arena", "begin", "end", "name")

    def __init__(self, arena: Arena, begin: int, shape: tuple[int, ...], name: str) -> None:
        self.arena = arena
        self.begin = begin
        self.end = begin + int(np.prod(shape))
        self.name = name
        self._data = arena.data[begin : self.end].reshape(shape)
        self._grad = arena.grad[begin : self.end].reshape(shape)

    @property
    def data(self) -> npt.NDArray[Any]:
        return self._data

    @data.setter
    def data(self, value: npt.ArrayLike) -> None:
        self._assign(self._data, value)

    @property
    def grad(self) -> npt.NDArray[Any]:
        return self._grad

    @grad.setter
    def grad(self, value: npt.ArrayLike) -> None:
        self._assign(self._grad, value)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape

    def _assign(self, into: npt.NDArray[Any], value: npt.ArrayLike) -> None:
        if value is into:  # `parameter.grad += g` assigns the array that it has changed in place
            return
        array = validation.as_array(value, self.name)
        if array.shape != into.shape:
            raise ValueError(f"{self.name} has shape {into.shape}; an array of shape {array.shape} does not fit.")
        into[...] = self.converted(array)

    def converted(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`array` in this parameter's dtype. Raises ValueError for a finite number that the dtype does not hold."""
        values = validation.as_dtype(array, self._data.dtype)
        if values is not array and (np.isinf(values) & np.isfinite(array)).any():
            raise ValueError(f"{self.name} would hold a number that does not fit {values.dtype}; scale it, or use a float64 model.")
        return values

    def __reduce__(self) -> Any:
        return Parameter, (self.arena, self.begin, self.shape, self.name)

    def __repr__(self) -> str:
        return f"Parameter({self.name!r}, shape={self.shape}, dtype={self._data.dtype})"


class Linear:
    """y = x W^T + b.

    x is [..., in_features], y [..., out_features], `weight` W [out_features, in_features], `bias` b [out_features] (None without).
    Both start uniform in +-1/sqrt(in_features), drawn from `seed` (None: fresh entropy), the same numbers on every machine. A row's
    output has the same bits in any batch and for any number of threads.

    The gradient is explicit: `model(x)` remembers x, and `model.backward(g)` adds g^T x to `weight.grad` and the column sums of g to
    `bias.grad`, and returns g W. Follows torch.nn.Linear.

    Raises ValueError for sizes below 1, wrong shapes, and NaN or infinity in x; TypeError for what is not a number; DivergenceError
    when the output is not finite although x is.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, dtype: npt.DTypeLike = np.float32, seed: int | None = None
    ) -> None:
        self.in_features = validation.as_count(in_features, "in_features")
        self.out_features = validation.as_count(out_features, "out_features")
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(f"dtype is {self.dtype}; float32 or float64 is wanted.")
        weights = self.in_features * self.out_features
        if weights * self.dtype.itemsize > _LARGEST_BYTES:
            raise ValueError(f"{self.in_features} x {self.out_features} weights do not fit the memory of any machine; use fewer.")
        self._arena = Arena(weights + (self.out_features if bias else 0), self.dtype)
        self.weight = Parameter(self._arena, 0, (self.out_features, self.in_features), "weight")
        self.bias = Parameter(self._arena, weights, (self.out_features,), "bias") if bias else None
        seed = validation.fresh_seed() if seed is None else validation.as_seed(seed)
        _core.fill_uniform(seed, 1.0 / np.sqrt(self.in_features), self._arena.data)
        self._input: npt.NDArray[Any] | None = None
        self.feature_names: list[str] | None = None
        self.target_names: list[str] | None = None
        self.training_summary: dict[str, Any] | None = None  # of the fit that these parameters come from; saved with the model

    def parameters(self) -> list[Parameter]:
        """The weight, and the bias where there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def __call__(self, x: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The layer's output; x is remembered, not copied where it fits, for `backward`. `out` receives the result if given."""
        bias = self.bias
        try:
            y = _core.linear_forward(x, self.weight._data, None if bias is None else bias._data, out)
        except (TypeError, ValueError, FloatingPointError):
            x, y = self._forward(x, out)
        self._input = x
        return y

    forward = __call__

    def _flat_out(self, out: Any, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
        """`out` as a matrix. Raises ValueError when it is not what a result of this shape can be written to."""
        if out is None:
            return None
        fits = isinstance(out, np.ndarray) and out.shape == shape and out.dtype == self.dtype
        if not fits or not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError(f"out does not fit; a C-contiguous {self.dtype} array of shape {shape} is wanted.")
        flat: npt.NDArray[Any] = out.reshape(-1, shape[-1])
        return flat

    def predict(self, x: Any) -> npt.NDArray[Any]:
        """The layer's output, [..., out_features]; nothing is remembered, so that threads may share the model."""
        bias = self.bias
        try:
            return _core.linear_forward(x, self.weight._data, None if bias is None else bias._data, None)
        except (TypeError, ValueError, FloatingPointError):
            return self._forward(x, None)[1]

    def _forward(self, x: Any, out: npt.NDArray[Any] | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The same for what the engine does not take as it is: convert it, or say why it cannot be."""
        rows = validation.as_rows(x, self.in_features, self.dtype, "x")
        shape = (*validation.as_array(x, "x").shape[:-1], self.out_features)
        out = self._flat_out(out, shape)
        try:
            y = _core.linear_forward(rows, self.weight._data, None if self.bias is None else self.bias._data, out)
        except FloatingPointError:
            validation.require_finite(x, rows, "x")
            if not np.isfinite(self._arena.data).all():
                raise DivergenceError("the weights hold NaN or infinity: training has diverged; start again with a smaller lr.") from None
            raise DivergenceError(f"the output does not fit {self.dtype}: the weights have grown too large; use a smaller lr.") from None
        return rows, y.reshape(shape)

    def backward(self, gradient: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Add to `.grad` and return the gradient of x, [..., in_features], for the gradient of the last output.

        `out` receives the result if given. Raises RuntimeError before the first call of the model.
        """
        x = self._input
        if x is None:
            raise RuntimeError("backward has no input to work with; call the model on a batch first.")
        bias = None if self.bias is None else self.bias._grad
        try:
            return _core.linear_backward(gradient, x, self.weight._data, self.weight._grad, bias, out)
        except (TypeError, ValueError):
            array = validation.as_array(gradient, "the gradient")
            if array.ndim == 0 or array.shape[-1] != self.out_features or array.size != len(x) * self.out_features:
                raise ValueError(
                    f"the gradient has shape {array.shape}; that of the last output, {len(x)} rows of {self.out_features}, is wanted."
                ) from None
            flat = np.ascontiguousarray(validation.as_dtype(array, self.dtype)).reshape(-1, self.out_features)
            shape = (*array.shape[:-1], self.in_features)
            result = _core.linear_backward(flat, x, self.weight._data, self.weight._grad, bias, self._flat_out(out, shape))
            return result.reshape(*array.shape[:-1], self.in_features)

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        self._arena.grad.fill(0)

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of the parameters by name: `weight`, `bias`."""
        return {parameter.name: parameter.data.copy() for parameter in self.parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the parameters in, all or none; anything that NumPy can view. Raises KeyError for missing and unexpected names."""
        if not isinstance(state, Mapping):
            raise TypeError(f"the state dict is a {type(state).__name__}; a dict of arrays by name is wanted, as state_dict() returns it.")
        parameters = {parameter.name: parameter for parameter in self.parameters()}
        missing, unexpected = (sorted(map(str, names)) for names in (parameters.keys() - state.keys(), state.keys() - parameters.keys()))
        if missing or unexpected:
            raise KeyError(f"the state dict does not fit this model: missing {missing}, unexpected {unexpected}.")
        arrays = {name: validation.as_array(state[name], name) for name in parameters}
        for name, parameter in parameters.items():
            if arrays[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {arrays[name].shape} in the state dict; {parameter.shape} is wanted.")
            arrays[name] = parameter.converted(arrays[name])
        for name, parameter in parameters.items():
            parameter.data = arrays[name]
        self.training_summary = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_input": None}

    def __repr__(self) -> str:
        return f"Linear(in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, dtype={self.dtype})"

"""Parameters: the numbers that a model learns. Those of one model are views into one flat vector, its arena."""

from __future__ import annotations

import math
import sys
from sys import getrefcount
from typing import TYPE_CHECKING, Any

import numpy as np

from gdlib import validation

if TYPE_CHECKING:
    import numpy.typing as npt

# Without the GIL an object's references are not all counted in one place.
_COUNTS_REFERENCES = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()

LINE_BYTES = 64  # vector loads of a whole cache line never straddle two


def aligned_zeros(size: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A flat vector of zeros that starts on a cache line."""
    raw = np.zeros(size * dtype.itemsize + LINE_BYTES, np.uint8)
    start = -raw.ctypes.data % LINE_BYTES
    return raw[start : start + size * dtype.itemsize].view(dtype)


class Arena:
    """One contiguous vector of parameters and one of their gradients: an update, an average or a save is one call over it.

    `version` changes before and after `data` does, so that who keeps something made from it knows when that is out of date. `vacated` is
    set once the parameters have moved into another arena: who still holds this one holds nothing.
    """

    __slots__ = ("_owner", "_views", "data", "grad", "vacated", "version")

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self.data = aligned_zeros(size, dtype)
        self.grad = aligned_zeros(size, dtype)
        self.vacated = False
        self.version = 0
        self._owner = self.data.base  # of the memory: NumPy makes it the base of every view of a view
        self._views: dict[tuple[int, tuple[int, ...]], tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}

    def view(self, begin: int, shape: tuple[int, ...]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Data and gradient from `begin` on, for one who never hands out this very view of the data. The arena keeps it."""
        if (begin, shape) not in self._views:
            end = begin + math.prod(shape)
            self._views[begin, shape] = self.data[begin:end].reshape(shape), self.grad[begin:end].reshape(shape)
        return self._views[begin, shape]

    def exclusive(self) -> bool:
        """Whether nobody outside gdlib holds a view of the data, through which it could change unseen.

        Every such view holds a reference to the memory's owner, as `data`, the views that this arena keeps, the arena and the call do.
        """
        return _COUNTS_REFERENCES and getrefcount(self._owner) == len(self._views) + 3

    def __getstate__(self) -> Any:
        return self.data, self.grad, self.vacated

    def __setstate__(self, state: Any) -> None:
        self.__init__(state[0].size, state[0].dtype)  # type: ignore[misc]  # a copy is aligned too
        self.data[:], self.grad[:], self.vacated = state


class Parameter:
    """Learnable numbers: `.data` and `.grad` are NumPy arrays that the engine reads and writes in place; `.name` is their key.

    Assigning to `.data` or `.grad` copies the values in; a shape that differs, or a number that does not fit the dtype, is a ValueError.
    A copy or a pickle of several parameters, of a model, or of a model with its optimizer, keeps them tied to one arena.
    """

    __slots__ = ("_data", "_grad", "arena", "begin", "end", "name")

    def __init__(self, arena: Arena, begin: int, shape: tuple[int, ...], name: str) -> None:
        self.name = name
        self._view(arena, begin, shape)

    def _view(self, arena: Arena, begin: int, shape: tuple[int, ...]) -> None:
        self.arena = arena
        self.begin = begin
        self.end = begin + math.prod(shape)
        self._data, self._grad = arena.view(begin, shape)

    def move(self, arena: Arena, begin: int) -> None:
        """Take values and gradient along to `begin` in another arena."""
        data, grad, self.arena.vacated = self._data, self._grad, True
        self._view(arena, begin, self.shape)
        self._data[...], self._grad[...] = data, grad

    @property
    def data(self) -> npt.NDArray[Any]:
        self.arena.version += 1  # it may be written to
        return self._data.view()

    @data.setter
    def data(self, value: npt.ArrayLike) -> None:
        self.arena.version += 1
        try:
            self._assign(self._data, value)
        finally:
            self.arena.version += 1

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
        array = validation.as_array(value, self.name)
        # `parameter.grad += g` assigns the array that it has changed in place.
        if array.dtype == into.dtype and array.shape == into.shape and array.ctypes.data == into.ctypes.data:
            return
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

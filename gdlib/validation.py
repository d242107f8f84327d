"""Friendly checks, in one place: each error says what came, what was wanted and what to do.

An array that already has the wanted dtype and layout passes through without a copy, read-only or not.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


def as_array(value: Any, name: str) -> npt.NDArray[Any]:
    """Any array that NumPy can view, or an object with `__dlpack__`, as a real-valued NumPy array. Raises TypeError."""
    if type(value) is not np.ndarray and hasattr(value, "filled") and hasattr(value, "mask"):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill it in or drop the rows first, such as {name}.filled(0).")
    if not isinstance(value, np.ndarray):
        if hasattr(value, "toarray") and hasattr(value, "nnz"):
            raise TypeError(f"{name} is a sparse matrix ({type(value).__name__}); a dense array is wanted: pass {name}.toarray().")
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array_interface__"):
            try:
                value = np.from_dlpack(value)
            except (BufferError, RuntimeError, TypeError, ValueError) as error:
                raise TypeError(
                    f"{name} is a {type(value).__name__} that cannot be shared ({error}); pass a CPU tensor of float32 or float64 without "
                    "gradient, such as tensor.detach().cpu().float()."
                ) from None
        else:
            try:
                value = np.asarray(value)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{name} cannot be viewed as an array ({error}); pass a NumPy array of numbers.") from None
    array: npt.NDArray[Any] = value
    if array.dtype.kind not in "fiub":
        what = {"U": "text", "S": "bytes", "O": "Python objects", "c": "complex numbers"}.get(array.dtype.kind, str(array.dtype))
        raise TypeError(f"{name} holds {what}; real numbers are wanted: convert it first, such as by .astype(float).")
    return array


def as_dtype(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if array.dtype == dtype and array.flags.aligned:
        return array
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is reported as that
        return array.astype(dtype)


def as_rows(value: Any, columns: int, dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    """[..., columns] -> [rows, columns] of the dtype, rows contiguous. Raises TypeError and ValueError."""
    array = as_array(value, name)
    if array.ndim == 0 or array.shape[-1] != columns:
        raise ValueError(f"{name} has shape {array.shape}; [rows, {columns}] is wanted, for a layer with {columns} input features.")
    array = as_dtype(array, dtype).reshape(-1, columns)
    if (columns > 1 and array.strides[1] != array.itemsize) or array.strides[0] < 0 or array.strides[0] % array.itemsize:
        array = np.ascontiguousarray(array)
    return array


def as_training_rows(value: Any, columns: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """X for fit: exactly two dimensions, at least one row."""
    array = as_array(value, "X")
    if array.ndim != 2:
        raise ValueError(f"X has shape {array.shape}; [rows, {columns}] is wanted. One row is X[None, :], one feature X[:, None].")
    if array.shape[0] == 0:
        raise ValueError(f"X has shape {array.shape}; there are no rows to learn from.")
    return as_rows(array, columns, dtype, "X")


def as_targets(value: Any, rows: int, columns: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """y for fit: [rows, columns], or [rows] for one output."""
    array = as_array(value, "y")
    if array.shape != (rows, columns) and not (columns == 1 and array.shape == (rows,)):
        wanted = f"[{rows}, {columns}]" + (f" or [{rows}]" if columns == 1 else "")
        raise ValueError(f"y has shape {array.shape}; {wanted} is wanted, for {rows} rows of X and {columns} outputs.")
    return np.ascontiguousarray(as_dtype(array, dtype).reshape(rows, columns))


def require_finite(given: Any, used: npt.NDArray[Any], name: str) -> None:
    """Raise a ValueError that names the first NaN or infinite element of `used`, the form of `given` that the engine reads."""
    bad = ~np.isfinite(used)
    if not bad.any():
        return
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    where = f"row {place[0]}" + (f", column {place[1]}" if used.ndim > 1 and used.shape[1] > 1 else "")
    original = np.asarray(as_array(given, name)).reshape(used.shape)[place]
    if np.isfinite(original):
        raise ValueError(f"{name} holds {original!r} at {where}, too large for {used.dtype}; scale it, or use a float64 model.")
    count = int(bad.sum())
    raise ValueError(
        f"{name} holds {count} value{'s' if count > 1 else ''} that {'are' if count > 1 else 'is'} NaN or infinite, the first "
        f"({float(used[place])}) at {where}; drop or fill in such rows first."
    )


def as_count(value: Any, name: str, least: int = 1, most: int = 2**40) -> int:
    """A whole number from `least` to `most`. Raises TypeError and ValueError."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; a whole number of at least {least} is wanted.") from None
    if not least <= count <= most:
        raise ValueError(f"{name} is {count}; it must be at least {least}" + ("." if count < least else f" and at most {most}."))
    return count


def as_number(value: Any, name: str, *, positive: bool = False) -> float:
    """A finite number, not negative, or above zero where `positive`. Raises TypeError and ValueError."""
    if isinstance(value, (bool, np.bool_, str, bytes)):
        raise TypeError(f"{name} is {value!r}; a number is wanted.")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; a number is wanted.") from None
    except OverflowError:  # of an int
        number = math.inf
    if not 0 <= number < math.inf or (positive and number == 0):
        raise ValueError(f"{name} is {value!r}; a finite number {'above 0' if positive else 'of at least 0'} is wanted.")
    return number


def fresh_seed() -> int:
    """64 bits from the operating system."""
    return int.from_bytes(os.urandom(8), "little")


def as_seed(value: Any, name: str = "seed") -> int:
    """A whole number from 0 to 2**64 - 1. Raises TypeError and ValueError."""
    return as_count(value, name, least=0, most=2**64 - 1)


def as_names(names: Sequence[str] | None, count: int, what: str) -> list[str] | None:
    """`count` different names, or None. Raises TypeError and ValueError."""
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(f"{what} is the text {names!r}; a list of {count} names is wanted.")
    result = [str(name) for name in names]
    if len(result) != count:
        raise ValueError(f"{what} has {len(result)} names; {count} are wanted.")
    if len(set(result)) != count:
        raise ValueError(f"{what} names one thing twice: {result}.")
    return result


def as_units(units: Sequence[str] | None, count: int, what: str) -> list[str] | None:
    """`count` units, "" for none, or None. Raises TypeError and ValueError."""
    if units is None:
        return None
    if isinstance(units, str):
        raise TypeError(f"{what} is the text {units!r}; a list of {count} units is wanted.")
    result = list(units)
    for unit in result:
        if not isinstance(unit, str):
            raise TypeError(f'{what} holds {unit!r}; texts are wanted, "" for no unit.')
    if len(result) != count:
        raise ValueError(f'{what} has {len(result)} units; {count} are wanted, "" for no unit.')
    return result


def as_ranges(ranges: Any, count: int, what: str) -> list[list[float]] | None:
    """`count` pairs [lowest, highest] of finite numbers, or None. Raises TypeError and ValueError."""
    if ranges is None:
        return None
    array = as_array(ranges, what)
    if array.shape != (count, 2):
        raise ValueError(f"{what} has shape {array.shape}; [{count}, 2] is wanted, the lowest and the highest value of each.")
    pairs: list[list[float]] = array.astype(np.float64).tolist()
    for i, (low, high) in enumerate(pairs):
        if not -np.inf < low <= high < np.inf:
            raise ValueError(f"{what} holds [{low}, {high}] at {i}; two finite numbers are wanted, the lower one first.")
    return pairs


def flat_out(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
    """`out` as a matrix. Raises ValueError when it is not what a result of this shape can be written to."""
    if out is None:
        return None
    fits = isinstance(out, np.ndarray) and out.shape == shape and out.dtype == dtype
    if not fits or not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError(f"out does not fit; a C-contiguous {dtype} array of shape {shape} is wanted.")
    flat: npt.NDArray[Any] = out.reshape(-1, shape[-1] if shape else 1)
    return flat

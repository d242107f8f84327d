"""Tensors of the Open Inference Protocol v2, as pure functions: JSON values or raw bytes -> checked NumPy arrays, and back.

NumPy alone would turn 1.7 into the integer 1, take "12" for a number, fill ragged rows with objects and let -1 stand for any size, so
everything is checked before it becomes an array. Raw bytes are little-endian and row-major, as the protocol has them.

Source: Open Inference Protocol v2, "Tensor Data"; Triton's binary tensor data extension.
"""

import math
import struct
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NUMERIC: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
BYTES, BF16 = "BYTES", "BF16"
DTYPES = NUMERIC | {BYTES: np.dtype(object), BF16: np.dtype("<f4")}  # NumPy has no bfloat16; its values are exact in float32
DATATYPE_NAMES = {dtype: name for name, dtype in NUMERIC.items()} | {np.dtype(object): BYTES}
RAW_ONLY = {"FP16", BF16}  # clients refuse these in JSON
_CONVERTIBLE = {"f": "biuf", "i": "biu", "u": "biu", "b": "b", "O": "O"}  # NumPy's kinds: a model's -> those that it may be sent
MAX_CONVERTED_BYTES = 2**27  # of a tensor in the model's datatype, which may be eight times as wide as that which was sent
_LITTLE = sys.byteorder == "little"
_MAX_SIZE = 2**40  # of one axis and of their product: far above any limit on the body, far below what overflows
_NUMBERS = {int, float, type(None)}
_JSON_TYPES: dict[type, str] = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}

Where = Callable[[int], str]  # the words for the value at a flat index


class ProtocolError(ValueError):
    """The request breaks the protocol; the text is one sentence written for the client."""


class TensorSpec(NamedTuple):
    """A tensor that a model takes or gives; -1 in `shape` stands for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


def shorten(text: str) -> str:
    """`text` quoted, and cut where a client's text would swamp the error that names it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def checked(value: Any, wanted: type, what: str) -> Any:
    """`value`, which must be of exactly this type: bool is a subclass of int. Raises ProtocolError."""
    # The value itself is not printed: it may be huge, or nest too deeply for repr.
    if type(value) is not wanted:
        raise ProtocolError(f"{what} is {_JSON_TYPES.get(type(value), 'missing or null')}: send {_JSON_TYPES[wanted]}.")
    return value


def check_shape(shape: Any, spec: TensorSpec) -> tuple[int, ...]:
    """`shape` as sent, which must be a list of sizes that `spec` allows. Raises ProtocolError."""
    sizes = checked(shape, list, "The input's 'shape'")
    fits = len(sizes) == len(spec.shape)
    for size, wanted in zip(sizes, spec.shape, strict=False):
        if type(size) is not int or not 1 <= size <= _MAX_SIZE or wanted not in (-1, size):
            fits = False
    if not fits or math.prod(sizes) > _MAX_SIZE:
        if len(spec.shape) == 2 and spec.shape[0] == -1 and spec.shape[1] > 0:
            wanted = spec.shape[1]
            raise ProtocolError(f"The input's shape is not [rows, {wanted}] with one row or more: send rows of {wanted} features.")
        raise ProtocolError(
            f"The input's shape is not {list(spec.shape)}, where -1 stands for any size of 1 or more: send input {shorten(spec.name)} so."
        )
    return tuple(sizes)


def from_json(data: Any, datatype: str, shape: tuple[int, ...], where: Where) -> NDArray[Any]:
    """The array [shape] of a tensor's `data`: flat and row-major, or nested as `shape` says.

    `data` is a list, or an array of float64, int64 or uint64 that a fast parser has read. Raises ProtocolError naming the place.
    """
    if datatype in RAW_ONLY:
        raise ProtocolError(f"{datatype} has no form in JSON: send the tensor in the binary format, or as FP32.")
    dtype = DTYPES[datatype]
    if isinstance(data, np.ndarray):
        if data.shape not in (shape, (math.prod(shape),)):
            return from_json(data.tolist(), datatype, shape, where)  # raises: it says what disagrees
        values = data.reshape(shape)
        if dtype.kind in "iu":
            _check_range(values, dtype, where)
        return _cast(values, dtype)
    flat = _flatten(checked(data, list, "The input's 'data'"), shape)
    if dtype.kind in "iu":
        array = _integers(flat, dtype, where)
    elif dtype.kind == "f":
        array = _floats(flat, dtype, where)
    elif dtype.kind == "b":
        _check_types(flat, {bool}, where, "true or false")
        array = np.array(flat, dtype)
    else:
        _check_types(flat, {str}, where, "a string")
        array = of_objects([text.encode("utf-8", "surrogatepass") for text in flat])
    return array.reshape(shape)


def from_bytes(raw: memoryview, datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array [shape] whose values lie in `raw`, of which numbers are a view. Raises ProtocolError for a wrong number of bytes."""
    count = math.prod(shape)
    if datatype == BYTES:
        return _split(raw, count).reshape(shape)
    dtype = np.dtype("<u2") if datatype == BF16 else DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise ProtocolError(
            f"The tensor has {len(raw)} bytes, and its shape and datatype {datatype} promise another number: make them agree."
        )
    array = np.frombuffer(raw, dtype)
    if datatype == BF16:
        array = (array.astype("<u4") << 16).view("<f4")
    elif datatype == "BOOL":
        array = np.frombuffer(raw, np.uint8) != 0  # any other byte would be an invalid bool
    return array.reshape(shape)


def check_convertible(datatype: str, shape: tuple[int, ...], spec: TensorSpec) -> None:
    """Raises ProtocolError where `convert` has no way from `datatype`, or too far a one, before values, perhaps millions, are read."""
    if DTYPES[datatype].kind not in _CONVERTIBLE[DTYPES[spec.datatype].kind]:
        raise ProtocolError(f"The input's datatype {datatype} does not fit: send input {shorten(spec.name)} as {spec.datatype}.")
    if math.prod(shape) * DTYPES[spec.datatype].itemsize > MAX_CONVERTED_BYTES:
        raise ProtocolError(f"The input takes more than {MAX_CONVERTED_BYTES} bytes as {spec.datatype}: send fewer rows in one request.")


def convert(array: NDArray[Any], spec: TensorSpec, where: Where) -> NDArray[Any]:
    """`array`, aligned and in the datatype of `spec`, into which every value must fit; floating point rounds. Raises ProtocolError."""
    wanted = DTYPES[spec.datatype]
    if array.dtype == wanted:
        return array if array.flags.aligned else array.copy()  # raw bytes lie wherever the JSON part ends
    if wanted.kind in "iu":
        _check_range(array, wanted, where)
    return _cast(array, wanted)


def check_finite(array: NDArray[Any], where: Where) -> None:
    """Raises ProtocolError naming the first value of a floating-point array that is NaN or infinite."""
    if not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        kind = "NaN or null" if np.isnan(array.flat[index]) else f"infinite, or too large for {DATATYPE_NAMES[array.dtype]}"
        raise ProtocolError(f"{where(index)} is {kind}: a model takes finite numbers only, so replace the value or leave the row out.")


def of_objects(items: Sequence[Any]) -> NDArray[Any]:
    """A flat array of objects as they are: NumPy alone would look for arrays inside them."""
    array = np.empty(len(items), object)
    array[:] = items
    return array


def to_bytes(array: NDArray[Any]) -> bytes:
    """The raw form of an array. Objects are bytes, each with its length before it."""
    if array.dtype.kind == "O":
        return b"".join(chain.from_iterable((struct.pack("<I", len(item)), item) for item in array.flat))
    return (array if _LITTLE else array.astype(array.dtype.newbyteorder("<"))).tobytes()


def to_json(array: NDArray[Any], name: str) -> Any:
    """What becomes a tensor's `data`: a flat array or list. Raises ProtocolError where JSON has no form, `check_json` apart."""
    if array.dtype.kind == "O":
        try:
            return [item.decode("utf-8") for item in array.flat]
        except UnicodeDecodeError:
            raise ProtocolError(f"A value is not UTF-8 text, and JSON has no form for it: {_ask_binary(name)}") from None
    if array.dtype == np.float16:
        raise ProtocolError(f"FP16 has no form in JSON: {_ask_binary(name)}")
    return array.ravel()


def check_json(array: NDArray[Any], name: str) -> None:
    """Raises ProtocolError for an infinity, which the encoder would write as null, as it does NaN."""
    if array.dtype.kind == "f" and np.isinf(array).any():
        raise ProtocolError(f"A value is infinite, and JSON has no form for it: {_ask_binary(name)}")


def _ask_binary(name: str) -> str:
    return f"ask for output {shorten(name)} in the binary format (its parameter 'binary_data': true)."


def _flatten(data: list[Any], shape: Sequence[int]) -> list[Any]:
    # Errors do not print the sizes in 'shape', which may have many digits.
    if len(shape) < 2 or not (data and type(data[0]) is list):
        if len(data) != math.prod(shape):
            raise ProtocolError(f"'data' holds {len(data)} values, and 'shape' promises another number: make them agree.")
        return data
    if len(data) != shape[0]:
        raise ProtocolError(f"'data' holds {len(data)} rows, and 'shape' promises another number: make them agree.")
    level = data
    for axis, size in enumerate(shape[1:], 1):
        for row, values in enumerate(level):
            if type(values) is not list or len(values) != size:
                place = ", ".join(map(str, np.unravel_index(row, shape[:axis])))
                raise ProtocolError(f"Row {place} of 'data' is not an array of {size} values: send every row with {size}.")
        level = list(chain.from_iterable(level))
    return level


def _cast(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if values.dtype == dtype:
        return values
    # An infinity is reported by its place, where the model does not take any; a signalling NaN becomes a quiet one.
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype)


def _check_range(values: NDArray[Any], dtype: np.dtype[Any], where: Where) -> None:
    limits = np.iinfo(dtype)
    low, high = int(values.min()), int(values.max())  # compared as Python's integers, which do not wrap
    if low < limits.min or high > limits.max:
        wrong = np.zeros(values.shape, np.bool_)
        if low < limits.min:  # only then can NumPy compare with it
            wrong |= values < limits.min
        if high > limits.max:
            wrong |= values > limits.max
        raise _outside(where(int(wrong.argmax())), dtype)


def _outside(place: str, dtype: np.dtype[Any]) -> ProtocolError:
    limits = np.iinfo(dtype)
    return ProtocolError(f"{place} is outside {limits.min}..{limits.max}, the range of {DATATYPE_NAMES[dtype]}.")


def _integers(values: list[Any], dtype: np.dtype[Any], where: Where) -> NDArray[Any]:
    limits = np.iinfo(dtype)
    if set(map(type, values)) != {int} or min(values) < limits.min or max(values) > limits.max:
        index = next(i for i, value in enumerate(values) if type(value) is not int or not limits.min <= value <= limits.max)
        value = values[index]
        # A fast parser reads integers of more than 64 bits as floating point.
        if type(value) is int or (type(value) is float and (value <= -(2.0**63) or value >= 2.0**64)):
            raise _outside(where(index), dtype)
        raise _wrong_type(where(index), value, "an integer without a decimal point")
    return np.array(values, dtype)


def _floats(values: list[Any], dtype: np.dtype[Any], where: Where) -> NDArray[Any]:
    types = _check_types(values, _NUMBERS, where, "a number")
    if type(None) in types:  # two widely used clients write NaN as null
        values = [math.nan if value is None else value for value in values]
    try:
        array = np.array(values, np.float64)
    except OverflowError:
        raise ProtocolError("'data' holds an integer too large for FP64: send smaller values.") from None
    return _cast(array, dtype)


def _check_types(values: list[Any], wanted: set[type], where: Where, what: str) -> set[type]:
    types = set(map(type, values))  # exact types: bool is a subclass of int
    if not types <= wanted:
        index = next(i for i, value in enumerate(values) if type(value) not in wanted)
        raise _wrong_type(where(index), values[index], what)
    return types


def _wrong_type(place: str, value: Any, wanted: str) -> ProtocolError:
    return ProtocolError(f"{place} is {_JSON_TYPES.get(type(value), 'null')}: send {wanted}.")


def _split(raw: memoryview, count: int) -> NDArray[Any]:
    """`count` byte strings, each after its length as a little-endian u32."""
    items: list[bytes] = []
    at = 0
    while at < len(raw) and len(items) < count:
        if at + 4 > len(raw):
            break
        (size,) = struct.unpack_from("<I", raw, at)
        if at + 4 + size > len(raw):
            break
        items.append(bytes(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(raw) or len(items) != count:
        raise ProtocolError("The BYTES tensor is not a length and that many bytes for each value of its shape: make them agree.")
    return of_objects(items)

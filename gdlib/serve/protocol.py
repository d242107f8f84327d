"""The Open Inference Protocol v2 in JSON, as pure functions: request bytes -> array, array -> response dict.

Every model has one input, "input" [rows, in_features], and one output, "output" [rows, out_features]. Nothing here opens a file
or a socket, and nothing trusts the request: NumPy alone would turn 1.7 into the integer 1, take "12" for a number and fill ragged
rows with objects, so each value is checked before it becomes an array. The binary tensor extension is deliberately not here.

Source: Open Inference Protocol v2, "Inference Request JSON Object" and "Inference Response JSON Object".
"""

import json
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

INPUT_NAME = "input"
OUTPUT_NAME = "output"
DATATYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    **{f"INT{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
DATATYPE_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_JSON_TYPES: dict[type, str] = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


class ProtocolError(ValueError):
    """The request breaks the protocol; the text is one sentence written for the client."""


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, which must be UTF-8, hold no key twice and nest no deeper than the parser's stack.

    NaN and Infinity tokens are read, since clients send them; `decode_request` refuses them where it can name the place.
    Raises ProtocolError.
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ProtocolError("The body nests too deeply: send flat or row-by-row data.") from None
    except ValueError as error:  # bad UTF-8, bad JSON, a key twice, an integer of thousands of digits
        reason = str(error).partition(";")[0]  # what follows is advice to the server's programmer
        raise ProtocolError(f"The body is not valid JSON in UTF-8: {reason}.") from None
    request: dict[str, Any] = _checked(value, dict, "The body")
    return request


def decode_request(
    request: dict[str, Any], in_features: int, dtype: np.dtype[Any], feature_names: Sequence[str] | None = None
) -> tuple[NDArray[Any], str | None]:
    """(X [rows, in_features] of `dtype`, the request's id or None), from an inference request.

    `data` may be flat, row-major, or one array per row. Values are first read as the datatype that the request declares, then
    converted to `dtype`, so that JSON gives what the same tensor would give in binary. Raises ProtocolError naming the field, or
    the row and feature, that is wrong.
    """
    identifier = _optional(request, "id", str, "'id'") or None
    _optional(request, "parameters", dict, "The request's 'parameters'")
    _check_outputs(_optional(request, "outputs", list, "'outputs'"))
    inputs = _checked(request.get("inputs"), list, "'inputs'")
    if len(inputs) != 1:
        raise ProtocolError(f"The request has {len(inputs)} inputs: send exactly one, named '{INPUT_NAME}'.")
    tensor = _checked(inputs[0], dict, "'inputs[0]'")
    name = _checked(tensor.get("name"), str, "The input's 'name'")
    if name != INPUT_NAME:
        raise ProtocolError(f"The input is named {shorten(name)}: this model's only input is '{INPUT_NAME}'.")
    if "binary_data_size" in _optional(tensor, "parameters", dict, "The input's 'parameters'"):
        raise ProtocolError("The input uses the binary tensor extension, which is not supported: send its values as JSON in 'data'.")
    datatype = _checked(tensor.get("datatype"), str, "The input's 'datatype'")
    if datatype not in DATATYPES:
        raise ProtocolError(f"The input's datatype is {shorten(datatype)}: send one of {', '.join(DATATYPES)}.")
    rows = _rows(tensor.get("shape"), in_features)
    values = _flatten(_checked(tensor.get("data"), list, "The input's 'data'"), rows, in_features)

    def place(index: int) -> str:
        row, column = divmod(index, in_features)
        return f"Row {row}, feature {column if feature_names is None else shorten(feature_names[column])}"

    declared = DATATYPES[datatype]
    tensor_values = _integers(values, declared, place) if declared.kind in "iu" else _floats(values, declared, place)
    with np.errstate(over="ignore"):  # an overflow is reported by its place just below
        X = tensor_values.astype(dtype, copy=False).reshape(rows, in_features)
    if not np.isfinite(X).all():
        index = int(np.flatnonzero(~np.isfinite(X))[0])
        kind = "NaN or null" if np.isnan(X.flat[index]) else f"infinite, or too large for {DATATYPE_NAMES[dtype]}"
        raise ProtocolError(f"{place(index)} is {kind}: a model takes finite numbers only, so replace the value or leave the row out.")
    return X, identifier


def encode_response(name: str, version: str, output: NDArray[Any], identifier: str | None = None) -> dict[str, Any]:
    """The inference response that holds `output` [rows, out_features], flat and row-major; `identifier` is echoed.

    Raises ProtocolError when a value is not finite, which JSON cannot write.
    """
    finite = np.isfinite(output).all(axis=1)
    if not finite.all():
        raise ProtocolError(f"The output of row {int(np.argmin(finite))} is not finite, which JSON cannot hold: send smaller values.")
    values = output.ravel().tolist()
    tensor = {"name": OUTPUT_NAME, "datatype": DATATYPE_NAMES[output.dtype], "shape": list(output.shape), "data": values}
    echo = {} if identifier is None else {"id": identifier}
    return {"model_name": name, "model_version": version, **echo, "outputs": [tensor]}


def shorten(text: str) -> str:
    """`text` quoted, and cut where a client's text would swamp the error that names it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object holds the same key twice")
    return result


def _checked(value: Any, wanted: type, what: str) -> Any:
    # The value itself is not printed: it may be huge, or nest too deeply for repr.
    if type(value) is not wanted:
        raise ProtocolError(f"{what} is {_JSON_TYPES.get(type(value), 'missing or null')}: send {_JSON_TYPES[wanted]}.")
    return value


def _optional(owner: dict[str, Any], key: str, wanted: type, what: str) -> Any:
    value = owner.get(key)  # some clients write the fields that they do not use as null
    return wanted() if value is None else _checked(value, wanted, what)


def _check_outputs(outputs: list[Any]) -> None:
    for wanted in outputs:
        name = _checked(_checked(wanted, dict, "An entry of 'outputs'").get("name"), str, "An output's 'name'")
        if name != OUTPUT_NAME:
            raise ProtocolError(f"The request wants an output named {shorten(name)}: this model's only output is '{OUTPUT_NAME}'.")
        # A wish for binary data (the usual client's default) is met with JSON, which that client reads as well.
        _optional(wanted, "parameters", dict, "The output's 'parameters'")


def _rows(shape: Any, in_features: int) -> int:
    sizes = _checked(shape, list, "The input's 'shape'")
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes) or sizes[1] != in_features:
        raise ProtocolError(f"The input's shape is not [rows, {in_features}] with one row or more: send rows of {in_features} features.")
    rows: int = sizes[0]
    return rows


def _flatten(data: list[Any], rows: int, columns: int) -> list[Any]:
    # Errors do not print the sizes in 'shape', which may have thousands of digits.
    if data and type(data[0]) is list:
        if len(data) != rows:
            raise ProtocolError(f"'data' holds {len(data)} rows, and 'shape' promises another number: make them agree.")
        for row, values in enumerate(data):
            if type(values) is not list or len(values) != columns:
                raise ProtocolError(f"Row {row} of 'data' is not an array of {columns} numbers: send every row with {columns}.")
        return list(chain.from_iterable(data))
    if len(data) != rows * columns:
        raise ProtocolError(f"'data' holds {len(data)} values, and 'shape' promises another number: make them agree.")
    return data


def _integers(values: list[Any], declared: np.dtype[Any], place: Callable[[int], str]) -> NDArray[Any]:
    _check_types(values, {int}, place, "an integer without a decimal point")
    limits = np.iinfo(declared)
    if min(values) < limits.min or max(values) > limits.max:
        index = next(i for i, value in enumerate(values) if not limits.min <= value <= limits.max)
        raise ProtocolError(f"{place(index)} is outside {limits.min}..{limits.max}, the range of {DATATYPE_NAMES[declared]}.")
    return np.array(values, declared)


def _floats(values: list[Any], declared: np.dtype[Any], place: Callable[[int], str]) -> NDArray[Any]:
    types = _check_types(values, {int, float, type(None)}, place, "a number")
    if type(None) in types:  # two widely used clients write NaN as null
        values = [math.nan if value is None else value for value in values]
    try:
        array = np.array(values, np.float64)
    except OverflowError:
        raise ProtocolError("'data' holds an integer too large for FP64: send smaller values.") from None
    with np.errstate(over="ignore"):  # decode_request reports the infinity by its place
        return array.astype(declared, copy=False)


def _check_types(values: list[Any], wanted: set[type], place: Callable[[int], str], what: str) -> set[type]:
    types = set(map(type, values))  # exact types: bool is a subclass of int
    if not types <= wanted:
        index = next(i for i, value in enumerate(values) if type(value) not in wanted)
        raise ProtocolError(f"{place(index)} is {_JSON_TYPES.get(type(values[index]), 'null')}: send {what}.")
    return types

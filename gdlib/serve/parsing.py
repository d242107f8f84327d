"""JSON of clients: an exact parser that says what is wrong, and two fast ones for inference requests that are as they should be.

orjson is the quickest for short requests; simdjson puts the numbers of long ones straight into arrays. Whatever they do not take, the
exact parser reads again and judges. All give the same values for the same request.
"""

import json
import threading
from typing import Any

import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from gdlib.serve.tensors import DTYPES, ProtocolError, checked

SHORT = 2048  # bytes; from about 100 numbers on an object for each costs more than simdjson's handles
MAX_CONTAINERS = 2**21  # arrays, and objects twice: they take about 104 and 232 bytes, which only so many keep below 40 times the body
_KEPT = 2**20  # bytes; a parser's buffers are some 11 times the longest body that it has read
_MAX_DEPTH = 500  # arrays in a short body, and so its depth at most; the exact parser reaches about 900
_MAX_KEYS, _MAX_PARTS = 64, 10_000  # of one object, and objects and arrays beside `data`: simdjson's are slow, and looked up one by one
_KINDS = {"f": ("d", np.float64), "i": ("i", np.int64), "u": ("u", np.uint64)}  # of simdjson's buffers, by NumPy's kinds
_parsers = threading.local()  # a parser keeps its buffers from one request to the next


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, which must be UTF-8, hold no key twice and nest no deeper than the parser's stack.

    NaN and Infinity tokens are read, since clients send them; they are refused where the place can be named. Raises ProtocolError.
    """
    if len(body) > MAX_CONTAINERS and body.count(b"[") + 2 * body.count(b"{") > MAX_CONTAINERS:
        raise ProtocolError("The body is mostly brackets, which take too much memory: send flat data, or binary tensors.")
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ProtocolError("The body nests too deeply: send flat or row-by-row data.") from None
    except ValueError as error:  # bad UTF-8, bad JSON, a key twice, an integer of thousands of digits
        reason = str(error).partition(";")[0]  # what follows is advice to the server's programmer
        raise ProtocolError(f"The body is not valid JSON in UTF-8: {reason}.") from None
    request: dict[str, Any] = checked(value, dict, "The body")
    return request


def parse_request(body: bytes) -> dict[str, Any]:
    """The inference request in `body`, as `parse_json` gives it, but that `data` of numbers may be arrays. Raises ProtocolError."""
    request = _parse_fast(body)
    return parse_json(body) if request is None else request


def split_data(body: bytes) -> tuple[bytes, list[Any], bytes] | None:
    """(what stands before the only flat `data` of a short request, that array, what stands after it), or None if it is not so simple.

    The request is as valid as the one with an empty array there, and the array is that of the only key `data`: without a backslash around
    it there is no other way to write that key, and none to have its quotes within a string.
    """
    key = body.find(b'"data"')
    begin = body.find(b"[", key)
    end = body.find(b"]", begin) + 1
    if key < 0 or begin < 0 or end == 0 or body[key + 6 : begin].strip() != b":":
        return None
    before, after = body[:begin], body[end:]
    if b"\\" in before or b"\\" in after or b'"data"' in after:
        return None
    values = parse_array(body[begin:end])  # not if nested, or with a bracket in a string
    return None if values is None else (before, values, after)


def parse_array(text: bytes) -> list[Any] | None:
    """The JSON array in `text`; None for what the exact parser must look at."""
    try:
        values = orjson.loads(text)
    except ValueError:
        return None
    return values if type(values) is list else None


def _parse_fast(body: bytes) -> dict[str, Any] | None:
    # What an exception holds of the fast parser's memory is free again when the exact parser begins.
    try:
        return _parse_short(body) if len(body) < SHORT else _parse_long(body)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):  # no JSON, or not the usual request: NaN, null, ragged rows
        return None


def _parse_short(body: bytes) -> dict[str, Any]:
    if body.count(b"[") > _MAX_DEPTH:
        raise ValueError("the body may nest deeper than the exact parser allows")
    request: dict[str, Any] = orjson.loads(body)
    # orjson drops a key that comes twice. Colons in strings are rare, and then the exact parser counts.
    if _count_keys(request) != body.count(b":"):
        raise ValueError("an object holds the same key twice, or a string a colon")
    return request


def _count_keys(request: dict[str, Any]) -> int:
    """As many levels down as the usual request has."""
    keys = len(request)
    for value in request.values():
        for item in value if type(value) is list else (value,):
            if type(item) is dict:
                keys += len(item)
                for inner in item.values():
                    if type(inner) is dict:
                        keys += len(inner)
    return keys


def _parse_long(body: bytes) -> dict[str, Any]:
    if len(body) > _KEPT:
        parser = simdjson.Parser()
    else:
        try:
            parser = _parsers.parser
        except AttributeError:
            parser = _parsers.parser = simdjson.Parser()
    try:
        return _Long(parser.parse(body)).request(body.count(b"["))
    except RuntimeError:  # a huge integer, or an object of an earlier request lives on, and with it the parser's buffer
        _parsers.parser = simdjson.Parser()
        raise ValueError("the exact parser must look") from None


class _Long:
    """Reads a request from simdjson's objects. Raises ValueError or TypeError for all that needs the exact parser."""

    def __init__(self, document: Any) -> None:
        self._document = document
        self._arrays = 0  # opened so far: simdjson reads through brackets, and only their number tells that there are more
        self._parts = 0

    def request(self, brackets: int) -> dict[str, Any]:
        request = {key: self._value(value) for key, value in self._items(self._document) if key != "inputs"}
        self._arrays += 1
        request["inputs"] = [self._tensor(tensor) for tensor in self._document["inputs"]]
        if self._arrays != brackets:
            raise ValueError("brackets in a string, or arrays in an unusual place")
        return request

    def _tensor(self, item: Any) -> dict[str, Any]:
        dtype = DTYPES.get(item["datatype"])
        return {
            key: self._numbers(value, dtype.kind) if key == "data" and dtype is not None else self._value(value)
            for key, value in self._items(item)
        }

    def _numbers(self, data: Any, kind: str) -> NDArray[Any]:
        code, dtype = _KINDS[kind] if kind in _KINDS else _other(kind)
        rows = len(data)
        self._arrays += 1
        if rows and type(data[0]) is simdjson.Array:
            sizes = {len(row) for row in data}
            self._arrays += rows
            (columns,) = sizes  # ragged rows do not unpack
            shape: tuple[int, ...] = (rows, columns)
        else:
            shape = (rows,)
        return np.frombuffer(data.as_buffer(of_type=code), dtype).reshape(shape)

    def _value(self, value: Any) -> Any:
        kind = type(value)
        if kind is simdjson.Object:
            return {key: self._value(inner) for key, inner in self._items(value)}
        if kind is simdjson.Array:
            self._arrays += 1
            self._count_part()
            return [self._value(inner) for inner in value]
        return value

    def _items(self, item: Any) -> list[tuple[str, Any]]:
        keys = list(item.keys())
        self._count_part()
        # A key is looked up among all before it, and only as far as a NUL in it.
        if len(keys) > _MAX_KEYS or len(set(keys)) != len(keys) or "\0" in "".join(keys):
            raise ValueError("an object holds the same key twice, or unusual keys")
        return [(key, item[key]) for key in keys]

    def _count_part(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise ValueError("the body holds more than numbers")


def _other(kind: str) -> Any:
    raise ValueError(f"values of kind {kind} are no numbers")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object holds the same key twice")
    return result

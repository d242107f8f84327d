"""The requests of the fuzzer: models that echo their inputs, valid requests for them, and the ways in which these are mutated."""

import gzip
import io
import json
import random
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gdlib.serve.parsing import SHORT
from gdlib.serve.protocol import Signature
from gdlib.serve.tensors import BYTES, DTYPES, TensorSpec

FEATURES = ["age", "a:b[c", "é"]


class Echo:
    """A model whose outputs are its inputs, so that the way there and back can be checked value by value."""

    platform = "echo"
    parameters: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, inputs: tuple[TensorSpec, ...], **more: Any) -> None:
        self.signature = Signature(inputs, inputs, **more)

    def predict(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return dict(arrays)


MODELS = {
    "named": Echo((TensorSpec("input", "FP64", (-1, 3)),), feature_names=FEATURES),
    "plain": Echo((TensorSpec("input", "FP32", (-1, 2)),)),
    "whole": Echo((TensorSpec("input", "INT8", (-1, 2)),)),
    "half": Echo((TensorSpec("input", "FP16", (-1, 2)),)),
    "text": Echo((TensorSpec("input", BYTES, (-1,)),)),
    "many": Echo(
        (TensorSpec("x", "FP32", (-1, 2, 1)), TensorSpec("i", "UINT64", (-1,)), TensorSpec("b", "BOOL", (2,)), TensorSpec("s", "FP64", ())),
    ),
}


class Case(NamedTuple):
    """A request: JSON, what follows it, and what the WSGI environment says of it."""

    model: str
    json: bytes
    tail: bytes
    environ: dict[str, Any]  # overrides; None removes
    pack: str | None = None  # how the body is compressed


def corpus() -> list[Case]:
    """Valid requests of every kind: JSON, binary and mixed, whole and by feature, short and long."""
    made: list[Case] = []

    def add(model: str, inputs: list[tuple[str, str, Any]], binary: int = 0, **more: Any) -> None:
        described, tail = [], b""
        for position, (name, datatype, values) in enumerate(inputs):
            tensor: dict[str, Any] = {"name": name, "shape": list(np.shape(values)), "datatype": datatype}
            if binary >> position & 1:
                raw = _raw(values, datatype)
                tensor["parameters"] = {"binary_data_size": len(raw)}
                tail += raw
            else:
                tensor["data"] = np.array(values, object).ravel().tolist() if position % 2 or not tensor["shape"] else values
            described.append(tensor)
        made.append(Case(model, json.dumps({"inputs": described, **more}).encode(), tail, {}))

    for binary in (0, 1):
        for rows in (1, 2, 120):
            add("named", [("input", "FP64", [[1.5, 2, 3]] * rows)], binary, id="a:[")
            add("plain", [("input", "FP32", [[0.1, -2e10]] * rows)], binary, parameters={"binary_data_output": bool(binary)})
            add(
                "whole", [("input", "INT8", [[-128, 127]] * rows)], binary, outputs=[{"name": "input", "parameters": {"binary_data": True}}]
            )
            add("text", [("input", BYTES, ["é", "", "a:[{"] * rows)], binary)
        add("whole", [("input", "INT64", [[5, 6], [7, 8]])], binary)
        add("plain", [("input", "BF16", [[1, 2]])], 1, outputs=[])
        add("half", [("input", "FP32", [[1, None], [3, 4]])] if not binary else [("input", "FP16", [[1, 2]])], binary)
        made[-1] = made[-1]._replace(json=made[-1].json[:-1] + b',"parameters":{"binary_data_output":true}}')
    for binary in range(8):
        features = [(FEATURES[0], "FP64", [1, 2]), (FEATURES[1], "INT8", [[3], [4]]), (FEATURES[2], "FP32", [5.5, 6])]
        add("named", features[binary % 3 :] + features[: binary % 3], binary)
    for binary in range(16):
        inputs = [("x", "FP32", [[[1], [2.5]]]), ("i", "UINT64", [0, 2**64 - 1, 5]), ("b", "BOOL", [True, False]), ("s", "FP64", 7.5)]
        chosen = [{"name": name, "parameters": {"binary_data": bool(binary >> at & 1)}} for at, name in enumerate("xibs")]
        add("many", inputs[binary % 4 :] + inputs[: binary % 4], binary, outputs=chosen[: binary % 5])
    return made


def _raw(values: Any, datatype: str) -> bytes:
    if datatype == BYTES:
        return b"".join(struct.pack("<I", len(item.encode())) + item.encode() for item in values)
    if datatype == "BF16":
        return (np.array(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return np.array(values, DTYPES[datatype]).tobytes()


NUMBERS = [0, -0.0, 1, -1, 1.7, 127, 128, -129, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 2**40, 10**30, 1e39, 1e308, 5e-324]
VALUES = [
    *NUMBERS,
    float("nan"),
    float("inf"),
    None,
    True,
    False,
    "",
    "12",
    "input",
    "\ud800",
    "a" * 70,
    "\0",
    [],
    {},
    [[]],
    [1],
    [[1], [2]],
]
VALUES += ["BYTES", "FP16", "BF16", "FP64", "BOOL", "UINT8", {"binary_data_size": 8}, {"classification": 1}, {"shared_memory_region": "r"}]
KEYS = [
    "name",
    "shape",
    "datatype",
    "data",
    "parameters",
    "inputs",
    "outputs",
    "id",
    "binary_data_size",
    "binary_data",
    "binary_data_output",
]
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[{}\[\],:]|[a-zA-Z]+')
TOKENS = [json.dumps(value).encode() for value in [*VALUES, *KEYS, *FEATURES]] + [b"{", b"}", b"[", b"]", b",", b":", b'"', b"[[", b"]]"]
TOKENS += [
    b"1e400",
    b"-1e400",
    b"9" * 400,
    b"01",
    b"1.",
    b"nan",
    b'"\\u0000"',
    b'"\\x"',
    b"\xff",
    b"\0",
    b'{"a":1,"a":2}',
    b" ",
    b"[" * 1100,
]
LENGTHS = ["", "0", "1", "-1", "+1", " 1", "1_0", "1.5", "x", "8388609", "67108865", "9" * 19, "9" * 30, "٣", None]
ENCODINGS = ["gzip", "deflate", "GZIP", "identity", "br", "gzip, gzip", "", "x" * 100]
ACCEPTED = ["gzip", "deflate", "gzip;q=0", "deflate;q=0.5, gzip;q=0", "*", "", ";;,q=", "identity"]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda body: gzip.compress(body, 1, mtime=0),
    "deflate": lambda body: zlib.compress(body, 1),
}


class Mutator:
    """Makes one request out of another, or of two."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._ways = [self._bytes, self._tokens, self._structure, self._structure, self._numbers, self._cut, self._tail, self._splice]
        self._ways += [self._headers, self._length, self._pack, self._longer]

    def mutate(self, case: Case, other: Case) -> Case:
        count = self._chance.choice((1, 1, 1, 2, 2, 3))
        for _ in range(count):
            case = self._chance.choice(self._ways)(case, other)
        return case

    def _bytes(self, case: Case, other: Case) -> Case:
        return case._replace(json=self._scramble(case.json))

    def _tail(self, case: Case, other: Case) -> Case:
        tail = self._scramble(case.tail) if self._chance.random() < 0.6 else case.tail + self._chance.randbytes(self._chance.randrange(9))
        return case._replace(tail=tail)

    def _scramble(self, text: bytes) -> bytes:
        at = self._chance.randrange(len(text) + 1)
        new = self._chance.randbytes(self._chance.randrange(4)) if self._chance.random() < 0.7 else self._chance.choice(TOKENS)
        return text[:at] + new + text[at + self._chance.randrange(4) :]

    def _token(self, case: Case, pattern: re.Pattern[bytes]) -> tuple[int, int]:
        start = self._chance.randrange(min(len(case.json), 400) + 1)  # near the front, where most of the structure is
        found = pattern.search(case.json, start) or pattern.search(case.json)
        return found.span() if found else (start, start)

    def _tokens(self, case: Case, other: Case) -> Case:
        start, end = self._token(case, TOKEN)
        if self._chance.random() < 0.5:
            new = self._chance.choice(TOKENS)
        else:
            begin, stop = self._token(other, TOKEN)
            new = other.json[begin:stop]
        return case._replace(json=case.json[:start] + new + case.json[end if self._chance.random() < 0.8 else start :])

    def _numbers(self, case: Case, other: Case) -> Case:
        start, end = self._token(case, _NUMBER)
        number = self._chance.choice(NUMBERS) if self._chance.random() < 0.7 else self._chance.randrange(-300, 300)
        return case._replace(json=case.json[:start] + str(number).encode() + case.json[end:])

    def _structure(self, case: Case, other: Case) -> Case:
        try:
            request, parts = json.loads(case.json), json.loads(other.json)
        except (ValueError, RecursionError):
            return self._tokens(case, other)
        owner, key = self._place(request)
        if owner is None:
            return case
        roll = self._chance.random()
        if roll < 0.2:
            del owner[key]
        elif roll < 0.5:
            owner[key] = self._chance.choice(VALUES)
        elif roll < 0.7:
            donor, at = self._place(parts)
            owner[key] = None if donor is None else donor[at]
        elif type(owner) is list:
            owner.insert(key, owner[self._chance.randrange(len(owner))])
        else:
            owner[self._chance.choice(KEYS)] = owner[key] if self._chance.random() < 0.5 else self._chance.choice(VALUES)
        try:
            return case._replace(json=json.dumps(request, ensure_ascii=self._chance.random() < 0.5).encode("utf-8", "surrogatepass"))
        except RecursionError:
            return case

    def _place(self, request: Any) -> tuple[Any, Any]:
        owner, key = None, None
        while type(request) in (dict, list) and request and (owner is None or self._chance.random() < 0.75):
            owner, key = (
                request,
                self._chance.choice(list(request)) if type(request) is dict else self._chance.randrange(min(len(request), 8)),
            )
            request = owner[key]
        return owner, key

    def _cut(self, case: Case, other: Case) -> Case:
        if self._chance.random() < 0.5:
            return case._replace(json=case.json[: self._chance.randrange(len(case.json) + 1)])
        return case._replace(tail=case.tail[self._chance.randrange(len(case.tail) + 1) :])

    def _splice(self, case: Case, other: Case) -> Case:
        cut, start = self._token(case, TOKEN)[0], self._token(other, TOKEN)[0]
        return case._replace(json=case.json[:cut] + other.json[start:], tail=self._chance.choice((case.tail, other.tail)))

    def _headers(self, case: Case, other: Case) -> Case:
        header, values = self._chance.choice(_HEADERS)
        return case._replace(environ=case.environ | {header: self._chance.choice(values)})

    def _length(self, case: Case, other: Case) -> Case:
        length = str(max(len(case.json) + self._chance.randrange(-2, 3), 0))
        return case._replace(environ=case.environ | {"HTTP_INFERENCE_HEADER_CONTENT_LENGTH": length})

    def _pack(self, case: Case, other: Case) -> Case:
        pack = self._chance.choice(list(PACK))
        return case._replace(pack=pack, environ=case.environ | {"HTTP_CONTENT_ENCODING": pack})

    def _longer(self, case: Case, other: Case) -> Case:
        """Long enough for the other fast parser."""
        at = self._token(case, _PUNCTUATION)[1]
        return case._replace(json=case.json[:at] + b" " * SHORT + case.json[at:]) if len(case.json) < 4 * SHORT else case


_NUMBER, _PUNCTUATION = re.compile(rb"-?[0-9][0-9.eE+-]*"), re.compile(rb"[{}\[\],:]")
_HEADERS: list[tuple[str, list[Any]]] = [
    ("CONTENT_LENGTH", LENGTHS),
    ("HTTP_INFERENCE_HEADER_CONTENT_LENGTH", LENGTHS),
    ("HTTP_CONTENT_ENCODING", ENCODINGS),
    ("HTTP_ACCEPT_ENCODING", ACCEPTED),
    ("wsgi.input_terminated", [True, False]),
]
_BASE = {"REQUEST_METHOD": "POST", "HTTP_HOST": "localhost", "REMOTE_ADDR": "127.0.0.1", "wsgi.input_terminated": False}


def environ_of(case: Case) -> dict[str, Any]:
    body = case.json + case.tail
    if case.pack is not None:
        body = PACK[case.pack](body)
        if len(body) % 7 == 0:  # now and then one that is cut, or not alone
            body = body[:-1] if len(body) % 2 else body + b"\0"
    environ = _BASE | {"PATH_INFO": f"/v2/models/{case.model}/infer", "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
    if case.tail:
        environ["HTTP_INFERENCE_HEADER_CONTENT_LENGTH"] = str(len(case.json))
    environ |= case.environ
    return {key: value for key, value in environ.items() if value is not None}

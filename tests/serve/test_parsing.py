"""JSON of clients: what is refused, and that the fast parsers give what the exact one gives, for every body."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gdlib.serve import parsing
from gdlib.serve.parsing import MAX_CONTAINERS, SHORT, parse_json, parse_request
from gdlib.serve.protocol import InferRequest, Signature, decode, decode_json
from gdlib.serve.tensors import BYTES, ProtocolError, TensorSpec

MIB = 2**20
SPECS = {
    "FP64": TensorSpec("input", "FP64", (-1, 3)),
    "FP32": TensorSpec("input", "FP32", (-1, 3)),
    "INT64": TensorSpec("input", "INT64", (-1, 3)),
    "INT8": TensorSpec("input", "INT8", (-1, 3)),
    "UINT64": TensorSpec("input", "UINT64", (-1, 3)),
    "BOOL": TensorSpec("input", "BOOL", (-1, 3)),
    BYTES: TensorSpec("input", BYTES, (-1, 3)),
    "flat": TensorSpec("input", "FP64", (-1,)),
    "cube": TensorSpec("input", "FP64", (-1, 3, 1)),
}
OUTPUT = (TensorSpec("output", "FP64", (-1, 1)),)
SIGNATURES = [Signature((spec,), OUTPUT) for spec in SPECS.values()]
SIGNATURES.append(Signature((SPECS["FP64"],), OUTPUT, ["a", "b:c", "d[0]"]))
SIGNATURES.append(Signature((SPECS["FP64"], TensorSpec("mask", "BOOL", ())), OUTPUT))
PARSERS = (parse_json, parse_request)


def body_of(data: str = "[1,2,3,4,5,6]", shape: str = "[2,3]", datatype: str = "FP64", tensor: str = "", request: str = "") -> bytes:
    return f'{{"inputs":[{{"name":"input","shape":{shape},"datatype":"{datatype}","data":{data}{tensor}}}]{request}}}'.encode()


def longer(body: bytes) -> bytes:
    """The same request, long enough for the other fast parser."""
    return body + b" " * SHORT


def exactly(body: bytes, signature: Signature) -> InferRequest:
    return decode(parse_json(body), memoryview(b""), signature)


def fast(body: bytes, signature: Signature) -> InferRequest:
    return decode(parse_request(body), memoryview(b""), signature)


def outcome(read: Callable[[bytes, Signature], InferRequest], body: bytes, signature: Signature) -> Any:
    """All that can be told of a request: its arrays to the bit, or the words that refuse it."""
    try:
        request = read(body, signature)
    except ProtocolError as error:
        return type(error), str(error)
    arrays = {name: (a.dtype, a.shape, a.tolist() if a.dtype == object else a.tobytes()) for name, a in request.arrays.items()}
    return arrays, request.rows, request.outputs, request.identifier


def agree(body: bytes) -> None:
    for whole in (body, longer(body)):
        for signature in SIGNATURES:
            wanted = outcome(exactly, whole, signature)
            assert outcome(fast, whole, signature) == wanted
            for _ in range(2):  # planned, and remembered
                assert outcome(decode_json, whole, signature) == wanted


def takes_fast(body: bytes) -> bool:
    return parsing._parse_fast(body) is not None


class TestParseJson:
    def test_reads_an_object(self) -> None:
        for parse in PARSERS:
            assert parse('{"a": [1, 2.5, null, "é"], "inputs": []}'.encode()) == {"a": [1, 2.5, None, "é"], "inputs": []}

    @pytest.mark.parametrize("parse", PARSERS)
    def test_reads_the_tokens_that_clients_send(self, parse: Any) -> None:
        assert str(parse(b'{"a": [NaN, Infinity, -Infinity, 1e400]}')["a"]) == "[nan, inf, -inf, inf]"

    @pytest.mark.parametrize("parse", PARSERS)
    @pytest.mark.parametrize("padding", [b"", b" " * SHORT])
    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b'{"a": 1} x', "not valid JSON"),
            (b'{"a": 1}\0', "not valid JSON"),
            (b'{"a": 1}{}', "not valid JSON"),
            (b"{'a': 1}", "not valid JSON"),
            (b'{"a": 1,}', "not valid JSON"),
            (b'{"a": [1,]}', "not valid JSON"),
            (b'{"a": 01}', "not valid JSON"),
            (b'{"a": "\t"}', "control character"),
            (b'{"a": "\\x"}', "not valid JSON"),
            (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
            (b'{"a": "\xff"}', "UTF-8"),
            (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
            (b'{"a": 1, "a": 2}', "same key twice"),
            (b'{"a": 1, "\\u0061": 2}', "same key twice"),
            (b'{"a": {"b": 1, "b": 1}}', "same key twice"),
            (b'{"a": [{"b": [[{"c": 1, "c": 1}]]}]}', "same key twice"),
            (b'{"data": [{"c": 1, "c": 1}]}', "same key twice"),
            (b'{"inputs": [{"name": "a", "name": "a"}]}', "same key twice"),
            pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "digits", id="5000 digits"),
            pytest.param(b'{"a": ' + b"[" * 1020 + b"]" * 1020, "nests too deeply", id="1020 arrays"),
            pytest.param(b'{"a": ' + b"[" * 100_000, "nests too deeply", id="deep arrays"),
            pytest.param(b'{"a": ' * 100_000, "nests too deeply", id="deep objects"),
            (b"[]", "The body is an array: send an object"),
            (b"null", "The body is missing or null"),
            (b"true", "The body is a boolean"),
            (b"1", "The body is a number"),
            (b'"a"', "The body is a string"),
        ],
    )
    def test_refuses(self, parse: Any, body: bytes, padding: bytes, words: str) -> None:
        with pytest.raises(ProtocolError, match=words) as caught:
            parse(body + padding)
        assert len(str(caught.value)) < 200
        assert "sys." not in str(caught.value)  # nothing about the interpreter

    def test_nests_below_the_limit(self) -> None:
        for nest in (b"[" * 300 + b"]" * 300, b'{"b":' * 300 + b"0" + b"}" * 300):
            assert parse_request(b'{"a":' + nest + b"}") == parse_json(b'{"a":' + nest + b"}")


NUMBERS = ["0", "-0", "-0.0", "1", "1.0", "1.7", "1e2", "1E+2", "1e-400", "5e-324", "1e400", "-1e400", "NaN", "-Infinity", "null"]
NUMBERS += ["true", '"12"', "[1]", "{}", "[]", '{"a":[1]}', "127", "128", "-128", "-129", "255", "256", "9007199254740993"]
NUMBERS += [str(sign * 2**bits + more) for bits in (31, 63, 64, 70) for sign in (-1, 1) for more in (-1025, -1, 0, 1, 1025)]
NUMBERS += ["1e19", "-1e19", "2e19", "1" + "0" * 400, "0." + "1" * 800, "1.7976931348623159e308", "2.2250738585072011e-308"]
DATA_FIELDS = [
    *("[1,2,3,4,5,6]", "[[1,2,3],[4,5,6]]", "[[1],[2],[3],[4],[5],[6]]", "[[[1],[2],[3]],[[4],[5],[6]]]", "[[1,2,3,4,5,6]]"),
    *("[1,[2,3],[],4,5,6]", "[[1,2,3],4]", '[[1,2,3],"abc"]', '[[1,2,3],{"a":1,"b":2,"c":3}]', "[[1,2,3],[4,5]]", "[[1,2,[3]],[4,5,6]]"),
    *("[]", "[[],[]]", "[[]]", "{}", '"[1]"', "5", "[[[[[[1]]]]]]"),
]
MORE_FIELDS = [
    *('"id":"a:b[c{d"', '"id":"\\ud800"', '"id":"\\u0000"', '"id":1', '"id":"a","id":"a"', '"inputs":[]', '"outputs":[{"name":"output"}]'),
    *('"x":[[1],[{}]]', '"x":{"a:":[]}', '"x":[{"a":1,"a":1}]', '"x":"' + "[" * 600 + '"', '"a":1,"\\u0061":1', '"shape":[6]', '"data":[]'),
    '"parameters":{"binary_data_output":true,"a[":["]"]}',
    '"parameters":{"binary_data_output":true,"binary_data_output\\u0000":false}',
]


class TestTheSameForAllParsers:
    @pytest.mark.parametrize("datatype", ["FP64", "FP32", "FP16", "INT64", "INT8", "UINT64", "UINT8", "BOOL", BYTES, "FP12"])
    @pytest.mark.parametrize("value", NUMBERS)
    def test_values(self, value: str, datatype: str) -> None:
        agree(body_of(f"[1,{value},3,{value},5,300]", datatype=datatype))
        agree(body_of(f"[[1,2,{value}],[4,1.5,{value}]]", datatype=datatype))

    @pytest.mark.parametrize("shape", ["[2,3]", "[6]", "[6,1]", "[1,6]", "[2,3,1]", "[3,2]", "[]", "[18446744073709551616,3]", "[2.0,3]"])
    @pytest.mark.parametrize("data", DATA_FIELDS)
    def test_shapes(self, data: str, shape: str) -> None:
        for datatype in ("FP64", "INT8", BYTES):
            agree(body_of(data, shape, datatype))

    @pytest.mark.parametrize("more", MORE_FIELDS)
    def test_other_fields(self, more: str) -> None:
        agree(body_of(request="," + more))
        agree(body_of(tensor="," + more))
        agree(body_of(tensor=',"parameters":{' + more + "}"))

    @pytest.mark.parametrize("size", ["0", "48", "true", "-1", "1.0", "null", "9223372036854775808", "18446744073709551616", "1e30"])
    def test_binary_sizes(self, size: str) -> None:
        agree(body_of("null", tensor=f',"parameters":{{"binary_data_size":{size}}}'))
        agree(body_of(tensor=f',"parameters":{{"binary_data_size":{size}}}'))

    def test_the_usual_requests_take_the_fast_way(self) -> None:
        """Else this would compare the exact parser with itself."""
        usual = [body_of(), body_of("[[1,2,3],[4,5,6]]"), body_of(datatype="INT8"), body_of(datatype="UINT64", tensor=',"parameters":{}')]
        usual.append(body_of(request=',"id":"x","outputs":[{"name":"output","parameters":{"binary_data":true}}]'))
        for body in usual:
            assert takes_fast(body)
            assert takes_fast(longer(body))
            assert isinstance(parse_request(longer(body))["inputs"][0]["data"], np.ndarray)

    def test_many_features_take_the_fast_way(self) -> None:
        inputs = [{"name": f"f{i}", "shape": [1, 1], "datatype": "FP64", "data": [i]} for i in range(1000)]
        assert takes_fast(json.dumps({"inputs": inputs}).encode())

    def test_threads_do_not_share_a_parser(self) -> None:
        bodies = [body_of(str([[i, i, i]] * 200), "[200,3]") for i in range(4)]
        wrong = []

        def work(i: int) -> None:
            for _ in range(100):
                data = parse_request(bodies[i])["inputs"][0]["data"]
                if data.shape != (200, 3) or (data != i).any():
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_an_array_outlives_the_next_request(self) -> None:
        first = parse_request(longer(body_of()))["inputs"][0]["data"]
        parse_request(longer(body_of("[9,9,9,9,9,9]")))
        assert first.tolist() == [1, 2, 3, 4, 5, 6]


TEXT = st.text(alphabet='ab:[{"\\,}] é\0\ud800', max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
VALUES = st.one_of(
    st.lists(st.floats(), min_size=6, max_size=6),
    st.lists(st.integers(-130, 130), min_size=6, max_size=6),
    st.lists(st.integers(-(2**65), 2**65) | st.floats() | st.none(), min_size=6, max_size=6),
    st.lists(TEXT | st.booleans(), min_size=6, max_size=6),
    st.lists(st.lists(st.integers(-5, 5) | st.floats(), min_size=2, max_size=3), min_size=2, max_size=3),
)
TENSORS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["input", "input", "input", "a", "b:c", "d[0]", "mask"]),
        "shape": st.sampled_from([[2, 3], [2, 3], [6], [6, 1], [2, 3, 1], []]) | st.lists(st.integers(-1, 6), max_size=3),
        "datatype": st.sampled_from(["FP64", "FP32", "INT64", "INT8", "UINT64", "BOOL", BYTES, "BF16"]),
        "data": VALUES | JSON,
    },
    optional={"parameters": st.dictionaries(TEXT, JSON, max_size=2), "x": JSON},
)
REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, min_size=1, max_size=3)},
    optional={"id": TEXT | JSON, "outputs": JSON, "parameters": st.dictionaries(TEXT, JSON, max_size=2), "x": JSON},
)


@st.composite
def mutated(draw: Any) -> bytes:
    """A request as text, perhaps with some characters cut, doubled or replaced."""
    text = json.dumps(draw(REQUESTS), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 3))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 4))
        piece = draw(st.binary(max_size=3) | st.sampled_from(list(b'{}[]:,"\\0-.eE')).map(lambda c: bytes([c])))
        text = text[:at] + piece + text[at + length :]
    return text


class TestNoBodyDividesThem:
    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(body=mutated())
    @example(body=body_of())
    @example(body=body_of("[[1],[2],[3],[4],[5],[6]]", "[6]"))
    @example(body=body_of("[300,400,-500]", "[1,3]", "INT8"))
    def test_all_agree(self, body: bytes) -> None:
        agree(body)

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(body=st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789eE+-.aNulIfinty\\ ').map(str.encode))
    def test_no_json_at_all(self, body: bytes) -> None:
        agree(body)


def fill(unit: bytes, prefix: bytes = b'{"x":[', size: int = 8 * MIB) -> bytes:
    """A body full of `unit` in an array, and the brackets that close it."""
    closing = b"]}]}" if b"inputs" in prefix else b"]}"
    return prefix + b",".join([unit] * ((size - len(prefix) - len(closing) + 1) // (len(unit) + 1))) + closing


DATA = b'{"inputs":[{"name":"input","shape":[9,3],"datatype":"FP64","data":['
HEAVY = {
    "lists": lambda: fill(b"[]"),
    "lists of one": lambda: fill(b"[0]"),
    "nests": lambda: fill(b"[" * 30 + b"]" * 30),
    "deep nests": lambda: fill(b"[" * 800 + b"]" * 800),
    "nests up to the limit": lambda: fill(b"[" * 30 + b"]" * 30 + b",1e1" * 15),
    "objects": lambda: fill(b'{"":0}'),
    "nested objects": lambda: fill(b'{"":' * 300 + b"0" + b"}" * 300),
    "objects up to the limit": lambda: fill(b'{"":{"":1}},257'),
    "one object": lambda: b"{" + b",".join(b'"%x":0' % i for i in range(800_000)) + b"}",
    "numbers": lambda: fill(b"1", DATA),
    "rows": lambda: fill(b"[1,2,3]", DATA),
    "rows of one": lambda: fill(b"[1]", DATA),
    "nulls": lambda: fill(b"null", DATA),
    "texts": lambda: fill('"éé"'.encode(), DATA.replace(b"FP64", b"BYTES")),
    "inputs": lambda: b'{"inputs":[' + b",".join(b'{"name":"%x"}' % i for i in range(450_000)) + b"]}",
}
MEASURE = """
import sys
from gdlib.serve.parsing import parse_request
from gdlib.serve.protocol import Signature, decode
from gdlib.serve.tensors import ProtocolError, TensorSpec

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

body = sys.stdin.buffer.read()
signature = Signature((TensorSpec("input", "FP64", (-1, 3)),), ())
before = memory("VmRSS")
try:
    decode(parse_request(body), memoryview(b""), signature)
except ProtocolError:
    pass
print((memory("VmHWM") - before) / len(body), (memory("VmRSS") - before) / len(body))
"""


class TestMemory:
    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="measures memory through /proc")
    @pytest.mark.parametrize("make", HEAVY.values(), ids=HEAVY)
    def test_a_large_body_takes_at_most_40_times_its_size(self, make: Callable[[], bytes]) -> None:
        body = make()
        measured = subprocess.run([sys.executable, "-c", MEASURE], input=body, capture_output=True, check=True).stdout
        peak, kept = map(float, measured.split())
        assert peak < 40
        assert kept < 8  # what the allocators hold back; a parser's buffers would be 11 more

    def test_brackets_are_counted_before_they_are_read(self) -> None:
        for body in (
            b'{"x":[' + b"[]," * (MAX_CONTAINERS // 2) + b"[" * (MAX_CONTAINERS // 2),
            b"{" * (MAX_CONTAINERS // 2 + 1) + b"[" * MIB,
        ):
            for parse in PARSERS:
                with pytest.raises(ProtocolError, match="The body is mostly brackets"):
                    parse(body)

    def test_rows_of_one_value_are_not_too_many_brackets(self) -> None:
        rows = 2**16
        body = fill(b"[1]", DATA.replace(b"[9,3]", b"[%d,1]" % rows), size=4 * rows + 75)
        assert parse_request(body)["inputs"][0]["data"].shape == (rows, 1)
        assert 8 * MIB // 4 == MAX_CONTAINERS  # [1], is four bytes

"""Inference requests: one input or several, in JSON and binary, whole or by feature."""

import math
import struct
from typing import Any

import numpy as np
import pytest

from gdlib.serve.protocol import InferRequest, Signature, decode, places
from gdlib.serve.tensors import BF16, BYTES, NUMERIC, ProtocolError, TensorSpec, check_finite

FEATURES = ["age", "size", "a:b[c"]
ONE = Signature((TensorSpec("input", "FP64", (-1, 3)),), (TensorSpec("output", "FP64", (-1, 1)),))
NAMED = Signature(ONE.inputs, ONE.outputs, FEATURES)
TWO = Signature(
    (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("flag", "BOOL", (-1,)), TensorSpec("word", BYTES, ())),
    (TensorSpec("y", "FP32", (-1,)), TensorSpec("z", BYTES, (-1,))),
)
NAN, INF = math.nan, math.inf


def tensor(name: str = "input", shape: Any = (2, 3), datatype: Any = "FP64", data: Any = None, **parameters: Any) -> dict[str, Any]:
    """A tensor of a request; one without data is binary."""
    described = {"name": name, "shape": list(shape), "datatype": datatype}
    if data is not None:
        described["data"] = data
    return described | ({"parameters": parameters} if parameters else {})


def request(data: Any = (1, 2, 3, 4, 5, 6), **more: Any) -> dict[str, Any]:
    return {"inputs": [tensor(data=list(data))], **more}


def read(request: dict[str, Any], tail: bytes = b"", signature: Signature = ONE, *, finite: bool = True) -> InferRequest:
    """The request as a gdlib model has it, which takes `finite` numbers only, and says where another one is."""
    decoded = decode(request, memoryview(tail), signature)
    for spec in signature.inputs:
        array = decoded.arrays[spec.name]
        if finite and signature is not TWO and array.dtype.kind == "f":
            check_finite(array, places(spec, signature.feature_names))
    return decoded


def split(*parts: tuple[dict[str, Any], bytes | None]) -> tuple[dict[str, Any], bytes]:
    """A request and its tail, from tensors and the raw bytes of those in binary."""
    inputs, tail = [], b""
    for described, raw in parts:
        if raw is not None:
            described = described | {"parameters": {"binary_data_size": len(raw)}}
            tail += raw
        inputs.append(described)
    return {"inputs": inputs}, tail


class TestOneInput:
    @pytest.mark.parametrize("datatype", [name for name in NUMERIC if name not in ("FP16",)])
    @pytest.mark.parametrize("wanted", ["FP32", "FP64"])
    def test_json_and_binary_give_the_same(self, datatype: str, wanted: str) -> None:
        signature = Signature((TensorSpec("input", wanted, (-1, 3)),), ONE.outputs)
        values = (np.arange(6).reshape(2, 3) % 2).astype(NUMERIC[datatype])
        in_json = read({"inputs": [tensor(datatype=datatype, data=values.tolist())]}, signature=signature)
        in_binary = read(*split((tensor(datatype=datatype), values.tobytes())), signature)
        for given in (in_json, in_binary):
            assert given.arrays["input"].dtype == NUMERIC[wanted]
            np.testing.assert_array_equal(given.arrays["input"], values)
        assert in_json[1:] == in_binary[1:] == (2, (("output", False),), None)

    @pytest.mark.parametrize(("datatype", "raw"), [("FP16", b"\x00\x3c\x00\xc0"), (BF16, b"\x80\x3f\x00\xc0")])
    def test_half_precision_in_binary(self, datatype: str, raw: bytes) -> None:
        X = read(*split((tensor(shape=(2, 3), datatype=datatype), raw * 3))).arrays["input"]
        assert X.dtype == np.float64
        assert X.ravel().tolist() == [1, -2] * 3

    def test_values_are_read_as_the_declared_datatype_first(self) -> None:
        X = read({"inputs": [tensor(shape=(1, 3), datatype="FP32", data=[0.1] * 3)]}).arrays["input"]
        np.testing.assert_array_equal(X, np.full((1, 3), np.float32(0.1), np.float64))

    @pytest.mark.parametrize(("given", "wanted"), [("FP32", "FP64"), ("FP64", "FP32"), ("FP32", "FP32")])
    def test_overflow_of_either_type_is_named(self, given: str, wanted: str) -> None:
        signature = Signature((TensorSpec("input", wanted, (-1, 3)),), NAMED.outputs, FEATURES)
        with pytest.raises(ProtocolError, match=f"^Row 0, feature 'size' is infinite, or too large for {wanted}"):
            read({"inputs": [tensor(shape=(1, 3), datatype=given, data=[1, 1e39, 3])]}, signature=signature)

    def test_a_tensor_that_would_grow_too_far(self) -> None:
        rows = 2**27 // 8 // 3 + 1
        raw = bytes(3 * rows)
        with pytest.raises(ProtocolError, match="The input takes more than 134217728 bytes as FP64: send fewer rows"):
            read(*split((tensor(shape=(rows, 3), datatype="INT8"), raw)))

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_what_a_model_does_not_take(self, value: float) -> None:
        X = np.array([[1, 2, 3], [4, value, 6]])
        for sent in (split((tensor(), X.tobytes())), ({"inputs": [tensor(data=X.tolist())]}, b"")):
            with pytest.raises(ProtocolError, match=r"^Row 1, feature 1 is (NaN or null|infinite).*: a model takes finite numbers only"):
                read(*sent)
            np.testing.assert_array_equal(read(*sent, finite=False).arrays["input"], X)

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ([1, 2, "3", 4, 5, 6], "Row 0, feature 2 is a string"),
            ([1, 2, 3, True, 5, 6], "Row 1, feature 0 is a boolean"),
            ([1, 2, 3, 4, None, 6], "Row 1, feature 1 is NaN or null"),
            ([[1, 2, 3], [4, 5, []]], "Row 1, feature 2 is an array"),
        ],
    )
    def test_errors_name_row_and_feature(self, data: Any, words: str) -> None:
        with pytest.raises(ProtocolError, match=f"^{words}"):
            read(request(data))
        words = words.replace("feature 2", r"feature 'a:b\[c'").replace("feature 1", "feature 'size'").replace("feature 0", "feature 'age'")
        with pytest.raises(ProtocolError, match=f"^{words}"):
            read(request(data), signature=NAMED)

    def test_integers_into_a_smaller_integer(self) -> None:
        signature = Signature((TensorSpec("input", "INT8", (-1, 3)),), ONE.outputs)
        assert read({"inputs": [tensor(shape=(1, 3), datatype="UINT64", data=[1, 2, 127])]}, signature=signature).rows == 1
        for data in ([1, 128, 300], [1, 2**64 - 1, 0]):
            with pytest.raises(ProtocolError, match=r"^Row 0, feature 1 is outside -128\.\.127, the range of INT8\.$"):
                read({"inputs": [tensor(shape=(1, 3), datatype="UINT64", data=data)]}, signature=signature)

    def test_fields_that_are_null_are_fields_left_out(self) -> None:
        full = request(id=None, outputs=None, parameters=None)
        full["inputs"][0]["parameters"] = None
        assert read(full).rows == 2
        full["inputs"][0]["parameters"] = {"binary_data_size": None, "shared_memory_region": None}
        assert read(full).rows == 2
        assert read({"inputs": [tensor(shape=(1, 3), binary_data_size=24) | {"data": None}]}, bytes(24)).rows == 1

    @pytest.mark.parametrize("datatype", ["FP12", "fp64", "float64", "", 64, None, [], {}, pytest.param("x" * 1000, id="long")])
    def test_refuses_datatypes(self, datatype: Any) -> None:
        with pytest.raises(ProtocolError, match="datatype") as caught:
            read({"inputs": [tensor(datatype=datatype, data=[1] * 6)]})
        assert len(str(caught.value)) < 250

    def test_a_datatype_that_cannot_be_converted_is_refused_unread(self) -> None:
        with pytest.raises(ProtocolError, match=r"^The input's datatype BYTES does not fit: send input 'input' as FP64"):
            read(*split((tensor(datatype=BYTES), bytes(4 * 2**20))))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"inputs": None}, "^'inputs' is missing or null: send an array"),
            ({"inputs": {}}, "'inputs' is an object"),
            ({"inputs": []}, "has 0 inputs: send exactly one, named 'input'"),
            ({"inputs": [tensor("a"), tensor("b")]}, "has 2 inputs: send exactly one, named 'input'"),
            ({"inputs": [tensor(), tensor()]}, "The input 'input' is there twice"),
            ({"inputs": [[]]}, "An entry of 'inputs' is an array: send an object"),
            ({"inputs": [{}]}, "The input's 'name' is missing"),
            ({"inputs": [{"name": 5}]}, "The input's 'name' is a number"),
            ({"inputs": [{"name": "x"}]}, "named 'x': this model's only input is 'input'"),
            ({"inputs": [{"name": "input"}]}, "The input's 'datatype' is missing"),
            ({"inputs": [{"name": "input", "datatype": "FP64"}]}, "The input's 'shape' is missing"),
            ({"inputs": [tensor()]}, "The input's 'data' is missing or null"),
            ({"inputs": [tensor(data=[]) | {"parameters": []}]}, "The input's 'parameters' is an array"),
            ({"id": 7}, "'id' is a number"),
            ({"id": "\ud800"}, "The 'id' is no Unicode text: send one without lone surrogates"),
            ({"parameters": []}, "The request's 'parameters' is an array"),
            ({"parameters": {"binary_data_output": 1}}, "The request's 'binary_data_output' is a number: send a boolean"),
        ],
    )
    def test_refuses_requests(self, change: dict[str, Any], words: str) -> None:
        with pytest.raises(ProtocolError, match=words):
            read(request() | change)

    @pytest.mark.parametrize(("sent", "given"), [("x7", "x7"), ("", None), (None, None), ("é\0", "é\0")])
    def test_the_id_is_given_back(self, sent: Any, given: Any) -> None:
        assert read(request(id=sent)).identifier == given


class TestSeveralInputs:
    X, FLAG, WORD = np.array([[1, 2], [3, 4], [5, NAN]], np.float32), np.array([True, False, True]), b"\xc3\xa9"

    def parts(self, binary: tuple[bool, bool, bool]) -> list[tuple[dict[str, Any], bytes | None]]:
        word = struct.pack("<I", 2) + self.WORD
        return [
            (tensor("x", (3, 2), "FP32"), self.X.tobytes()) if binary[0] else (tensor("x", (3, 2), "FP32", self.X.tolist()), None),
            (tensor("flag", (3,), "BOOL"), self.FLAG.tobytes()) if binary[1] else (tensor("flag", (3,), "BOOL", self.FLAG.tolist()), None),
            (tensor("word", (), BYTES), word) if binary[2] else (tensor("word", (), BYTES, ["é"]), None),
        ]

    @pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
    @pytest.mark.parametrize("binary", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    def test_json_and_binary_in_any_order(self, binary: Any, order: Any) -> None:
        parts = self.parts(binary)
        given = read(*split(*(parts[i] for i in order)), TWO)
        np.testing.assert_array_equal(given.arrays["x"], self.X)
        np.testing.assert_array_equal(given.arrays["flag"], self.FLAG)
        assert given.arrays["word"].shape == ()
        assert given.arrays["word"][()] == self.WORD
        assert (given.rows, given.outputs) == (3, (("y", False), ("z", False)))

    @pytest.mark.parametrize(
        ("index", "change", "words"),
        [
            (0, {"name": "flag"}, "The input 'flag' is there twice: send each input once"),
            (0, {"name": "q"}, "The request's inputs are 'q', 'flag', 'word': send exactly 'x', 'flag', 'word'"),
            (0, {"data": [1]}, "^Input 'x': 'data' holds 1 values"),
            (1, {"datatype": "INT8"}, "datatype INT8 does not fit: send input 'flag' as BOOL"),
            (1, {"shape": [3, 1]}, "^The input's shape is not .* send input 'flag' so"),
            (1, {"data": [True, 1, False]}, "^Value 1 of input 'flag' is a number"),
            (2, {"data": [["é"]]}, "^Value 0 of input 'word' is an array: send a string"),
            (2, {"data": "é"}, "^Input 'word': The input's 'data' is a string"),
            (2, {"parameters": {"shared_memory_region": "r"}}, "^Input 'word': The request uses shared memory"),
        ],
    )
    def test_errors_name_the_input(self, index: int, change: Any, words: str) -> None:
        sent, _ = split(*self.parts((False, False, False)))
        sent["inputs"][index] |= change
        with pytest.raises(ProtocolError, match=words):
            read(sent, signature=TWO)

    def test_the_first_axis_gives_the_rows(self) -> None:
        fixed = Signature((TensorSpec("x", "FP32", (4, 2)),), ONE.outputs)
        assert read({"inputs": [tensor("x", (4, 2), "FP32", [0] * 8)]}, signature=fixed).rows == 1
        scalar = Signature((TensorSpec("x", "FP32", ()),), ONE.outputs)
        assert read({"inputs": [tensor("x", (), "FP32", [0])]}, signature=scalar).rows == 1


class TestTheTail:
    @pytest.mark.parametrize("size", [True, -1, 1.0, "48", [], {}, 2**63, 2**64, -(2**70), 2.0**64])
    def test_a_size_is_a_number_of_bytes(self, size: Any) -> None:
        with pytest.raises(ProtocolError, match="A 'binary_data_size' is not a number of bytes: send a non-negative integer"):
            read({"inputs": [tensor(binary_data_size=size)]}, bytes(48))

    @pytest.mark.parametrize(("size", "tail"), [(48, 47), (48, 0), (1, 0), (2**63 - 1, 48)])
    def test_missing_bytes(self, size: int, tail: int) -> None:
        with pytest.raises(ProtocolError, match=r"Fewer bytes follow .* Inference-Header-Content-Length where they begin"):
            read({"inputs": [tensor(binary_data_size=size)]}, bytes(tail))

    def test_leftover_bytes(self) -> None:
        for sent in ({"inputs": [tensor(binary_data_size=48)]}, request()):
            with pytest.raises(ProtocolError, match="More bytes follow the JSON part than the inputs' 'binary_data_size' promise"):
                read(sent, bytes(49))

    @pytest.mark.parametrize("size", [0, 47, 24])
    def test_a_size_that_the_shape_does_not_fill(self, size: int) -> None:
        with pytest.raises(ProtocolError, match=f"The tensor has {size} bytes, and its shape and datatype FP64 promise another number"):
            read({"inputs": [tensor(binary_data_size=size)]}, bytes(size))

    def test_both_ways_at_once(self) -> None:
        for data in ([1] * 6, [], 0):
            with pytest.raises(ProtocolError, match="both 'data' and 'binary_data_size': send one of them"):
                read({"inputs": [tensor(data=data, binary_data_size=48)]}, bytes(48))

    def test_the_first_input_without_its_bytes_is_named(self) -> None:
        described, tail = split((tensor("age", [2]), bytes(16)), (tensor("size", [2]), bytes(16)), (tensor(FEATURES[2], [2]), bytes(16)))
        with pytest.raises(ProtocolError, match="Input 'size': Fewer bytes"):
            read(described, tail[:20], NAMED)


class TestFeatures:
    """One input for each feature, by its name."""

    COLUMNS = ([1, 2], [3, 4], [5, 6])

    def parts(self, nested: bool = False) -> list[tuple[dict[str, Any], bytes | None]]:
        shape = (2, 1) if nested else (2,)
        return [(tensor(name, shape, "FP64", list(values)), None) for name, values in zip(FEATURES, self.COLUMNS, strict=True)]

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
    @pytest.mark.parametrize("nested", [False, True])
    def test_any_order_and_both_shapes(self, nested: bool, order: Any) -> None:
        parts = self.parts(nested)
        given = read(*split(*(parts[i] for i in order)), NAMED)
        assert given.arrays["input"].tolist() == [[1, 3, 5], [2, 4, 6]]
        assert (given.rows, given.outputs) == (2, (("output", False),))

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
    def test_mixed_datatypes_shapes_and_forms(self, order: Any) -> None:
        parts = [
            (tensor("age", (2, 1), "INT8"), b"\x01\x02"),
            (tensor("size", (2, 1), "FP32", [[3], [4]]), None),
            (tensor("a:b[c", (2,), BF16), np.array([5, 6], "<f4").tobytes()[2:4] + np.array([5, 6], "<f4").tobytes()[6:]),
        ]
        X = read(*split(*(parts[i] for i in order)), NAMED).arrays["input"]
        assert X.dtype == np.float64
        assert X.tolist() == [[1, 3, 5], [2, 4, 6]]

    @pytest.mark.parametrize(
        ("index", "change", "words"),
        [
            (1, {"name": "age"}, "^The input 'age' is there twice"),
            (1, {"name": "x"}, "^The request lacks 'size' and has the unknown 'x': send one input for each feature, or all as 'input'"),
            (1, {"name": "input"}, "lacks 'size' and has the unknown 'input'"),
            (1, {"shape": [3], "data": [1, 2, 3]}, "^The features have different numbers of rows"),
            (1, {"shape": [1, 2]}, r"^Input 'size': The input's shape is not \[rows, 1\]"),
            (1, {"shape": [2, 1, 1]}, "^The input's shape is not .* send input 'size' so"),
            (1, {"shape": []}, "^The input's shape is not .* send input 'size' so"),
            (1, {"shape": [-1]}, "^The input's shape is not .* send input 'size' so"),
            (1, {"shape": None}, "^Input 'size': The input's 'shape' is missing"),
            (1, {"data": [1]}, "^Input 'size': 'data' holds 1 values"),
            (1, {"data": [1, "2"]}, "^Row 1, feature 'size' is a string"),
            (1, {"data": [[1], [2]]}, "^Row 0, feature 'size' is an array"),
            (2, {"data": [NAN, INF]}, r"^Row 0, feature 'a:b\[c' is NaN or null"),
            (0, {"datatype": BYTES, "data": ["a", "b"]}, "datatype BYTES does not fit: send input 'age' as FP64"),
            (0, {"datatype": "FP16"}, "^Input 'age': FP16 has no form in JSON"),
        ],
    )
    def test_refuses(self, index: int, change: Any, words: str) -> None:
        sent, _ = split(*self.parts())
        sent["inputs"][index] |= change
        with pytest.raises(ProtocolError, match=words):
            read(sent, signature=NAMED)

    def test_missing_and_unknown_features(self) -> None:
        parts = self.parts()
        for sent, words in (
            (parts[:2], r"The request lacks 'a:b\[c': send"),
            ([*parts, (tensor("x", (2,), "FP64", [1, 2]), None)], "The request has the unknown 'x': send"),
            ([(tensor("x", (2,), "FP64", [1, 2]), None)], r"named 'x': this model's only input is 'input' \(or one for each feature"),
        ):
            with pytest.raises(ProtocolError, match=words):
                read(*split(*sent), NAMED)
        with pytest.raises(ProtocolError, match=r"this model's only input is 'input'$|has 3 inputs: send exactly one"):
            read(*split(*parts), ONE)

    def test_many_unknown_names_are_cut(self) -> None:
        parts = [(tensor(f"name{i}", (1,), "FP64", [1]), None) for i in range(20_000)]
        signature = Signature(NAMED.inputs, NAMED.outputs, ["age", *(f"f{i}" for i in range(2_000))])
        with pytest.raises(ProtocolError, match="lacks 'f0', ") as caught:
            read(*split(*parts, (tensor("age", (1,), "FP64", [1]), None)), signature)
        assert len(str(caught.value)) < 400

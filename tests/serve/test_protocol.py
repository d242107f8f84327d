"""The protocol's JSON: what becomes an array, what is refused and with which words."""

import json
from typing import Any

import numpy as np
import pytest

from gdlib.serve.protocol import DATATYPE_NAMES, DATATYPES, ProtocolError, decode_request, encode_response, parse_json

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def request(data: Any, shape: Any = (2, 3), datatype: Any = "FP64", **more: Any) -> dict[str, Any]:
    tensor = {"name": "input", "shape": list(shape), "datatype": datatype, "data": data}
    return {"inputs": [tensor], **more}


def decode(request: dict[str, Any], dtype: np.dtype[Any] = F64, names: list[str] | None = None) -> np.ndarray:
    return decode_request(request, 3, dtype, names)[0]


class TestParseJson:
    def test_reads_an_object(self) -> None:
        assert parse_json('{"a": [1, 2.5, null, "é"]}'.encode()) == {"a": [1, 2.5, None, "é"]}

    def test_reads_the_nan_tokens_that_clients_send(self) -> None:
        assert np.isnan(parse_json(b'{"a": NaN}')["a"])

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b'{"a": 1} x', "not valid JSON"),
            (b"{'a': 1}", "not valid JSON"),
            (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
            (b'{"a": "\xff"}', "UTF-8"),
            (b'{"a": 1, "a": 2}', "same key twice"),
            (b'{"a": {"b": 1, "b": 1}}', "same key twice"),
            pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "digits", id="5000 digits"),
            pytest.param(b'{"a": ' + b"[" * 100_000, "nests too deeply", id="deep arrays"),
            pytest.param(b'{"a": ' * 100_000, "nests too deeply", id="deep objects"),
            (b"[]", "The body is an array: send an object"),
            (b"null", "The body is missing or null"),
            (b"true", "The body is a boolean"),
        ],
    )
    def test_refuses(self, body: bytes, words: str) -> None:
        with pytest.raises(ProtocolError, match=words):
            parse_json(body)

    def test_says_nothing_about_the_interpreter(self) -> None:
        with pytest.raises(ProtocolError) as caught:
            parse_json(b'{"a": ' + b"9" * 5000 + b"}")
        assert "sys." not in str(caught.value)


class TestDecode:
    @pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]])
    @pytest.mark.parametrize("datatype", DATATYPES)
    @pytest.mark.parametrize("dtype", [F32, F64])
    def test_every_datatype_flat_and_by_row(self, data: list[Any], datatype: str, dtype: np.dtype[Any]) -> None:
        X = decode(request(data, datatype=datatype), dtype)
        assert X.dtype == dtype
        np.testing.assert_array_equal(X, [[1, 2, 3], [4, 5, 6]])

    def test_values_are_read_as_the_declared_datatype_first(self) -> None:
        X = decode(request([0.1] * 3, (1, 3), "FP32"))
        np.testing.assert_array_equal(X, np.full((1, 3), np.float32(0.1), np.float64))
        np.testing.assert_array_equal(decode(request([0.1] * 3, (1, 3))), np.full((1, 3), 0.1))

    @pytest.mark.parametrize("datatype", [name for name in DATATYPES if "INT" in name])
    def test_integer_limits(self, datatype: str) -> None:
        info = np.iinfo(DATATYPES[datatype])
        X = decode(request([info.min, 0, info.max], (1, 3), datatype))
        np.testing.assert_array_equal(X, np.array([[info.min, 0, info.max]], np.float64))
        for value in (info.min - 1, info.max + 1, 10**400):
            with pytest.raises(ProtocolError, match=rf"^Row 0, feature 2 is outside .*the range of {datatype}"):
                decode(request([0, 0, value], (1, 3), datatype))

    def test_the_id_is_given_back(self) -> None:
        assert decode_request(request([1] * 6, id="x7"), 3, F64)[1] == "x7"
        for none in ({}, {"id": None}, {"id": ""}):
            assert decode_request(request([1] * 6, **none), 3, F64)[1] is None

    def test_fields_that_are_null_are_fields_left_out(self) -> None:
        full = request([1] * 6, id=None, outputs=None, parameters=None)
        full["inputs"][0]["parameters"] = None
        assert decode(full).shape == (2, 3)

    @pytest.mark.parametrize("outputs", [[], [{"name": "output"}], [{"name": "output", "parameters": {"binary_data": True}}]])
    def test_outputs_may_be_listed(self, outputs: list[Any]) -> None:
        assert decode(request([1] * 6, outputs=outputs, parameters={"binary_data_output": True})).shape == (2, 3)

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ([1, 2, 3, 4, 5], "'data' holds 5 values"),
            ([1, 2, 3, 4, 5, 6, 7], "'data' holds 7 values"),
            ([], "'data' holds 0 values"),
            ([[1, 2, 3]], "'data' holds 1 rows"),
            ([[1, 2, 3], [4, 5]], "Row 1 of 'data' is not an array of 3 numbers"),
            ([[1, 2, 3], 4], "Row 1 of 'data'"),
            ([[1, 2, 3], "abc"], "Row 1 of 'data'"),
            ([1, 2, 3, 4, 5, [6]], "Row 1, feature 2 is an array"),
            ([[1, 2, 3], [4, 5, [6]]], "Row 1, feature 2 is an array"),
            ([1, 2, "3", 4, 5, 6], "Row 0, feature 2 is a string"),
            ([1, 2, 3, True, 5, 6], "Row 1, feature 0 is a boolean"),
            ([1, 2, 3, {}, 5, 6], "Row 1, feature 0 is an object"),
            ([1, 2, 3, 4, None, 6], "Row 1, feature 1 is NaN or null"),
            ([1, 2, 3, 4, float("nan"), 6], "Row 1, feature 1 is NaN or null"),
            ([1, 2, 3, 4, float("inf"), 6], "Row 1, feature 1 is infinite"),
            ([1, 2, -float("inf"), 4, 5, 6], "Row 0, feature 2 is infinite"),
            ([1, 2, 3, 4, 10**400, 6], "an integer too large"),
            ("123456", "The input's 'data' is a string"),
            ({}, "The input's 'data' is an object"),
            (None, "The input's 'data' is missing or null"),
        ],
    )
    def test_refuses_data(self, data: Any, words: str) -> None:
        with pytest.raises(ProtocolError, match=words):
            decode(request(data))

    @pytest.mark.parametrize("value", [1.0, 1.7, None, "1", True, float("nan")])
    def test_integers_are_written_as_integers(self, value: Any) -> None:
        with pytest.raises(ProtocolError, match=r"^Row 0, feature 1 is .*send an integer"):
            decode(request([1, value, 3], (1, 3), "INT32"))

    @pytest.mark.parametrize(("datatype", "dtype"), [("FP32", F64), ("FP64", F32), ("FP32", F32)])
    def test_overflow_of_either_type_is_named(self, datatype: str, dtype: np.dtype[Any]) -> None:
        with pytest.raises(ProtocolError, match="Row 0, feature 'width' is infinite, or too large"):
            decode(request([1, 1e39, 3], (1, 3), datatype), dtype, ["length", "width", "height"])

    @pytest.mark.parametrize(
        "shape", [[], [6], [2, 4], [3, 2], [2, 3, 1], [-1, 3], [0, 3], [2.0, 3], [True, 3], ["2", 3], [None, 3], [[2], 3]]
    )
    def test_refuses_shapes(self, shape: list[Any]) -> None:
        with pytest.raises(ProtocolError):
            decode(request([1] * 6, shape))

    @pytest.mark.parametrize("rows", [1, 3, 10**30, pytest.param(10**4000, id="4001 digits")])
    def test_a_shape_that_data_does_not_fill(self, rows: int) -> None:
        with pytest.raises(ProtocolError, match="make them agree"):
            decode(request([1] * 6, [rows, 3]))
        with pytest.raises(ProtocolError, match="make them agree"):
            decode(request([[1] * 3] * 2, [rows, 3]))

    @pytest.mark.parametrize(
        "datatype", ["FP16", "BF16", "BYTES", "BOOL", "fp64", "float64", "", 64, None, [], pytest.param("x" * 1000, id="long")]
    )
    def test_refuses_datatypes(self, datatype: Any) -> None:
        with pytest.raises(ProtocolError, match="datatype") as caught:
            decode(request([1] * 6, datatype=datatype))
        assert len(str(caught.value)) < 250

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"inputs": None}, "'inputs' is missing"),
            ({"inputs": {}}, "'inputs' is an object"),
            ({"inputs": []}, "has 0 inputs"),
            ({"inputs": [{}, {}]}, "has 2 inputs"),
            ({"inputs": [[]]}, r"'inputs\[0\]' is an array"),
            ({"inputs": [{}]}, "'name' is missing"),
            ({"inputs": [{"name": "x"}]}, "named 'x': this model's only input is 'input'"),
            ({"id": 7}, "'id' is a number"),
            ({"parameters": []}, "'parameters' is an array"),
            ({"outputs": {}}, "'outputs' is an object"),
            ({"outputs": ["output"]}, "An entry of 'outputs' is a string"),
            ({"outputs": [{}]}, "An output's 'name' is missing"),
            ({"outputs": [{"name": "y"}]}, "named 'y': this model's only output is 'output'"),
            ({"outputs": [{"name": "output", "parameters": 1}]}, "'parameters' is a number"),
        ],
    )
    def test_refuses_requests(self, change: dict[str, Any], words: str) -> None:
        with pytest.raises(ProtocolError, match=words):
            decode(request([1] * 6) | change)

    def test_binary_tensors_are_refused_by_name(self) -> None:
        tensor = {"name": "input", "shape": [2, 3], "datatype": "FP64", "parameters": {"binary_data_size": 48}}
        with pytest.raises(ProtocolError, match="binary tensor extension, which is not supported"):
            decode({"inputs": [tensor]})


class TestEncode:
    def test_a_response(self) -> None:
        response = encode_response("house", "3", np.array([[1.5, 2], [3, 4]], np.float32), "x7")
        tensor = {"name": "output", "datatype": "FP32", "shape": [2, 2], "data": [1.5, 2.0, 3.0, 4.0]}
        assert response == {"model_name": "house", "model_version": "3", "id": "x7", "outputs": [tensor]}
        assert "id" not in encode_response("house", "3", np.ones((1, 1)))

    @pytest.mark.parametrize("dtype", [F32, F64])
    def test_numbers_survive_json_bit_for_bit(self, dtype: np.dtype[Any]) -> None:
        output = np.random.default_rng(0).standard_normal((50, 2)).astype(dtype)
        data = json.loads(json.dumps(encode_response("m", "1", output)))["outputs"][0]["data"]
        np.testing.assert_array_equal(np.array(data, dtype), output.ravel())

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_json_cannot_hold(self, value: float) -> None:
        with pytest.raises(ProtocolError, match="output of row 1 is not finite"):
            encode_response("m", "1", np.array([[1.0, 2], [3, value]]))

    def test_datatype_names(self) -> None:
        assert [DATATYPE_NAMES[dtype] for dtype in DATATYPES.values()] == list(DATATYPES)

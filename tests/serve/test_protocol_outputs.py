"""What a client may ask of the outputs, and the answers that it gets, in JSON and binary."""

import json
import math
from typing import Any, ClassVar

import numpy as np
import orjson
import pytest

from gdlib.serve import tensors
from gdlib.serve.protocol import Signature, UnsupportedError, decode, encode
from gdlib.serve.tensors import BYTES, NUMERIC, ProtocolError, TensorSpec

INPUTS = (TensorSpec("x", "FP32", (-1,)),)
ONE = Signature(INPUTS, (TensorSpec("output", "FP32", (-1,)),))
TWO = Signature(INPUTS, (TensorSpec("y", "FP32", (-1,)), TensorSpec("z", BYTES, (-1,))))
NAN, INF = math.nan, math.inf


def outputs_of(signature: Signature, **more: Any) -> Any:
    request = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}
    return list(decode(request | more, memoryview(b""), signature).outputs)


class TestOutputs:
    @pytest.mark.parametrize("whole", [None, False, True])
    @pytest.mark.parametrize("y", [None, False, True])
    @pytest.mark.parametrize("z", [None, False, True])
    def test_binary_or_not(self, whole: Any, y: Any, z: Any) -> None:
        outputs = [
            {"name": "z", "parameters": {"binary_data": z}},
            {"name": "y", "parameters": {"binary_data": y} if y is not None else {}},
        ]
        parameters = {"binary_data_output": whole}
        wanted = [("z", bool(whole if z is None else z)), ("y", bool(whole if y is None else y))]
        assert outputs_of(TWO, parameters=parameters, outputs=outputs) == wanted
        assert outputs_of(TWO, parameters=parameters) == [("y", bool(whole)), ("z", bool(whole))]
        assert outputs_of(TWO, outputs=outputs[:1]) == [("z", bool(z))]
        for none in ([], None):
            assert outputs_of(TWO, parameters=None, outputs=none) == [("y", False), ("z", False)]

    @pytest.mark.parametrize(
        ("outputs", "words"),
        [
            ({}, "'outputs' is an object"),
            (["output"], "An entry of 'outputs' is a string: send an object"),
            ([{}], "An output's 'name' is missing"),
            ([{"name": "y"}], "named 'y': this model's only output is 'output'"),
            ([{"name": "output"}, {"name": "output"}], "The request wants output 'output' twice: name each output once"),
            ([{"name": "output", "parameters": 1}], "The output's 'parameters' is a number"),
            ([{"name": "output", "parameters": {"binary_data": 1}}], "An output's 'binary_data' is a number: send a boolean"),
        ],
    )
    def test_refuses(self, outputs: Any, words: str) -> None:
        with pytest.raises(ProtocolError, match=words):
            outputs_of(ONE, outputs=outputs)

    def test_unknown_among_several(self) -> None:
        with pytest.raises(ProtocolError, match="named 'q': this model's outputs are 'y', 'z'"):
            outputs_of(TWO, outputs=[{"name": "y"}, {"name": "q"}])

    @pytest.mark.parametrize("parameters", [{"classification": 3}, {"shared_memory_region": "r", "shared_memory_byte_size": 48}])
    def test_extensions_that_are_not_here(self, parameters: Any) -> None:
        tensor = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1], "parameters": parameters}
        for more in ({"outputs": [{"name": "output", "parameters": parameters}]}, {"inputs": [tensor]}):
            with pytest.raises(UnsupportedError, match="which this server does not have: send and ask for plain tensors"):
                outputs_of(ONE, **more)
        unused = dict.fromkeys(parameters)
        assert outputs_of(ONE, outputs=[{"name": "output", "parameters": unused}]) == [("output", False)]


class TestEncode:
    ARRAYS: ClassVar = {
        "y": np.array([[1.5, NAN]], np.float32),
        "z": tensors.of_objects([b"a", "é".encode()]),
        "i": np.array([2**63], np.uint64),
    }

    def test_json(self) -> None:
        body, length = encode("house", "3", self.ARRAYS, [("i", False), ("y", False), ("z", False)], "x7")
        assert length is None
        assert json.loads(body) == {
            "model_name": "house",
            "model_version": "3",
            "id": "x7",
            "outputs": [
                {"name": "i", "datatype": "UINT64", "shape": [1], "data": [2**63]},
                {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.5, None]},
                {"name": "z", "datatype": "BYTES", "shape": [2], "data": ["a", "é"]},
            ],
        }
        assert "id" not in json.loads(encode("house", "3", self.ARRAYS, [], None)[0])

    @pytest.mark.parametrize("binary", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    def test_binary_outputs_follow_in_their_order(self, binary: Any) -> None:
        outputs = [(name, bool(chosen)) for name, chosen in zip("zyi", binary, strict=True)]
        body, length = encode("m", "1", self.ARRAYS, outputs, None)
        assert (length is None) == (not any(binary))
        described, tail = json.loads(body[:length]), body[len(body) if length is None else length :]
        for output, (name, is_binary) in zip(described["outputs"], outputs, strict=True):
            assert output["name"] == name
            assert ("data" in output) != is_binary
            if is_binary:
                size = output["parameters"]["binary_data_size"]
                array = tensors.from_bytes(memoryview(tail)[:size], output["datatype"], tuple(output["shape"]))
                np.testing.assert_array_equal(array, self.ARRAYS[name])
                tail = tail[size:]
        assert tail == b""

    @pytest.mark.parametrize(
        ("array", "words"), [(np.array([INF]), "infinite"), (np.array([1], np.float16), "FP16"), ([b"\xff"], "not UTF-8")]
    )
    def test_what_json_cannot_hold_goes_in_binary(self, array: Any, words: str) -> None:
        arrays = {"y": tensors.of_objects(array) if type(array) is list else array}
        with pytest.raises(ProtocolError, match=rf"{words}.*ask for output 'y' in the binary format \(its parameter 'binary_data': true\)"):
            encode("m", "1", arrays, [("y", False)], None)
        assert encode("m", "1", arrays, [("y", True)], None)[0].endswith(tensors.to_bytes(arrays["y"]))


class TestValues:
    def json(self, array: Any) -> Any:
        return orjson.loads(orjson.dumps(tensors.to_json(np.asarray(array), "y"), option=orjson.OPT_SERIALIZE_NUMPY))

    @pytest.mark.parametrize("datatype", [*NUMERIC, BYTES])
    def test_bytes_come_back(self, datatype: str) -> None:
        if datatype == BYTES:
            array = tensors.of_objects([b"", b"\xff", b"abc", b"d"]).reshape(2, 2)
        else:
            array = np.array([[0, 1], [1, 0]], NUMERIC[datatype]).T
        np.testing.assert_array_equal(tensors.from_bytes(memoryview(tensors.to_bytes(array)), datatype, (2, 2)), array)

    @pytest.mark.parametrize("datatype", [*(name for name in NUMERIC if name != "FP16"), BYTES])
    def test_json_comes_back(self, datatype: str) -> None:
        if datatype == BYTES:
            array = tensors.of_objects([b"", "é\0".encode(), b"abc", b"d"]).reshape(2, 2)
        else:
            array = np.array([[0, 1], [1, 0]], NUMERIC[datatype])[:, ::-1]
        back = tensors.from_json(self.json(array), datatype, (2, 2), str)
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_numbers_survive_json_bit_for_bit(self, dtype: Any) -> None:
        values = np.random.default_rng(0).integers(0, 2**63, 400).view(np.float64)
        values = np.concatenate([values[np.abs(values) < np.finfo(dtype).max], [5e-324, 1e-45, np.finfo(dtype).max]]).astype(dtype)
        np.testing.assert_array_equal(np.array(self.json(values), dtype), values)

    def test_integer_limits_survive_json(self) -> None:
        for datatype in [name for name in NUMERIC if "INT" in name]:
            limits = np.iinfo(NUMERIC[datatype])
            assert self.json(np.array([limits.min, limits.max], NUMERIC[datatype])) == [limits.min, limits.max]

    def test_nan_becomes_null(self) -> None:
        for dtype in (np.float32, np.float64):
            assert self.json(np.array([[1, NAN], [NAN, 2]], dtype)) == [1, None, None, 2]

    def test_no_values_and_no_axes(self) -> None:
        assert self.json(np.zeros((0, 3))) == []
        assert self.json(np.array(2.5)) == [2.5]
        assert tensors.to_bytes(np.array(2, "<i2")) == b"\x02\x00"
        assert tensors.to_bytes(tensors.of_objects([])) == b""

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.array([1, INF]), "infinite"),
            (np.array([-INF], np.float32), "infinite"),
            (np.array([1], np.float16), "FP16"),
            (tensors.of_objects([b"a", b"\xff"]), "not UTF-8 text"),
            (tensors.of_objects([b"\xed\xa0\x80"]), "not UTF-8 text"),
        ],
    )
    def test_what_json_cannot_hold_names_the_binary_mode(self, array: Any, words: str) -> None:
        refuse = tensors.check_json if words == "infinite" else tensors.to_json
        with pytest.raises(
            ProtocolError, match=rf"{words}.* ask for output 'y' in the binary format \(its parameter 'binary_data': true\)"
        ):
            refuse(array, "y")

"""What is remembered of requests: all but their values, which must be read each time as if nothing were remembered."""

import json
import struct
from typing import Any

import numpy as np
import pytest

from gdlib.serve.parsing import split_data
from gdlib.serve.protocol import MAX_HEADER, MAX_PLANS, Signature, decode_binary, decode_json
from gdlib.serve.tensors import ProtocolError
from tests.serve.test_parsing import OUTPUT, SPECS, agree, body_of, exactly, outcome
from tests.serve.test_protocol import FEATURES, NAN, ONE, split, tensor


class TestPlans:
    """What is remembered of the JSON parts of binary requests."""

    @staticmethod
    def header(**more: Any) -> bytes:
        return json.dumps({"inputs": [tensor(shape=[1, 3], binary_data_size=24)], **more}).encode()

    @pytest.fixture
    def signature(self) -> Signature:
        return Signature(ONE.inputs, ONE.outputs)

    def test_a_header_that_comes_again_gives_the_new_values(self, signature: Signature) -> None:
        for values in ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]):
            decoded = decode_binary(self.header(id="a"), memoryview(np.array(values).tobytes()), signature)
            assert decoded.arrays["input"].tolist() == [values]
            assert (decoded.rows, decoded.outputs, decoded.identifier) == (1, (("output", False),), "a")
        assert signature.plan_header.cache_info().hits == 1

    def test_each_tail_is_measured(self, signature: Signature) -> None:
        decode_binary(self.header(), memoryview(bytes(24)), signature)
        with pytest.raises(ProtocolError, match="Fewer bytes"):
            decode_binary(self.header(), memoryview(bytes(23)), signature)
        with pytest.raises(ProtocolError, match="More bytes"):
            decode_binary(self.header(), memoryview(bytes(25)), signature)

    def test_values_beside_the_tail_are_not_remembered(self) -> None:
        described, tail = split((tensor("age", [2]), struct.pack("<2d", 1, 2)), (tensor("size", [2], data=[3, None]), None))
        described["inputs"].append(tensor(FEATURES[2], [2, 1], data=[5, 6]))
        signature = Signature(ONE.inputs, ONE.outputs, FEATURES)
        for _ in range(2):
            x = decode_binary(json.dumps(described).encode(), memoryview(tail), signature).arrays["input"]
            np.testing.assert_array_equal(x, [[1, 3, 5], [2, NAN, 6]])
        assert signature.plan_header.cache_info().currsize == 0

    def test_what_is_wrong_or_long_is_not_remembered(self, signature: Signature) -> None:
        for _ in range(2):
            with pytest.raises(ProtocolError, match="not valid JSON"):
                decode_binary(b"{", memoryview(bytes(24)), signature)
        decode_binary(self.header(parameters={"note": "n" * MAX_HEADER}), memoryview(bytes(24)), signature)
        assert signature.plan_header.cache_info().currsize == 0

    def test_so_many_are_remembered(self, signature: Signature) -> None:
        for number in range(MAX_PLANS + 9):
            decode_binary(self.header(id=str(number)), memoryview(bytes(24)), signature)
        assert signature.plan_header.cache_info().currsize == MAX_PLANS


class TestSplitData:
    """A short request without its values, which are parsed alone."""

    @pytest.mark.parametrize("data", ["[1,2.5,-3e2]", "[ 1 , 2 ]", "[]", '["a","b"]', "[true,null]"])
    def test_takes_the_values_out(self, data: str) -> None:
        before, values, after = split_data(body_of(data))
        assert (before + b"[]" + after, values) == (body_of("[]"), json.loads(data))

    def test_space_stays_where_it_is(self) -> None:
        assert split_data(b'{"data" : [1] , "a": 2}') == (b'{"data" : ', [1], b' , "a": 2}')

    @pytest.mark.parametrize("data", ["[[1,2]]", "[NaN]", '["]"]', "[1", "1", "null", "[1,]", '"[1]"'])
    def test_leaves_other_values(self, data: str) -> None:
        assert split_data(body_of(data)) is None

    def test_leaves_a_request_without_data_or_with_several(self) -> None:
        assert split_data(b'{"inputs":[]}') is None
        assert split_data(b'{"inputs":[{"data":[1]},{"data":[2]}]}') is None

    @pytest.mark.parametrize(
        "body",
        [
            body_of(request=',"id":"\\"data\\":[1,2]"'),  # within a string
            body_of(request=',"id":"data"'),
            body_of(request=',"outputs":[{"name":"output","parameters":{"data":[7]}}]'),  # another's
            body_of(request=',"parameters":{"x\\"data":[7]}'),  # a key that ends so
            body_of(tensor=',"data":[9,9,9,9,9,9]'),  # twice
            body_of("[]", tensor=',"parameters":{"data":[1,2,3,4,5,6]}'),  # another's, beside none
            body_of("[]", request=',"parameters":{"data":[1,2,3,4,5,6]}'),
            body_of("[]", request=',"data":[1,2,3,4,5,6]'),
            body_of("[]", tensor=',"parameters":{"x\\"data":[1,2,3,4,5,6]}'),
            body_of("[]", request=',"outputs":[{"name":"output","parameters":{"data":[1,2,3,4,5,6]}}]'),
            body_of().replace(b'"data"', b'"d\\u0061ta"'),
            body_of("[]", tensor=',"parameters":{"data":[1,2,3,4,5,6]}').replace(b'"data":[]', b'"d\\u0061ta":[]'),
            body_of(request=',"inputs":[]'),  # a key twice around it
            body_of(request=',"note":"x"data":[1]'),
            body_of() + b"]",
            body_of()[:-1],
            b"\xff" + body_of(),
            body_of(request=',"id":"\\ud800"'),
            body_of("[1,2,3,4,5,6]", "[6]"),
            body_of("[1,2,3]"),
            body_of("[1,2,3,4,5,1e400]"),
            body_of("[1,2,3,4,5,18446744073709551616]", datatype="UINT64"),
        ],
    )
    def test_traps(self, body: bytes) -> None:
        agree(body)

    def test_one_plan_serves_all_values(self) -> None:
        signature = Signature((SPECS["FP64"],), OUTPUT)
        for number in range(5):
            read = decode_json(body_of(f"[{number},2,3,4,5,6]"), signature)
            assert read.arrays["input"].tolist() == [[number, 2, 3], [4, 5, 6]]
        assert signature.plan_header.cache_info()[:2] == (0, 1)  # hits, misses: after the first it is the usual one
        for number in range(6):
            assert decode_json(body_of(request=f',"id":"{number % 2}"'), signature).identifier == str(number % 2)
        assert signature.plan_header.cache_info()[:2] == (4, 3)

    @pytest.mark.parametrize(
        "inside",
        [
            "[1,2,3],[4,5,6]",
            "1,2,3],[4,5,6",
            '1,2,3,4,5,6],"data":[7',
            '1,2,3,4,5,6]}],"id":"x","y":[{"z":[1',
            "",
            "]",
            "[",
            "1,2",
            "1,2,3,4,5,true",
        ],
    )
    def test_other_things_in_the_usual_frame(self, inside: str) -> None:
        signature = Signature((SPECS["FP64"],), OUTPUT)
        decode_json(body_of(), signature)
        body = body_of(f"[{inside}]")
        assert outcome(decode_json, body, signature) == outcome(exactly, body, signature)

    @pytest.mark.parametrize("data", ["7", "null", "{}", '"[1,2,3]"', "[[1,2,3],[4,5,6]]", ""])
    def test_no_array_in_the_usual_frame(self, data: str) -> None:
        signature = Signature((SPECS["FP64"],), OUTPUT)
        decode_json(body_of(), signature)
        assert outcome(decode_json, body_of(data), signature) == outcome(exactly, body_of(data), signature)

"""Tensors on the wire: what JSON values and raw bytes become, what is refused and with which words."""

import math
import struct
from typing import Any

import numpy as np
import pytest

from gdlib.serve import tensors
from gdlib.serve.tensors import BF16, BYTES, DTYPES, NUMERIC, ProtocolError, TensorSpec

INTEGERS = [name for name in NUMERIC if "INT" in name]
IN_JSON = [name for name in NUMERIC if name != "FP16"]
NAN, INF = math.nan, math.inf


def place(index: int) -> str:
    return f"Value {index}"


def from_json(data: Any, datatype: str = "FP64", shape: tuple[int, ...] = (2, 3)) -> Any:
    return tensors.from_json(data, datatype, shape, place)


def from_bytes(raw: bytes, datatype: str, shape: tuple[int, ...]) -> Any:
    return tensors.from_bytes(memoryview(raw), datatype, shape)


def strings(*items: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


class TestShape:
    SPEC = TensorSpec("input", "FP64", (-1, 3))

    def test_any_number_of_rows(self) -> None:
        for rows in (1, 7, 2**30):
            assert tensors.check_shape([rows, 3], self.SPEC) == (rows, 3)

    @pytest.mark.parametrize(
        "shape",
        [
            [],
            [6],
            [2, 4],
            [3, 2],
            [2, 3, 1],
            [-1, 3],
            [0, 3],
            [2.0, 3],
            [True, 3],
            ["2", 3],
            [None, 3],
            [[2], 3],
            [{}, 3],
            [NAN, 3],
            [2**40 + 1, 3],
            [2**40, 3],
            [2**64, 3],
            pytest.param([10**4000, 3], id="4001 digits"),
        ],
    )
    def test_refuses(self, shape: list[Any]) -> None:
        with pytest.raises(ProtocolError, match=r"^The input's shape is not \[rows, 3\] with one row or more: send rows of 3 features\.$"):
            tensors.check_shape(shape, self.SPEC)

    @pytest.mark.parametrize(("shape", "what"), [(None, "missing or null"), (3, "a number"), ("23", "a string"), ({}, "an object")])
    def test_is_a_list(self, shape: Any, what: str) -> None:
        with pytest.raises(ProtocolError, match=f"The input's 'shape' is {what}: send an array"):
            tensors.check_shape(shape, self.SPEC)

    def test_other_ranks(self) -> None:
        assert tensors.check_shape([], TensorSpec("x", "FP32", ())) == ()
        assert tensors.check_shape([4, 5, 6], TensorSpec("x", "FP32", (-1, 5, -1))) == (4, 5, 6)
        for spec, shape in (((), [1]), ((-1,), []), ((-1, 5, -1), [4, 6, 6]), ((3, 2), [3, -1])):
            with pytest.raises(ProtocolError, match="where -1 stands for any size of 1 or more: send input 'x' so"):
                tensors.check_shape(shape, TensorSpec("x", "FP32", spec))


class TestFromJson:
    @pytest.mark.parametrize("data", [[1, 0, 1, 1, 0, 1], [[1, 0, 1], [1, 0, 1]]])
    @pytest.mark.parametrize("datatype", IN_JSON)
    def test_every_datatype_flat_and_by_row(self, data: list[Any], datatype: str) -> None:
        if datatype == "BOOL":
            data = np.array(data, bool).tolist()
        array = from_json(data, datatype)
        assert array.dtype == NUMERIC[datatype]
        np.testing.assert_array_equal(array, np.array([[1, 0, 1], [1, 0, 1]]))

    @pytest.mark.parametrize("datatype", ["FP32", "FP64", *INTEGERS])
    @pytest.mark.parametrize("rows", [False, True])
    def test_arrays_of_a_fast_parser(self, datatype: str, rows: bool) -> None:
        data = np.array([[1, 0, 3], [4, 5, 6]], {"f": np.float64, "i": np.int64, "u": np.uint64}[NUMERIC[datatype].kind])
        array = from_json(data if rows else data.ravel(), datatype)
        assert array.dtype == NUMERIC[datatype]
        np.testing.assert_array_equal(array, data)

    def test_strings(self) -> None:
        array = from_json([["a", "é"], ["", "\ud800"]], BYTES, (2, 2))
        assert array.tolist() == [[b"a", "é".encode()], [b"", b"\xed\xa0\x80"]]

    def test_any_rank(self) -> None:
        nested = np.arange(24).reshape(2, 3, 4)
        np.testing.assert_array_equal(from_json(nested.tolist(), "INT16", (2, 3, 4)), nested)
        np.testing.assert_array_equal(from_json(nested.ravel().tolist(), "INT16", (2, 3, 4)), nested)
        assert from_json([7], "FP32", ()).shape == ()

    def test_null_and_nan_are_nan(self) -> None:
        np.testing.assert_array_equal(from_json([1, None, NAN, INF, -INF, 0], "FP32"), [[1, NAN, NAN], [INF, -INF, 0]])

    def test_the_declared_precision(self) -> None:
        assert from_json([0.1], "FP32", (1,))[0] == np.float32(0.1)
        assert from_json([0.1], "FP64", (1,))[0] == 0.1
        assert from_json([1e39], "FP32", (1,))[0] == INF
        assert from_json([2**53 + 1, 2**64 + 2**12, -(2**70)], "FP64", (3,)).tolist() == [2.0**53, 2.0**64 + 2**12, -(2.0**70)]

    @pytest.mark.parametrize("datatype", INTEGERS)
    def test_integer_limits(self, datatype: str) -> None:
        limits = np.iinfo(NUMERIC[datatype])
        assert from_json([limits.min, 0, limits.max], datatype, (3,)).tolist() == [limits.min, 0, limits.max]
        for value in (limits.min - 1, limits.max + 1, 10**400, -(2.0**63) * 2, 2.0**64):
            with pytest.raises(ProtocolError, match=rf"^Value 2 is outside {limits.min}\.\.{limits.max}, the range of {datatype}\.$"):
                from_json([0, 0, value, value], datatype, (4,))

    @pytest.mark.parametrize("datatype", [name for name in INTEGERS if "64" not in name])
    def test_integer_limits_in_arrays_of_a_fast_parser(self, datatype: str) -> None:
        limits = np.iinfo(NUMERIC[datatype])
        wide = np.dtype(np.uint64 if datatype[0] == "U" else np.int64)
        np.testing.assert_array_equal(from_json(np.array([limits.min, limits.max], wide), datatype, (2,)), [limits.min, limits.max])
        values = [limits.max + 1, np.iinfo(wide).max] if datatype[0] == "U" else [limits.max + 1, limits.min - 5, np.iinfo(wide).min]
        for first in range(len(values)):
            with pytest.raises(ProtocolError, match=rf"^Value 1 is outside {limits.min}\.\.{limits.max}, the range of {datatype}\.$"):
                from_json(np.array([0, *values[first:], *values[:first]], wide), datatype, (1 + len(values),))

    @pytest.mark.parametrize(
        ("value", "what"),
        [
            (1.0, "a number"),
            (1.7, "a number"),
            (1e300, "outside"),
            (None, "null"),
            ("1", "a string"),
            (True, "a boolean"),
            (NAN, "a number"),
            ([1], "an array"),
            ({}, "an object"),
        ],
    )
    def test_integers_are_written_as_integers(self, value: Any, what: str) -> None:
        with pytest.raises(ProtocolError, match=rf"^Value 1 is {what}") as caught:
            from_json([1, value, 3.5], "INT32", (3,))
        assert what == "outside" or str(caught.value).endswith(": send an integer without a decimal point.")

    @pytest.mark.parametrize("value", [0, 1, 1.0, "true", None, []])
    def test_booleans_are_booleans(self, value: Any) -> None:
        with pytest.raises(ProtocolError, match=r"^Value 1 is .*: send true or false\.$"):
            from_json([True, value], "BOOL", (2,))

    @pytest.mark.parametrize("value", [0, 1.5, True, None, ["a"], {"a": 1}])
    def test_strings_are_strings(self, value: Any) -> None:
        with pytest.raises(ProtocolError, match=r"^Value 1 is .*: send a string\.$"):
            from_json(["a", value], BYTES, (2,))

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ([1, 2, 3, 4, 5], "'data' holds 5 values, and 'shape' promises another number"),
            ([1, 2, 3, 4, 5, 6, 7], "'data' holds 7 values"),
            ([], "'data' holds 0 values"),
            ([[1, 2, 3]], "'data' holds 1 rows"),
            ([[1, 2, 3], [4, 5]], "Row 1 of 'data' is not an array of 3 values: send every row with 3"),
            ([[1, 2, 3], 4], "Row 1 of 'data'"),
            ([[1, 2, 3], "abc"], "Row 1 of 'data'"),
            ([[1, 2, 3], {"a": 1, "b": 2, "c": 3}], "Row 1 of 'data'"),
            ([1, 2, 3, 4, 5, [6]], "Value 5 is an array: send a number"),
            ([[1, 2, 3], [4, 5, [6]]], "Value 5 is an array"),
            ([1, 2, "3", 4, 5, 6], "Value 2 is a string"),
            ([1, 2, 3, True, 5, 6], "Value 3 is a boolean"),
            ([1, 2, 3, {}, 5, 6], "Value 3 is an object"),
            ([1, 2, 3, 4, 10**400, 6], "an integer too large for FP64"),
            ("123456", "The input's 'data' is a string: send an array"),
            ({}, "The input's 'data' is an object"),
            (None, "The input's 'data' is missing or null"),
        ],
    )
    def test_refuses(self, data: Any, words: str) -> None:
        with pytest.raises(ProtocolError, match=words):
            from_json(data)

    def test_ragged_at_any_depth(self) -> None:
        with pytest.raises(ProtocolError, match=r"^Row 1, 0 of 'data' is not an array of 2 values"):
            from_json([[[1, 2], [3, 4]], [[5], [7, 8]]], "FP64", (2, 2, 2))

    @pytest.mark.parametrize("shape", [(), (1,), (6,), (3, 2), (2, 3, 1), (1, 6), (2**40,), (2**20, 2**20)])
    def test_arrays_of_a_fast_parser_are_refused_like_lists(self, shape: tuple[int, ...]) -> None:
        for data in (np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(6, 1), np.arange(5.0), np.zeros((1, 1))):
            if data.shape == shape or (data.ndim == 1 and data.size == math.prod(shape)):
                continue
            with pytest.raises(ProtocolError) as wanted:
                from_json(data.tolist(), "FP64", shape)
            with pytest.raises(ProtocolError) as caught:
                from_json(data, "FP64", shape)
            assert str(caught.value) == str(wanted.value)

    @pytest.mark.parametrize("datatype", ["FP16", BF16])
    def test_half_precision_has_no_json(self, datatype: str) -> None:
        with pytest.raises(ProtocolError, match=f"^{datatype} has no form in JSON: send the tensor in the binary format, or as FP32"):
            from_json([1.0], datatype, (1,))


class TestFromBytes:
    @pytest.mark.parametrize("datatype", NUMERIC)
    def test_every_datatype(self, datatype: str) -> None:
        values = np.random.default_rng(0).integers(0, 2, (4, 3)).astype(NUMERIC[datatype])
        for offset in range(8):
            array = tensors.from_bytes(memoryview(bytes(offset) + values.tobytes())[offset:], datatype, (4, 3))
            assert array.dtype == values.dtype
            np.testing.assert_array_equal(array, values)

    def test_little_endian(self) -> None:
        assert from_bytes(b"\x01\x02\x03\x04", "UINT32", (1,))[0] == 0x04030201
        assert from_bytes(b"\x00\x00\x80\x3f", "FP32", (1,))[0] == 1.0
        assert from_bytes(b"\x00\x3c", "FP16", (1,))[0] == 1.0

    def test_bf16_is_the_upper_half_of_float32(self) -> None:
        bits = np.arange(2**16, dtype="<u2")
        array = from_bytes(bits.tobytes(), BF16, (2**8, 2**8))
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array.view(np.uint32).ravel() >> 16, bits)
        assert from_bytes(b"\x80\x3f\x49\x40", BF16, (2,)).tolist() == [1.0, 3.140625]

    def test_any_byte_but_zero_is_true(self) -> None:
        array = from_bytes(bytes([0, 1, 2, 255]), "BOOL", (2, 2))
        assert array.dtype == np.bool_
        assert array.tolist() == [[False, True], [True, True]]
        assert array.view(np.uint8).max() == 1

    @pytest.mark.parametrize("datatype", [*NUMERIC, BF16])
    @pytest.mark.parametrize("change", [-6, -1, 1, 6])
    def test_a_wrong_number_of_bytes(self, datatype: str, change: int) -> None:
        count = 6 * (2 if datatype == BF16 else DTYPES[datatype].itemsize) + change
        with pytest.raises(ProtocolError, match=f"The tensor has {count} bytes, .* datatype {datatype} promise another number"):
            from_bytes(bytes(count), datatype, (2, 3))

    def test_strings(self) -> None:
        array = from_bytes(strings(b"", b"\xff\x00", b"abc", b"\x04\x00\x00\x00"), BYTES, (2, 2))
        assert array.dtype == object
        assert array.tolist() == [[b"", b"\xff\x00"], [b"abc", b"\x04\x00\x00\x00"]]

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            strings(b"a"),
            strings(b"a", b"b")[:-1],
            strings(b"a", b"b") + b"x",
            strings(b"a", b"b", b""),
            strings(b"a") + b"\x01\x00\x00",
            strings(b"a") + b"\xff\xff\xff\xff",
            strings(b"a") + b"\x02\x00\x00\x00b",
        ],
    )
    def test_broken_strings(self, raw: bytes) -> None:
        with pytest.raises(ProtocolError, match="The BYTES tensor is not a length and that many bytes for each value of its shape"):
            from_bytes(raw, BYTES, (2,))


class TestConvert:
    def convert(self, values: Any, datatype: str) -> Any:
        return tensors.convert(np.asarray(values), TensorSpec("x", datatype, (-1,)), place)

    def test_what_becomes_what(self) -> None:
        for given in (*NUMERIC, BF16, BYTES):
            for wanted in (*NUMERIC, BYTES):
                floats, integers = given in ("FP16", BF16, "FP32", "FP64"), "INT" in given or given == "BOOL"
                fits = given == wanted or (wanted[0] == "F" and (floats or integers)) or ("INT" in wanted and integers)
                if fits:
                    tensors.check_convertible(given, (1,), TensorSpec("x", wanted, (-1,)))
                    array = from_bytes(
                        strings(b"z") if given == BYTES else bytes(2 if given == BF16 else DTYPES[given].itemsize), given, (1,)
                    )
                    assert self.convert(array, wanted).dtype == DTYPES[wanted]
                else:
                    with pytest.raises(ProtocolError, match=f"^The input's datatype {given} does not fit: send input 'x' as {wanted}"):
                        tensors.check_convertible(given, (1,), TensorSpec("x", wanted, (-1,)))

    def test_integers_must_fit(self) -> None:
        assert self.convert(np.array([-128, 127], np.int64), "INT8").tolist() == [-128, 127]
        assert self.convert(np.array([True, False]), "UINT8").tolist() == [1, 0]
        for values, dtype, datatype, index in [
            ([0, 300, 400], np.int64, "UINT8", 1),
            ([0, -1, 400], np.int64, "UINT8", 1),
            ([0, 400, -1], np.int16, "UINT8", 1),
            ([5, -1, 0], np.int8, "UINT64", 1),
            ([0, 0, 2**63], np.uint64, "INT64", 2),
        ]:
            with pytest.raises(ProtocolError, match=rf"^Value {index} is outside .*, the range of {datatype}\.$"):
                self.convert(np.array(values, dtype), datatype)

    def test_floating_point_rounds(self) -> None:
        assert self.convert(np.array([2**24 + 1, 2**64 - 1], np.uint64), "FP32").tolist() == [2.0**24, 2.0**64]
        assert self.convert(np.array([1e300, -1e300, 0.1]), "FP32").tolist() == [INF, -INF, np.float32(0.1)]

    def test_signalling_nans(self) -> None:
        for given, bits in (("FP64", "000000000000f47f"), ("FP32", "0000a07f"), ("FP16", "007d"), (BF16, "a07f")):
            array = from_bytes(bytes.fromhex(bits), given, (1,))
            for wanted in ("FP16", "FP32", "FP64"):
                assert np.isnan(self.convert(array, wanted)).all()

    @pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT16", "INT64"])
    def test_the_result_is_aligned(self, datatype: str) -> None:
        raw = np.arange(6).astype(DTYPES[datatype]).tobytes()
        for offset in range(8):
            array = self.convert(tensors.from_bytes(memoryview(bytes(offset) + raw)[offset:], datatype, (6,)), datatype)
            assert array.flags.aligned
            assert array.tolist() == list(range(6))
        whole = np.arange(6).astype(DTYPES[datatype])
        assert self.convert(whole, datatype) is whole


class TestCheckFinite:
    @pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
    def test_names_the_first(self, dtype: str) -> None:
        tensors.check_finite(np.zeros((2, 3), dtype), place)
        for bad, words in ((NAN, "NaN or null"), (INF, "infinite, or too large for FP"), (-INF, "infinite, or too large for FP")):
            array = np.zeros((2, 3), dtype)
            array[1, 1], array[1, 2] = bad, NAN
            with pytest.raises(ProtocolError, match=f"^Value 4 is {words}.*: a model takes finite numbers only"):
                tensors.check_finite(array, place)


class TestNames:
    def test_the_names_of_datatypes(self) -> None:
        assert [tensors.DATATYPE_NAMES[dtype] for dtype in NUMERIC.values()] == list(NUMERIC)
        assert tensors.shorten("x" * 1000) == repr("x" * 57 + "...")

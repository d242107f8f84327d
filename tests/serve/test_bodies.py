"""Bodies as they cross the wire: lengths that are missing or untrue, limits, compression, bombs, and answers as clients accept them."""

import gzip
import io
import random
import tracemalloc
import zlib
from typing import Any

import pytest

from gdlib.serve import bodies
from gdlib.serve.bodies import MAX_BYTES, MAX_JSON_BYTES, MIN_COMPRESSED, pack, read_body, read_optional_body
from gdlib.serve.exchange import HTTPError
from gdlib.serve.tensors import ProtocolError
from tests.serve.fuzz_bodies import Fuzzer

BODY = b'{"inputs": []}'
PACK = {"gzip": gzip.compress, "deflate": zlib.compress}
MIB = 2**20


class Drops(io.BytesIO):
    """A stream that hands out a few bytes at a time, and breaks when `after` of them are gone."""

    def __init__(self, body: bytes, step: int = 3, after: int | None = None) -> None:
        super().__init__(body)
        self.step, self.after, self.most = step, after, 0

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert size >= 0, "a read without a limit"
        self.most = max(self.most, size)
        if self.after is not None and self.tell() >= self.after:
            raise OSError("gone")
        return super().read(min(size, self.step))


def environ(body: bytes, stream: Any = None, length: str | None = "", **more: Any) -> dict[str, Any]:
    full = {"wsgi.input": stream or io.BytesIO(body), **more}
    if length is not None:
        full["CONTENT_LENGTH"] = length or str(len(body))
    return full


def refused(status: int, environ: dict[str, Any]) -> str:
    """The words of an error with this status."""
    with pytest.raises((ProtocolError, HTTPError)) as caught:
        read_body(environ)
    assert getattr(caught.value, "status", 400) == status
    return str(caught.value)


def zeros(count: int, encoding: str = "gzip") -> bytes:
    packer = zlib.compressobj(9, wbits=bodies._WBITS[encoding])
    return b"".join([*(packer.compress(bytes(MIB)) for _ in range(count // MIB)), packer.compress(bytes(count % MIB)), packer.flush()])


class TestLength:
    def test_a_whole_body(self) -> None:
        assert read_body(environ(BODY)) == (BODY, len(BODY))
        assert read_body(environ(b"", length="0")) == (b"", 0)

    def test_no_more_than_its_length(self) -> None:
        stream = io.BytesIO(BODY + b"the next request")
        assert read_body(environ(BODY, stream)) == (BODY, len(BODY))
        assert stream.read() == b"the next request"

    @pytest.mark.parametrize("step", [1, 3, 1000])
    def test_servers_that_hand_out_what_has_arrived(self, step: int) -> None:
        assert read_body(environ(BODY, Drops(BODY, step))) == (BODY, len(BODY))
        chunked = environ(BODY, Drops(BODY, step), None, **{"wsgi.input_terminated": True})
        assert read_body(chunked) == (BODY, len(BODY))

    @pytest.mark.parametrize("length", [None, "\0"])
    def test_missing(self, length: str | None) -> None:
        full = environ(BODY, length=None) | ({"CONTENT_LENGTH": ""} if length else {})
        assert "The Content-Length header is missing or not a number" in refused(400, full)

    @pytest.mark.parametrize("length", ["abc", "-1", "+5", "1.5", "1_0", " 5", "5 ", "\u0665", "²", "5, 5", "0x5", "1e3"])
    def test_not_a_number(self, length: str) -> None:
        assert "The Content-Length header is missing or not a number: send a length in bytes." in refused(400, environ(BODY, length=length))

    @pytest.mark.parametrize(
        "length", [str(MAX_JSON_BYTES + 1), "1" + "0" * 18, "1" + "0" * 19, pytest.param("9" * 5000, id="5000 digits")]
    )
    def test_too_large_is_not_read(self, length: str) -> None:
        stream = Drops(BODY)
        words = refused(413, environ(BODY, stream, length))
        assert words == f"The body is larger than {MAX_JSON_BYTES} bytes: send fewer rows in one request, or binary tensors."
        assert stream.tell() == 0

    def test_leading_zeros(self) -> None:
        assert read_body(environ(BODY, length="0014")) == (BODY, 14)

    def test_untrue(self) -> None:
        assert "shorter than its Content-Length" in refused(400, environ(BODY, length="15"))
        assert read_body(environ(BODY, length="2"))[0] == BODY[:2]

    @pytest.mark.parametrize("after", [0, 6])
    def test_a_connection_that_breaks(self, after: int) -> None:
        assert "The connection broke before the body was whole" in refused(400, environ(BODY, Drops(BODY, after=after)))

    def test_the_largest(self) -> None:
        body = b" " * MAX_JSON_BYTES
        for more in ({}, {"wsgi.input_terminated": True}):
            assert read_body(environ(body, length="" if not more else None, **more))[1] == MAX_JSON_BYTES


class TestChunked:
    """The server knows where the body ends, and no length comes before it."""

    def test_reads_to_the_end(self) -> None:
        for length in (None, "\0"):
            full = environ(BODY, length=None, **{"wsgi.input_terminated": True}) | ({"CONTENT_LENGTH": ""} if length else {})
            assert read_body(full) == (BODY, len(BODY))

    def test_a_length_counts_where_it_is_given(self) -> None:
        assert read_body(environ(BODY, length="5", **{"wsgi.input_terminated": True}))[0] == BODY[:5]

    def test_too_large(self) -> None:
        stream = Drops(bytes(MAX_JSON_BYTES + 10), step=MIB)
        assert "larger than" in refused(413, environ(b"", stream, None, **{"wsgi.input_terminated": True}))
        assert stream.most <= MAX_JSON_BYTES + 1
        assert stream.tell() == MAX_JSON_BYTES + 1

    def test_endless(self) -> None:
        class Endless(io.RawIOBase):
            def read(self, size: int = -1) -> bytes:
                return bytes(min(size, MIB))

        full = environ(b"", Endless(), None, HTTP_INFERENCE_HEADER_CONTENT_LENGTH="2", **{"wsgi.input_terminated": True})
        assert refused(413, full) == f"The body is larger than {MAX_BYTES} bytes: send fewer rows in one request."


class TestJSONLength:
    def test_where_the_tensors_begin(self) -> None:
        for length in (0, 1, len(BODY), len(BODY) + 8):
            full = environ(BODY + bytes(8), HTTP_INFERENCE_HEADER_CONTENT_LENGTH=str(length))
            assert read_body(full) == (BODY + bytes(8), length)

    @pytest.mark.parametrize("length", ["", "-1", "+1", "1.0", "x", " 1", "1,1"])
    def test_not_a_number(self, length: str) -> None:
        words = refused(400, environ(BODY, HTTP_INFERENCE_HEADER_CONTENT_LENGTH=length))
        assert words.startswith("The Inference-Header-Content-Length header is missing or not a number")

    @pytest.mark.parametrize("length", ["15", str(MAX_JSON_BYTES + 1), "9" * 19, "9" * 20, pytest.param("9" * 5000, id="5000 digits")])
    def test_more_than_the_body(self, length: str) -> None:
        words = refused(400, environ(BODY, HTTP_INFERENCE_HEADER_CONTENT_LENGTH=length))
        assert words == "The Inference-Header-Content-Length is more than the body holds: send the length of its JSON part."

    def test_limits(self) -> None:
        body = bytes(MAX_JSON_BYTES + 1)
        assert read_body(environ(body, HTTP_INFERENCE_HEADER_CONTENT_LENGTH=str(MAX_JSON_BYTES)))[1] == MAX_JSON_BYTES
        assert f"larger than {MAX_JSON_BYTES} bytes" in refused(413, environ(body, HTTP_INFERENCE_HEADER_CONTENT_LENGTH=str(len(body))))
        full = environ(b"", length=str(MAX_BYTES + 1), HTTP_INFERENCE_HEADER_CONTENT_LENGTH="2")
        assert f"larger than {MAX_BYTES} bytes" in refused(413, full)


class TestCompressed:
    @pytest.mark.parametrize("encoding", PACK)
    @pytest.mark.parametrize("name", [str, str.upper, " {} ".format])
    def test_unpacks(self, encoding: str, name: Any) -> None:
        packed = PACK[encoding](BODY + bytes(8))
        assert read_body(environ(packed, HTTP_CONTENT_ENCODING=name(encoding))) == (BODY + bytes(8), len(BODY) + 8)
        full = environ(packed, HTTP_CONTENT_ENCODING=name(encoding), HTTP_INFERENCE_HEADER_CONTENT_LENGTH=str(len(BODY)))
        assert read_body(full) == (BODY + bytes(8), len(BODY))
        chunked = environ(packed, None, None, HTTP_CONTENT_ENCODING=encoding, **{"wsgi.input_terminated": True})
        assert read_body(chunked)[0] == BODY + bytes(8)

    @pytest.mark.parametrize("encoding", PACK)
    def test_numbers_that_hardly_shrink(self, encoding: str) -> None:
        for size in (4_000, 4_096, 100_000):
            body = random.Random(size).randbytes(size)
            packed = PACK[encoding](body)
            assert read_body(environ(packed, HTTP_CONTENT_ENCODING=encoding))[0] == body
            assert "not one whole" in refused(400, environ(packed[:-1], HTTP_CONTENT_ENCODING=encoding))

    @pytest.mark.parametrize("encoding", ["", "identity", "Identity", " identity"])
    def test_nothing_to_unpack(self, encoding: str) -> None:
        assert read_body(environ(BODY, HTTP_CONTENT_ENCODING=encoding)) == (BODY, len(BODY))

    @pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "br, gzip", "gzip;q=1", "*", "x" * 1000])
    def test_unknown_encodings(self, encoding: str) -> None:
        words = refused(415, environ(BODY, HTTP_CONTENT_ENCODING=encoding))
        assert words.endswith("use gzip, deflate or none.")
        assert len(words) < 150
        with pytest.raises(HTTPError) as caught:
            read_body(environ(BODY, HTTP_CONTENT_ENCODING=encoding))
        assert caught.value.headers == (("Accept-Encoding", "gzip, deflate"),)

    @pytest.mark.parametrize("encoding", PACK)
    def test_truncated_at_every_byte(self, encoding: str) -> None:
        packed = PACK[encoding](BODY)
        for size in range(len(packed)):
            assert "not one whole" in refused(400, environ(packed[:size], HTTP_CONTENT_ENCODING=encoding))

    @pytest.mark.parametrize("encoding", PACK)
    @pytest.mark.parametrize("more", [b"x", b"\0", gzip.compress(BODY), bytes(10_000)])
    def test_something_after_it(self, encoding: str, more: bytes) -> None:
        assert "and nothing after it" in refused(400, environ(PACK[encoding](BODY) + more, HTTP_CONTENT_ENCODING=encoding))

    @pytest.mark.parametrize("encoding", PACK)
    def test_not_what_it_says(self, encoding: str) -> None:
        raw = zlib.compressobj(wbits=-15)
        for body in (
            BODY,
            PACK["deflate" if encoding == "gzip" else "gzip"](BODY),
            raw.compress(BODY) + raw.flush(),
            PACK[encoding](BODY)[:-4] + b"oops",
        ):
            assert f"The body is not '{encoding}' data" in refused(400, environ(body, HTTP_CONTENT_ENCODING=encoding))


class TestBombs:
    """64 MiB of zeros are 65 KB of gzip."""

    @pytest.mark.parametrize("encoding", PACK)
    def test_no_more_than_the_limit_is_held(self, encoding: str) -> None:
        for limit, more in ((MAX_JSON_BYTES, {}), (MAX_BYTES, {"HTTP_INFERENCE_HEADER_CONTENT_LENGTH": "2"})):
            bomb = zeros(4 * limit, encoding)
            assert len(bomb) < limit / 200
            full = environ(bomb, HTTP_CONTENT_ENCODING=encoding, **more)
            tracemalloc.start()
            try:
                assert f"larger than {limit} bytes" in refused(413, full)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < limit + 10 * MIB

    @pytest.mark.parametrize("encoding", PACK)
    def test_exactly_the_limit(self, encoding: str) -> None:
        assert read_body(environ(zeros(MAX_JSON_BYTES, encoding), HTTP_CONTENT_ENCODING=encoding))[1] == MAX_JSON_BYTES
        assert "larger" in refused(413, environ(zeros(MAX_JSON_BYTES + 1, encoding), HTTP_CONTENT_ENCODING=encoding))

    def test_what_is_small_packed_may_be_too_large_for_json(self) -> None:
        full = environ(zeros(9 * MIB), HTTP_CONTENT_ENCODING="gzip", HTTP_INFERENCE_HEADER_CONTENT_LENGTH=str(9 * MIB))
        assert f"larger than {MAX_JSON_BYTES} bytes" in refused(413, full)


class TestOptional:
    def test_none_or_one(self) -> None:
        for none in ({}, {"CONTENT_LENGTH": ""}, {"CONTENT_LENGTH": "0"}, {"wsgi.input_terminated": False}):
            assert read_optional_body({"wsgi.input": io.BytesIO(b"not ours"), **none}) == b""
        assert read_optional_body(environ(BODY)) == BODY
        assert read_optional_body(environ(BODY, length=None, **{"wsgi.input_terminated": True})) == BODY


class TestAnswers:
    LONG = b"0123456789" * (MIN_COMPRESSED // 10 + 1)

    @pytest.mark.parametrize(
        ("accepted", "encoding"),
        [
            ("gzip", "gzip"),
            ("deflate", "deflate"),
            ("deflate, gzip", "gzip"),
            ("GZIP", "gzip"),
            (" gzip ;q=0.5 , br", "gzip"),
            ("gzip;q=1.0", "gzip"),
            ("gzip;q=0.001", "gzip"),
            ("gzip;q=0, deflate", "deflate"),
            ("gzip;q=0", None),
            ("gzip; q=0.0", None),
            ("gzip ; Q = 0.000", None),
            ("gzip;q=0,deflate;q=0.", None),
            ("identity", None),
            ("br, zstd", None),
            ("xgzip, gzipx", None),
            ("*", None),
            ("", None),
            (",;,;q=,=0", None),
        ],
    )
    def test_as_the_client_accepts(self, accepted: str, encoding: str | None) -> None:
        packed, given = pack(self.LONG, accepted)
        assert given == encoding
        assert (packed if encoding is None else zlib.decompress(packed, bodies._WBITS[encoding])) == self.LONG
        assert (len(packed) < 100) == (encoding is not None)

    def test_short_ones_stay_as_they_are(self) -> None:
        assert pack(self.LONG[: MIN_COMPRESSED - 1], "gzip") == (self.LONG[: MIN_COMPRESSED - 1], None)
        assert pack(self.LONG[:MIN_COMPRESSED], "gzip")[1] == "gzip"


class TestFuzzed:
    def test_no_body_breaks_it(self) -> None:
        """A small run of the fuzzer beside this file, which fails on whatever is no answer of the protocol."""
        fuzzer = Fuzzer(seed=1)
        fuzzer.run(20_000)
        assert fuzzer.statuses[200] > 1_000
        assert fuzzer.statuses[400] > 5_000
        assert len(fuzzer.texts) > 100

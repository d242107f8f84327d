"""Bodies of requests and answers as they cross the wire: lengths, limits and Content-Encoding.

Every limit holds for what arrives and for what it unpacks to: 64 MiB of zeros are 65 KB of gzip.
"""

import zlib
from http import HTTPStatus
from wsgiref.types import WSGIEnvironment

from gdlib.serve.exchange import HTTPError
from gdlib.serve.tensors import ProtocolError, shorten

MAX_JSON_BYTES = 8 * 2**20  # parsed JSON takes some 10 to 40 times its size in memory
MAX_BYTES = 64 * 2**20  # of a body with binary tensors, which are used where they lie
MIN_COMPRESSED = 1024  # bytes; below it an answer fits one packet anyway
_LEVEL = 1  # of compression: numbers hardly shrink further at higher ones
_STEP = 4096  # bytes unpacked at once, to 4 MiB at most, of which zlib then holds two copies
_WBITS = {"gzip": 31, "deflate": 15}  # zlib's names for the two formats; HTTP's deflate is zlib's, with its header


def read_body(environ: WSGIEnvironment) -> tuple[bytes, int]:
    """(the body, unpacked; the length of its JSON part, which is all of it unless a header says otherwise).

    Raises ProtocolError for lengths that are missing or untrue, HTTPError 413 above a limit and 415 for an unknown encoding.
    """
    header = environ.get("HTTP_INFERENCE_HEADER_CONTENT_LENGTH")
    limit = MAX_JSON_BYTES if header is None else MAX_BYTES
    length = environ.get("CONTENT_LENGTH")
    if not length and environ.get("wsgi.input_terminated"):  # sent in chunks, by a server that knows where they end
        body = _read(environ, limit + 1)
        if len(body) > limit:
            raise _too_large(limit)
    else:
        size = _as_size(length or "", "Content-Length")
        if size > limit:
            raise _too_large(limit)
        body = _read(environ, size)
        if len(body) < size:
            raise ProtocolError("The body is shorter than its Content-Length: send all of it.")
    encoding = environ.get("HTTP_CONTENT_ENCODING")
    if encoding and encoding.strip().lower() != "identity":
        body = _unpack(body, encoding, limit)
    if header is None:
        return body, len(body)
    json_length = _as_size(header, "Inference-Header-Content-Length")
    if json_length > len(body):
        raise ProtocolError("The Inference-Header-Content-Length is more than the body holds: send the length of its JSON part.")
    if json_length > MAX_JSON_BYTES:
        raise _too_large(MAX_JSON_BYTES)
    return body, json_length


def read_optional_body(environ: WSGIEnvironment) -> bytes:
    """The body, all of it JSON, of a request that may have none."""
    if not environ.get("CONTENT_LENGTH") and not environ.get("wsgi.input_terminated"):
        return b""
    # tritonclient leaves this header of an inference in the caller's dict of headers, and sends it along from then on.
    return read_body({key: value for key, value in environ.items() if key != "HTTP_INFERENCE_HEADER_CONTENT_LENGTH"})[0]


def pack(body: bytes, accept_encoding: str) -> tuple[bytes, str | None]:
    """(the body, perhaps compressed; its Content-Encoding or None), as the client's Accept-Encoding allows."""
    if len(body) < MIN_COMPRESSED:
        return body, None
    accepted = {token.strip().lower() for token in accept_encoding.split(",") if not _refused(token)}
    for encoding in ("gzip", "deflate"):
        if any(token.split(";")[0].strip() == encoding for token in accepted):
            packer = zlib.compressobj(_LEVEL, wbits=_WBITS[encoding])
            return packer.compress(body) + packer.flush(), encoding
    return body, None


def _refused(token: str) -> bool:
    parameter = token.partition(";")[2].replace(" ", "").lower()
    return parameter.startswith("q=0") and not parameter[3:].strip(".0")


def _as_size(text: str, header: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ProtocolError(f"The {header} header is missing or not a number: send a length in bytes.")
    return int(text) if len(text) < 20 else 10**20  # Python refuses to read integers of thousands of digits


def _too_large(limit: int) -> HTTPError:
    advice = "fewer rows in one request" if limit == MAX_BYTES else "fewer rows in one request, or binary tensors"
    return HTTPError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body is larger than {limit} bytes: send {advice}.")


def _read(environ: WSGIEnvironment, size: int) -> bytes:
    stream = environ["wsgi.input"]
    try:
        body: bytes = stream.read(size)
        if len(body) < size:  # some servers hand out what has arrived
            parts, left = [body], size - len(body)
            while left > 0 and (more := stream.read(left)):
                parts.append(more)
                left -= len(more)
            body = b"".join(parts)
    except OSError:
        raise ProtocolError("The connection broke before the body was whole: send it again.") from None
    return body


def _unpack(body: bytes, encoding: str, limit: int) -> bytes:
    wbits = _WBITS.get(encoding.strip().lower())
    if wbits is None:
        status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        raise HTTPError(
            status, f"The Content-Encoding is {shorten(encoding)}: use gzip, deflate or none.", ("Accept-Encoding", "gzip, deflate")
        )
    unpacker = zlib.decompressobj(wbits)
    parts: list[bytes] = []
    at, left = 0, limit
    while at < len(body) and not unpacker.eof:
        try:
            parts.append(unpacker.decompress(body[at : at + _STEP], left + 1))
        except zlib.error:
            raise ProtocolError(f"The body is not {shorten(encoding)} data: compress it again, or leave Content-Encoding out.") from None
        left -= len(parts[-1])
        if left < 0:
            raise _too_large(limit)
        at += _STEP
    if not unpacker.eof or unpacker.unused_data or at < len(body):
        raise ProtocolError(f"The body is not one whole {shorten(encoding)} stream: send all of it, and nothing after it.")
    return b"".join(parts)

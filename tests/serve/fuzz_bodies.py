"""A fuzzer of inference requests: valid ones, mutated, through the whole way from the WSGI environment to the answer.

    python tests/serve/fuzz_bodies.py --executions 1000000 --seed 0

A tenth goes through the application, the rest through the functions that it is made of; every twentieth is also read by the exact
parser, which must agree. What ends in anything but an answer of the protocol or one sentence that refuses is a failure, and is printed
with what makes it happen again. The same seed gives the same requests. A request whose answer is new joins those that are mutated.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gdlib.serve import tensors
from gdlib.serve.app import App
from gdlib.serve.bodies import read_body
from gdlib.serve.exchange import HTTPError
from gdlib.serve.parsing import parse_json, parse_request
from gdlib.serve.protocol import InferRequest, Signature, UnsupportedError, decode, decode_binary, decode_json, encode
from gdlib.serve.repository import Repository
from gdlib.serve.tensors import DTYPES, ProtocolError

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it has no package around it
from tests.serve.fuzz_requests import MODELS, Case, Mutator, corpus, environ_of

_NAME = r"""(?:(?<![a-z])'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?\b(?:0x[0-9a-f]+|[0-9]+))"""
_NAMES = re.compile(rf"{_NAME}(?:, {_NAME})*")  # what differs between two texts of a kind


class Fuzzer:
    """Runs requests, and raises AssertionError for one that is answered as it should not be."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._mutator = Mutator(self._chance)
        self._valid = corpus()
        self._found: list[Case] = []
        self.statuses: Counter[int] = Counter()
        self.texts: dict[str, int] = {}  # what was said, without names and numbers -> the status

    def run(self, executions: int) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("error")
            app = _app(Path(folder))
            for number in range(executions):
                case = self._valid[number] if number < len(self._valid) else self._mutator.mutate(self._pick(), self._pick())
                try:
                    status, text = self._through_app(app, case) if number % 10 == 0 else self._through_functions(case, number % 20 == 1)
                except Exception as error:
                    raise AssertionError(f"execution {number}: {type(error).__name__}: {error}\n{case}") from error
                self.statuses[status] += 1
                kind = f"{status} " + _NAMES.sub("_", text)
                if kind not in self.texts:
                    self.texts[kind] = status
                    if len(case.json) + len(case.tail) < 20_000:
                        self._found.append(case)

    def _pick(self) -> Case:
        return self._chance.choice(self._found if self._chance.random() < 0.2 and self._found else self._valid)

    def _through_functions(self, case: Case, compare: bool) -> tuple[int, str]:
        signature = MODELS[case.model].signature
        try:
            body, json_length = read_body(environ_of(case))
            tail = memoryview(body)[json_length:]
            if compare:
                _compare(body[:json_length], tail, signature)
            header = body[:json_length]
            request = decode_binary(header, tail, signature) if tail else decode_json(header, signature)
            arrays = MODELS[case.model].predict(request.arrays)
            answer, length = encode(case.model, "1", arrays, request.outputs, request.identifier)
        except (ProtocolError, HTTPError) as error:
            _check_text(str(error))
            return getattr(error, "status", 501 if isinstance(error, UnsupportedError) else 400), str(error)
        _check_request(request, signature)
        _check_answer(answer, length, request, arrays)
        return 200, ",".join(name for name, binary in request.outputs if binary)

    def _through_app(self, app: App, case: Case) -> tuple[int, str]:
        started: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], _: object = None) -> Any:
            started.extend((status, dict(headers)))

        environ = environ_of(case)
        body = b"".join(app(environ, start))
        status, headers = int(started[0][:3]), started[1]
        assert headers["Content-Length"] == str(len(body))
        if "Content-Encoding" in headers:
            assert headers["Content-Encoding"] in environ["HTTP_ACCEPT_ENCODING"]
            body = zlib.decompress(body, 47)  # either format
        if status == 200:
            length = headers.get("Inference-Header-Content-Length")
            assert headers["Content-Type"] == ("application/json" if length is None else "application/octet-stream")
            _check_answer(body, None if length is None else int(length), None, {})
            return status, "app"
        assert status in (400, 413, 415, 501), f"status {status}: {body!r}"
        error = json.loads(body)
        assert list(error) == ["error"]
        _check_text(error["error"])
        return status, error["error"]


def _app(root: Path) -> App:
    for name in MODELS:
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.safetensors").touch()
    return App(Repository(root, {"model.safetensors": lambda path: MODELS[path.parts[-3]]}), watch_seconds=3600)


def _outcome(read: Callable[[], InferRequest]) -> Any:
    try:
        request = read()
    except ProtocolError as error:
        return str(error)
    arrays = {
        name: (array.dtype, array.shape, array.tolist() if array.dtype == object else array.tobytes())
        for name, array in request.arrays.items()
    }
    return arrays, request[1:]


def _compare(body: bytes, tail: memoryview, signature: Signature) -> None:
    exact = _outcome(lambda: decode(parse_json(body), tail, signature))
    fast = _outcome(lambda: decode(parse_request(body), tail, signature))
    assert fast == exact, f"the parsers disagree: {fast} and {exact}"
    for _ in range(2):  # planned, and remembered
        again = _outcome(lambda: decode_binary(body, tail, signature) if tail else decode_json(body, signature))
        assert again == exact, f"what is remembered changes a request: {again} and {exact}"


def _check_text(text: str) -> None:
    assert text.endswith("."), f"no sentence: {text!r}"
    assert len(text) < 600
    assert "\n" not in text
    text.encode()


def _check_request(request: InferRequest, signature: Signature) -> None:
    assert list(request.arrays) == [name for name in request.arrays if name in {spec.name for spec in signature.inputs}]
    for spec in signature.inputs:
        array = request.arrays[spec.name]
        assert array.dtype == DTYPES[spec.datatype]
        assert array.flags.aligned
        assert len(array.shape) == len(spec.shape)
        assert all(wanted in (-1, size) for size, wanted in zip(array.shape, spec.shape, strict=True))


def _not_json(token: str) -> None:
    raise AssertionError(f"{token} is no JSON")


def _check_answer(body: bytes, length: int | None, request: InferRequest | None, arrays: dict[str, Any]) -> None:
    answer = json.loads(body[:length], parse_constant=_not_json)
    tail = memoryview(body)[len(body) if length is None else length :]
    described = {}
    for output in answer["outputs"]:
        shape = tuple(output["shape"])
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = tensors.from_json(output["data"], output["datatype"], shape, str)
        else:
            values, tail = tensors.from_bytes(tail[:size], output["datatype"], shape), tail[size:]
        described[output["name"]] = size is not None
        if request is not None:
            assert values.dtype == arrays[output["name"]].dtype
            assert np.array_equal(values, arrays[output["name"]], equal_nan=values.dtype.kind == "f")
    assert len(tail) == 0
    assert request is None or (tuple(described.items()) == request.outputs and answer.get("id") == request.identifier)


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutates inference requests until one is answered as it should not be.")
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", action="store_true", help="print every kind of answer")
    arguments = parser.parse_args()
    fuzzer = Fuzzer(arguments.seed)
    begin = time.perf_counter()
    fuzzer.run(arguments.executions)
    seconds = time.perf_counter() - begin
    print(f"{arguments.executions} executions in {seconds:.1f} s, all answered as the protocol has it")
    for status, count in sorted(fuzzer.statuses.items()):
        print(f"{status}: {count} answers, {sum(code == status for code in fuzzer.texts.values())} of different kinds")
    if arguments.texts:
        print(*sorted(fuzzer.texts), sep="\n")


if __name__ == "__main__":
    sys.exit(main())

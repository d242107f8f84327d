"""Servers in processes of their own, and the smallest client that can ask them: what the serving benchmarks run.

MLServer has dependencies that no other peer should have to live with: GDLIB_BENCH_MLSERVER names its command in an environment of its own
(`pip install mlserver "uvloop<0.22"`: workers of MLServer 1.7 do not start with a later uvloop).
"""

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

import gdlib
from benchmarks.measure import Run, UnavailableError

ROOT = Path(__file__).parents[1]
FEATURES = 13
MLSERVER = "GDLIB_BENCH_MLSERVER"
START_SECONDS = 60.0  # until a server that does not answer is given up
INFER = "/v2/models/house/infer"

BARE = """
BODY = b'{"model_name":"house","model_version":"1","outputs":[{"name":"output","datatype":"FP64","shape":[1,1],"data":[0.5]}]}'
HEADERS = [("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))]

def application(environ, start_response):
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", HEADERS)
    return [BODY]
"""
NUMPY_RUNTIME = """
import numpy
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Linear(MLModel):
    async def load(self):
        self.weight, self.bias = numpy.load("weight.npy"), numpy.load("bias.npy")
        return True

    async def predict(self, payload):
        output = self.decode(payload.inputs[0], default_codec=NumpyCodec) @ self.weight.T + self.bias
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("output", output)])
"""


@cache
def model() -> gdlib.Linear:
    return gdlib.Linear(FEATURES, 1, dtype=np.float64, seed=0)


@cache
def rows(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, FEATURES))


def json_body(count: int) -> bytes:
    tensor = {"name": "input", "shape": [count, FEATURES], "datatype": "FP64", "data": rows(count).ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def binary_body(count: int) -> tuple[bytes, int]:
    """(the body, the length of its JSON part)."""
    raw = rows(count).tobytes()
    tensor = {"name": "input", "shape": [count, FEATURES], "datatype": "FP64", "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return header + raw, len(header)


@cache
def folder() -> Path:
    """Everything that the servers read: models for gdlib, an application that answers a constant, a runtime for MLServer."""
    path = Path(tempfile.mkdtemp(prefix="gdlib-bench-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    gdlib.save(model(), path / "models" / "house" / "1" / "model.safetensors", feature_names=[f"x{i}" for i in range(FEATURES)])
    for i in range(10):
        gdlib.save(gdlib.Linear(FEATURES, 1, seed=i), path / "ten" / f"house{i}" / "1" / "model.safetensors")
    (path / "bare.py").write_text(BARE)
    (path / "mlserver").mkdir()
    (path / "mlserver" / "runtime.py").write_text(NUMPY_RUNTIME)
    (path / "mlserver" / "model-settings.json").write_text(json.dumps({"name": "house", "implementation": "runtime.Linear"}))
    np.save(path / "mlserver" / "weight.npy", model().weight.data)
    np.save(path / "mlserver" / "bias.npy", np.asarray(model().state_dict()["bias"]))
    return path


@dataclass
class Running:
    """A server that answers on `port`; `ready_seconds` from the start of its process to its first answer."""

    process: subprocess.Popen[bytes]
    port: int
    ready_seconds: float

    def resident_bytes(self) -> int:
        """Of the process and its children: what is in memory, each page counted in every process that has it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        pids = [str(self.process.pid), *children]
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") for pid in pids)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def start(command: Sequence[str], port: int, *, cwd: Path | None = None, path: str = "/v2/health/ready", **environment: str) -> Running:
    """Start a server and wait until it answers. It is ended with this process."""
    begin = time.perf_counter()
    process = subprocess.Popen(  # in a group of its own, so that workers of one that does not stop can be ended with it
        command,
        cwd=cwd or folder(),
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    atexit.register(end, process)
    while time.perf_counter() - begin < START_SECONDS and process.poll() is None:
        try:
            answer = Connection(port).ask(request("GET", path))
        except OSError:
            time.sleep(0.002)
            continue
        if answer.startswith(b"HTTP/1.1 200"):
            return Running(process, port, time.perf_counter() - begin)
        time.sleep(0.002)
    end(process)
    raise UnavailableError(f"{command[0]} did not start")


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


@cache
def gdlib_server(models: str = "models") -> Running:
    (port,) = free_ports(1)
    return start(python("-m", "gdlib", "serve", str(folder() / models), "--port", str(port)), port, cwd=ROOT)


@cache
def bare_waitress() -> Running:
    (port,) = free_ports(1)
    return start(python("-m", "waitress", f"--listen=127.0.0.1:{port}", "bare:application"), port)


@cache
def granian(constant: bool, workers: int = 2) -> Running:
    if shutil.which("granian", path=str(Path(sys.executable).parent)) is None:
        raise UnavailableError("granian is not installed")
    (port,) = free_ports(1)
    # One blocking thread: more of them wait for each other's GIL.
    options = ["--interface", "wsgi", "--host", "127.0.0.1", "--port", str(port), "--workers", str(workers), "--blocking-threads", "1"]
    target = "bare:application" if constant else "gdlib.serve.wsgi:application"
    command = python("-m", "granian", *options, target)
    return start(command, port, PYTHONPATH=str(ROOT), GDLIB_MODELS=str(folder() / "models"))


@cache
def mlserver(workers: bool) -> Running:
    command = os.environ.get(MLSERVER)
    if command is None:
        raise UnavailableError(f"{MLSERVER} does not name its command")
    http, grpc, metrics = free_ports(3)
    settings: dict[str, object] = {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics, "debug": False}
    if not workers:
        settings["parallel_workers"] = 0
    where = folder() / f"mlserver-{workers}"
    shutil.copytree(folder() / "mlserver", where, dirs_exist_ok=True)
    (where / "settings.json").write_text(json.dumps(settings))
    return start([command, "start", "."], http, cwd=where, path="/v2/models/house/ready")


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Connection:
    """A kept connection: bytes of a request in, bytes of the whole answer out."""

    def __init__(self, port: int, *, patient: bool = True) -> None:
        self._port = port
        self._patient = patient  # connects again when the server has closed the connection
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=START_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, message: bytes) -> bytes:
        self._socket.sendall(message)
        try:
            answer = self._receive()
        except ConnectionError:  # it was idle for longer than the server likes
            if not self._patient:
                raise
            self._connect()
            self._socket.sendall(message)
            answer = self._receive()
        while (head := answer.find(b"\r\n\r\n")) < 0:
            answer += self._receive()
        at = answer[:head].lower().index(b"content-length:") + len(b"content-length:")
        size = head + 4 + int(answer[at:].split(b"\r\n", 1)[0])
        while len(answer) < size:
            answer += self._receive()
        return answer

    def _receive(self) -> bytes:
        part = self._socket.recv(65536)
        if not part:
            raise ConnectionError("the server closed the connection")
        return part


def asking(server: Callable[[], Running], message: bytes) -> Run:
    """One request on a kept connection; gives the answer's body."""
    connection = Connection(server().port)
    return lambda: connection.ask(message).split(b"\r\n\r\n", 1)[1]

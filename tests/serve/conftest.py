"""What the tests of serving share: a model in plain NumPy, a folder of models, and a WSGI client that checks the application."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import numpy as np
import pytest

from gdlib.serve.app import App
from gdlib.serve.models import NativeModel, ServedModel
from gdlib.serve.repository import Repository


class FakeModel:
    """y = x W^T + b with W[out, in] = 10 * out + in and b[out] = out, exact in float32 for small x."""

    def __init__(self, in_features: int = 3, out_features: int = 2, dtype: str = "float64", feature_names: list[str] | None = None) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = np.dtype(dtype)
        self.feature_names = feature_names
        self.target_names: list[str] | None = None
        self.weight = (10 * np.arange(out_features)[:, None] + np.arange(in_features)).astype(dtype)
        self.bias = np.arange(out_features).astype(dtype)

    def predict(self, x: Any) -> np.ndarray:
        if not np.isfinite(x).all():
            raise ValueError("x holds a value that is NaN or infinite")
        return x @ self.weight.T + self.bias


def load_fake(path: Path) -> ServedModel:
    """A loader whose files hold the keyword arguments of a FakeModel as JSON, or the name of what goes wrong."""
    text = path.read_text()
    if text == "broken":
        raise ValueError(f"{path} is not a whole file; save the model again.")
    if text == "crash":
        raise RuntimeError("a secret")
    return NativeModel(FakeModel(**json.loads(text)))


LOADERS = {"model.safetensors": load_fake}


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Client = Callable[..., Reply]


def send(app: Any, method: str, path: str, body: bytes | dict[str, Any] | None = None, *, validate: bool = True, **environ: Any) -> Reply:
    """One request, through the WSGI validator unless it is one that the validator itself refuses to pass on.

    `body` may be bytes or what becomes JSON; `environ` overrides, and None removes.
    """
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    full: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "REMOTE_ADDR": "127.0.0.1",
        "wsgi.input": io.BytesIO(body or b""),
    }
    if body is not None:
        full["CONTENT_LENGTH"] = str(len(body))
    full |= environ
    setup_testing_defaults(full)
    full = {key: value for key, value in full.items() if value is not None}
    started: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        started[:] = [status, headers]
        return lambda data: None

    chunks = (validator(app) if validate else app)(full, start_response)
    answer = b"".join(chunks)
    if validate:
        chunks.close()
    return Reply(int(started[0].split()[0]), dict(started[1]), answer)


@pytest.fixture(scope="session")
def call() -> Client:
    return send


@pytest.fixture
def models_dir(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Writes {"name/version": content} as model files, and gives the folder."""

    def write(files: dict[str, str]) -> Path:
        root = tmp_path / "models"
        root.mkdir()
        for place, content in files.items():
            (root / place).mkdir(parents=True)
            (root / place / "model.safetensors").write_text(content)
        return root

    return write


@pytest.fixture
def loaders() -> dict[str, Callable[[Path], ServedModel]]:
    return LOADERS


@pytest.fixture
def fake_model() -> type[FakeModel]:
    return FakeModel


@pytest.fixture
def client(models_dir: Callable[[dict[str, str]], Path]) -> Callable[[dict[str, str]], Client]:
    """A client of an application over {"name/version": content}."""

    def make(files: dict[str, str]) -> Client:
        app = App(Repository(models_dir(files), LOADERS))
        return lambda *arguments, **environ: send(app, *arguments, **environ)

    return make


@pytest.fixture
def one(client: Callable[[dict[str, str]], Client]) -> Client:
    """A client of an application over one model, a, in one version."""
    return client({"a/1": "{}"})

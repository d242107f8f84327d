"""The servers that the clients' tests ask: each kind once without keys and once with them, for the whole session."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from gdlib.serve.keys import add_key
from tests.clients import models
from tests.clients.servers import ONE, Running


class Keyed(NamedTuple):
    server: Running
    admin: dict[str, str]  # headers
    reader: dict[str, str]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a fresh folder that holds models/."""
    pytest.importorskip("onnx", reason="the models are made with the package onnx")
    pytest.importorskip("onnxruntime", reason="the models run on the package onnxruntime")

    def make() -> Path:
        path = tmp_path_factory.mktemp("served")
        models.write(path / "models")
        return path

    return make


@pytest.fixture(scope="session", params=ONE)
def server(request: pytest.FixtureRequest, folder: Callable[[], Path]) -> Iterator[Running]:
    """One process of each kind, without keys."""
    path = folder()
    with Running(ONE[request.param], path / "models", path / "log", state_dir=path / "state") as running:
        yield running


@pytest.fixture(scope="session", params=ONE)
def keyed(request: pytest.FixtureRequest, folder: Callable[[], Path]) -> Iterator[Keyed]:
    """One process of each kind, with keys, one of which may load and unload."""
    path = folder()
    admin = add_key(path / "keys.json", "operator", ["models:*", "admin", "metrics"])
    reader = add_key(path / "keys.json", "reader", ["models:house"])
    settings = {"keys": path / "keys.json", "admin": 1, "state_dir": path / "state"}
    with Running(ONE[request.param], path / "models", path / "log", **settings) as running:
        yield Keyed(running, {"Authorization": f"Bearer {admin}"}, {"Authorization": f"Bearer {reader}"})

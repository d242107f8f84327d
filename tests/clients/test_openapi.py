"""The API's description held against the server by schemathesis, which makes requests of all that it says, and of much that it does not."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gdlib.serve.keys import add_key
from tests.clients.servers import ONE, Running

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="no schemathesis: pip install gdlib[clients]"),
]
# 501 and 503 are answers that the description has: an extension that is switched off, a model that is not loaded.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 501, 503]
"""
MODEL = """
[parameters]
"path.model" = "house"
"path.version" = "1"
"""
# A model takes its own inputs only, which no description of all models can say: its refusal of others that fit the description is right.
INFER, OTHERS = ["--include-path-regex", "/infer$"], ["--exclude-path-regex", "/infer$"]
# Nothing is made by one request and deleted by another: these two look for that.
NO_RESOURCES = "use_after_free,ensure_resource_availability"


def run(server: Running, folder: Path, config: str, *options: str, key: str = "", without: str = "") -> None:
    """Let schemathesis try the server, with all its checks but those in `without`."""
    (folder / "schemathesis.toml").write_text(config)
    words = ["--config-file", str(folder / "schemathesis.toml"), "run", f"{server.url}/openapi.json", "--no-color", "--warnings", "off"]
    words += ["--checks", "all", "--exclude-checks", NO_RESOURCES + without, "--generation-deterministic", "--max-examples", "20", *options]
    words += ["--header", f"Authorization: Bearer {key}"] if key else []
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SCHEMATHESIS")}
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=folder, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def path(folder: Callable[[], Path]) -> Path:
    return folder()


def statuses(path: Path) -> set[tuple[str, int]]:
    """(last part of the path, status) of all requests that the server has answered."""
    lines = [json.loads(line) for line in (path / "access.log").read_text().splitlines()]
    return {(line["path"].rpartition("/")[2], line["status"]) for line in lines}


def test_a_server_without_keys(path: Path):
    with Running(ONE["waitress"], path / "models", path / "log", access_log=path / "access.log") as server:
        run(server, path, CONFIG + MODEL, *OTHERS)
        run(server, path, CONFIG + MODEL, *INFER, without=",positive_data_acceptance")
    wanted = {
        ("infer", 200),
        ("infer", 400),
        ("config", 200),
        ("ready", 200),
        ("stats", 200),
        ("load", 403),
        ("index", 200),
        ("index", 400),
    }
    assert wanted <= statuses(path)


def test_a_server_with_keys(path: Path):
    key = add_key(path / "keys.json", "operator", ["models:*", "admin", "metrics"])
    with Running(
        ONE["waitress"], path / "models", path / "log", keys=path / "keys.json", admin=1, access_log=path / "access.log"
    ) as server:
        run(server, path, CONFIG + MODEL, *OTHERS, key=key)
        run(server, path, CONFIG + MODEL, *INFER, key=key, without=",positive_data_acceptance")
        run(server, path, CONFIG, key=key)  # names that no model has
    wanted = {
        ("infer", 401),
        ("infer", 404),
        ("load", 200),
        ("load", 400),
        ("load", 501),
        ("unload", 200),
        ("unload", 404),
        ("metrics", 401),
    }
    assert wanted <= statuses(path)

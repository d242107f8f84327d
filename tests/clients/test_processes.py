"""Several processes of one server: with a common folder they agree with each other, and without one they refuse what they cannot know."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gdlib import save
from gdlib.serve.keys import add_key
from tests.clients import models
from tests.clients.servers import ONE, SEVERAL, Running, eventually

pytestmark = pytest.mark.clients
REQUEST = {"inputs": [{"name": "input", "shape": [3, 2], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}]}
INFER = "/v2/models/house/infer"


class Group:
    """A server of two processes, and the headers that let a client do everything."""

    def __init__(self, server: Running, secret: str) -> None:
        self.server = server
        self.headers = {"Authorization": f"Bearer {secret}"}

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
        return self.server.ask(method, path, body, self.headers)

    def both(self, method: str, path: str, body: Any = None) -> list[tuple[int, Any]]:
        """(status, body) of requests that both processes have answered."""
        return self.server.everywhere(method, path, body, self.headers)


def make(words: list[str], path: Path, **settings: Any) -> tuple[Running, str]:
    secret = add_key(path / "keys.json", "operator", ["models:*", "admin", "metrics"])
    return Running(words, path / "models", path / "log", keys=path / "keys.json", admin=1, **settings), secret


@pytest.fixture(scope="module", params=SEVERAL)
def group(request: pytest.FixtureRequest, folder: Callable[[], Path]) -> Iterator[Group]:
    path = folder()
    server, secret = make(SEVERAL[request.param], path, state_dir=path / "state")
    with server:
        yield Group(server, secret)


def statistics(answer: Any) -> tuple[int, int, int]:
    (found,) = answer["model_stats"]
    return found["execution_count"], found["inference_count"], found["inference_stats"]["fail"]["count"]


def counters(text: bytes) -> tuple[int, int, int]:
    """The same from /metrics."""
    names = ("success", "rows", "failure")
    found = (re.search(rf'^gdlib_inference_{name}_total{{model="house",version="1"}} (\d+)$', text.decode(), re.M) for name in names)
    return tuple(int(match[1]) if match else 0 for match in found)  # type: ignore[return-value]


def test_counts_add_up_over_the_processes(group: Group):
    answered = len(group.both("POST", INFER, REQUEST))
    refused = len(group.both("POST", INFER, {"inputs": []}))
    wanted = (answered, 3 * answered, refused)

    def counted() -> bool:
        return statistics(group.ask("GET", "/v2/models/house/versions/1/stats")[2]) == wanted

    eventually(counted)
    assert {statistics(answer) for _, answer in group.both("GET", "/v2/models/house/stats")} == {wanted}
    assert {counters(answer) for _, answer in group.both("GET", "/metrics")} == {wanted}


def test_unloading_reaches_every_process_at_once(group: Group):
    for _ in range(3):
        group.both("GET", "/v2/models/network")
        assert group.ask("POST", "/v2/repository/models/network/unload")[0] == 200
        assert {status for status, _ in group.both("GET", "/v2/models/network/ready")} == {503}
        assert {status for status, _ in group.both("GET", "/v2/models/network")} == {503}
        states = [{each["name"]: each["state"] for each in index} for _, index in group.both("POST", "/v2/repository/index")]
        assert {state["network"] for state in states} == {"UNAVAILABLE"}
        assert group.ask("POST", "/v2/repository/models/network/load")[0] == 200
        # The others load it in their turn, and meanwhile do not keep requests waiting.
        eventually(lambda: {status for status, _ in group.both("GET", "/v2/models/network/ready")} == {200})


def test_a_new_version_reaches_every_process(group: Group):
    request = REQUEST | {"id": "x"}
    assert {answer["model_version"] for _, answer in group.both("POST", "/v2/models/house64/infer", request)} == {"2"}
    save(models.house("float64", bias=7.0), group.server.models / "house64" / "3" / "model.safetensors")
    eventually(lambda: {answer["model_version"] for _, answer in group.both("POST", "/v2/models/house64/infer", request)} == {"3"})
    assert {answer["outputs"][0]["data"][0] for _, answer in group.both("POST", "/v2/models/house64/infer", request)} == {69.0}


@pytest.mark.parametrize("kind", SEVERAL)
def test_without_a_common_folder_they_refuse(folder: Callable[[], Path], kind: str):
    server, secret = make(SEVERAL[kind], folder())
    with server:
        group = Group(server, secret)
        for method, path in (
            ("GET", "/metrics"),
            ("GET", "/v2/models/stats"),
            ("GET", "/v2/models/house/stats"),
            ("POST", "/v2/repository/models/house/load"),
            ("POST", "/v2/repository/models/house/unload"),
        ):
            answers = group.both(method, path)
            assert {status for status, _ in answers} == {501}
            assert "GDLIB_STATE_DIR" in answers[0][1]["error"]
        assert {status for status, _ in group.both("POST", INFER, REQUEST)} == {200}


def test_one_process_needs_no_common_folder(folder: Callable[[], Path]):
    server, secret = make(ONE["gunicorn"], folder())
    with server:
        group = Group(server, secret)
        assert group.ask("GET", "/metrics")[0] == 200
        assert group.ask("POST", "/v2/repository/models/house/unload")[0] == 200

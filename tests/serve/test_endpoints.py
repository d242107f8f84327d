"""What each endpoint answers: health, index, metadata, statistics and counts after known requests, and models that change under them."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gdlib.serve.app import App
from gdlib.serve.repository import Repository
from tests.waiting import TIMEOUT

Make = Callable[[dict[str, str]], Callable[..., Any]]
TENSOR = {"name": "input", "shape": [2, 3], "datatype": "FP64", "data": [1, 0, 0, 0, 1, 2]}
INFER = "/v2/models/a/infer"


def write(root: Path, place: str, content: str) -> None:
    (root / place).mkdir(parents=True, exist_ok=True)
    temporary = root / place / ".new"
    temporary.write_text(content)
    temporary.replace(root / place / "model.safetensors")


@pytest.fixture
def several(client: Make) -> Callable[..., Any]:
    names = json.dumps({"feature_names": ["x", "y", "z"], "dtype": "float32"})
    return client({"a/1": "{}", "a/2": names, "bad/1": "{}", "bad/2": "broken", "none/1": "broken"})


class TestHealthAndMetadata:
    def test_server(self, one: Any) -> None:
        reply = one("GET", "/v2")
        assert reply.status == 200
        assert reply.json["name"] == "gdlib"
        assert isinstance(reply.json["version"], str)
        assert reply.json["extensions"] == ["binary_tensor_data", "model_repository", "statistics", "model_configuration", "parameters"]

    def test_healthy(self, one: Any) -> None:
        for path in ("/v2/health/live", "/v2/health/ready"):
            reply = one("GET", path)
            assert (reply.status, reply.json) == (200, {"live": True, "ready": True})
        assert one("GET", "/v2/models/a/ready").json == {"name": "a", "ready": True}

    @pytest.mark.parametrize("files", [{}, {"a/1": "broken"}, {"a/1": "{}", "b/1": "crash"}])
    def test_alive_but_not_ready(self, client: Make, files: dict[str, str]) -> None:
        call = client(files)
        reply = call("GET", "/v2/health/live")
        assert (reply.status, reply.json) == (200, {"live": True, "ready": False})
        reply = call("GET", "/v2/health/ready")
        assert (reply.status, reply.json) == (503, {"live": True, "ready": False})

    def test_draining(self, models_dir: Any, loaders: Any, call: Any) -> None:
        app = App(Repository(models_dir({"a/1": "{}"}), loaders))
        app.drain()
        reply = call(app, "GET", "/v2/health/ready")
        assert (reply.status, reply.json) == (503, {"live": True, "ready": False})
        assert call(app, "GET", "/v2/health/live").status == 200
        assert call(app, "GET", "/v2/models/a/ready").status == 503
        assert call(app, "POST", INFER, {"inputs": [TENSOR]}).status == 200, "what has come is answered"

    def test_model(self, several: Any) -> None:
        assert several("GET", "/v2/models/a").json == {
            "name": "a",
            "versions": ["1", "2"],
            "platform": "gdlib",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}],
            "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 2]}],
            "parameters": {"feature_names": ["x", "y", "z"]},
        }
        first = several("GET", "/v2/models/a/versions/1").json
        assert first["inputs"][0]["datatype"] == "FP64"
        assert first["parameters"] == {}

    def test_config(self, several: Any) -> None:
        assert several("GET", "/v2/models/a/config").json == {
            "name": "a",
            "platform": "gdlib",
            "backend": "gdlib",
            "max_batch_size": 0,
            "input": [{"name": "input", "data_type": "TYPE_FP32", "dims": [-1, 3]}],
            "output": [{"name": "output", "data_type": "TYPE_FP32", "dims": [-1, 2]}],
        }
        assert several("GET", "/v2/models/a/versions/1/config").json["input"][0]["data_type"] == "TYPE_FP64"

    def test_a_broken_newest_version_leaves_the_one_before_it_the_default(self, several: Any) -> None:
        assert several("GET", "/v2/models/bad").json["versions"] == ["1"]
        assert several("POST", "/v2/models/bad/infer", {"inputs": [TENSOR]}).json["model_version"] == "1"
        assert several("GET", "/v2/models/bad/ready").status == 200

    @pytest.mark.parametrize(("path", "name"), [("/v2/models/none", "'none' version 1"), ("/v2/models/bad/versions/2", "'bad' version 2")])
    def test_unavailable(self, several: Any, path: str, name: str) -> None:
        for method, rest, body in (("GET", "", None), ("GET", "/config", None), ("POST", "/infer", {"inputs": [TENSOR]})):
            reply = several(method, path + rest, body)
            assert reply.status == 503
            assert reply.json["error"].startswith(f"Model {name} is not available: {name.split(chr(39))[1]}/")
            assert reply.json["error"].endswith("is not a whole file; save the model again.")
            assert reply.headers["Retry-After"] == "1"
        reply = several("GET", path + "/ready")
        assert (reply.status, reply.json["ready"]) == (503, False)
        assert several("GET", path + "/stats").json == {"model_stats": []}

    def test_index(self, several: Any) -> None:
        full = several("POST", "/v2/repository/index").json
        assert [(entry["name"], entry["version"], entry["state"]) for entry in full] == [
            ("a", "1", "READY"),
            ("a", "2", "READY"),
            ("bad", "1", "READY"),
            ("bad", "2", "UNAVAILABLE"),
            ("none", "1", "UNAVAILABLE"),
        ]
        assert full[3]["reason"] == "bad/2/model.safetensors is not a whole file; save the model again."
        assert several("POST", "/v2/repository/index", b"").json == full
        assert several("POST", "/v2/repository/index", {"ready": False}).json == full
        assert several("POST", "/v2/repository/index", {"ready": True}).json == full[:3]
        assert several("POST", "/v2/repository/index", b"[").status == 400

    def test_no_answer_says_where_the_folder_is(self, several: Any, tmp_path: Path) -> None:
        for method, path in (
            ("POST", "/v2/repository/index"),
            ("GET", "/v2/models/none"),
            ("GET", "/v2/models/stats"),
            ("GET", "/metrics"),
            ("GET", "/v2/models/a"),
        ):
            assert str(tmp_path).encode() not in several(method, path).body

    def test_a_name_that_is_no_unicode(self, client: Make, caplog: Any) -> None:
        """What no JSON can hold is an error of the server's, in the server's words."""
        call = client({"a/1": '{"feature_names": ["\\ud800", "y", "z"]}'})
        reply = call("GET", "/v2/models/a")
        assert (reply.status, reply.json) == (500, {"error": "Internal error: the server's log says more."})
        assert "A request failed." in caplog.text
        assert call("POST", INFER, {"inputs": [TENSOR]}).status == 200


class TestStatistics:
    def test_known_requests(self, several: Any) -> None:
        for rows in (1, 2, 2):
            data = [1.0] * 3 * rows
            assert several("POST", INFER, {"inputs": [TENSOR | {"shape": [rows, 3], "data": data}]}).status == 200
        assert several("POST", "/v2/models/a/versions/1/infer", {"inputs": [TENSOR]}).status == 200
        assert several("POST", INFER, b"{").status == 400
        assert several("POST", INFER, {"inputs": []}).status == 400
        assert several("POST", "/v2/models/unknown/infer", {"inputs": [TENSOR]}).status == 404
        assert several("POST", "/v2/models/none/infer", {"inputs": [TENSOR]}).status == 503
        both = several("GET", "/v2/models/a/stats").json["model_stats"]
        assert [(entry["name"], entry["version"]) for entry in both] == [("a", "1"), ("a", "2")]
        first, second = both
        assert (first["inference_count"], first["execution_count"]) == (2, 1)
        assert (second["inference_count"], second["execution_count"]) == (5, 3)
        stats = second["inference_stats"]
        counts = {name: duration["count"] for name, duration in stats.items()}
        assert counts == {
            "success": 3,
            "fail": 2,
            "queue": 3,
            "compute_input": 3,
            "compute_infer": 3,
            "compute_output": 3,
            "cache_hit": 0,
            "cache_miss": 0,
        }
        assert stats["success"]["ns"] == sum(stats[f"compute_{stage}"]["ns"] for stage in ("input", "infer", "output")) > 0
        assert stats["fail"]["ns"] > 0
        assert [(batch["batch_size"], batch["compute_infer"]["count"]) for batch in second["batch_stats"]] == [(1, 1), (2, 2)]
        assert sum(batch["compute_infer"]["ns"] for batch in second["batch_stats"]) == stats["compute_infer"]["ns"]
        assert several("GET", "/v2/models/a/versions/2/stats").json == {"model_stats": [second]}

    def test_all_models(self, client: Make) -> None:
        call = client({"b/10": "{}", "b/9": "{}", "a/1": "{}", "c/1": "broken"})
        everything = call("GET", "/v2/models/stats").json["model_stats"]
        assert [(entry["name"], entry["version"]) for entry in everything] == [("a", "1"), ("b", "9"), ("b", "10")]
        assert all(entry["execution_count"] == entry["last_inference"] == 0 for entry in everything)

    def test_names_that_clients_make_up_take_no_memory(self, one: Any) -> None:
        for i in range(50):
            assert one("POST", f"/v2/models/x{i}/infer", {"inputs": [TENSOR]}).status == 404
            assert one("POST", f"/v2/models/a/versions/{i + 2}/infer", {"inputs": [TENSOR]}).status == 404
        assert len(one("GET", "/v2/models/stats").json["model_stats"]) == 1
        assert b"x1" not in one("GET", "/metrics").body


class TestMetrics:
    def test_known_requests(self, several: Any) -> None:
        for _ in range(3):
            several("POST", INFER, {"inputs": [TENSOR]})
        several("POST", INFER, b"")
        several("GET", "/nothing")
        reply = several("GET", "/metrics")
        assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = reply.body.decode().splitlines()
        for line in (
            'gdlib_responses_total{status="200"} 3',
            'gdlib_responses_total{status="400"} 1',
            'gdlib_responses_total{status="404"} 1',
            'gdlib_inference_success_total{model="a",version="2"} 3',
            'gdlib_inference_failure_total{model="a",version="2"} 1',
            'gdlib_inference_rows_total{model="a",version="2"} 6',
            'gdlib_inference_seconds_bucket{model="a",version="2",le="+Inf"} 3',
            'gdlib_inference_seconds_count{model="a",version="2"} 3',
            'gdlib_batch_rows_bucket{model="a",version="2",le="1"} 0',
            'gdlib_batch_rows_bucket{model="a",version="2",le="4"} 3',
            'gdlib_model_ready{model="bad",version="1"} 1',
            'gdlib_model_ready{model="bad",version="2"} 0',
            "gdlib_in_flight 0",
            "gdlib_access_log_lines_lost 0",
        ):
            assert line in lines
        assert 'gdlib_responses_total{status="200"} 4' in several("GET", "/metrics").body.decode().splitlines()


class TestInFlight:
    def test_more_than_the_limit_are_sent_away(self, models_dir: Any, loaders: Any, fake_model: Any, call: Any, monkeypatch: Any) -> None:
        arrived, go = threading.Semaphore(0), threading.Event()
        predict = fake_model.predict

        def wait(self: Any, x: Any) -> Any:
            arrived.release()
            assert go.wait(TIMEOUT)
            return predict(self, x)

        monkeypatch.setattr(fake_model, "predict", wait)
        app = App(Repository(models_dir({"a/1": "{}", "b/1": "{}"}), loaders), max_in_flight=2)
        with ThreadPoolExecutor(2) as pool:
            inside = [pool.submit(call, app, "POST", INFER, {"inputs": [TENSOR]}) for _ in range(2)]
            try:
                for _ in inside:
                    assert arrived.acquire(timeout=TIMEOUT)
                reply = call(app, "POST", "/v2/models/b/infer", {"inputs": [TENSOR]})
                assert reply.status == 503
                assert reply.headers["Retry-After"] == "1"
                assert reply.json == {"error": "2 requests are being answered already: send this one again in a moment."}
                assert b"\ngdlib_in_flight 2\n" in call(app, "GET", "/metrics").body
                assert call(app, "GET", "/v2/health/ready").status == 200, "all else is answered"
                assert call(app, "POST", "/v2/repository/index").status == 200
            finally:
                go.set()
            assert [reply.result(TIMEOUT).status for reply in inside] == [200, 200]
        assert call(app, "POST", INFER, {"inputs": [TENSOR]}).status == 200
        assert b"\ngdlib_in_flight 0\n" in call(app, "GET", "/metrics").body

    def test_a_request_that_fails_leaves_its_place(self, models_dir: Any, loaders: Any, call: Any) -> None:
        app = App(Repository(models_dir({"a/1": "{}"}), loaders), max_in_flight=1)
        for _ in range(3):
            assert call(app, "POST", INFER, b"{").status == 400
            assert call(app, "POST", INFER, None, CONTENT_LENGTH="100").status == 400
        assert call(app, "POST", INFER, {"inputs": [TENSOR]}).status == 200


class TestChangesUnderRequests:
    def test_a_model_that_goes_between_two_looks_of_one_request(self, models_dir: Any, loaders: Any, call: Any, monkeypatch: Any) -> None:
        """The folder is looked at, and the model dropped, just after the request has found it."""
        root = models_dir({"a/1": "{}", "b/1": "{}"})
        repository = Repository(root, loaders, settle_seconds=0.0)
        app = App(repository)
        get = repository.get

        def get_and_drop(name: str, version: str | None = None) -> Any:
            entry = get(name, version)
            shutil.rmtree(root / name, ignore_errors=True)
            repository.refresh()
            repository.refresh()
            return entry

        monkeypatch.setattr(repository, "get", get_and_drop)
        reply = call(app, "GET", "/v2/models/a")
        assert (reply.status, reply.json["versions"]) == (200, ["1"])
        assert call(app, "POST", "/v2/models/b/infer", {"inputs": [TENSOR]}).status == 200
        assert call(app, "GET", "/v2/models/b").status == 404

    def test_answers_while_models_are_replaced(self, models_dir: Any, loaders: Any, call: Any) -> None:
        """Each answer is that of the version it names: version v has v outputs."""
        root = models_dir({"a/1": '{"out_features": 1}'})
        repository = Repository(root, loaders, settle_seconds=0.0)
        app = App(repository, max_in_flight=1000)
        done = threading.Event()

        def ask() -> set[str]:
            seen: set[str] = set()
            while not done.is_set() or not seen:
                reply = call(app, "POST", INFER, {"inputs": [TENSOR]})
                assert reply.status == 200
                version = reply.json["model_version"]
                assert reply.json["outputs"][0]["shape"] == [2, int(version)]
                assert call(app, "GET", "/v2/models/a").status == 200
                seen.add(version)
            return seen

        with ThreadPoolExecutor(4) as pool:
            askers = [pool.submit(ask) for _ in range(3)]
            try:
                for version in range(2, 20):
                    write(root, f"a/{version}", json.dumps({"out_features": version}))
                    repository.refresh()
                    if version % 3 == 0:
                        repository.load("a")
                    if version > 3:
                        shutil.rmtree(root / "a" / str(version - 2))
            finally:
                done.set()
            assert all(asker.result(TIMEOUT) for asker in askers)
        assert call(app, "POST", INFER, {"inputs": [TENSOR]}).json["model_version"] == "19"

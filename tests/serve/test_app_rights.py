"""Who may do what: peers, keys and their scopes, loading by request, several processes, and what the access log tells of it."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gdlib
from gdlib.serve import create_app
from gdlib.serve.access_log import AccessLog
from gdlib.serve.app import App
from gdlib.serve.keys import KeyFile, add_key, revoke_key
from gdlib.serve.metrics import Metrics
from gdlib.serve.repository import Repository

TENSOR = {"name": "input", "shape": [1, 3], "datatype": "FP64", "data": [1, 0, 0]}
OPEN = ["/v2/health/live", "/v2/health/ready", "/openapi.json", "/"]
CLOSED = [
    ("GET", "/v2"),
    ("GET", "/v2/models/a"),
    ("GET", "/v2/models/nothing"),
    ("GET", "/v2/models/a/ready"),
    ("GET", "/v2/models/a/config"),
    ("GET", "/v2/models/a/stats"),
    ("GET", "/v2/models/stats"),
    ("GET", "/metrics"),
    ("POST", "/v2/models/a/infer"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/a/load"),
    ("POST", "/v2/repository/models/a/unload"),
]
SCOPES = {"all": ["models:*"], "only-a": ["models:a"], "scraper": ["metrics"], "boss": ["admin"]}

Ask = Callable[..., Any]


@pytest.fixture
def make(models_dir: Any, loaders: Any, tmp_path: Path, call: Any) -> Callable[..., Ask]:
    """Applications over one folder of models a and b, as clients that send the key of a name."""
    root = models_dir({"a/1": "{}", "b/1": "{}"})
    path = tmp_path / "keys.json"
    secrets = {name: add_key(path, name, scopes) for name, scopes in SCOPES.items()}

    def application(*, keys: bool = True, admin: bool = True, state: Path | None = None, log: Path | None = None) -> Ask:
        app = App(
            Repository(root, loaders, state_file=state and state / "repository.json", settle_seconds=0.0),
            keys=KeyFile(path) if keys else None,
            admin=admin,
            metrics=Metrics(state),
            access_log=None if log is None else AccessLog(str(log)),
        )

        def ask(key: str | None, method: str, target: str, body: Any = None, **environ: Any) -> Any:
            if key is not None:
                environ["HTTP_AUTHORIZATION"] = f"Bearer {secrets.get(key, key)}"
            if target.endswith("/infer") and body is None:
                body = {"inputs": [TENSOR]}
            return call(app, method, target, body, **environ)

        return ask

    return application


class TestWithoutKeys:
    @pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "", "localhost"])
    def test_local_peers(self, make: Any, peer: str) -> None:
        ask = make(keys=False)
        assert ask(None, "GET", "/v2/models/a", REMOTE_ADDR=peer).status == 200

    @pytest.mark.parametrize("peer", ["10.0.0.1", "::2", "127.0.0.1, 10.0.0.1", "localhost.example", "unknown", None])
    def test_other_peers(self, make: Any, peer: str | None) -> None:
        ask = make(keys=False)
        for method, path in [*CLOSED, *(("GET", path) for path in OPEN), ("GET", "/nothing")]:
            reply = ask(None, method, path, REMOTE_ADDR=peer)
            assert reply.status == 403
            assert "give it a file of `gdlib keys`" in reply.json["error"]

    def test_loading_wants_a_key_all_the_same(self, make: Any) -> None:
        ask = make(keys=False)
        for action in ("load", "unload"):
            assert ask(None, "POST", f"/v2/repository/models/a/{action}").status == 403

    def test_a_key_that_nobody_asked_for_does_no_harm(self, make: Any) -> None:
        assert make(keys=False)("all", "GET", "/v2/models/a").status == 200


class TestKeys:
    def test_what_is_open(self, make: Any) -> None:
        ask = make()
        for path in OPEN:
            assert ask(None, "GET", path, REMOTE_ADDR="10.0.0.1").status == 200
            assert ask("wrong", "GET", path, REMOTE_ADDR="10.0.0.1").status == 200

    @pytest.mark.parametrize(("method", "path"), CLOSED)
    def test_what_is_closed(self, make: Any, method: str, path: str) -> None:
        ask = make()
        for key in (None, "wrong", "", "gdlib_", "x" * 10_000):
            reply = ask(key, method, path)
            assert reply.status == 401
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            assert reply.json == {"error": "The request holds no key that is in force: send the header 'Authorization: Bearer <key>'."}

    def test_other_schemes(self, make: Any, tmp_path: Path, call: Any) -> None:
        secret = add_key(tmp_path / "keys.json", "new", ["models:*"])
        ask = make()
        for header, status in {
            f"Bearer {secret}": 200,
            f"bearer {secret}": 200,
            f"BEARER   {secret} ": 200,
            f"Basic {secret}": 401,
            secret: 401,
            f"Bearer{secret}": 401,
            "Bearer": 401,
            f"Bearer {secret} {secret}": 401,
            f"Bearer {secret},": 401,
        }.items():
            assert ask(None, "GET", "/v2", HTTP_AUTHORIZATION=header).status == status, header

    # What each scope may do, in the order of the keys: all, only-a, scraper, boss.
    @pytest.mark.parametrize(
        ("method", "path", "statuses"),
        [
            ("GET", "/v2", (200, 200, 200, 200)),
            ("GET", "/v2/models/a", (200, 200, 403, 403)),
            ("GET", "/v2/models/b", (200, 403, 403, 403)),
            ("GET", "/v2/models/nothing", (404, 403, 403, 403)),
            ("GET", "/v2/models/*", (404, 403, 403, 403)),
            ("GET", "/v2/models/a/ready", (200, 200, 403, 403)),
            ("GET", "/v2/models/b/ready", (200, 403, 403, 403)),
            ("GET", "/v2/models/b/config", (200, 403, 403, 403)),
            ("GET", "/v2/models/b/stats", (200, 403, 403, 403)),
            ("GET", "/v2/models/b/versions/1", (200, 403, 403, 403)),
            ("POST", "/v2/models/a/infer", (200, 200, 403, 403)),
            ("POST", "/v2/models/b/infer", (200, 403, 403, 403)),
            ("POST", "/v2/models/b/versions/1/infer", (200, 403, 403, 403)),
            ("POST", "/v2/repository/index", (200, 200, 200, 200)),
            ("GET", "/v2/models/stats", (200, 200, 200, 200)),
            ("GET", "/metrics", (403, 403, 200, 403)),
            ("POST", "/v2/repository/models/a/load", (403, 403, 403, 200)),
            ("POST", "/v2/repository/models/a/unload", (403, 403, 403, 200)),
            ("POST", "/v2/repository/models/nothing/load", (403, 403, 403, 404)),
            ("POST", "/v2/repository/models/nothing/unload", (403, 403, 403, 404)),
        ],
    )
    def test_scopes(self, make: Any, method: str, path: str, statuses: tuple[int, ...]) -> None:
        ask = make()
        replies = [ask(key, method, path) for key in SCOPES]
        assert tuple(reply.status for reply in replies) == statuses
        for reply in replies:
            if reply.status == 403:
                assert reply.json["error"].startswith("The key does not have the scope '")

    def test_lists_hold_what_the_key_may_see(self, make: Any) -> None:
        ask = make()
        for key, names in {"all": ["a", "b"], "only-a": ["a"], "scraper": [], "boss": []}.items():
            assert [entry["name"] for entry in ask(key, "POST", "/v2/repository/index").json] == names
            assert [entry["name"] for entry in ask(key, "GET", "/v2/models/stats").json["model_stats"]] == names

    def test_a_thousand_wrong_keys(self, make: Any) -> None:
        ask = make()
        assert {ask(f"gdlib_{i}", "GET", "/v2").status for i in range(1000)} == {401}
        assert ask("all", "GET", "/v2").status == 200

    def test_changes_count_at_the_next_request(self, make: Any, tmp_path: Path) -> None:
        ask, path = make(), tmp_path / "keys.json"
        assert ask("all", "GET", "/v2").status == 200
        content = path.read_bytes()
        path.write_bytes(content[:-9])
        assert ask("all", "GET", "/v2").status == 200
        path.unlink()
        assert ask("all", "GET", "/v2").status == 401
        path.write_bytes(content)
        assert ask("all", "GET", "/v2").status == 200
        revoke_key(path, "all")
        assert ask("all", "GET", "/v2").status == 401
        assert ask("only-a", "GET", "/v2").status == 200

    def test_create_app(self, tmp_path: Path, call: Any) -> None:
        gdlib.save(gdlib.Linear(3, 2, seed=0), tmp_path / "models" / "a" / "1" / "model.safetensors")
        secret = add_key(tmp_path / "keys.json", "k", ["models:*"])
        with pytest.raises(ValueError, match="admin needs keys"):
            create_app(tmp_path / "models", admin=True)
        with pytest.raises(ValueError, match="max_in_flight is 0: pass 1 or more"):
            create_app(tmp_path / "models", max_in_flight=0)
        with pytest.raises(FileNotFoundError, match="make one with `gdlib keys add`"):
            create_app(tmp_path / "models", keys=tmp_path / "nothing.json")
        app = create_app(
            tmp_path / "models", keys=tmp_path / "keys.json", state_dir=tmp_path / "new" / "state", access_log=str(tmp_path / "log")
        )
        assert call(app, "GET", "/v2").status == 401
        assert call(app, "GET", "/v2", HTTP_AUTHORIZATION=f"Bearer {secret}").status == 200
        assert (tmp_path / "new" / "state").is_dir()
        assert len((tmp_path / "log").read_text().splitlines()) == 2


class TestLoading:
    def test_switched_off(self, make: Any) -> None:
        ask = make(admin=False)
        for action in ("load", "unload"):
            reply = ask("boss", "POST", f"/v2/repository/models/a/{action}")
            assert reply.status == 403
            assert "start the server with --admin" in reply.json["error"]
        assert ask("all", "POST", "/v2/models/a/infer").status == 200

    def test_unload_and_load(self, make: Any) -> None:
        ask = make()
        reply = ask("boss", "POST", "/v2/repository/models/a/unload", {"parameters": {"unload_dependents": False}})
        assert (reply.status, reply.json) == (200, {})
        reply = ask("all", "POST", "/v2/models/a/infer")
        assert (reply.status, reply.json) == (503, {"error": "Model 'a' version 1 is not available: it was unloaded by request."})
        assert ask("all", "GET", "/v2/health/ready").status == 200
        reply = ask("boss", "POST", "/v2/repository/models/a/load", b"")
        assert (reply.status, reply.json) == (200, {})
        assert ask("all", "POST", "/v2/models/a/infer").status == 200

    def test_a_common_folder_that_is_gone(self, make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        state = tmp_path / "state"
        state.mkdir()
        ask = make(state=state)
        state.rmdir()
        for action in ("unload", "load"):
            reply = ask("boss", "POST", f"/v2/repository/models/a/{action}")
            assert reply.status == 503
            assert "GDLIB_STATE_DIR, cannot be written, and nothing was changed" in reply.json["error"]
            assert str(tmp_path) not in reply.json["error"]
        assert ask("all", "GET", "/v2/models/a/ready").status == 200
        assert "cannot be written for the other processes" in caplog.text

    @pytest.mark.parametrize("body", [{"parameters": {"config": "{}"}}, {"parameters": {"file:1/model.onnx": "AAAA"}}])
    def test_no_configuration_and_no_files(self, make: Any, body: Any) -> None:
        ask = make()
        assert ask("boss", "POST", "/v2/repository/models/a/load", {"parameters": [1]}).status == 400
        reply = ask("boss", "POST", "/v2/repository/models/a/load", body)
        assert reply.status == 501
        assert "send no configuration and no files" in reply.json["error"]

    def test_bodies(self, make: Any) -> None:
        ask = make()
        assert ask("boss", "POST", "/v2/repository/models/a/load", {"parameters": {}}).status == 200
        assert ask("boss", "POST", "/v2/repository/models/a/load", {}).status == 200
        assert ask("boss", "POST", "/v2/repository/models/a/load", b"[").status == 400

    def test_a_load_that_fails_says_so_and_the_old_model_serves(self, make: Any, tmp_path: Path) -> None:
        ask = make()
        (tmp_path / "models" / "a" / "1" / "model.safetensors").write_text("broken")
        reply = ask("boss", "POST", "/v2/repository/models/a/load")
        assert reply.status == 400
        assert reply.json["error"].startswith(
            "failed to load 'a' version 1: a newer file cannot be loaded, and the one before it serves on: a/1/"
        )
        assert str(tmp_path) not in reply.json["error"]
        assert ask("all", "POST", "/v2/models/a/infer").status == 200

    def test_the_folder_is_away(self, make: Any, tmp_path: Path) -> None:
        ask = make()
        os.rename(tmp_path / "models", tmp_path / "away")
        reply = ask("boss", "POST", "/v2/repository/models/a/load")
        assert (reply.status, reply.json) == (503, {"error": "The models folder cannot be read: try again when it is back."})
        assert ask("all", "POST", "/v2/models/a/infer").status == 200

    @pytest.mark.parametrize("name", ["..", "%2e%2e", "a\0", "stats", "a\n", "x" * 5000])
    def test_names(self, make: Any, name: str) -> None:
        ask = make()
        for action in ("load", "unload"):
            reply = ask("boss", "POST", f"/v2/repository/models/{name}/{action}")
            assert reply.status == 404
            assert reply.json["error"].startswith("Request for unknown model: ")


MANY = {"wsgi.multiprocess": True}


class TestSeveralProcesses:
    def test_without_a_common_folder_no_half_truths(self, make: Any) -> None:
        ask = make()
        for key, method, path in (
            ("scraper", "GET", "/metrics"),
            ("all", "GET", "/v2/models/stats"),
            ("all", "GET", "/v2/models/a/stats"),
            ("boss", "POST", "/v2/repository/models/a/load"),
            ("boss", "POST", "/v2/repository/models/a/unload"),
        ):
            reply = ask(key, method, path, **MANY)
            assert reply.status == 501
            assert "GDLIB_STATE_DIR" in reply.json["error"]
        assert ask("all", "POST", "/v2/models/a/infer", **MANY).status == 200

    def test_rights_come_first(self, make: Any) -> None:
        ask = make()
        assert ask("all", "GET", "/metrics", **MANY).status == 403
        assert ask("only-a", "GET", "/v2/models/b/stats", **MANY).status == 403
        assert ask("all", "POST", "/v2/repository/models/a/unload", **MANY).status == 403

    def test_loading_wants_common_knowledge_of_what_is_loaded(
        self, models_dir: Any, make: Any, loaders: Any, tmp_path: Path, call: Any
    ) -> None:
        secret = add_key(tmp_path / "keys.json", "second", ["admin"])
        app = App(Repository(tmp_path / "models", loaders), keys=KeyFile(tmp_path / "keys.json"), admin=True, metrics=Metrics(tmp_path))
        environ = {"HTTP_AUTHORIZATION": f"Bearer {secret}"} | MANY
        assert call(app, "POST", "/v2/repository/models/a/unload", **environ).status == 501

    def test_with_one_they_are_as_one(self, make: Any, tmp_path: Path) -> None:
        one, other = make(state=tmp_path), make(state=tmp_path)
        assert one("boss", "POST", "/v2/repository/models/a/unload", **MANY).status == 200
        for ask in (one, other):
            assert ask("all", "POST", "/v2/models/a/infer", **MANY).status == 503
            assert ask("all", "GET", "/v2/models/a/ready", **MANY).status == 503
            assert [entry["state"] for entry in ask("all", "POST", "/v2/repository/index", **MANY).json] == ["UNAVAILABLE", "READY"]
        assert other("boss", "POST", "/v2/repository/models/a/load", **MANY).status == 200
        for ask in (one, other):
            assert ask("all", "POST", "/v2/models/a/infer", **MANY).status == 200

    def test_counts_add_up(self, make: Any, tmp_path: Path) -> None:
        one, other = make(state=tmp_path), make(state=tmp_path)
        for ask in (one, other, other):
            assert ask("all", "POST", "/v2/models/a/infer", **MANY).status == 200
        assert b'\ngdlib_inference_success_total{model="a",version="1"} 1\n' in one("scraper", "GET", "/metrics", **MANY).body
        assert b'\ngdlib_inference_success_total{model="a",version="1"} 3\n' in other("scraper", "GET", "/metrics", **MANY).body
        (entry,) = one("all", "GET", "/v2/models/a/stats", **MANY).json["model_stats"]
        assert entry["execution_count"] == 3


class TestAccessLog:
    def test_what_a_line_tells(self, make: Any, tmp_path: Path) -> None:
        path = tmp_path / "access.log"
        ask = make(log=path)
        reply = ask("only-a", "POST", "/v2/models/a/infer", HTTP_X_REQUEST_ID="my-id")
        ask("wrong", "GET", "/v2/models/b")
        ask(None, "GET", '/x\n{"id": "forged"}')
        first, second, third = map(json.loads, path.read_text().splitlines())
        assert first["ms"] > 0
        body = json.dumps({"inputs": [TENSOR]})
        assert {key: value for key, value in first.items() if key not in ("time", "ms")} == {
            "id": "my-id",
            "remote": "127.0.0.1",
            "key": "only-a",
            "method": "POST",
            "path": "/v2/models/a/infer",
            "status": 200,
            "model": "a",
            "version": "1",
            "rows": 1,
            "bytes_in": len(body),
            "bytes_out": len(reply.body),
        }
        assert (second["status"], second.get("key"), second.get("model")) == (401, None, None)
        assert (third["status"], third["path"]) == (404, '/x\n{"id": "forged"}')

    def test_no_line_holds_a_key(self, make: Any, tmp_path: Path) -> None:
        path = tmp_path / "access.log"
        ask = make(log=path)
        for key in SCOPES:
            ask(key, "GET", "/v2")
        ask("gdlib_wrong", "GET", "/v2")
        assert "gdlib_" not in path.read_text()

    def test_a_full_disk_stops_no_request(self, make: Any, tmp_path: Path, monkeypatch: Any) -> None:
        ask = make(log=tmp_path / "access.log")

        def full(descriptor: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            assert ask("all", "POST", "/v2/models/a/infer").status == 200
            assert ask("wrong", "GET", "/v2").status == 401
        assert b"\ngdlib_access_log_lines_lost 2\n" in ask("scraper", "GET", "/metrics").body

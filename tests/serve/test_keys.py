"""Access keys: what the file may hold, what each scope allows, and that changes count at once, whatever state the file is in."""

import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gdlib.serve import keys as module
from gdlib.serve.keys import ADMIN, ALL_MODELS, METRICS, KeyFile, add_key, read_keys, revoke_key

ENTRY = {"name": "a", "sha256": "0" * 64, "scopes": ["models:*"], "created": "2026-01-01T00:00:00Z"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def add_several(path: Path, prefix: str, count: int) -> None:
    for i in range(count):
        add_key(path, f"{prefix}{i}", [ALL_MODELS])


class TestFile:
    def test_a_key_is_found_by_its_secret_alone(self, path: Path) -> None:
        secrets = {name: add_key(path, name, [f"models:{name}"]) for name in ("a", "b", "c")}
        file = KeyFile(path)
        for name, secret in secrets.items():
            found = file.find(secret)
            assert found is not None
            assert found.name == name
            for wrong in (secret[:-1], secret + "a", secret.upper(), name, secret.encode().hex(), f" {secret}"):
                assert file.find(wrong) is None

    @pytest.mark.parametrize("secret", ["", "\0", "é", "\ud800", "x" * 100_000, "0" * 64])
    def test_what_is_no_key(self, path: Path, secret: str) -> None:
        path.write_text(json.dumps({"keys": [ENTRY]}))
        assert KeyFile(path).find(secret) is None

    def test_the_hash_is_no_key(self, path: Path) -> None:
        add_key(path, "a", [ADMIN])
        assert KeyFile(path).find(json.loads(path.read_text())["keys"][0]["sha256"]) is None

    def test_the_file_does_not_hold_the_secret(self, path: Path) -> None:
        secret = add_key(path, "a", [METRICS, "models:x"])
        assert secret.startswith("gdlib_")
        assert len(secret) >= 6 + 43, "256 random bits"
        assert secret not in path.read_text()
        assert secret[6:] not in path.read_text()
        (entry,) = json.loads(path.read_text())["keys"]
        assert entry["scopes"] == ["metrics", "models:x"]

    def test_every_hash_is_compared_in_constant_time(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = add_key(path, "a", [ALL_MODELS])
        add_several(path, "b", 3)
        file = KeyFile(path)
        compared: list[str] = []
        real = module.hmac.compare_digest

        def compare(one: str, other: str) -> bool:
            compared.append(one)
            return real(one, other)

        monkeypatch.setattr(module.hmac, "compare_digest", compare)
        for secret in (first, "wrong"):
            compared.clear()
            file.find(secret)
            assert len(compared) == 4, "a match does not end the search"

    def test_folders_are_made(self, tmp_path: Path) -> None:
        add_key(tmp_path / "new" / "folder" / "keys.json", "a", [ALL_MODELS])
        assert len(read_keys(tmp_path / "new" / "folder" / "keys.json")) == 1

    def test_no_other_file_is_left(self, path: Path) -> None:
        add_key(path, "a", [ALL_MODELS])
        revoke_key(path, "a")
        assert os.listdir(path.parent) == ["keys.json"]

    @pytest.mark.parametrize("name", ["", ".a", "a b", "a\n", "é", "a/b", "x" * 65])
    def test_bad_names(self, path: Path, name: str) -> None:
        with pytest.raises(ValueError, match="use up to 64 letters"):
            add_key(path, name, [ALL_MODELS])
        assert not path.exists()

    @pytest.mark.parametrize("scope", ["", "model:a", "models:", "models:a/b", "models:**", "ADMIN", "metrics ", "models:a\n", "*"])
    def test_bad_scopes(self, path: Path, scope: str) -> None:
        with pytest.raises(ValueError, match="use models:NAME"):
            add_key(path, "a", [ALL_MODELS, scope])
        assert not path.exists()

    def test_a_name_in_use(self, path: Path) -> None:
        add_key(path, "a", [ALL_MODELS])
        before = path.read_bytes()
        with pytest.raises(ValueError, match="has a key 'a' already"):
            add_key(path, "a", [ADMIN])
        assert path.read_bytes() == before

    def test_revoke(self, path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="make one with `gdlib keys add`"):
            revoke_key(path.parent / "nothing" / "keys.json", "a")
        add_several(path, "a", 3)
        revoke_key(path, "a1")
        assert [key.name for key in read_keys(path)] == ["a0", "a2"]
        with pytest.raises(ValueError, match="no key 'a1'; it has 'a0', 'a2'"):
            revoke_key(path, "a1")

    def test_two_processes_at_once_lose_nothing(self, path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=add_several, args=(path, prefix, 15)) for prefix in "abc"]
        for worker in workers:
            worker.start()
        add_several(path, "d", 15)
        for worker in workers:
            worker.join(60)
            assert worker.exitcode == 0
        assert {key.name for key in read_keys(path)} == {f"{prefix}{i}" for prefix in "abcd" for i in range(15)}

    def test_several_threads_at_once_lose_nothing(self, path: Path) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: add_key(path, f"k{i}", [ALL_MODELS]), range(24)))
            list(pool.map(lambda i: revoke_key(path, f"k{i}"), range(0, 24, 2)))
        assert {key.name for key in read_keys(path)} == {f"k{i}" for i in range(1, 24, 2)}

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"[]",
            b"{}",
            b"null",
            b'{"keys": 1}',
            b'{"keys": {"a": 1}}',
            b'{"keys": [1]}',
            b'{"keys": [[]]}',
            b"[" * 100_000,
            *(
                json.dumps({"keys": entries}).encode()
                for entries in (
                    [ENTRY | {"sha256": "0" * 63}],
                    [ENTRY | {"sha256": "A" * 64}],
                    [ENTRY | {"sha256": None}],
                    [ENTRY | {"scopes": "models:*"}],
                    [ENTRY | {"scopes": ["root"]}],
                    [ENTRY | {"scopes": [["admin"]]}],
                    [ENTRY | {"name": "a b"}],
                    [ENTRY | {"secret": "x"}],
                    [{key: value for key, value in ENTRY.items() if key != "scopes"}],
                    [ENTRY, ENTRY],
                )
            ),
        ],
    )
    def test_a_file_that_holds_no_keys(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"keys\.json .*; mend it\."):
            KeyFile(path)

    def test_a_missing_file_is_an_error_at_the_start(self, path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="make one with `gdlib keys add`"):
            KeyFile(path)


def test_scopes(path: Path) -> None:
    secrets = {
        scope: add_key(path, scope.replace("*", "all").replace(":", "-"), [scope]) for scope in (ALL_MODELS, "models:a", METRICS, ADMIN)
    }
    file = KeyFile(path)
    allowed = {
        scope: (key.allows_model("a"), key.allows_model("b"), key.allows_model("*"), key.allows(METRICS), key.allows(ADMIN))
        for scope, secret in secrets.items()
        if (key := file.find(secret)) is not None
    }
    assert allowed == {
        ALL_MODELS: (True, True, True, False, False),
        "models:a": (True, False, False, False, False),
        METRICS: (False, False, False, True, False),
        ADMIN: (False, False, False, False, True),
    }


class TestChanges:
    @pytest.fixture
    def secret(self, path: Path) -> str:
        return add_key(path, "a", [ALL_MODELS])

    def test_keys_come_and_go_without_a_restart(self, path: Path, secret: str) -> None:
        file = KeyFile(path)
        new = add_key(path, "b", [ALL_MODELS])
        assert file.find(new) is not None
        revoke_key(path, "a")
        assert file.find(secret) is None
        assert file.find(new) is not None
        revoke_key(path, "b")
        assert file.find(new) is None

    def test_scopes_change_without_a_restart(self, path: Path, secret: str) -> None:
        file = KeyFile(path)
        path.write_text(path.read_text().replace("models:*", "models:b"))
        key = file.find(secret)
        assert key is not None
        assert (key.allows_model("a"), key.allows_model("b")) == (False, True)

    def test_an_edit_that_keeps_size_and_time(self, path: Path, secret: str) -> None:
        file = KeyFile(path)
        assert file.find(secret) is not None
        status = path.stat()
        path.write_text(path.read_text().replace("models:*", "models:b"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        key = file.find(secret)
        assert key is not None
        assert not key.allows_model("a")

    def test_a_half_written_file_leaves_the_keys_in_force(self, path: Path, secret: str, caplog: Any) -> None:
        file = KeyFile(path)
        content = path.read_bytes()
        for part in range(1, 8):
            path.write_bytes(content[: len(content) * part // 8])
            assert file.find(secret) is not None
            assert file.find("wrong") is None
        assert caplog.text.count("the keys read before stay in force") == 7, "once for each state of the file"
        revoke_key_by_hand = json.dumps({"keys": []}).encode()
        path.write_bytes(revoke_key_by_hand)
        assert file.find(secret) is None

    def test_a_missing_file_lets_nobody_in_until_it_is_back(self, path: Path, secret: str, caplog: Any) -> None:
        file = KeyFile(path)
        away = path.with_name("away")
        for _ in range(2):
            path.rename(away)
            assert file.find(secret) is None
            assert file.find(secret) is None
            away.rename(path)
            assert file.find(secret) is not None
        assert caplog.text.count("nobody is let in") == 2, "once each time"

    def test_a_file_that_comes_back_broken_lets_nobody_in(self, path: Path, secret: str) -> None:
        file = KeyFile(path)
        content = path.read_bytes()
        path.unlink()
        assert file.find(secret) is None
        path.write_bytes(content[:-20])
        assert file.find(secret) is None
        path.write_bytes(content)
        assert file.find(secret) is not None

    def test_a_file_that_may_not_be_read(self, path: Path, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
        file = KeyFile(path)
        assert file.find(secret) is not None
        add_key(path, "b", [ALL_MODELS])

        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", refuse)
            assert file.find(secret) is not None

    def test_threads_agree(self, path: Path, secret: str) -> None:
        file = KeyFile(path)
        with ThreadPoolExecutor(4) as pool:
            for i in range(10):
                new = add_key(path, f"n{i}", [ALL_MODELS])
                assert all(pool.map(file.find, [secret, new] * 8))
                revoke_key(path, f"n{i}")
                assert not any(pool.map(file.find, [new] * 8))

"""The models folder while it changes: nothing half-written is served, nothing that serves is lost, and what is mended comes back."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gdlib
from gdlib.serve.repository import Repository

Write = Callable[[dict[str, str]], Path]
HOUR = 3600.0  # seconds


def put(root: Path, place: str, content: str | bytes) -> Path:
    """Replace or make a version's file as `gdlib.save` does: the new one appears whole."""
    folder = root / place
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".new"
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return temporary.replace(folder / "model.safetensors")


def listing(repository: Repository) -> dict[str, str]:
    return {f"{entry.name}/{entry.version}": entry.state for entry in repository.index()}


def inputs(repository: Repository, name: str, version: str | None = None) -> int:
    model = repository.get(name, version).model
    assert model is not None
    return model.signature.inputs[0].shape[1]


@pytest.fixture
def watched(models_dir: Write, loaders: Any) -> Callable[[dict[str, str]], Repository]:
    """A repository that takes every file for whole."""
    return lambda files: Repository(models_dir(files), loaders, settle_seconds=0.0)


Watched = Callable[[dict[str, str]], Repository]


def test_models_and_versions_come_and_go(watched: Watched) -> None:
    repository = watched({"a/1": "{}"})
    put(repository.root, "a/2", '{"in_features": 5}')
    put(repository.root, "b/7", "{}")
    repository.refresh()
    assert listing(repository) == {"a/1": "READY", "a/2": "READY", "b/7": "READY"}
    assert inputs(repository, "a") == 5
    shutil.rmtree(repository.root / "a" / "2")
    shutil.rmtree(repository.root / "b")
    repository.refresh()
    repository.refresh()
    assert listing(repository) == {"a/1": "READY"}
    assert inputs(repository, "a") == 3
    with pytest.raises(KeyError):
        repository.get("b")


def test_a_look_at_what_has_not_changed_loads_nothing(models_dir: Write, loaders: Any) -> None:
    loads: list[Path] = []
    root = models_dir({"a/1": "{}", "a/2": "broken"})
    repository = Repository(root, {"model.safetensors": lambda path: loads.append(path) or loaders["model.safetensors"](path)})
    before = list(repository.index())
    for _ in range(3):
        repository.refresh()
    assert len(loads) == 2
    assert all(new is old for new, old in zip(repository.index(), before, strict=True))


@pytest.mark.parametrize("content", ["broken", "crash"])
def test_a_broken_file_leaves_the_one_before_it_in_service(watched: Watched, content: str) -> None:
    repository = watched({"a/1": "{}"})
    before = repository.get("a").model
    put(repository.root, "a/1", content)
    for _ in range(2):
        repository.refresh()
        entry = repository.get("a")
        assert entry.model is before
        assert entry.state == "READY"
        assert entry.reason.startswith("a newer file cannot be loaded, and the one before it serves on: ")
        assert repository.ready()
    put(repository.root, "a/1", '{"in_features": 4}')
    repository.refresh()
    assert inputs(repository, "a") == 4
    assert repository.get("a").reason == ""


@pytest.mark.parametrize("size", ["changed", "same"])
def test_a_file_that_is_written_in_place(watched: Watched, size: str) -> None:
    repository = watched({"a/1": '{"in_features": 4}'})
    path = repository.root / "a" / "1" / "model.safetensors"
    path.write_text('{"in_features": 5}' if size == "same" else '{"in_features": 5 }')
    os.utime(path, ns=(0, 0))  # older than before, as cp -p leaves it
    repository.refresh()
    assert inputs(repository, "a") == 5


def test_a_file_that_is_gone_while_its_folder_stays(watched: Watched) -> None:
    repository = watched({"a/1": "{}"})
    (repository.root / "a" / "1" / "model.safetensors").unlink()
    for _ in range(3):
        repository.refresh()
    assert inputs(repository, "a") == 3
    assert "a/1 holds no model file" in repository.get("a").reason


def test_a_folder_that_is_missing_for_one_look_is_not_lost(watched: Watched) -> None:
    repository = watched({"a/1": "{}", "a/2": "{}"})
    model = repository.get("a").model
    for _ in range(3):
        os.rename(repository.root / "a", repository.root / ".away")
        repository.refresh()
        assert repository.get("a").model is model
        os.rename(repository.root / ".away", repository.root / "a")
        repository.refresh()
        assert repository.get("a").model is model


def test_a_folder_that_is_back_and_young_counts_as_there(models_dir: Write, loaders: Any) -> None:
    root = models_dir({"a/1": "{}"})
    repository = Repository(root, loaders, settle_seconds=HOUR)
    for _ in range(3):
        os.rename(root / "a" / "1", root / "a" / ".1")
        repository.refresh()
        os.rename(root / "a" / ".1", root / "a" / "1")
        put(root, "a/1", "{}")  # another file, and it may still be written
        repository.refresh()
        assert inputs(repository, "a") == 3


def test_the_whole_folder_removed_and_restored(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    repository = watched({"a/1": "{}"})
    away = repository.root.with_name("away")
    for _ in range(2):
        caplog.clear()
        os.rename(repository.root, away)
        for _ in range(3):
            repository.refresh()
        assert inputs(repository, "a") == 3
        assert repository.ready()
        assert caplog.text.count("cannot be read") == 1, "said once, not at every look"
        os.rename(away, repository.root)
        repository.refresh()
    put(repository.root, "a/1", '{"in_features": 4}')
    repository.refresh()
    assert inputs(repository, "a") == 4


def test_a_folder_that_cannot_be_read(watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    repository = watched({"a/1": "{}", "b/1": "{}"})
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        # Of this folder alone: another application's thread may look at its own meanwhile.
        if Path(path) in (repository.root / "a", repository.root / "c"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    put(repository.root, "b/2", "{}")
    put(repository.root, "c/1", "{}")
    for _ in range(3):
        repository.refresh()
    assert listing(repository) == {"a/1": "READY", "b/1": "READY", "b/2": "READY", "c/": "UNAVAILABLE"}
    assert "no version folder that can be read" in repository.get("c").reason
    assert caplog.text.count("The folder of model a cannot be read") == 1
    monkeypatch.undo()
    repository.refresh()
    assert listing(repository)["c/1"] == "READY"


def test_a_young_file_is_left_alone_and_the_one_before_it_serves(models_dir: Write, loaders: Any) -> None:
    root = models_dir({"a/1": "{}"})
    repository = Repository(root, loaders, settle_seconds=HOUR)
    put(root, "a/1", '{"in_features": 4}')
    put(root, "a/2", '{"in_features": 5}')
    repository.refresh()
    assert inputs(repository, "a", "1") == 3
    assert repository.get("a", "1").reason == ""
    assert repository.get("a", "2").reason == "its file is being written."
    for path in root.glob("*/*/*"):
        os.utime(path, (0, 0))
    repository.refresh()
    assert (inputs(repository, "a", "1"), inputs(repository, "a", "2")) == (4, 5)


def test_a_time_in_the_future_does_not_keep_a_file_out(models_dir: Write, loaders: Any) -> None:
    root = models_dir({})
    repository = Repository(root, loaders, settle_seconds=HOUR)
    os.utime(put(root, "a/1", "{}"), (2**32, 2**32))
    repository.refresh()
    assert inputs(repository, "a") == 3


def test_a_file_that_changes_while_it_is_loaded(models_dir: Write, loaders: Any) -> None:
    root = models_dir({"a/1": "{}"})
    writes = ['{"in_features": 4}', '{"in_features": 5}']

    def load(path: Path) -> Any:
        model = loaders["model.safetensors"](path)
        if writes:
            put(root, "a/1", writes.pop(0))
        return model

    repository = Repository(root, {"model.safetensors": load}, settle_seconds=0.0)
    assert repository.get("a").reason == "its file changed while it was read."
    repository.refresh()
    assert repository.get("a").model is None
    repository.refresh()
    assert inputs(repository, "a") == 5


def test_files_beside_the_model_count_as_parts_of_it(models_dir: Write, loaders: Any) -> None:
    root = models_dir({"a/1": "{}"})

    def load(path: Path) -> Any:
        if not path.with_name("weights.bin").exists():
            raise ValueError("a/1/weights.bin is missing.")
        return loaders["model.safetensors"](path)

    repository = Repository(root, {"model.safetensors": load}, settle_seconds=0.0)
    assert repository.get("a").model is None
    (root / "a" / "1" / "weights.bin").write_bytes(b"0")
    repository.refresh()
    first = repository.get("a").model
    assert first is not None
    (root / "a" / "1" / "weights.bin").write_bytes(b"00")
    repository.refresh()
    assert repository.get("a").model is not first


class TestReadiness:
    def test_what_was_there_at_the_start_must_load(self, watched: Watched) -> None:
        repository = watched({"a/1": "{}", "b/1": "broken"})
        assert not repository.ready()
        put(repository.root, "b/1", "{}")
        repository.refresh()
        assert repository.ready()

    def test_what_cannot_be_loaded_and_is_taken_away_is_not_waited_for(self, watched: Watched) -> None:
        repository = watched({"a/1": "{}", "b/1": "broken"})
        shutil.rmtree(repository.root / "b")
        repository.refresh()
        assert not repository.ready()
        repository.refresh()
        assert repository.ready()

    def test_what_comes_later_does_not_take_readiness_away(self, watched: Watched) -> None:
        repository = watched({"a/1": "{}", "b/1": "{}"})
        put(repository.root, "a/1", "broken")
        put(repository.root, "a/2", "crash")
        put(repository.root, "c/1", "broken")
        shutil.rmtree(repository.root / "b" / "1")
        for _ in range(3):
            repository.refresh()
            assert repository.ready()
        assert listing(repository) == {"a/1": "READY", "a/2": "UNAVAILABLE", "b/": "UNAVAILABLE", "c/1": "UNAVAILABLE"}

    def test_the_first_model_to_come_makes_it_ready(self, watched: Watched) -> None:
        repository = watched({})
        assert not repository.ready()
        put(repository.root, "a/1", "{}")
        repository.refresh()
        assert repository.ready()


class TestHalfWritten:
    @pytest.fixture
    def content(self, tmp_path: Path) -> bytes:
        path = tmp_path / "whole.safetensors"
        gdlib.save(gdlib.Linear(30, 4, seed=1), path, feature_names=[f"f{i}" for i in range(30)])
        return path.read_bytes()

    def test_every_eighth(self, content: bytes, tmp_path: Path) -> None:
        root = tmp_path / "models"
        for part in range(9):
            put(root, f"a/{part}", content[: len(content) * part // 8])
        repository = Repository(root)
        assert repository.versions("a") == ["8"]
        assert all("save the model again" in repository.get("a", str(part)).reason for part in range(8))

    def test_while_it_grows(self, content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """In place of a model that serves, looked at after each piece, as a writer slower than the time to settle makes it."""
        root = tmp_path / "models"
        gdlib.save(gdlib.Linear(30, 2, seed=0), root / "a" / "1" / "model.safetensors")
        repository = Repository(root, settle_seconds=0.0)
        old = repository.get("a").model
        assert old is not None
        x = np.ones((3, 30), np.float32)
        with caplog.at_level(logging.CRITICAL), open(root / "a" / "1" / "model.safetensors", "wb") as file:
            for part in range(8):
                file.write(content[len(content) * part // 8 : len(content) * (part + 1) // 8])
                file.flush()
                repository.refresh()
                entry = repository.get("a")
                if part < 7:
                    assert entry.model is old
                    assert "serves on" in entry.reason
                    assert entry.model.predict({"input": x})["output"].shape == (3, 2)
        model = repository.get("a").model
        assert model is not None
        np.testing.assert_array_equal(model.predict({"input": x})["output"], gdlib.Linear(30, 4, seed=1).predict(x))

    def test_a_file_that_is_cut_short_while_it_is_loaded(self, content: bytes, tmp_path: Path) -> None:
        """In a process of its own: one that has mapped such a file is ended by the system."""
        path = put(tmp_path / "models", "a/1", content)
        code = """
import os, sys
from gdlib import serialization
from gdlib.serve.repository import Repository
build, path = serialization._build, sys.argv[1]
def cut_and_build(*arguments):
    os.truncate(path, 0)
    return build(*arguments)
serialization._build = cut_and_build
repository = Repository(sys.argv[2], settle_seconds=0.0)
print(repository.get("a").reason)
serialization._build = build
repository.refresh()
print(repository.get("a").reason)
"""
        command = [sys.executable, "-c", code, str(path), str(tmp_path / "models")]
        first, second = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert first == "its file changed while it was read."
        assert second.startswith("a/1/model.safetensors is not a whole safetensors file (")

"""The models folder: which files count, which version answers, and that a bad one is reported and stops nothing."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gdlib
from gdlib.serve.repository import Repository

Write = Callable[[dict[str, str]], Path]


def listing(repository: Repository) -> list[tuple[str, str, str]]:
    return [(entry.name, entry.version, entry.state) for entry in repository.index()]


def test_versions_are_ordered_as_numbers(models_dir: Write, load: Any) -> None:
    repository = Repository(models_dir({"a/9": "{}", "a/10": "{}", "a/0": "{}", "b/1": "{}"}), load)
    assert repository.versions("a") == ["0", "9", "10"]
    assert repository.get("a").version == "10"
    assert repository.get("a", "9").version == "9"
    assert listing(repository) == [("a", "0", "READY"), ("a", "9", "READY"), ("a", "10", "READY"), ("b", "1", "READY")]
    assert repository.ready()


@pytest.mark.parametrize(
    ("name", "version"), [("a", "2"), ("a", "01"), ("a", ""), ("a", "../a/1"), ("b", None), ("", None), ("../models/a", "1")]
)
def test_unknown_models_are_key_errors(models_dir: Write, load: Any, name: str, version: str | None) -> None:
    with pytest.raises(KeyError):
        Repository(models_dir({"a/1": "{}"}), load).get(name, version)


def test_other_folders_and_files_are_left_out(models_dir: Write, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = models_dir(
        {"a/1": "{}", "a/01": "{}", "a/v2": "{}", "a/-3": "{}", "a/\u0663": "{}", ".hidden/1": "{}", "two words/1": "{}", "stats/1": "{}"}
    )
    (root / "file").write_text("")
    (root / "a" / "2").write_text("")
    assert listing(Repository(root, load)) == [("a", "1", "READY")]
    assert "two words" in caplog.text
    assert "stats" in caplog.text
    assert "hidden" not in caplog.text


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "x" * 200])
def test_names(models_dir: Write, load: Any, name: str) -> None:
    assert Repository(models_dir({f"{name}/1": "{}"}), load).get(name).state == "READY"


def test_a_broken_file_is_reported_and_the_others_are_served(models_dir: Write, load: Any) -> None:
    root = models_dir({"a/1": "{}", "a/2": "broken", "b/1": "{}"})
    repository = Repository(root, load)
    assert listing(repository) == [("a", "1", "READY"), ("a", "2", "UNAVAILABLE"), ("b", "1", "READY")]
    broken = repository.get("a")
    assert broken.version == "2"
    assert broken.model is None
    assert broken.reason == f"{Path('a', '2', 'model.safetensors')} is not a whole file; save the model again."
    assert repository.get("a", "1").model is not None
    assert repository.versions("a") == ["1"]
    assert not repository.ready()


def test_an_older_broken_version_does_not_hold_up_readiness(models_dir: Write, load: Any) -> None:
    assert Repository(models_dir({"a/1": "broken", "a/2": "{}"}), load).ready()


def test_an_unexpected_failure_is_logged_and_not_told(models_dir: Write, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        entry = Repository(models_dir({"a/1": "crash"}), load).get("a")
    assert entry.reason == "loading failed; the server's log says why."
    assert "a secret" in caplog.text


def test_a_version_without_its_file(models_dir: Write, load: Any) -> None:
    root = models_dir({"a/1": "{}"})
    (root / "a" / "2").mkdir()
    (root / "a" / "3" / "model.safetensors").mkdir(parents=True)
    repository = Repository(root, load)
    assert "missing or no regular file" in repository.get("a", "2").reason
    assert "missing or no regular file" in repository.get("a", "3").reason


def test_a_model_without_versions_is_listed_and_does_not_hold_up_readiness(models_dir: Write, load: Any) -> None:
    root = models_dir({"a/1": "{}"})
    (root / "empty").mkdir()
    repository = Repository(root, load)
    assert listing(repository) == [("a", "1", "READY"), ("empty", "", "UNAVAILABLE")]
    assert "no version folder" in repository.get("empty").reason
    assert repository.ready()


def test_a_folder_that_cannot_be_read(
    models_dir: Write, load: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = models_dir({"a/1": "{}", "b/1": "{}"})
    iterdir = Path.iterdir

    def refuse(self: Path) -> Any:
        if self.name == "a":
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    repository = Repository(root, load)
    assert listing(repository) == [("a", "", "UNAVAILABLE"), ("b", "1", "READY")]
    assert "'a' cannot be read" in caplog.text


def test_an_empty_folder_is_not_ready(tmp_path: Path, load: Any) -> None:
    repository = Repository(tmp_path, load)
    assert listing(repository) == []
    assert not repository.ready()


@pytest.mark.parametrize("link", ["a", "a/1", "a/1/model.safetensors"])
def test_links_must_stay_under_the_root(models_dir: Write, load: Any, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside" / "1"
    outside.mkdir(parents=True)
    (outside / "model.safetensors").write_text("{}")
    target = {"a": outside.parent, "a/1": outside, "a/1/model.safetensors": outside / "model.safetensors"}[link]
    root = models_dir({"b/1": "{}"})
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(target)
    (root / "c").symlink_to(root / "b")
    repository = Repository(root, load)
    assert "leads out of the models folder" in repository.get("a", "1").reason
    assert str(tmp_path) not in repository.get("a", "1").reason
    assert repository.get("c", "1").model is not None, "a link to another model of the same folder is fine"


def test_the_root_may_be_a_link_or_relative(models_dir: Write, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models_dir({"a/1": "{}"})
    (tmp_path / "link").symlink_to("models")
    monkeypatch.chdir(tmp_path)
    assert Repository("link", load).ready()
    assert Repository(os.path.join("models", "..", "models"), load).ready()


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="pass one that holds"):
        Repository(tmp_path / "nothing")


def test_files_that_gdlib_saved(tmp_path: Path) -> None:
    model = gdlib.Linear(3, 2, dtype=np.float64, seed=1)
    gdlib.save(model, tmp_path / "a" / "1" / "model.safetensors", feature_names=["x", "y", "z"])
    content = (tmp_path / "a" / "1" / "model.safetensors").read_bytes()
    for version, broken in {"2": content[:-1], "3": b"", "4": b"\x80\x04."}.items():
        (tmp_path / "a" / version).mkdir()
        (tmp_path / "a" / version / "model.safetensors").write_bytes(broken)
    repository = Repository(tmp_path)
    assert [entry.state for entry in repository.index()] == ["READY", "UNAVAILABLE", "UNAVAILABLE", "UNAVAILABLE"]
    assert all("save the model again" in entry.reason for entry in list(repository.index())[1:])
    loaded = repository.get("a", "1").model
    assert loaded is not None
    assert loaded.feature_names == ["x", "y", "z"]
    np.testing.assert_array_equal(loaded.predict(np.ones((4, 3))), model.predict(np.ones((4, 3))))

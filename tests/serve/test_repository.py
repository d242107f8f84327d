"""The models folder at the start: which files count, which version answers, and that a bad one is reported and stops nothing."""

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


def test_versions_are_ordered_as_numbers(models_dir: Write, loaders: Any) -> None:
    repository = Repository(models_dir({"a/9": "{}", "a/10": "{}", "a/0": "{}", "b/1": "{}"}), loaders)
    assert repository.versions("a") == ["0", "9", "10"]
    assert repository.get("a").version == "10"
    assert repository.get("a", "9").version == "9"
    assert listing(repository) == [("a", "0", "READY"), ("a", "9", "READY"), ("a", "10", "READY"), ("b", "1", "READY")]
    assert repository.ready()


@pytest.mark.parametrize(
    ("name", "version"), [("a", "2"), ("a", "01"), ("a", ""), ("a", "../a/1"), ("b", None), ("", None), ("../models/a", "1")]
)
def test_unknown_models_are_key_errors(models_dir: Write, loaders: Any, name: str, version: str | None) -> None:
    with pytest.raises(KeyError):
        Repository(models_dir({"a/1": "{}"}), loaders).get(name, version)


def test_other_folders_and_files_are_left_out(models_dir: Write, loaders: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = models_dir(
        {"a/1": "{}", "a/01": "{}", "a/v2": "{}", "a/-3": "{}", "a/\u0663": "{}", ".hidden/1": "{}", "two words/1": "{}", "stats/1": "{}"}
    )
    (root / "file").write_text("")
    (root / "a" / "2").write_text("")
    assert listing(Repository(root, loaders)) == [("a", "1", "READY")]
    assert "'two words' is left out" in caplog.text
    assert "'stats' is left out" in caplog.text
    assert "hidden" not in caplog.text


def test_what_is_left_out_is_said_once(models_dir: Write, loaders: Any, caplog: pytest.LogCaptureFixture) -> None:
    repository = Repository(models_dir({"two words/1": "{}"}), loaders)
    repository.refresh()
    assert caplog.text.count("two words") == 1


def test_a_link_that_cannot_be_followed_hides_nothing(models_dir: Write, loaders: Any) -> None:
    root = models_dir({"a/1": "{}"})
    (root / "loop").symlink_to("loop")
    (root / "a" / "2").symlink_to("2")
    (root / "a" / "1" / "loop").symlink_to("loop")
    assert listing(Repository(root, loaders)) == [("a", "1", "READY")]


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "x" * 200])
def test_names(models_dir: Write, loaders: Any, name: str) -> None:
    assert Repository(models_dir({f"{name}/1": "{}"}), loaders).get(name).state == "READY"


def test_a_broken_file_is_reported_and_the_highest_that_is_loaded_serves(models_dir: Write, loaders: Any) -> None:
    repository = Repository(models_dir({"a/1": "{}", "a/2": "{}", "a/3": "broken", "b/1": "{}"}), loaders)
    assert listing(repository) == [("a", "1", "READY"), ("a", "2", "READY"), ("a", "3", "UNAVAILABLE"), ("b", "1", "READY")]
    assert repository.get("a").version == "2"
    broken = repository.get("a", "3")
    assert broken.model is None
    assert broken.reason == f"{Path('a', '3', 'model.safetensors')} is not a whole file; save the model again."
    assert repository.versions("a") == ["1", "2"]
    assert repository.ready()


def test_where_none_is_loaded_the_newest_says_why(models_dir: Write, loaders: Any) -> None:
    repository = Repository(models_dir({"a/1": "broken", "a/2": "crash", "b/1": "{}"}), loaders)
    entry = repository.get("a")
    assert (entry.version, entry.model) == ("2", None)
    assert repository.versions("a") == []
    assert not repository.ready(), "a model that was there at the start must load"


def test_a_reason_is_not_as_long_as_the_loader_likes(models_dir: Write, loaders: Any) -> None:
    def load(path: Path) -> Any:
        raise ValueError("x" * 100_000)

    entry = Repository(models_dir({"a/1": "{}"}), {"model.safetensors": load}).get("a")
    assert entry.reason == "x" * 500


def test_an_unexpected_failure_is_logged_and_not_told(models_dir: Write, loaders: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        entry = Repository(models_dir({"a/1": "crash"}), loaders).get("a")
    assert entry.reason == "loading failed; the server's log says why."
    assert "a secret" in caplog.text


def test_a_version_without_its_file(models_dir: Write, loaders: Any) -> None:
    root = models_dir({"a/1": "{}"})
    (root / "a" / "2").mkdir()
    (root / "a" / "3" / "model.safetensors").mkdir(parents=True)
    repository = Repository(root, loaders)
    assert repository.get("a", "2").reason == "a/2 holds no model file; put one there, model.safetensors."
    assert repository.get("a", "3").reason == "a/3/model.safetensors is no regular file; save a model there."


def test_two_formats_in_one_version(models_dir: Write, loaders: Any) -> None:
    root = models_dir({"a/1": "{}", "a/2": "{}"})
    (root / "a" / "2" / "model.onnx").write_text("{}")
    repository = Repository(root, loaders | {"model.onnx": loaders["model.safetensors"]})
    assert repository.get("a").version == "1"
    assert repository.get("a", "2").reason == "a/2 holds more than one model file; put one there, model.safetensors or model.onnx."


def test_the_file_name_says_which_loader(models_dir: Write, loaders: Any, fake_model: Any) -> None:
    root = models_dir({"a/1": "{}"})
    (root / "a" / "2").mkdir()
    (root / "a" / "2" / "model.onnx").write_text("{}")
    paths: list[Path] = []
    repository = Repository(root, loaders | {"model.onnx": lambda path: paths.append(path) or loaders["model.safetensors"](path)})
    assert repository.versions("a") == ["1", "2"]
    assert paths == [root / "a" / "2" / "model.onnx"]


def test_a_model_without_versions_is_listed_and_does_not_hold_up_readiness(models_dir: Write, loaders: Any) -> None:
    root = models_dir({"a/1": "{}"})
    (root / "empty").mkdir()
    repository = Repository(root, loaders)
    assert listing(repository) == [("a", "1", "READY"), ("empty", "", "UNAVAILABLE")]
    assert "no version folder" in repository.get("empty").reason
    assert repository.ready()


def test_an_empty_folder_is_not_ready(tmp_path: Path, loaders: Any) -> None:
    repository = Repository(tmp_path, loaders)
    assert listing(repository) == []
    assert not repository.ready()


@pytest.mark.parametrize("link", ["a", "a/1", "a/1/model.safetensors"])
def test_links_must_stay_under_the_root(models_dir: Write, loaders: Any, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside" / "1"
    outside.mkdir(parents=True)
    (outside / "model.safetensors").write_text("{}")
    target = {"a": outside.parent, "a/1": outside, "a/1/model.safetensors": outside / "model.safetensors"}[link]
    root = models_dir({"b/1": "{}"})
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(target)
    (root / "c").symlink_to(root / "b")
    repository = Repository(root, loaders)
    assert "leads out of the models folder" in repository.get("a", "1").reason
    assert str(tmp_path) not in repository.get("a", "1").reason
    assert repository.get("c", "1").model is not None, "a link to another model of the same folder is fine"


def test_the_root_may_be_a_link_or_relative(models_dir: Write, loaders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models_dir({"a/1": "{}"})
    (tmp_path / "link").symlink_to("models")
    monkeypatch.chdir(tmp_path)
    assert Repository("link", loaders).ready()
    assert Repository(os.path.join("models", "..", "models"), loaders).ready()


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
    assert loaded.parameters["feature_names"] == ["x", "y", "z"]
    np.testing.assert_array_equal(loaded.predict({"input": np.ones((4, 3))})["output"], model.predict(np.ones((4, 3))))

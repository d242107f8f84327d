"""Models loaded and unloaded by request, in one process and in several, and that no request waits for a load."""

import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gdlib
from gdlib.serve.repository import LOADING, UNLOADED, Repository
from tests.waiting import TIMEOUT

Write = Callable[[dict[str, str]], Path]


def write(root: Path, place: str, content: str) -> None:
    (root / place).mkdir(parents=True, exist_ok=True)
    temporary = root / place / ".new"
    temporary.write_text(content)
    temporary.replace(root / place / "model.safetensors")


def states(repository: Repository) -> dict[str, str]:
    return {f"{entry.name}/{entry.version}": entry.reason or entry.state for entry in repository.index()}


@pytest.fixture
def pair(models_dir: Write, loaders: Any, tmp_path: Path) -> Callable[[dict[str, str]], tuple[Repository, Repository]]:
    """Two repositories that share their state, as two processes do."""

    def make(files: dict[str, str]) -> tuple[Repository, Repository]:
        root, state = models_dir(files), tmp_path / "repository.json"
        return tuple(Repository(root, loaders, state_file=state, settle_seconds=0.0) for _ in range(2))  # type: ignore[return-value]

    return make


Pair = Callable[[dict[str, str]], tuple[Repository, Repository]]


class TestOne:
    def test_unload_and_load(self, models_dir: Write, loaders: Any) -> None:
        repository = Repository(models_dir({"a/1": "{}", "a/2": "{}", "b/1": "{}"}), loaders)
        assert not repository.shared
        repository.unload("a")
        assert states(repository) == {"a/1": UNLOADED, "a/2": UNLOADED, "b/1": "READY"}
        assert repository.ready()
        repository.refresh()
        assert repository.get("a").model is None
        repository.unload("a")
        assert repository.load("a").version == "2"
        assert states(repository) == {"a/1": "READY", "a/2": "READY", "b/1": "READY"}

    def test_all_unloaded_is_not_ready(self, models_dir: Write, loaders: Any) -> None:
        repository = Repository(models_dir({"a/1": "{}"}), loaders)
        repository.unload("a")
        assert not repository.ready()

    def test_what_never_loaded_and_is_unloaded_is_not_waited_for(self, models_dir: Write, loaders: Any) -> None:
        repository = Repository(models_dir({"a/1": "{}", "b/1": "broken"}), loaders)
        repository.unload("b")
        assert repository.ready()

    def test_an_unloaded_model_stays_so_whatever_comes(self, models_dir: Write, loaders: Any) -> None:
        root = models_dir({"a/1": "{}"})
        repository = Repository(root, loaders, settle_seconds=0.0)
        repository.unload("a")
        write(root, "a/2", "{}")
        repository.refresh()
        assert states(repository) == {"a/1": UNLOADED, "a/2": UNLOADED}
        shutil.rmtree(root / "a" / "1")
        repository.refresh()
        repository.refresh()
        assert states(repository) == {"a/2": UNLOADED}

    def test_load_reads_files_that_have_not_changed(self, models_dir: Write, loaders: Any) -> None:
        repository = Repository(models_dir({"a/1": "{}"}), loaders)
        before = repository.get("a").model
        assert repository.load("a").model is not before

    def test_load_takes_files_that_are_young_but_of_no_other_model(self, models_dir: Write, loaders: Any) -> None:
        root = models_dir({"a/1": "{}", "b/1": "{}"})
        repository = Repository(root, loaders, settle_seconds=3600.0)
        write(root, "a/2", "{}")
        write(root, "b/2", "{}")
        assert repository.load("a").version == "2"
        assert repository.versions("b") == ["1"]

    def test_load_finds_what_no_look_has_seen(self, models_dir: Write, loaders: Any) -> None:
        root = models_dir({"a/1": "{}"})
        repository = Repository(root, loaders)
        write(root, "new/3", "{}")
        assert repository.load("new").version == "3"

    def test_load_gives_the_highest_version_and_its_reason(self, models_dir: Write, loaders: Any) -> None:
        root = models_dir({"a/1": "{}"})
        repository = Repository(root, loaders)
        write(root, "a/2", "broken")
        entry = repository.load("a")
        assert (entry.version, entry.model) == ("2", None)
        assert "save the model again" in entry.reason
        assert repository.get("a").version == "1"

    @pytest.mark.parametrize("name", ["b", "", ".", "..", "../models/a", "a/1", "stats", "two words", "a\0", "x" * 5000])
    def test_unknown_names(self, models_dir: Write, loaders: Any, name: str) -> None:
        repository = Repository(models_dir({"a/1": "{}", "stats/1": "{}", "two words/1": "{}"}), loaders)
        for act in (repository.load, repository.unload):
            with pytest.raises(KeyError):
                act(name)
        assert states(repository) == {"a/1": "READY"}

    def test_a_model_whose_folder_is_gone_cannot_be_loaded(self, models_dir: Write, loaders: Any) -> None:
        root = models_dir({"a/1": "{}"})
        repository = Repository(root, loaders)
        shutil.rmtree(root / "a")
        with pytest.raises(KeyError):
            repository.load("a")

    @pytest.mark.parametrize("how", ["unload", "replace", "remove"])
    def test_the_memory_is_free(self, tmp_path: Path, how: str) -> None:
        path = tmp_path / "a" / "1" / "model.safetensors"
        gdlib.save(gdlib.Linear(3, 2, seed=0), path)
        repository = Repository(tmp_path, settle_seconds=0.0)
        served = repository.get("a").model
        assert served is not None
        served.predict({"input": np.ones((1, 3), np.float32)})
        alive = weakref.ref(served)
        del served
        if how == "unload":
            repository.unload("a")
        elif how == "replace":
            gdlib.save(gdlib.Linear(3, 2, seed=1), path)
        else:
            shutil.rmtree(path.parents[1])
        repository.refresh()
        repository.refresh()
        gc.collect()
        assert alive() is None


class TestSeveral:
    def test_unload_in_one_is_seen_by_the_other(self, pair: Pair) -> None:
        one, other = pair({"a/1": "{}", "b/1": "{}"})
        assert one.shared
        one.unload("a")
        other.sync("b")
        assert states(other) == {"a/1": UNLOADED, "b/1": "READY"}

    def test_load_in_one_is_done_by_the_first_request_to_the_other(self, pair: Pair) -> None:
        one, other = pair({"a/1": "{}", "b/1": "{}"})
        one.unload("a")
        other.sync()
        one.load("a")
        other.sync("b")
        assert other.get("a").reason == LOADING, "a request for another model does not load this one"
        other.sync("a")
        assert states(other) == {"a/1": "READY", "b/1": "READY"}

    def test_load_in_one_is_done_by_the_next_look_of_the_other(self, pair: Pair) -> None:
        one, other = pair({"a/1": "{}"})
        one.unload("a")
        other.refresh()
        one.load("a")
        other.refresh()
        assert states(other) == {"a/1": "READY"}

    def test_what_was_unloaded_stays_so_after_a_start(self, pair: Pair, loaders: Any, tmp_path: Path) -> None:
        one, _ = pair({"a/1": "{}", "b/1": "{}"})
        one.unload("a")
        again = Repository(one.root, loaders, state_file=tmp_path / "repository.json")
        assert states(again) == {"a/1": UNLOADED, "b/1": "READY"}
        assert again.ready()
        again.load("a")
        assert states(again) == {"a/1": "READY", "b/1": "READY"}

    def test_changes_at_once_are_not_lost(self, pair: Pair) -> None:
        names = [f"m{i}" for i in range(20)]
        both = pair({f"{name}/1": "{}" for name in names})
        with ThreadPoolExecutor(8) as pool:
            for result in [pool.submit(both[i % 2].unload, name) for i, name in enumerate(names)]:
                result.result(TIMEOUT)
        for repository in both:
            repository.sync()
            assert states(repository) == {f"{name}/1": UNLOADED for name in sorted(names)}

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"unloaded": "a"}', b'{"unloaded": [1]}', b"\xff", b"[" * 100_000])
    def test_a_state_file_that_cannot_be_read(self, pair: Pair, tmp_path: Path, caplog: Any, content: bytes) -> None:
        one, other = pair({"a/1": "{}", "b/1": "{}"})
        one.unload("a")
        other.sync()
        (tmp_path / "repository.json").write_bytes(content)
        for _ in range(3):
            other.sync("b")
        assert states(other) == {"a/1": UNLOADED, "b/1": "READY"}
        assert caplog.text.count("what was unloaded before stays so") == 1
        other.unload("b")
        one.sync()
        assert states(one) == {"a/1": UNLOADED, "b/1": UNLOADED}
        assert json.loads((tmp_path / "repository.json").read_bytes()) == {"unloaded": ["a", "b"]}

    def test_a_state_file_that_is_gone(self, pair: Pair, tmp_path: Path) -> None:
        one, other = pair({"a/1": "{}", "b/1": "{}"})
        one.unload("a")
        (tmp_path / "repository.json").unlink()
        other.sync()
        one.sync()
        assert states(one) == {"a/1": UNLOADED, "b/1": "READY"}
        assert one._state_stamp is None, "it is not looked for again and again"
        one.unload("b")
        other.sync()
        assert states(other) == {"a/1": UNLOADED, "b/1": UNLOADED}


class Slow:
    """A loader that stops, once it is told to, until it is let go."""

    def __init__(self, loader: Callable[[Path], Any]) -> None:
        self.loader = loader
        self.stops = False
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, path: Path) -> Any:
        if self.stops:
            self.began.set()
            assert self.go.wait(TIMEOUT)
        return self.loader(path)


class TestNoRequestWaits:
    @pytest.fixture
    def slow(self, models_dir: Write, loaders: Any, tmp_path: Path) -> Any:
        """A repository whose background is loading a new file of `a`."""
        loader = Slow(loaders["model.safetensors"])
        root = models_dir({"a/1": "{}", "b/1": "{}"})
        state = tmp_path / "repository.json"
        repository = Repository(root, {"model.safetensors": loader}, state_file=state, settle_seconds=0.0)
        loader.stops = True
        write(root, "a/1", '{"in_features": 4}')
        thread = threading.Thread(target=repository.refresh)
        thread.start()
        assert loader.began.wait(TIMEOUT)
        yield repository, Repository(root, loaders, state_file=state, settle_seconds=0.0), loader, thread
        loader.go.set()
        thread.join(TIMEOUT)

    def test_for_a_load_in_the_background(self, slow: Any) -> None:
        repository = slow[0]
        for name in ("a", "b"):
            repository.sync(name)
            assert repository.get(name).model is not None
        assert repository.get("a").model.signature.inputs[0].shape == (-1, 3)
        assert repository.ready()

    def test_for_what_another_process_does_meanwhile(self, slow: Any) -> None:
        repository, other, _, _ = slow
        other.unload("b")
        repository.sync("b")
        assert repository.get("b").reason == UNLOADED
        other.load("b")
        repository.sync("b")
        assert repository.get("b").reason == LOADING

    def test_unload_does_not_wait_either_and_holds_against_the_load(self, slow: Any) -> None:
        repository, _, loader, thread = slow
        repository.unload("a")
        assert repository.get("a").reason == UNLOADED
        loader.go.set()
        thread.join(TIMEOUT)
        assert repository.get("a").reason == UNLOADED
        loader.stops = False
        repository.load("a")
        assert repository.get("a").model.signature.inputs[0].shape == (-1, 4)

    def test_predictions_while_models_are_replaced(self, models_dir: Write, loaders: Any) -> None:
        """What a reader gets is one version's, whole, whatever is done to the folder meanwhile."""
        root = models_dir({"a/1": '{"in_features": 1}'})
        repository = Repository(root, loaders, settle_seconds=0.0)
        done = threading.Event()

        def read() -> int:
            count = 0
            while not done.is_set() or not count:
                entry = repository.get("a")
                assert entry.model is not None
                size = entry.model.signature.inputs[0].shape[1]
                assert entry.model.predict({"input": np.ones((1, size))})["output"].shape == (1, 2)
                assert size == int(entry.version)
                assert repository.index()
                assert repository.ready()
                count += 1
            return count

        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(read) for _ in range(3)]
            try:
                for version in range(2, 30):
                    write(root, f"a/{version}", json.dumps({"in_features": version}))
                    repository.refresh()
                    repository.load("a")
                    if version > 3:
                        shutil.rmtree(root / "a" / str(version - 2))
            finally:
                done.set()
            assert all(reader.result(TIMEOUT) > 0 for reader in readers)
        repository.refresh()
        repository.refresh()
        assert repository.versions("a")[-1] == "29"

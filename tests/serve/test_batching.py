"""Requests computed together: the answers are each one's own, errors too, and nobody waits who is alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gdlib
from gdlib.serve import create_app
from gdlib.serve.batching import MAX_ROWS, MIN_BYTES, BatchedModel, load_batched
from gdlib.serve.models import NativeModel
from tests.waiting import wait_until

FOREVER = 60.0  # a window that no test waits out


class Counting:
    """A predictor that remembers the rows of each call, and can be held up in one."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.calls: list[int] = []
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def predict(self, x: Any) -> Any:
        self.calls.append(len(x))
        self.entered.set()
        assert self.go_on.wait(FOREVER)
        return self._inner.predict(x)


@pytest.fixture
def counting(fake_model: Any) -> Counting:
    return Counting(fake_model())


def ask(model: BatchedModel, rows: Any) -> Any:
    return model.predict({"input": np.asarray(rows, float)})["output"]


def test_a_lone_request_does_not_wait(counting: Counting) -> None:
    model = BatchedModel(counting, FOREVER)
    for _ in range(3):
        np.testing.assert_array_equal(ask(model, [[1, 0, 0]]), [[0, 11]])
    assert counting.calls == [1, 1, 1]


def test_requests_that_arrive_meanwhile_are_one_batch(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdlib.serve.batching.MAX_ROWS", 6)  # the window ends when they are all here
    model = BatchedModel(counting, FOREVER)
    counting.go_on.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, model, [[1, 0, 0]])
        assert counting.entered.wait(FOREVER)
        others = [pool.submit(ask, model, [[row, 0, 0]] * 2) for row in (2, 3, 4)]
        wait_until(lambda: counting.calls == [1, 6])
        counting.go_on.set()
        np.testing.assert_array_equal(first.result(), [[0, 11]])
        for row, other in zip((2, 3, 4), others, strict=True):
            np.testing.assert_array_equal(other.result(), [[0, 10 * row + 1]] * 2)
    assert counting.calls == [1, 6]


def test_an_error_is_that_of_its_request_alone(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdlib.serve.batching.MAX_ROWS", 3)
    inner = counting._inner.predict

    def picky(x: Any) -> Any:
        if (x == 7).any():
            raise ValueError("a seven")
        return inner(x)

    monkeypatch.setattr(counting._inner, "predict", picky)
    model = BatchedModel(counting, FOREVER)
    counting.go_on.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, model, [[1, 0, 0]])
        assert counting.entered.wait(FOREVER)
        others = [pool.submit(ask, model, [[row, 0, 0]]) for row in (2, 7, 4)]
        wait_until(lambda: counting.calls[:2] == [1, 3])
        counting.go_on.set()
        assert first.result().tolist() == [[0, 11]]
        assert others[0].result().tolist() == [[0, 21]]
        with pytest.raises(ValueError, match="a seven"):
            others[1].result()
        assert others[2].result().tolist() == [[0, 41]]
    assert ask(model, [[1, 0, 0]]).tolist() == [[0, 11]], "and it goes on"


@pytest.mark.parametrize("moment", ["wait", "compute"])
def test_an_interruption_holds_up_nobody_else(counting: Counting, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    monkeypatch.setattr("gdlib.serve.batching.MAX_ROWS", 2)
    model = BatchedModel(counting, FOREVER)
    counting.go_on.clear()
    inner, wait = counting._inner.predict, model._full.wait

    def interrupted(*arguments: Any) -> Any:
        wait(FOREVER)
        raise KeyboardInterrupt

    def compute(x: Any) -> Any:
        if len(x) == 2:
            raise KeyboardInterrupt
        return inner(x)

    if moment == "wait":
        monkeypatch.setattr(model._full, "wait", interrupted)
    else:
        monkeypatch.setattr(counting._inner, "predict", compute)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, model, [[1, 0, 0]])
        assert counting.entered.wait(FOREVER)
        leader = pool.submit(ask, model, [[2, 0, 0]])
        wait_until(lambda: len(model._gathering) == 1)
        follower = pool.submit(ask, model, [[3, 0, 0]])
        wait_until(lambda: counting.calls[:2] == [1, 2])
        counting.go_on.set()
        assert first.result().tolist() == [[0, 11]]
        assert follower.result().tolist() == [[0, 31]]
        with pytest.raises(KeyboardInterrupt):
            leader.result()
    assert ask(model, [[4, 0, 0]]).tolist() == [[0, 41]]


def test_many_at_once_get_the_bits_that_they_get_alone() -> None:
    network = gdlib.Sequential(gdlib.Linear(20, 33, seed=0), gdlib.Tanh(), gdlib.Linear(33, 5, seed=1))
    model = BatchedModel(network, 0.001)
    rows = np.random.default_rng(0).standard_normal((200, 3, 20)).astype(np.float32)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda x: model.predict({"input": x})["output"], rows))
    for x, answer in zip(rows, answers, strict=True):
        np.testing.assert_array_equal(answer, network.predict(x))


def test_only_wide_models_batch(tmp_path: Any) -> None:
    wide = gdlib.Linear(MIN_BYTES // 4, 1, seed=0)
    for name, model in (("wide", wide), ("narrow", gdlib.Linear(3, 1, seed=0))):
        gdlib.save(model, tmp_path / name / "1" / "model.safetensors")
    kinds = {name: type(load_batched(tmp_path / name / "1" / "model.safetensors", 0.1)) for name in ("wide", "narrow")}
    assert kinds == {"wide": BatchedModel, "narrow": NativeModel}
    assert MAX_ROWS > 1
    for window in (-1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="batch_window is"):
            create_app(tmp_path, batch_window=window)
    x = np.random.default_rng(0).standard_normal((1, MIN_BYTES // 4)).astype(np.float32)
    for app in (create_app(tmp_path), create_app(tmp_path, batch_window=0.001)):
        entry = app.repository.get("wide")
        np.testing.assert_array_equal(entry.model.predict({"input": x})["output"], wide.predict(x))

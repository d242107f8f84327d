"""Requests to a wide model that arrive together are computed together: its weights are then read from memory once for all of them.

A row's prediction does not depend on the batch that it is in, so nobody can tell from an answer. The first request of a batch waits up
to the window for others, but only while others are being answered: a lone client waits for nobody.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdlib.serve.models import INPUT_NAME, OUTPUT_NAME, QUICK_BYTES, Arrays, NativeModel, Predictor, ServedModel, load_copy

MIN_BYTES = 2**20  # a core's L2: a model that fits it is computed faster than anybody waits
MAX_ROWS = 256  # of a batch that still waits for more: by then computing costs more than reading the weights


class _Waiting:
    """One request's rows, and in the end its answer or its error."""

    def __init__(self, rows: NDArray[Any]) -> None:
        self.rows = rows
        self.done = threading.Event()
        self.answer: NDArray[Any] | None = None
        self.error: Exception | None = None


class BatchedModel(NativeModel):
    """A gdlib model whose concurrent requests share a computation, waiting at most `window` seconds for each other."""

    def __init__(self, model: Predictor, window: float) -> None:
        super().__init__(model)
        self._window = window
        self._lock = threading.Lock()
        self._full = threading.Event()
        self._gathering: list[_Waiting] = []
        self._inside = 0  # requests that have come and not yet gone

    def predict(self, arrays: Arrays) -> Arrays:
        mine = _Waiting(arrays[INPUT_NAME])
        with self._lock:
            self._inside += 1
            self._gathering.append(mine)
            leads = len(self._gathering) == 1
            alone = self._inside == 1
            if sum(len(waiting.rows) for waiting in self._gathering) >= MAX_ROWS:
                self._full.set()
        try:
            if leads:
                try:
                    if not alone:
                        self._full.wait(self._window)
                finally:  # whatever ends the waiting, others are in the batch
                    self._compute()
            else:
                mine.done.wait()
            if mine.error is not None:
                raise mine.error
            if mine.answer is None:  # who computed for all was interrupted
                return super().predict(arrays)
            return {OUTPUT_NAME: mine.answer}
        finally:
            with self._lock:
                self._inside -= 1

    def _compute(self) -> None:
        with self._lock:
            batch, self._gathering = self._gathering, []
            self._full.clear()
        try:
            together = batch[0].rows if len(batch) == 1 else np.concatenate([waiting.rows for waiting in batch])
            answers = super().predict({INPUT_NAME: together})[OUTPUT_NAME]
            ends = np.cumsum([len(waiting.rows) for waiting in batch])[:-1]
            for waiting, answer in zip(batch, np.split(answers, ends), strict=True):
                waiting.answer = answer
        except Exception:
            for waiting in batch:  # one by one, so that each gets the error that is its own
                try:
                    waiting.answer = super().predict({INPUT_NAME: waiting.rows})[OUTPUT_NAME]
                except Exception as error:
                    waiting.error = error
        finally:
            for waiting in batch:
                waiting.done.set()


def load_batched(path: Path, window: float) -> ServedModel:
    """The gdlib model in a file; one whose weights do not fit a core's cache batches its requests. Raises what `gdlib.load` raises."""
    model = load_copy(path)
    size = path.stat().st_size
    return BatchedModel(model, window) if size >= MIN_BYTES else NativeModel(model, quick=size <= QUICK_BYTES)

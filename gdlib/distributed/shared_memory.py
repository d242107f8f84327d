"""Parameter averaging between processes of one machine: states in shared memory, rows in memory-mapped files.

Workers are spawned, never forked: a fork copies OpenMP's locks but not its threads. A pipe to each carries commands and results; the parent
waits for pipes and process ends together, so that a dead worker is an error and not a hang. Shared memory and files have no names once the
workers hold them, so that nothing is left behind however a process ends. Does not restart workers and does not reach other machines.
"""

import ctypes
import errno
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gdlib import _core, validation
from gdlib.config import set_num_threads
from gdlib.distributed import averaging
from gdlib.history import History
from gdlib.losses import MSELoss
from gdlib.modules import Model
from gdlib.optim import GD, SGD
from gdlib.parameters import LINE_BYTES
from gdlib.training import Run, progress_bar

_START = "at its start"
_COPY_BYTES = 8 << 20  # of rows at a time: still in the cache when they are checked, and Ctrl-C is answered between two
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class _Job:
    """What a worker is started with; the rows follow once they are on disk."""

    task: averaging.Round
    rows: int
    in_features: int
    out_features: int
    dtype: np.dtype[Any]
    workers: int
    threads: int
    memory: Any  # a RawArray of _memory_size bytes: shared by inheritance, without a name that could be left behind

    def states(self) -> npt.NDArray[Any]:
        """[workers + 1, state_size]: the average, then each worker's state. The same bytes in every process, since mappings are pages."""
        raw = np.frombuffer(self.memory, np.uint8)
        start = -raw.ctypes.data % LINE_BYTES
        states = raw[start : start + len(raw) - LINE_BYTES].view(self.dtype)
        return states.reshape(self.workers + 1, -1)[:, : self.task.state_size]

    def map_rows(self, directory: Path, mode: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        x = np.memmap(directory / "X", self.dtype, mode, shape=(self.rows, self.in_features))
        return x, np.memmap(directory / "y", self.dtype, mode, shape=(self.rows, self.out_features))


def _memory_size(workers: int, state_bytes: int) -> int:
    """Every state has cache lines of its own, so that no two workers write to the same one; one more is for alignment."""
    return (workers + 1) * -(-state_bytes // LINE_BYTES) * LINE_BYTES + LINE_BYTES


@dataclass(frozen=True)
class _Failure:
    traceback: str


def _end_with_parent() -> None:
    """A worker whose parent was killed must not live on. The thread also covers a parent that ended before prctl, and other systems."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _work(pipe: connection.Connection, rank: int, job: _Job) -> None:
    """A worker process: is told where the rows are, then (round, seed) each time, and answers with the round's result; None ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    _end_with_parent()
    try:
        set_num_threads(job.threads)
        states = job.states()
        shard = averaging.shards(job.rows, job.workers)[rank]
        x, y = (rows[shard] for rows in job.map_rows(pipe.recv(), "r"))
        pipe.send(None)
        while (command := pipe.recv()) is not None:
            states[rank + 1] = states[0]
            pipe.send(averaging.local_round(job.task, x, y, states[rank + 1], *command))
    except EOFError:
        return  # the parent has closed the pipe
    except BaseException:
        pipe.send(_Failure(traceback.format_exc()))


class _Workers:
    """The worker processes of a run: started on entry, ended on exit whatever happens."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.processes: list[Any] = []
        self.pipes: list[connection.Connection] = []

    def __enter__(self) -> "_Workers":
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # its own start would unblock SIGINT below
        try:
            # Workers inherit the blocked signal: Ctrl-C cannot hit them before they ignore it, nor the parent between start and append.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                for rank in range(self.job.workers):
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_work, args=(theirs, rank, self.job), name=f"gdlib-worker-{rank}", daemon=True)
                    self.pipes.append(ours)
                    with theirs:  # the worker holds the only other end: its death closes the pipe
                        process.start()
                    self.processes.append(process)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.send(None)
            for process in self.processes:
                process.join(5)
        self._end()

    def _end(self) -> None:
        for process in self.processes:
            process.kill()  # nothing of theirs needs tidying up
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()

    def send(self, command: object) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(command)
            except OSError:  # its process has ended: collect() says which, and how
                continue

    def collect(self, when: str) -> list[Any]:
        """One answer of each worker, by rank. Raises RuntimeError when one has failed or ended, at once."""
        answers: dict[int, Any] = {}
        while len(answers) < len(self.processes):
            waiting: dict[Any, int] = {}
            for rank, (pipe, process) in enumerate(zip(self.pipes, self.processes, strict=True)):
                if rank not in answers:
                    waiting |= {pipe: rank, process.sentinel: rank}
            for rank in {waiting[ready] for ready in connection.wait(list(waiting))}:
                answers[rank] = self._receive(rank, when)
        return [answers[rank] for rank in range(len(self.processes))]

    def _receive(self, rank: int, when: str) -> Any:
        try:
            if not self.pipes[rank].poll():  # only its end was reported
                raise EOFError
            answer = self.pipes[rank].recv()
        except (EOFError, OSError):
            self.processes[rank].join(5)
            code = self.processes[rank].exitcode
            advice = "minus the signal that killed it, 9 often for lack of memory. The parameters of the last finished round are kept."
            if when == _START and code == 1:
                advice = 'its message is above. In a script call fit under `if __name__ == "__main__":`; workers import the script.'
            raise RuntimeError(f"worker {rank} ended {when} with exit code {code}: {advice}") from None
        if isinstance(answer, _Failure):
            raise RuntimeError(f"worker {rank} failed {when}:\n{answer.traceback}")
        return answer


def _write_rows(run: Run, job: _Job, order: npt.NDArray[np.uint32] | None, directory: Path) -> None:
    """X and y in `order`, so that a shard is a slice. Raises ValueError for NaN and infinity, OSError where the disk is full."""
    maps = job.map_rows(directory, "w+")
    for name, rows in zip("Xy", maps, strict=True):
        if not hasattr(os, "posix_fallocate"):
            break
        try:
            with open(directory / name, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, rows.nbytes)  # writing to a map on a full disk would end the process (SIGBUS)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # others: a file system that cannot reserve
                raise OSError(
                    errno.ENOSPC, f"{rows.nbytes} bytes of {name} do not fit in {directory.parent}; free some, or set TMPDIR"
                ) from None
    step = max(1, _COPY_BYTES // maps[0][0].nbytes)
    for begin in range(0, run.rows, step):
        for source, rows in zip((run.X, run.y), maps, strict=True):
            into = rows[begin : begin + step]
            if order is None:
                into[...] = source[begin : begin + step]
            else:
                np.take(source, order[begin : begin + step], axis=0, out=into, mode="clip")  # "raise" would copy twice
            if not _core.all_finite(into):
                run.require_finite_data()


def _round(run: Run, workers: _Workers, states: npt.NDArray[Any], number: int) -> float:
    """One round of every worker and the average, in states[0]; returns the sum of squared errors over all rows. Raises DivergenceError."""
    job, where = workers.job, f"in round {number + 1}"
    workers.send((number, None if run.seeds is None else int(run.seeds[number])))
    results = workers.collect(where)
    for rank, (stop, steps, _) in enumerate(results):
        if stop != "finished":
            raise run.divergence(f"{where} the loss of worker {rank} is no longer finite", number + 1, number * job.task.steps + steps + 1)
    if not averaging.average(states[1:], states[0]):
        raise run.divergence(f"{where} the average is no longer finite", number + 1, (number + 1) * job.task.steps)
    # Shards may share rows: back to the scale of `rows` rows.
    return float(sum(loss for _, _, loss in results) * (run.rows / (job.workers * -(-run.rows // job.workers))))


def fit(
    model: Model,
    X: Any,
    y: Any,
    *,
    loss: MSELoss,
    optimizer: SGD,
    epochs: int,
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int | Sequence[int] | None = None,
    progress: bool = False,
    workers: int = 2,
) -> History:
    """Train the model in several processes: each epoch, every worker makes one pass of SGD over its shard; then theta <- mean of theta_k.

    Arguments mean what they do in `gdlib.fit`; momentum is averaged with the parameters. All rows are shuffled once, by the seed of the
    first epoch, and dealt out in equal shards; with shuffle=False shards are runs of rows as given, which should then be in no particular
    order. A worker makes rows / (workers * batch_size) steps an epoch: averaged gradients are less noisy, and bear a larger lr. Threads are
    shared out among the workers. Same seed, same workers: the same bits. One worker gives the bits of `gdlib.fit` on the rows so shuffled.

    The History holds a loss per epoch, the mean over all workers; `seconds` leaves out starting the workers and writing their rows to the
    temporary directory (TMPDIR). Call it under `if __name__ == "__main__":` in a script: workers are spawned, and import it.

    Raises TypeError and ValueError as `gdlib.fit` does, and for GD or fewer rows than workers; DivergenceError naming the round and the
    worker; RuntimeError when a worker fails or is killed; OSError without room for the rows. After any of them, and after Ctrl-C, the model
    and the optimizer hold the average of the last finished round.

    Follows Zinkevich et al. 2010 (averaging) and Stich 2018 (averaging between rounds).
    """
    if isinstance(optimizer, GD):
        raise ValueError("GD takes all rows at each step, and leaves nothing to average; use gdlib.fit, whose threads share the rows.")
    workers = validation.as_count(workers, "workers")
    run = Run(model, X, y, loss, optimizer, epochs, batch_size, shuffle, seed)
    shard_rows = averaging.shards(run.rows, workers)[0].stop
    task = averaging.Round(
        parameters=run.arena.data.size,
        layers=model.architecture(),
        has_momentum=run.momentum is not None,
        ranges=run.ranges,
        batch_size=min(run.batch_size, shard_rows),
        steps=averaging.steps_per_round(shard_rows, run.batch_size),
        mean=loss.reduction == "mean",
    )
    memory = RawArray(ctypes.c_byte, _memory_size(workers, task.state_size * model.dtype.itemsize))
    threads = max(1, _core.num_threads() // workers)
    job = _Job(task, run.rows, model.in_features, model.out_features, model.dtype, workers, threads, memory)
    states = job.states()
    states[0] = run.start if run.momentum is None else np.concatenate([run.start, run.momentum])
    order = None if run.seeds is None else averaging.global_order(int(run.seeds[0]), run.rows)
    kept: npt.NDArray[Any] | None = None
    try:
        with _Workers(job) as pool:
            with tempfile.TemporaryDirectory(prefix="gdlib-") as directory:
                _write_rows(run, job, order, Path(directory))
                pool.send(Path(directory))
                pool.collect(_START)
            # The files are gone; their contents last as long as the workers' maps.
            begin = time.perf_counter()
            with progress_bar(run) if progress else nullcontext() as bar:
                for number in range(run.epochs):
                    run.losses[number] = _round(run, pool, states, number)
                    kept = states[0].copy()
                    run.check_explosion(number + 1, (number + 1) * task.steps)
                    if bar is not None:
                        bar.set_postfix(loss=f"{run.curve()[number]:.4g}", refresh=False)
                        bar.update()
            seconds = time.perf_counter() - begin
    finally:
        if kept is not None:
            run.arena.version += 1
            run.arena.data[:] = kept[: task.parameters]
            run.arena.version += 1
            optimizer.set_momentum_buffer(kept[task.parameters :] if task.has_momentum else None)
    return run.finish(seconds, workers=workers)

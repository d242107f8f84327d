"""The maths of parameter averaging (local SGD): shards, a worker's round, and the average. No files, no processes.

A worker's state is one flat vector, [parameters | momentum]. Momentum is averaged with the parameters: left to itself it would pull each
worker back towards where it alone was going. The average after a round goes back to every worker:

    state_k <- `steps` steps of SGD from mean, over shard k;   mean <- (state_0 + state_1 + ... in rank order) / workers

Sources: Zinkevich, Weimer, Li and Smola 2010, Parallelized Stochastic Gradient Descent; Stich 2018, Local SGD Converges Fast and
Communicates Little (arXiv 1805.09767).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gdlib import _core, data
from gdlib.modules import LayerTuple
from gdlib.optim import UpdateRange


@dataclass(frozen=True)
class Round:
    """What is the same for every worker and every round of a run."""

    parameters: int  # length of the arena
    layers: list[LayerTuple]  # the model's architecture
    has_momentum: bool
    ranges: list[UpdateRange]
    batch_size: int
    steps: int  # of each worker in a round
    mean: bool  # the loss is a mean over a batch, else a sum

    @property
    def state_size(self) -> int:
        return self.parameters * (2 if self.has_momentum else 1)


def global_order(seed: int | None, rows: int) -> npt.NDArray[np.uint32] | None:
    """The order of all rows from which shards are cut, the one that belongs to `seed`; None: as they are.

    Shuffled first, every shard is a fair sample. Shards of rows sorted by target pull the workers apart, and their average is far off.
    """
    return None if seed is None else data.draw_order(seed, rows)


def shards(rows: int, workers: int) -> list[slice]:
    """One contiguous slice of ceil(rows / workers) rows for each worker; together they hold every row.

    Equal sizes give equal numbers of steps, so that the plain mean weighs the workers rightly. Where `workers` does not divide `rows`,
    neighbours share one row, at most workers - 1 in all (torch's DistributedSampler repeats rows to the same end).

    Raises ValueError for fewer rows than workers.
    """
    if rows < workers:
        raise ValueError(f"{rows} rows cannot be shared by {workers} workers; at most one worker per row is possible.")
    size = -(-rows // workers)
    return [slice(k * rows // workers, k * rows // workers + size) for k in range(workers)]


def steps_per_round(shard_rows: int, batch_size: int) -> int:
    """Steps of one pass over a shard: its last batch may be smaller."""
    return -(-shard_rows // batch_size)


def local_round(
    task: Round, x: npt.NDArray[Any], y: npt.NDArray[Any], state: npt.NDArray[Any], number: int, seed: int | None
) -> tuple[str, int, float]:
    """Advance `state` by round `number` (from 0) over the shard x [rows, in_features], y [rows, out_features], in one native call.

    Returns why it stopped ("finished" or "non_finite"), the steps made, and the sum of squared errors. Equal arguments give equal bits,
    for any number of threads: a lost round can be run again elsewhere. Every worker takes the rows of its shard in the same order, that
    of `seed` (None: as they are); the shards are random already.
    """
    losses = np.zeros(1)
    stop, steps = _core.train(
        x,
        y,
        state[: task.parameters],
        state[task.parameters :] if task.has_momentum else None,
        task.layers,
        [(*r[:8], r[8] and number == 0) for r in task.ranges],  # after the first round every momentum has begun
        task.batch_size,
        None if seed is None else np.array([seed], np.uint64),
        0,
        task.steps,
        task.mean,
        0.0,
        losses,
    )
    return stop, steps, float(losses[0])


def average(states: npt.NDArray[Any], mean: npt.NDArray[Any]) -> bool:
    """mean [n] <- the mean of states [workers, n], added in rank order: the same bits in every run. False when it is not finite."""
    _core.average(states, mean)
    return bool(_core.all_finite(mean))

"""fit(): a whole training run in one native call, and what is said when it goes wrong."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gdlib import _core, validation
from gdlib.errors import DivergenceError
from gdlib.history import History
from gdlib.losses import MSELoss
from gdlib.modules import Model
from gdlib.nn import Linear
from gdlib.optim import GD, SGD, UpdateRange, is_auto

if TYPE_CHECKING:
    import numpy.typing as npt

DEFAULT_BATCH_SIZE = 32
SAMPLE_ROWS = 4096  # for estimates: enough to see a factor of 100
# At what the last update left, an explosion shows in many rows: so many are looked at first. Fewer of a large model, down to 128, where
# even 1,000,000 multiply-adds (under 0.1 ms) and a 64th of the run's rows are less: a 64th costs 0.5 % of the run's time.
FIRST_LOOK_ROWS, LEAST_LOOK_ROWS, LOOK_WORK, LOOK_SHARE = 256, 128, 1_000_000, 64


def explosion_factor(momentum: float) -> float:
    """How many times worse than the start a loss must be to count as exploded: 100, or 10 times what momentum reaches on its way.

    Heavy ball at the border of stability overshoots by up to 2 / (e (1 - sqrt(momentum))), squared in the loss, and still converges.
    """
    if momentum >= 1.0:
        return math.inf
    return max(100.0, 10.0 * (2.0 / (math.e * (1.0 - math.sqrt(momentum)))) ** 2)


def _curvature(model: Linear, X: npt.NDArray[Any], loss: MSELoss) -> float:
    """Largest eigenvalue of the Hessian of the loss over X: each output has 2 [x 1]^T [x 1], over rows * outputs for a mean."""
    scale = len(X) * model.out_features if loss.reduction == "mean" else 1
    return _core.hessian_eigenvalue(X, model.bias is not None) / scale


def auto_lr(model: Model, X: Any, loss: MSELoss) -> float:
    """1 / L, L being the largest eigenvalue of the Hessian of the loss over all rows of X: the step that `GD(..., lr="auto")` takes.

    Raises ValueError for wrong shapes, NaN or infinity in X, an X of zeros without a bias, and a Sequential.
    """
    if not isinstance(model, Linear):
        raise ValueError("lr='auto' goes by the curvature of a Linear, and a network's changes as it learns; give a number, such as 0.01.")
    rows = validation.as_training_rows(X, model.in_features, model.dtype)
    curvature = _curvature(model, rows, loss)
    if not np.isfinite(curvature):
        validation.require_finite(X, rows, "X")
        raise ValueError(f"X holds numbers whose squares do not fit {model.dtype}; scale it, or use a float64 model.")
    if curvature == 0:
        raise ValueError("X holds only zeros, so that lr='auto' has nothing to go by; give a number.")
    return float(1.0 / curvature)


def _stable_lr(
    model: Model, X: npt.NDArray[Any], loss: MSELoss, batch_size: int, full_batch: bool, ranges: list[UpdateRange]
) -> float | None:
    """An estimate of the largest stable lr, from a sample of rows in float64; None where there is none.

    With curvature h = L + weight_decay, L the largest eigenvalue of the Hessian: full batch, 2 (1 + momentum) / h / (1 - dampening) (heavy
    ball; Polyak 1964), with nesterov 2 (1 + momentum) / ((1 + 2 momentum) h). Batches of B rows: the mean square of the error shrinks
    while lr < 2 / (L (1 - 1/B) + 2 s / B + weight_decay), s = E|x|^4 / E|x|^2, and momentum multiplies the step by 1 / (1 - momentum).
    """
    if not isinstance(model, Linear) or any(r[7] for r in ranges):
        return None  # a network has no constant curvature, and an ascent no stable lr
    with np.errstate(all="ignore"):
        sample = np.ascontiguousarray(X[:: -(-len(X) // SAMPLE_ROWS)], dtype=np.float64)
        curvature = _curvature(Linear(model.in_features, 1, model.bias is not None, dtype=np.float64, seed=0), sample, MSELoss())
        if not full_batch:
            squares = np.einsum("ij,ij->i", sample, sample) + (model.bias is not None)
            spread = float(np.mean(squares**2) / np.mean(squares)) if squares.any() else 0.0
            curvature = curvature * (1.0 - 1.0 / batch_size) + 2.0 * spread / batch_size
        curvature *= 1.0 / model.out_features if loss.reduction == "mean" else batch_size
        limits = []
        for _, _, _, momentum, dampening, weight_decay, nesterov, _, _ in ranges:
            bent = curvature + weight_decay
            full = (1.0 + momentum) / (1.0 + 2.0 * momentum if nesterov else 1.0)
            factor = full if full_batch else 1.0 - momentum
            damped = 1.0 - dampening if momentum else 1.0
            limits.append(2.0 * factor / (bent * damped) if bent > 0 and damped > 0 else np.inf)
        limit = min(limits)
    return float(limit) if np.isfinite(limit) and limit > 0 else None


def _epoch_seeds(seed: int | Sequence[int] | None, epochs: int) -> npt.NDArray[np.uint64]:
    if seed is None:
        return np.array([validation.fresh_seed() for _ in range(epochs)], np.uint64)
    if isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, (str, bytes)) and np.ndim(seed) == 1:
        if len(seed) != epochs:
            raise ValueError(f"seed holds {len(seed)} numbers; one for each of {epochs} epochs is wanted, or a single one.")
        return np.array([validation.as_seed(value) for value in seed], np.uint64)
    return np.full(epochs, validation.as_seed(seed), np.uint64)


class Run:
    """One run of fit: its inputs in the engine's form, and the calls that it takes."""

    def __init__(
        self,
        model: Model,
        X: Any,
        y: Any,
        loss: MSELoss,
        optimizer: SGD,
        epochs: int,
        batch_size: int | None,
        shuffle: bool,
        seed: int | Sequence[int] | None,
    ) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"the model is a {type(model).__name__}; a gdlib.Linear or gdlib.Sequential is wanted.")
        if model._composed:
            raise ValueError("the model is a part of a Sequential, with which it shares its parameters; train the whole of it.")
        if not isinstance(loss, MSELoss):
            raise TypeError(f"the loss is a {type(loss).__name__}; a gdlib.MSELoss is wanted.")
        if not isinstance(optimizer, SGD):
            raise TypeError(f"the optimizer is a {type(optimizer).__name__}; a gdlib.SGD or gdlib.GD is wanted.")
        if loss.reduction == "none":
            raise ValueError("a loss with reduction 'none' has no single number to descend; use MSELoss('mean') or MSELoss('sum').")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        model.training_summary = None  # it would describe other parameters from here on
        self.given = (X, y)
        self.X = validation.as_training_rows(X, model.in_features, model.dtype)
        self.rows = len(self.X)
        self.y = validation.as_targets(y, self.rows, model.out_features, model.dtype)
        self.epochs = validation.as_count(epochs, "epochs")
        self.batch_size = self.rows
        self.seeds: npt.NDArray[np.uint64] | None = None
        if isinstance(optimizer, GD):
            if batch_size is not None and validation.as_count(batch_size, "batch_size") < self.rows:
                raise ValueError(f"batch_size is {batch_size}, but GD takes all {self.rows} rows at each step; leave it out, or use SGD.")
        else:
            size = DEFAULT_BATCH_SIZE if batch_size is None else validation.as_count(batch_size, "batch_size")
            self.batch_size = min(size, self.rows)
            if shuffle:
                if self.rows >= 2**32:
                    raise ValueError(f"{self.rows} rows cannot be shuffled; at most {2**32 - 1} can.")
                self.seeds = _epoch_seeds(seed, self.epochs)
        self.steps_per_epoch = -(-self.rows // self.batch_size)
        self.steps = self.epochs * self.steps_per_epoch
        self.losses = np.zeros(self.epochs)
        self.arena, self.layers = model._arena, model.architecture()
        self.start = self.arena.data.copy()
        if not _core.all_finite(self.start):
            raise ValueError("the model's parameters hold NaN or infinity; start from a fresh model.")
        for group in optimizer.param_groups:
            if is_auto(group["lr"]):
                self.require_finite_data()  # NaN has no eigenvalues
                group["lr"] = auto_lr(model, self.X, loss)
        self.ranges = optimizer.update_ranges(self.arena)
        self.momentum = optimizer.momentum_buffer(self.arena)
        self.start_momentum = None if self.momentum is None else self.momentum.copy()
        self.optimizer_start = optimizer.momentum_state()
        self.explosion = explosion_factor(max(r[3] for r in self.ranges))
        self.ascends = any(r[7] for r in self.ranges)
        self._spread: float | None = None
        self._start_error: float | None = None

    def advance(self, first_step: int, last_step: int, loss_limit: float, progress: Any) -> tuple[str, int]:
        """One native call. Momentum is handed back to the optimizer however the call ends, if a step was made."""
        ranges = [(*r[:8], r[8] and first_step == 0) for r in self.ranges]
        moved = first_step > 0
        self.arena.version += 1
        try:
            stop, step = _core.train(
                self.X,
                self.y,
                self.arena.data,
                self.momentum,
                self.layers,
                ranges,
                self.batch_size,
                self.seeds,
                first_step,
                last_step,
                self.loss.reduction == "mean",
                loss_limit,
                self.losses,
                progress,
            )
            moved = step > 0
            return stop, step
        finally:
            self.arena.version += 1  # whatever was made of it meanwhile
            if moved or self.losses.any():  # the latter after Ctrl-C, which returns no step
                self.optimizer.set_momentum_buffer(self.momentum)

    def train(self, progress: Any) -> None:
        """All steps, or an exception."""
        step = 0
        while step < self.steps:
            stop, step = self.advance(step, self.steps, self.loss_limit(), progress)
            if stop == "non_finite":
                self._fail(step)
            if stop == "above_limit":
                self.check_explosion(step // self.steps_per_epoch, step)
        self.check_end()

    def _error(self, X: npt.NDArray[Any], y: npt.NDArray[Any], parameters: npt.NDArray[Any]) -> float:
        """Mean squared error of these parameters."""
        return _core.squared_error(X, y, parameters, self.layers) / y.size

    def loss_limit(self) -> float:
        """The mean squared error of an epoch that `check_explosion` has to look at; 0: none, for an ascent."""
        if self.ascends:
            return 0.0
        if self._spread is None:
            self._spread = self._error_of_a_constant()
        worst = max(self._spread, self._start_error or 0.0)
        return self.explosion * max(worst, sys.float_info.min)  # infinite with an infinite factor

    def _error_of_a_constant(self) -> float:
        """Mean squared error of the best constant, from a sample: SAMPLE_ROWS rows of one output, fewer of several, 64 at least."""
        rows = max(64, SAMPLE_ROWS // self.model.out_features)
        with np.errstate(all="ignore"):
            sample = self.y[:: -(-self.rows // rows)].astype(np.float64)
            sample -= sample.sum(axis=0) / len(sample)
            spread = float(np.square(sample, out=sample).sum()) / sample.size
        return spread if math.isfinite(spread) else 0.0

    def _explodes(self, reached: float) -> bool:
        """Whether an error is far above both the best constant's and the start's, which takes a pass over X: only on suspicion."""
        if not 0.0 < self.loss_limit() < reached:
            return False
        if self._start_error is None:
            self._start_error = self._error(self.X, self.y, self.start)
        return reached > self.loss_limit()

    def check_explosion(self, epochs_done: int, steps_done: int) -> None:
        """Raise DivergenceError when the last epoch is far worse than both a constant and the model at the start."""
        reached = float(self.losses[epochs_done - 1]) / self.y.size
        if self._explodes(reached):
            raise self.divergence(f"the loss has grown to {reached:.3g}", epochs_done, steps_done)

    def check_end(self) -> None:
        """The same for the last update, which no loss of the run has seen: on a sample first, on all rows where that looks bad."""
        if not self.loss_limit() > 0.0:
            return
        affordable = max(LOOK_WORK // max(1, self.arena.data.size), self.rows * self.epochs // LOOK_SHARE)
        stride = -(-self.rows // min(FIRST_LOOK_ROWS, max(LEAST_LOOK_ROWS, affordable)))
        reached = self._error(self.X[::stride], np.ascontiguousarray(self.y[::stride]), self.arena.data)
        if math.isfinite(reached) and reached <= self.loss_limit():
            return
        reached = self._error(self.X, self.y, self.arena.data)
        if not math.isfinite(reached) or self._explodes(reached):
            raise self.divergence(f"the last update took the loss to {reached:.3g}", self.epochs, self.steps)

    def require_finite_data(self) -> None:
        validation.require_finite(self.given[0], self.X, "X")
        validation.require_finite(self.given[1], self.y, "y")

    def _restore(self) -> None:
        self.arena.version += 1
        self.arena.data[:] = self.start
        self.arena.version += 1
        if self.momentum is not None and self.start_momentum is not None:
            self.momentum[:] = self.start_momentum

    def _fail(self, step: int) -> None:
        """After `step` steps something is not finite: because of the data, or because training has diverged."""
        try:
            self.require_finite_data()
        except ValueError:
            self._restore()
            self.optimizer.restore_momentum(self.optimizer_start)
            raise
        # The loss of the next step is not finite; or, at the end of an epoch, what the last update left.
        failed = step + 1 if np.isfinite(self.arena.data).all() else step
        while not np.isfinite(self.arena.data).all():
            # The update before the failing step was the last straw. Equal arguments give equal bits: run again, up to the step before.
            step -= 1
            self._restore()
            self.losses[:] = 0
            self.advance(0, step, 0.0, None)
        if step == 0:
            self.optimizer.restore_momentum(self.optimizer_start)
        raise self.divergence("the loss is no longer finite", (failed - 1) // self.steps_per_epoch + 1, failed)

    def curve(self) -> npt.NDArray[np.float64]:
        """The loss of each epoch so far."""
        return self.losses / self.y.size if self.loss.reduction == "mean" else self.losses

    def finish(self, seconds: float, **summary: Any) -> History:
        """The history of a run that has ended well; its summary stays with the model."""
        history = History(self.curve().tolist(), seconds, self.rows * self.epochs / max(seconds, 1e-9), [r[2] for r in self.ranges])
        self.model.training_summary = {
            "optimizer": type(self.optimizer).__name__,
            "lr": history.lr[0],
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "rows": self.rows,
            "loss": [float(f"{value:.6g}") for value in history.loss[:: -(-self.epochs // 256)]],  # enough points for a curve
            "final_loss": history.loss[-1],
            **summary,
        }
        return history

    def divergence(self, what: str, epoch: int, step: int) -> DivergenceError:
        lr = max(r[2] for r in self.ranges)
        stable = _stable_lr(self.model, self.X, self.loss, self.batch_size, self.batch_size >= self.rows, self.ranges)
        if self.ascends:
            advice = "with maximize it climbs without end; leave maximize out"
        elif not isinstance(self.model, Linear):
            advice = "use a smaller lr, or standardise X and y"
        elif stable is None or stable >= lr:  # then it is not the lr alone
            advice = "standardise X and y, or use a float64 model and a smaller lr"
        else:
            advice = f"about {stable:.3g} is the largest stable lr; use a smaller one, or standardise X"
        return DivergenceError(
            f"training diverged: {what} in epoch {epoch}, step {step}, with lr {lr:g}; {advice}. The last finite parameters are kept.",
            epoch=epoch,
            step=step,
            lr=lr,
            stable_lr=stable,
        )


def progress_bar(run: Run) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=run.epochs, unit="epoch", desc="fit")


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
) -> History:
    """Train the model in one native call: theta <- theta - lr * grad J(batch), over all batches of all epochs.

    X is [rows, in_features], y [rows, out_features] or, for one output, [rows]: anything that NumPy can view, `__dlpack__` objects and
    memory maps; where dtype and layout fit, nothing is copied but up to 4 MiB of short rows. With SGD a step takes `batch_size` rows (32
    when None); with GD all rows, in order, in one pass over X. The same run as the readable loop over
    `DataLoader(X, y, batch_size, shuffle, seed)`, to rounding.

    A step of a Sequential, and of a Linear with 8 outputs and 65,537 parameters or more, goes over its rows in passes of up to 1024, fewer
    where layers are wide: what the engine keeps of them stays near 64 MiB for any batch.

    `seed` fixes the order of the rows: one number gives every epoch that order, a sequence gives each epoch its own, None draws a fresh
    one for each. Same seed, same machine: the same bits for any number of threads. (One order for all epochs converges at the rate of
    reshuffling: Mishchenko, Khaled and Richtarik 2020, Random Reshuffling.)

    The GIL is released; Ctrl-C is answered within 0.2 s, with the parameters of the last finished step. `progress` shows a bar.

    Raises TypeError and ValueError for input that does not fit, NaN or infinity (the parameters are then untouched), and
    DivergenceError when the loss becomes non-finite, or explodes: to 100 times (more with momentum, see `explosion_factor`) both the one
    at the start and that of the best constant. The last finite parameters are then kept.
    """
    run = Run(model, X, y, loss, optimizer, epochs, batch_size, shuffle, seed)
    bar = progress_bar(run) if progress else None

    def show(done: int) -> None:
        if bar is not None and done > bar.n:
            bar.set_postfix(loss=f"{run.curve()[done - 1]:.4g}", refresh=False)
            bar.update(done - bar.n)

    begin = time.perf_counter()
    try:
        run.train(None if bar is None else show)
        if bar is not None:
            show(run.epochs)
    finally:
        seconds = time.perf_counter() - begin
        if bar is not None:
            bar.close()
    return run.finish(seconds)

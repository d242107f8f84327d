"""What a run of training did: its learning curve, its time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


class History:
    """What a run of `fit` did.

    `loss` has one value per epoch: of the parameters before each step, averaged over rows and outputs, or summed for reduction "sum".
    `seconds` is the time in training, `rows_per_second` follows from it, and `lr` holds the learning rate of each group.
    """

    def __init__(self, loss: list[float], seconds: float, rows_per_second: float, lr: list[float]) -> None:
        self.loss = loss
        self.seconds = seconds
        self.rows_per_second = rows_per_second
        self.lr = lr

    def __repr__(self) -> str:
        return f"History({len(self.loss)} epochs, final loss {self.loss[-1]:.6g}, {self.seconds:.3g} s, lr {self.lr})"

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the loss by epoch; returns the matplotlib Axes, and writes a picture (format by suffix) when `path` is given.

        Raises ImportError without matplotlib (the extra `plot`).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("drawing needs matplotlib: pip install gdlib[plot].") from None
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(range(1, len(self.loss) + 1), self.loss, linewidth=2)
        axes.set(xlabel="epoch", ylabel="loss", title="Learning curve")
        if len(self.loss) > 1 and min(self.loss) > 0 and max(self.loss) / min(self.loss) > 100:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if path is not None:
            figure.savefig(path)
        return axes

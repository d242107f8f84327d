"""The one exception of gdlib's own; everything else is a ValueError, TypeError, RuntimeError or OSError with a clear sentence."""


class DivergenceError(ArithmeticError):
    """Training left the range of finite numbers, or its loss exploded.

    Attributes: `epoch` and `step` (both from 1) and `lr` of the step that failed, and `stable_lr`, an estimate of the largest learning
    rate at which the same run is stable; each is None where it is not known, as in a loop of the caller's own.
    """

    def __init__(
        self,
        message: str,
        *,
        epoch: int | None = None,
        step: int | None = None,
        lr: float | None = None,
        stable_lr: float | None = None,
    ) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step
        self.lr = lr
        self.stable_lr = stable_lr

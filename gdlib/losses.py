"""Losses with explicit gradients, under PyTorch's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gdlib import _core, validation
from gdlib.errors import DivergenceError

if TYPE_CHECKING:
    import numpy.typing as npt

_INFINITY = float("inf")
REDUCTIONS = ("mean", "sum", "none")


class MSELoss:
    """Squared error: (output - target)^2, averaged over EVERY element (rows x outputs), summed, or left as it is.

    `criterion(output, target)` returns a float (an array of output's shape for reduction "none"); shapes must be equal: nothing is
    broadcast. `criterion.backward()` returns the gradient with respect to the last output: scale * 2 (output - target), scale being
    1 / elements for "mean" and 1 for "sum"; for "none" it takes the gradient of the terms. Follows torch.nn.MSELoss.

    Raises ValueError for shapes that differ, empty input, and NaN or infinity in the target; DivergenceError when the output is not
    finite; RuntimeError for `backward` before a call.
    """

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; one of {', '.join(REDUCTIONS)} is wanted.")
        self.reduction = reduction
        self._last: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None

    def __call__(self, output: Any, target: Any) -> float | npt.NDArray[Any]:
        reduction = self.reduction
        reduced = _core.squared_error_mean if reduction == "mean" else _core.squared_error_sum
        try:
            loss = reduced(output, target)
        except (TypeError, ValueError):
            output, target = self._convert(output, target)
            loss = reduced(output, target)
        if not loss < _INFINITY:
            self._explain(output, target)
        self._last = (output, target)
        return _core.squared_error_terms(output, target) if reduction == "none" else loss

    def backward(self, gradient: Any = None, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The gradient with respect to the output of the last call, of its shape. `out` receives it if given."""
        if self._last is None:
            raise RuntimeError("backward has no loss to work with; call the criterion on an output and a target first.")
        output, target = self._last
        if self.reduction != "none":
            if gradient is not None:
                raise ValueError(f"a {self.reduction} loss takes no gradient; call backward() without one.")
            try:
                return _core.squared_error_gradient(output, target, None if self.reduction == "mean" else 1.0, out)
            except (TypeError, ValueError):
                validation.flat_out(out, output.shape, output.dtype)
                raise
        if gradient is None:
            raise ValueError("a loss without reduction has one gradient for each term; call backward(gradient) with an array of its shape.")
        terms = validation.as_array(gradient, "the gradient")
        if terms.shape != output.shape:
            raise ValueError(f"the gradient has shape {terms.shape}; a loss without reduction wants one of shape {output.shape}.")
        if validation.flat_out(out, output.shape, output.dtype) is not None:
            for remembered, name in ((output, "output"), (target, "target")):
                if np.may_share_memory(out, remembered):
                    raise ValueError(f"out shares memory with the {name}; give it memory of its own.")
        slope = _core.squared_error_gradient(output, target, 1.0)  # apart from `out`, which may be the gradient
        result: npt.NDArray[Any] = np.multiply(slope, validation.as_dtype(terms, output.dtype), out=slope if out is None else out)
        return result

    @staticmethod
    def _convert(output: Any, target: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        output, target = validation.as_array(output, "the output"), validation.as_array(target, "the target")
        if output.shape != target.shape:
            hint = "; give the target a column for each output: target[:, None]" if output.shape == (*target.shape, 1) else ""
            raise ValueError(f"the output has shape {output.shape} and the target {target.shape}; equal shapes are wanted{hint}.")
        if output.size == 0:
            raise ValueError(f"the output has shape {output.shape}; a loss of nothing is not defined.")
        dtype = output.dtype if output.dtype in (np.float32, np.float64) else np.dtype(np.float64)
        return (
            np.ascontiguousarray(validation.as_dtype(output, dtype)),
            np.ascontiguousarray(validation.as_dtype(target, dtype)),
        )

    @staticmethod
    def _explain(output: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
        validation.require_finite(target, target, "the target")
        if not np.isfinite(output).all():
            raise DivergenceError("the output holds NaN or infinity: training has diverged; start again with a smaller lr.")
        raise DivergenceError(f"the loss does not fit {output.dtype}: training has diverged; start again with a smaller lr.")

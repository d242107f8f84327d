"""Standardisation, and folding it into a layer so that a saved model takes raw measurements."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from gdlib import validation
from gdlib.modules import Model
from gdlib.nn import Linear

if TYPE_CHECKING:
    import numpy.typing as npt

_Model = TypeVar("_Model", bound=Model)


class StandardScaler:
    """z = (x - mean) / scale, column by column, in float64; a constant column has scale 1.

    `mean_` and `scale_` (the standard deviation, dividing by the number of rows) have shape [n_features]. Follows
    sklearn.preprocessing.StandardScaler. Raises ValueError for wrong shapes and for NaN or infinity.
    """

    mean_: npt.NDArray[np.float64]
    scale_: npt.NDArray[np.float64]

    def fit(self, X: Any) -> Self:
        """Take mean and standard deviation from X [n_samples, n_features]."""
        array = validation.as_array(X, "X")
        if array.ndim != 2 or array.shape[0] == 0:
            raise ValueError(f"X has shape {array.shape}; [n_samples, n_features] with at least one sample is wanted.")
        validation.require_finite(array, array, "X")
        with np.errstate(over="ignore"):
            mean = array.mean(axis=0, dtype=np.float64)
            deviation = np.sqrt(np.square(array - mean).mean(axis=0, dtype=np.float64))
        if not (np.isfinite(mean) & np.isfinite(deviation)).all():
            raise ValueError("X holds numbers whose squares do not fit float64; scale it first.")
        # Compared exactly: rounding leaves a constant column a deviation that is noise, not a scale.
        self.mean_, self.scale_ = mean, np.where(array.max(axis=0) == array.min(axis=0), 1.0, deviation)
        return self

    def _require_fitted(self) -> None:
        if not hasattr(self, "mean_"):
            raise RuntimeError("the scaler has no means yet; call fit(X) first.")

    def transform(self, X: Any) -> npt.NDArray[np.float64]:
        """(X - mean) / scale, as float64. Raises RuntimeError before `fit`."""
        self._require_fitted()
        array = validation.as_array(X, "X")
        if array.ndim != 2 or array.shape[1] != len(self.mean_):
            raise ValueError(f"X has shape {array.shape}; [n_samples, {len(self.mean_)}] is wanted.")
        validation.require_finite(array, array, "X")
        return np.asarray((array - self.mean_) / self.scale_)

    def fold_into(self, model: _Model) -> _Model:
        """A model of raw x that answers as `model` does of z: in its first layer W' = W / scale, b' = b - W' mean.

        Its `feature_ranges`, if it has any, are taken for those of z, and become those of x.

        Raises ValueError without a bias there, and for a Sequential whose first layer is not a Linear.
        """
        self._require_fitted()
        folded = copy.deepcopy(model)
        first = folded._leaves()[0][1]
        if not isinstance(first, Linear):
            raise ValueError(f"the first layer of the model is a {type(first).__name__}, without weights to scale; a Linear is wanted.")
        if first.bias is None:
            raise ValueError("the model has no bias to take up the means; use Linear(..., bias=True).")
        if model.in_features != len(self.mean_):
            raise ValueError(f"the model has {model.in_features} features and the scaler {len(self.mean_)}; equal numbers are wanted.")
        weight = first.weight.data / self.scale_
        state = {"weight": weight, "bias": first.bias.data - weight @ self.mean_}
        first.load_state_dict(state)
        folded.zero_grad()
        folded.training_summary = model.training_summary
        if model.feature_ranges is not None:
            ranges = np.asarray(model.feature_ranges) * self.scale_[:, None] + self.mean_[:, None]
            folded.feature_ranges = ranges.tolist()
        return folded

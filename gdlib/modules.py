"""What layers and models have in common: parameters by name, their state, sizes and names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gdlib import _core, validation
from gdlib.errors import DivergenceError
from gdlib.parameters import Arena, Parameter

if TYPE_CHECKING:
    import numpy.typing as npt

LayerTuple = tuple[str, int, int, bool]  # kind, in_features, out_features, bias: what the engine builds a network from

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


class Module:
    """What layers and models share: their parameters by name, and the state of those."""

    _composed = False  # whether it is part of a Sequential

    def __call__(self, x: Any) -> npt.NDArray[Any]:
        raise NotImplementedError

    def predict(self, x: Any, /) -> npt.NDArray[Any]:
        raise NotImplementedError

    def backward(self, gradient: Any) -> npt.NDArray[Any]:
        raise NotImplementedError

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """The parameters with their keys in the state dict, in order."""
        return []

    def parameters(self) -> list[Parameter]:
        """The parameters, in order: what an optimizer wants."""
        return [parameter for _, parameter in self.named_parameters()]

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        for parameter in self.parameters():
            _core.set_zero(parameter._grad)

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of the parameters by name, under PyTorch's keys."""
        return {name: parameter._data.copy() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the parameters in, all or none; anything that NumPy can view.

        Raises KeyError for missing and unexpected names, ValueError for wrong shapes and numbers that do not fit the dtype.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"the state dict is a {type(state).__name__}; a dict of arrays by name is wanted, as state_dict() returns it.")
        parameters = dict(self.named_parameters())
        missing, unexpected = (sorted(map(str, names)) for names in (parameters.keys() - state.keys(), state.keys() - parameters.keys()))
        if missing or unexpected:
            raise KeyError(f"the state dict does not fit this model: missing {missing}, unexpected {unexpected}.")
        arrays = {name: validation.as_array(state[name], name) for name in parameters}
        for name, parameter in parameters.items():
            if arrays[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {arrays[name].shape} in the state dict; {parameter.shape} is wanted.")
            arrays[name] = parameter.converted(arrays[name])
        for name, parameter in parameters.items():
            parameter.data = arrays[name]

    def _leaves(self) -> list[tuple[str, Module]]:
        """The layers that are not made of layers, with the place of each inside this one."""
        return [("", self)]

    def _adopt(self, arena: Arena, begin: int) -> None:
        """Move the parameters to `begin` in an arena that belongs to a Sequential around this layer."""
        self._composed = True


class Model(Module):
    """A module that can be trained, saved and served: sizes, dtype, names, and one arena for all of its parameters."""

    in_features: int
    out_features: int
    dtype: np.dtype[Any]
    _arena: Arena
    _kept: tuple[Arena, int, _core.Predictor] | None = None  # with the version of the parameters that it was made of
    _seen: tuple[Arena, int] | None = None  # by the prediction before
    feature_names: list[str] | None = None
    target_names: list[str] | None = None
    feature_units: list[str] | None = None  # "" where there is none
    target_units: list[str] | None = None
    feature_ranges: list[list[float]] | None = None  # [lowest, highest] in the data that it learnt from
    training_summary: dict[str, Any] | None = None  # of the fit that these parameters come from; saved with the model

    def architecture(self) -> list[LayerTuple]:
        """The layers as (kind, in_features, out_features, bias)."""
        raise NotImplementedError

    def _span(self) -> tuple[int, int]:
        """Where the parameters lie in the arena."""
        raise NotImplementedError

    def _kept_predictor(self) -> _core.Predictor | None:
        """The weights laid out for predictions, once a second one finds the parameters as the one before.

        None while they may change unseen: as long as someone holds an array that `parameter.data` gave out.
        """
        arena = self._arena
        version = arena.version
        if not arena.exclusive():
            self._kept = self._seen = None
            return None
        kept = self._kept
        if kept is not None and kept[0] is arena and kept[1] == version:
            return kept[2]
        if self._seen is None or self._seen[0] is not arena or self._seen[1] != version:
            self._kept, self._seen = None, (arena, version)
            return None
        begin, end = self._span()
        predictor = _core.Predictor(self.architecture(), arena.view(begin, (end - begin,))[0])
        if arena.version != version:  # another thread has written to them meanwhile
            return None
        self._kept = arena, version, predictor
        return predictor

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_seen": None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.training_summary = None

    load_state_dict.__doc__ = Module.load_state_dict.__doc__

    def _not_finite(self, x: Any, rows: npt.NDArray[Any]) -> DivergenceError:
        """Why an output is not finite. Raises ValueError when x is not."""
        validation.require_finite(x, rows, "x")
        if not np.isfinite(self._arena.data).all():
            return DivergenceError("the weights hold NaN or infinity: training has diverged; start again with a smaller lr.")
        return DivergenceError(f"the output does not fit {self.dtype}: the weights have grown too large; use a smaller lr.")

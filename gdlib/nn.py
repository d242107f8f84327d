"""Layers with explicit gradients, and networks of them, under PyTorch's names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gdlib import _core, validation
from gdlib.modules import FLOATS, LayerTuple, Model, Module
from gdlib.parameters import Arena, Parameter

if TYPE_CHECKING:
    import numpy.typing as npt

_LARGEST_BYTES = 2**47  # what a process can address


class Linear(Model):
    """y = x W^T + b.

    x is [..., in_features], y [..., out_features], `weight` W [out_features, in_features], `bias` b [out_features] (None without).
    Both start uniform in +-1/sqrt(in_features), drawn from `seed` (None: fresh entropy), the same numbers on every machine. A row's
    output has the same bits in any batch and for any number of threads.

    The gradient is explicit: `model(x)` remembers x, and `model.backward(g)` adds g^T x to `weight.grad` and the column sums of g to
    `bias.grad`, and returns g W. Follows torch.nn.Linear.

    Raises ValueError for sizes below 1, wrong shapes, and NaN or infinity in x; TypeError for what is not a number; DivergenceError
    when the output is not finite although x is.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, dtype: npt.DTypeLike = np.float32, seed: int | None = None
    ) -> None:
        self.in_features = validation.as_count(in_features, "in_features")
        self.out_features = validation.as_count(out_features, "out_features")
        self.dtype = np.dtype(dtype)
        if self.dtype not in FLOATS:
            raise TypeError(f"dtype is {self.dtype}; float32 or float64 is wanted.")
        weights = self.in_features * self.out_features
        if weights * self.dtype.itemsize > _LARGEST_BYTES:
            raise ValueError(f"{self.in_features} x {self.out_features} weights do not fit the memory of any machine; use fewer.")
        self._arena = Arena(weights + (self.out_features if bias else 0), self.dtype)
        self.weight = Parameter(self._arena, 0, (self.out_features, self.in_features), "weight")
        self.bias = Parameter(self._arena, weights, (self.out_features,), "bias") if bias else None
        seed = validation.fresh_seed() if seed is None else validation.as_seed(seed)
        _core.fill_uniform(seed, 1.0 / math.sqrt(self.in_features), self._arena.data)
        self._input: npt.NDArray[Any] | None = None

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """The weight, and the bias where there is one."""
        return [("weight", self.weight)] if self.bias is None else [("weight", self.weight), ("bias", self.bias)]

    def architecture(self) -> list[LayerTuple]:
        """The layer as (kind, in_features, out_features, bias)."""
        return [("linear", self.in_features, self.out_features, self.bias is not None)]

    def _adopt(self, arena: Arena, begin: int) -> None:
        super()._adopt(arena, begin)
        for parameter in self.parameters():
            parameter.move(arena, begin)
            begin = parameter.end
        self._arena = arena

    def __call__(self, x: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The layer's output; x is remembered, not copied where it fits, for `backward`. `out` receives the result if given."""
        bias = self.bias
        try:
            y = _core.linear_forward(x, self.weight._data, None if bias is None else bias._data, out)
        except (TypeError, ValueError, FloatingPointError):
            x, y = self._forward(x, out)
        self._input = x
        return y

    forward = __call__

    def predict(self, x: Any) -> npt.NDArray[Any]:
        """The layer's output, [..., out_features]; no input is remembered, so that threads may share the model.

        From the second call on, the weights of a layer with many outputs are kept in the kernels' own order, in memory of as many bytes,
        until they change: one row then costs about one reading of them.
        """
        bias = self.bias
        try:
            if self.out_features >= _core.few_outputs and (predictor := self._kept_predictor()) is not None:
                return predictor(x)
            return _core.linear_forward(x, self.weight._data, None if bias is None else bias._data, None)
        except (TypeError, ValueError, FloatingPointError):
            return self._forward(x, None)[1]

    def _forward(self, x: Any, out: npt.NDArray[Any] | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The same for what the engine does not take as it is: convert it, or say why it cannot be."""
        rows = validation.as_rows(x, self.in_features, self.dtype, "x")
        shape = (*validation.as_array(x, "x").shape[:-1], self.out_features)
        out = validation.flat_out(out, shape, self.dtype)
        try:
            y = _core.linear_forward(rows, self.weight._data, None if self.bias is None else self.bias._data, out)
        except FloatingPointError:
            raise self._not_finite(x, rows) from None
        return rows, y.reshape(shape)

    def backward(self, gradient: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Add to `.grad` and return the gradient of x, [..., in_features], for the gradient of the last output.

        `out` receives the result if given. Raises RuntimeError before the first call of the model.
        """
        x = self._input
        if x is None:
            raise RuntimeError("backward has no input to work with; call the model on a batch first.")
        bias = None if self.bias is None else self.bias._grad
        try:
            return _core.linear_backward(gradient, x, self.weight._data, self.weight._grad, bias, out)
        except (TypeError, ValueError):
            array = validation.as_array(gradient, "the gradient")
            if array.ndim == 0 or array.shape[-1] != self.out_features or array.size != len(x) * self.out_features:
                raise ValueError(
                    f"the gradient has shape {array.shape}; that of the last output, {len(x)} rows of {self.out_features}, is wanted."
                ) from None
            flat = np.ascontiguousarray(validation.as_dtype(array, self.dtype)).reshape(-1, self.out_features)
            shape = (*array.shape[:-1], self.in_features)
            result = _core.linear_backward(flat, x, self.weight._data, self.weight._grad, bias, validation.flat_out(out, shape, self.dtype))
            return result.reshape(*array.shape[:-1], self.in_features)

    def _span(self) -> tuple[int, int]:
        return self.weight.begin, (self.bias or self.weight).end

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_input": None}

    def __repr__(self) -> str:
        return f"Linear(in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, dtype={self.dtype})"


class Activation(Module):
    """An elementwise function of arrays of any shape, float32 or float64 (others become float32); NaN stays NaN."""

    kind: ClassVar[str]  # the engine's name

    def __init__(self) -> None:
        self._output: npt.NDArray[Any] | None = None

    def __call__(self, x: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The function of every element; remembered for `backward`. `out` receives the result if given, and may be x."""
        try:
            y = _core.activation_forward(self.kind, x, out)
        except (TypeError, ValueError):
            array = validation.as_array(x, "x")
            array = np.ascontiguousarray(array if array.dtype in FLOATS else validation.as_dtype(array, FLOATS[0]))
            validation.flat_out(out, array.shape, array.dtype)
            y = _core.activation_forward(self.kind, array, out)
        self._output = y
        return y

    forward = __call__

    def predict(self, x: Any, /) -> npt.NDArray[Any]:
        """The function of every element; nothing is remembered, so that threads may share the layer."""
        return type(self)()(x)

    def backward(self, gradient: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The gradient of x for the gradient of the last output, of its shape. `out` receives it if given, and may be the gradient.

        Raises RuntimeError before the first call.
        """
        y = self._output
        if y is None:
            raise RuntimeError("backward has no output to work with; call the layer on a batch first.")
        try:
            return _core.activation_backward(self.kind, y, gradient, out)
        except (TypeError, ValueError):
            array = validation.as_array(gradient, "the gradient")
            if array.shape != y.shape:
                raise ValueError(f"the gradient has shape {array.shape}; that of the last output, {y.shape}, is wanted.") from None
            validation.flat_out(out, y.shape, y.dtype)
            return _core.activation_backward(self.kind, y, np.ascontiguousarray(validation.as_dtype(array, y.dtype)), out)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_output": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ReLU(Activation):
    """max(0, x), with the gradient 0 at 0. Follows torch.nn.ReLU."""

    kind = "relu"


class Tanh(Activation):
    """tanh x = (e^x - e^-x) / (e^x + e^-x), to 3 units of the last place. Follows torch.nn.Tanh."""

    kind = "tanh"


class Sigmoid(Activation):
    """1 / (1 + e^-x), to 3 units of the last place. Follows torch.nn.Sigmoid."""

    kind = "sigmoid"


def _in_a_line(layer: Module) -> str:
    return " ".join(repr(layer).split())


class Sequential(Model):
    """y = f_n(... f_2(f_1(x))): layers one after the other.

    `Sequential(Linear(13, 64), ReLU(), Linear(64, 1))` takes x [..., 13] to y [..., 1]. `len(model)`, `model[0]` and iteration give the
    layers; a Sequential may be a layer of another. Keys of the state dict are PyTorch's: `0.weight`, `0.bias`, `2.weight`, ... A row's
    output has the same bits in any batch and for any number of threads.

    The parameters of all layers move into one arena; the layers' Parameter objects stay the same. Hence a layer has one place: build
    optimizers after the Sequential, and new layers for another one. Gradients are explicit, as for `Linear`. Follows torch.nn.Sequential.

    Raises TypeError for what is no layer; ValueError without a Linear, for sizes that do not chain, dtypes that differ, and a layer that
    has a place already.
    """

    def __init__(self, *layers: Module) -> None:
        seen: set[int] = set()
        for i, layer in enumerate(layers):
            if not isinstance(layer, (Linear, Activation, Sequential)):
                hint = "; pass them one by one, Sequential(*layers)" if isinstance(layer, (list, tuple, Mapping)) else ""
                raise TypeError(f"layer {i} is a {type(layer).__name__}; a Linear, ReLU, Tanh, Sigmoid or Sequential is wanted{hint}.")
            if layer._composed or id(layer) in seen:
                raise ValueError(
                    f"layer {i}, {_in_a_line(layer)}, already has a place in a Sequential; make a new one, and copy its state_dict()."
                )
            seen.add(id(layer))
        self._layers = layers
        places = self._leaves()
        linear = [(place, leaf) for place, leaf in places if isinstance(leaf, Linear)]
        if not linear:
            raise ValueError("a Sequential without a Linear has nothing to learn and no sizes; give it at least one Linear.")
        for (place, before), (next_place, after) in pairwise(linear):
            if before.out_features != after.in_features:
                raise ValueError(
                    f"layer {place}, {before!r}, gives {before.out_features} features and layer {next_place}, {after!r}, takes "
                    f"{after.in_features}; equal numbers are wanted."
                )
            if before.dtype != after.dtype:
                raise ValueError(
                    f"layer {place}, {before!r}, computes in {before.dtype} and layer {next_place}, {after!r}, in {after.dtype}; one dtype "
                    "is wanted."
                )
        self.in_features, self.out_features, self.dtype = linear[0][1].in_features, linear[-1][1].out_features, linear[0][1].dtype
        self._flat_layers = [leaf for _, leaf in places if isinstance(leaf, (Linear, Activation))]
        # An activation works in place on a Linear's output, which has no other reader, and on a gradient that this model has made.
        after_linear = [False, *(isinstance(leaf, Linear) for leaf in self._flat_layers[:-1])]
        steps = [(leaf, after and isinstance(leaf, Activation)) for leaf, after in zip(self._flat_layers, after_linear, strict=True)]
        steps_back = [(leaf, i > 0 and isinstance(leaf, Activation)) for i, leaf in enumerate(reversed(self._flat_layers))]
        *self._steps, self._last_step = steps
        *self._steps_back, self._last_step_back = steps_back
        features = self.in_features
        self._architecture: list[LayerTuple] = []
        for leaf in self._flat_layers:
            if isinstance(leaf, Activation):
                self._architecture.append((leaf.kind, features, features, False))
            else:
                self._architecture += leaf.architecture()
                features = leaf.out_features
        self._place(Arena(sum(parameter.data.size for parameter in self.parameters()), self.dtype), 0)
        for name, parameter in self.named_parameters():
            parameter.name = name

    def _place(self, arena: Arena, begin: int) -> None:
        self._arena, self._begin = arena, begin
        for layer in self._layers:
            layer._adopt(arena, begin)
            begin += sum(parameter.data.size for parameter in layer.parameters())
        self._end = begin

    def _adopt(self, arena: Arena, begin: int) -> None:
        super()._adopt(arena, begin)
        self._place(arena, begin)

    def _leaves(self) -> list[tuple[str, Module]]:
        return [(f"{i}.{place}" if place else str(i), leaf) for i, layer in enumerate(self._layers) for place, leaf in layer._leaves()]

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """Every layer's parameters, their names behind the layer's number: `0.weight`."""
        return [(f"{i}.{name}", parameter) for i, layer in enumerate(self._layers) for name, parameter in layer.named_parameters()]

    def architecture(self) -> list[LayerTuple]:
        """The layers as (kind, in_features, out_features, bias), those of a Sequential inside in its place."""
        return list(self._architecture)

    def __call__(self, x: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The output, [..., out_features]; every layer remembers what its `backward` needs. `out` receives the result if given."""
        if out is not None:
            self._require_room(out, x, "x", self.in_features, self.out_features)
        y: npt.NDArray[Any] = x
        if isinstance(self._flat_layers[0], Activation):  # infinity would come out of it as a number
            y = self._as_input(x)
        for layer, in_place in self._steps:
            y = layer(y, y if in_place else None)
        layer, in_place = self._last_step
        return layer(y, y if in_place and out is None else out)

    forward = __call__

    def _require_room(self, out: Any, given: Any, name: str, features: int, wanted: int) -> None:
        """Raises ValueError, before any layer has worked, for an `out` that does not fit, or whose memory this model reads."""
        shape = validation.as_array(given, name).shape
        if shape and shape[-1] == features:  # what the layers say of another shape is clearer
            validation.flat_out(out, (*shape[:-1], wanted), self.dtype)
        for other, what in ((given, name), (self._arena.data, "the parameters")):
            if isinstance(other, np.ndarray) and np.may_share_memory(out, other):
                raise ValueError(f"out shares memory with {what}; give it memory of its own.")

    def _as_input(self, x: Any) -> npt.NDArray[Any]:
        """x as finite numbers of this dtype, in its shape."""
        rows = validation.as_rows(x, self.in_features, self.dtype, "x")
        validation.require_finite(x, rows, "x")
        return np.ascontiguousarray(rows).reshape(*validation.as_array(x, "x").shape[:-1], self.in_features)

    def predict(self, x: Any, /) -> npt.NDArray[Any]:
        """The output, [..., out_features], in one native call; no input is remembered, so that threads may share the model.

        From the second call on, the weights are kept in the kernels' own order, in memory of as many bytes, until they change.
        """
        parameters = self._arena.view(self._begin, (self._end - self._begin,))[0]
        try:
            if (predictor := self._kept_predictor()) is not None:
                return predictor(x)
            return _core.network_forward(self._architecture, x, parameters)
        except (TypeError, ValueError, FloatingPointError):
            rows = validation.as_rows(x, self.in_features, self.dtype, "x")
            try:
                y = _core.network_forward(self._architecture, rows, parameters)
            except FloatingPointError:
                raise self._not_finite(x, rows) from None
            shaped: npt.NDArray[Any] = y.reshape(*validation.as_array(x, "x").shape[:-1], self.out_features)
            return shaped

    def backward(self, gradient: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Add to every `.grad` and return the gradient of x, [..., in_features], for the gradient of the last output.

        `out` receives the result if given. Raises RuntimeError before the first call of the model, ValueError for a gradient of another
        shape.
        """
        if out is not None:
            self._require_room(out, gradient, "the gradient", self.out_features, self.in_features)
        g: npt.NDArray[Any] = gradient
        for layer, in_place in self._steps_back:
            g = layer.backward(g, g if in_place else None)
        layer, in_place = self._last_step_back
        return layer.backward(g, g if in_place and out is None else out)

    def _span(self) -> tuple[int, int]:
        return self._begin, self._end

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._layers)

    def __getitem__(self, index: int) -> Module:
        if isinstance(index, slice):
            raise TypeError("a slice of a Sequential would share its layers, which have one place each; take them one by one, as model[0].")
        return self._layers[index]

    def __repr__(self) -> str:
        lines = (f"  ({i}): " + repr(layer).replace("\n", "\n  ") for i, layer in enumerate(self._layers))
        return "Sequential(\n" + "\n".join(lines) + "\n)"

"""Optimizers under PyTorch's names: stochastic gradient descent, and gradient descent over all rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gdlib import _core, validation
from gdlib.parameters import Arena, Parameter, aligned_zeros

if TYPE_CHECKING:
    import numpy.typing as npt

# One group's update for the engine: begin, end, lr, momentum, dampening, weight_decay, nesterov, maximize, first_step.
UpdateRange = tuple[int, int, float, float, float, float, bool, bool, bool]


class _Run:
    """Neighbouring parameters of one arena and one group: a single call updates them."""

    __slots__ = ("arena", "begin", "buffer", "data", "end", "grad", "started")

    def __init__(self, parameters: list[Parameter]) -> None:
        self.arena: Arena = parameters[0].arena
        self.begin, self.end = parameters[0].begin, parameters[-1].end
        self.buffer: npt.NDArray[Any] | None = None  # momentum, once a step needs it
        self.started = False  # whether the buffer holds a gradient yet
        self._view()

    def _view(self) -> None:
        self.data, self.grad = self.arena.view(self.begin, (self.end - self.begin,))

    def __getstate__(self) -> Any:
        return self.arena, self.begin, self.end, self.buffer, self.started

    def __setstate__(self, state: Any) -> None:
        self.arena, self.begin, self.end, self.buffer, self.started = state
        self._view()


def _runs(parameters: list[Parameter]) -> list[_Run]:
    runs: list[list[Parameter]] = []
    for parameter in parameters:
        if runs and runs[-1][-1].arena is parameter.arena and runs[-1][-1].end == parameter.begin:
            runs[-1].append(parameter)
        else:
            runs.append([parameter])
    return [_Run(run) for run in runs]


class SGD:
    """Stochastic gradient descent with momentum.

    d = grad + weight_decay * theta (grad negated to maximize); v = d on the first step, then momentum * v + (1 - dampening) * d;
    theta <- theta - lr * (d + momentum * v with nesterov, v with momentum, d without). Weight decay applies to every parameter of its
    group, biases too. Follows torch.optim.SGD: `params` is a list of parameters, or of groups, each a dict with "params" and its own
    options; `param_groups` may be changed between steps.

    Raises ValueError for lr <= 0, negative or non-finite options, nesterov without momentum or with dampening, no parameters, or one
    given twice; TypeError for what is no number; RuntimeError when it is used after its parameters have moved into a Sequential.
    """

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        self.defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        self.param_groups: list[dict[str, Any]] = []
        if not isinstance(params, Iterable):
            raise TypeError(f"the parameters are a {type(params).__name__}; a list of them is wanted, such as model.parameters().")
        given = list(params)
        if not given:
            raise ValueError("the optimizer got no parameters; pass model.parameters().")
        groups: list[dict[str, Any]] = given if isinstance(given[0], dict) else [{"params": given}]  # type: ignore[assignment]
        seen: set[int] = set()
        for group in groups:
            members = group.get("params") if isinstance(group, Mapping) else None
            members = [members] if isinstance(members, Parameter) else list(members or ())
            if not members or not all(isinstance(member, Parameter) for member in members):
                raise TypeError("a group of parameters is no dict with a list of Parameters under 'params'; pass model.parameters().")
            if unknown := sorted(group.keys() - self.defaults.keys() - {"params"}):
                raise ValueError(f"a group of parameters has unknown options {unknown}; known are {sorted(self.defaults)}.")
            if any(id(member) in seen for member in members) or len({id(member) for member in members}) < len(members):
                raise ValueError("a parameter was given to the optimizer twice; each belongs to one group.")
            seen.update(id(member) for member in members)
            self.param_groups.append({**self.defaults, **group, "params": members})
        for group in self.param_groups:
            self._check(group)
        self._runs = [_runs(group["params"]) for group in self.param_groups]
        self._flat = [(group, run) for group, runs in zip(self.param_groups, self._runs, strict=True) for run in runs]

    def _check_lr(self, lr: Any) -> None:
        validation.as_number(lr, "lr", positive=True)

    def _refuse_vacated(self) -> None:
        raise RuntimeError(
            "the parameters have moved into a Sequential since this optimizer was built; build one from that model.parameters()."
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        self._check_lr(group["lr"])
        for name in ("momentum", "dampening", "weight_decay"):
            validation.as_number(group[name], name)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov wants a momentum above 0 and no dampening.")

    def _require_parameters(self) -> None:
        if any(run.arena.vacated for _, run in self._flat):
            self._refuse_vacated()

    def zero_grad(self) -> None:
        """Set the gradient of every parameter to zero."""
        for _, run in self._flat:
            if run.arena.vacated:
                self._refuse_vacated()
            _core.set_zero(run.grad)

    def step(self) -> None:
        """Update every parameter from its `.grad`, in place."""
        for group, run in self._flat:
            arena, momentum = run.arena, group["momentum"]
            if arena.vacated:
                self._refuse_vacated()
            if momentum and run.buffer is None:
                run.buffer = aligned_zeros(run.end - run.begin, run.data.dtype)
            arena.version += 1
            try:
                _core.sgd_update(run.data, run.grad, run.buffer if momentum else None, group, not run.started)
            except (TypeError, ValueError, OverflowError):
                self._check(group)
                raise
            finally:
                arena.version += 1
            if momentum:
                run.started = True

    def update_ranges(self, arena: Arena) -> list[UpdateRange]:
        """What the engine needs to update this arena. Raises ValueError when a parameter lies in another one."""
        self._require_parameters()
        ranges: list[UpdateRange] = []
        for group, runs in zip(self.param_groups, self._runs, strict=True):
            self._check(group)
            for run in runs:
                if run.arena is not arena:
                    raise ValueError("the optimizer holds parameters of another model; build it from this model.parameters().")
                options = (float(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay"))
                flags = (bool(group["nesterov"]), bool(group["maximize"]), not run.started)
                ranges.append((run.begin, run.end, *options, *flags))  # type: ignore[arg-type]
        return ranges

    def momentum_buffer(self, arena: Arena) -> npt.NDArray[Any] | None:
        """A copy of the momentum of the arena's parameters, zero where none has been kept; None when no group has momentum."""
        if not any(group["momentum"] for group in self.param_groups):
            return None
        buffer = aligned_zeros(arena.data.size, arena.data.dtype)
        for runs in self._runs:
            for run in runs:
                if run.buffer is not None:
                    buffer[run.begin : run.end] = run.buffer
        return buffer

    def set_momentum_buffer(self, buffer: npt.NDArray[Any] | None) -> None:
        """Take over the momentum that a run of the engine has left, at least one step old."""
        for group, run in self._flat:
            if buffer is not None and group["momentum"]:
                run.buffer = buffer[run.begin : run.end].copy()
                run.started = True

    def momentum_state(self) -> list[tuple[npt.NDArray[Any] | None, bool]]:
        """Copies of all momentum, for `restore_momentum`."""
        return [(None if run.buffer is None else run.buffer.copy(), run.started) for _, run in self._flat]

    def restore_momentum(self, state: list[tuple[npt.NDArray[Any] | None, bool]]) -> None:
        """Go back to an earlier `momentum_state`."""
        for (_, run), (buffer, started) in zip(self._flat, state, strict=True):
            run.buffer, run.started = None if buffer is None else buffer.copy(), started

    def state_dict(self) -> dict[str, Any]:
        """`state` (momentum buffers by parameter number) and `param_groups` (options and parameter numbers), as in PyTorch."""
        self._require_parameters()
        state: dict[int, dict[str, npt.NDArray[Any]]] = {}
        packed: list[dict[str, Any]] = []
        number = 0
        for group, runs in zip(self.param_groups, self._runs, strict=True):
            numbers = []
            for parameter in group["params"]:
                run = next(r for r in runs if r.arena is parameter.arena and r.begin <= parameter.begin < r.end)
                if run.buffer is not None and run.started:
                    flat = run.buffer[parameter.begin - run.begin : parameter.end - run.begin]
                    state[number] = {"momentum_buffer": flat.reshape(parameter.shape).copy()}
                numbers.append(number)
                number += 1
            packed.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
        return {"state": state, "param_groups": packed}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over options and momentum. Raises ValueError when groups, their sizes or a buffer's shape differ; then nothing changes."""
        if not isinstance(state_dict, Mapping) or not {"param_groups", "state"} <= state_dict.keys():
            raise ValueError("the state is no dict with 'param_groups' and 'state'; pass what state_dict() returned.")
        self._require_parameters()
        groups, state = state_dict["param_groups"], state_dict["state"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != sizes:
            raise ValueError(
                f"the state has groups of {[len(group['params']) for group in groups]} parameters and the optimizer of {sizes}; "
                "build the optimizer with the same groups."
            )
        options = [{name: group.get(name, self.defaults[name]) for name in self.defaults} for group in groups]
        for group in options:
            self._check(group)
        numbers = [number for group in groups for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        buffers: dict[int, npt.NDArray[Any]] = {}
        for number, parameter in zip(numbers, parameters, strict=True):
            value = state.get(number, {}).get("momentum_buffer")
            if value is None:
                continue
            buffers[id(parameter)] = validation.as_array(value, f"the momentum of {parameter.name}")
            if buffers[id(parameter)].shape != parameter.shape:
                raise ValueError(f"the momentum of {parameter.name} has shape {buffers[id(parameter)].shape}; {parameter.shape} is wanted.")
        for group, values, runs in zip(self.param_groups, options, self._runs, strict=True):
            group.update(values)
            for run in runs:
                run.buffer, run.started = None, False
                for parameter in group["params"]:
                    if id(parameter) in buffers and run.arena is parameter.arena and run.begin <= parameter.begin < run.end:
                        if run.buffer is None:
                            run.buffer = aligned_zeros(run.end - run.begin, run.data.dtype)
                        run.buffer[parameter.begin - run.begin : parameter.end - run.begin] = buffers[id(parameter)].ravel()
                        run.started = True


def is_auto(lr: Any) -> bool:
    """Whether `fit` is to find the lr. (An array would be compared element by element.)"""
    return isinstance(lr, str) and lr == "auto"


class GD(SGD):
    """Full-batch gradient descent: theta <- theta - lr * grad J(theta).

    In `fit` a step is an epoch: one pass over all rows. With lr="auto" `fit` takes lr = 1 / L from the data, L being the largest
    eigenvalue of the Hessian of J by power iteration (reached from below, to about 1e-4 of itself where it stands apart), and leaves that
    number in `param_groups`: the largest step for which descent is guaranteed at every point (Nesterov, Introductory Lectures on Convex
    Optimization, 1.2.3). In a loop of your own `step` wants a number: `gdlib.training.auto_lr(model, X, loss)` gives the same one.
    """

    def __init__(self, params: Iterable[Parameter] | Iterable[dict[str, Any]], lr: float | str) -> None:
        super().__init__(params, lr)  # type: ignore[arg-type]

    def _check_lr(self, lr: Any) -> None:
        if is_auto(lr):
            return
        if isinstance(lr, str):
            raise ValueError(f"lr is {lr!r}; a number above 0 or 'auto' is wanted.")
        super()._check_lr(lr)

    def step(self) -> None:
        """Update every parameter from its `.grad`, in place. Raises ValueError while lr is "auto"."""
        if any(is_auto(group["lr"]) for group in self.param_groups):
            raise ValueError("lr is 'auto', which fit takes from the data; in a loop of your own give a number, such as auto_lr(...).")
        super().step()

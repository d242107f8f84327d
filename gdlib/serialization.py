"""Model files: safetensors with the architecture, names, units, ranges and training summary in the metadata; written whole or not at all.

What only these calls need is imported by them: `import gdlib` stays quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gdlib import validation
from gdlib.modules import Model, Module
from gdlib.nn import Linear, ReLU, Sequential, Sigmoid, Tanh

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt


FORMAT = "gdlib"
FORMAT_VERSION = "1"
CHUNK_BYTES = 2**24  # of a tensor that are read at once: some milliseconds, in which no other thread computes
_ACTIVATIONS = {layer.__name__: layer for layer in (ReLU, Tanh, Sigmoid)}

# What a model says of itself, by attribute and key of the metadata: each checked against its sizes, or None.
_FACTS: dict[str, Callable[[Model, Any], Any]] = {
    "feature_names": lambda model, names: validation.as_names(names, model.in_features, "feature_names"),
    "target_names": lambda model, names: validation.as_names(names, model.out_features, "target_names"),
    "feature_units": lambda model, units: validation.as_units(units, model.in_features, "feature_units"),
    "target_units": lambda model, units: validation.as_units(units, model.out_features, "target_units"),
    "feature_ranges": lambda model, ranges: validation.as_ranges(ranges, model.in_features, "feature_ranges"),
}


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, and rename: a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{validation.fresh_seed():x}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask, as for any new file
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def save(
    model: Model,
    path: str | os.PathLike[str],
    *,
    feature_names: Sequence[str] | None = None,
    target_names: Sequence[str] | None = None,
    feature_units: Sequence[str] | None = None,
    target_units: Sequence[str] | None = None,
    feature_ranges: npt.ArrayLike | None = None,
) -> None:
    """Write the model to a safetensors file, with what it says of itself and its training summary; folders are made as needed.

    Names, units ("" for none) and ranges default to those that the model has. `feature_ranges` [in_features, 2] holds the lowest and
    the highest value of each feature in the training data, such as np.stack([X.min(axis=0), X.max(axis=0)], axis=1). The file appears whole
    or not at all. Raises ValueError for a wrong number of them and for parameters that are not finite, OSError when the file cannot be
    written.
    """
    import json
    from pathlib import Path

    from safetensors.numpy import save as to_bytes

    if not isinstance(model, Model):
        raise TypeError(f"the model is a {type(model).__name__}; a gdlib.Linear or gdlib.Sequential is wanted.")
    state = model.state_dict()
    for name, values in state.items():
        validation.require_finite(values, values, name)
    given = {
        "feature_names": feature_names,
        "target_names": target_names,
        "feature_units": feature_units,
        "target_units": target_units,
        "feature_ranges": feature_ranges,
    }
    facts = {name: check(model, getattr(model, name) if given[name] is None else given[name]) for name, check in _FACTS.items()}
    architecture = _describe(model) | {"dtype": model.dtype.name}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": json.dumps(architecture),
        **{name: json.dumps(value) for name, value in facts.items()},
        "training": json.dumps(model.training_summary),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_bytes(state, metadata=metadata))


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model that `save` wrote, what it says of itself and training summary included.

    Raises FileNotFoundError, and ValueError for a file that is truncated, is no safetensors file, was not written by gdlib, or does not
    hold what its architecture says; OSError when it cannot be read.
    """
    from pathlib import Path

    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file at {path}.")
    try:
        opened = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); save the model again.") from None
    with opened as file:
        metadata: dict[str, str] = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} was not written by gdlib; load its tensors with the safetensors package and pass them to load_state_dict."
            )
        if metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {metadata.get('format_version')!r}, and this gdlib reads {FORMAT_VERSION!r}; update gdlib, or "
                "save the model again."
            )
        try:
            return _build(metadata, file)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
            reason = error.args[0] if error.args else error
            raise ValueError(f"{path} does not hold the model that its header describes ({reason}); save the model again.") from None


def _describe(module: Module) -> dict[str, Any]:
    """The architecture of a layer or a network of them, as it stands in a file."""
    description: dict[str, Any] = {"type": type(module).__name__}
    if isinstance(module, Linear):
        description |= {"in_features": module.in_features, "out_features": module.out_features, "bias": module.bias is not None}
    elif isinstance(module, Sequential):
        description["layers"] = [_describe(layer) for layer in module]
    return description


def _shapes(described: dict[str, Any], prefix: str = "") -> dict[str, list[int]]:
    """The tensors of a description by name, and their shapes."""
    if described["type"] == "Sequential":
        shapes: dict[str, list[int]] = {}
        for i, layer in enumerate(described["layers"]):
            shapes |= _shapes(layer, f"{prefix}{i}.")
        return shapes
    if described["type"] in _ACTIVATIONS:
        return {}
    if described["type"] != "Linear":
        raise ValueError(f"unknown layer {described['type']!r}")
    inputs, outputs = (validation.as_count(described[name], name) for name in ("in_features", "out_features"))
    return {f"{prefix}weight": [outputs, inputs]} | ({f"{prefix}bias": [outputs]} if described["bias"] else {})


def _create(described: dict[str, Any], dtype: str) -> Module:
    """The module of a description whose shapes are known to be those of the file."""
    if described["type"] == "Sequential":
        return Sequential(*(_create(layer, dtype) for layer in described["layers"]))
    if described["type"] in _ACTIVATIONS:
        return _ACTIVATIONS[described["type"]]()
    return Linear(described["in_features"], described["out_features"], bool(described["bias"]), dtype=dtype, seed=0)


def _fill(data: npt.NDArray[Any], stored: Any, name: str) -> None:
    """Copy a tensor of the file in, some rows at a time: whole, a large one would be in memory once more, and others kept waiting."""
    rows = max(1, CHUNK_BYTES // (data.nbytes // len(data)))
    for begin in range(0, len(data), rows):
        end = min(begin + rows, len(data))
        data[begin:end] = stored[begin:end]
        if not np.isfinite(data[begin:end]).all():
            validation.require_finite(data[:end], data[:end], name)  # raises, and names the row


def _build(metadata: dict[str, str], file: Any) -> Model:
    """The model that the metadata describes. Sizes are compared with what the file holds before memory is taken for them."""
    import json

    described = json.loads(metadata["architecture"])
    shapes = _shapes(described)
    stored = {"float32": "F32", "float64": "F64"}[described["dtype"]]
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
    held = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
    wanted = {name: (stored, shape) for name, shape in shapes.items()}
    if held != wanted:
        raise ValueError(f"it holds {held} where {wanted} belong")
    model = _create(described, described["dtype"])
    if not isinstance(model, Model):
        raise ValueError(f"it is a lone {described['type']}")
    for name, parameter in model.named_parameters():
        _fill(parameter.data, slices[name], name)
    for name, check in _FACTS.items():
        setattr(model, name, check(model, json.loads(metadata.get(name, "null"))))  # older files lack units and ranges
    training = json.loads(metadata["training"])
    if training is not None and not isinstance(training, dict):
        raise ValueError("its training summary is no object")
    model.training_summary = training
    return model

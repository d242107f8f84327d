"""Inference requests and answers of the Open Inference Protocol v2, as pure functions: a parsed request -> arrays, arrays -> body.

A tensor's values stand in its `data`, or raw after the JSON part, in the order of the tensors (the binary tensor data extension); one
request may mix both. Nothing here opens a file or a socket, and nothing trusts the request.

Source: Open Inference Protocol v2, "Inference Request JSON Object" and "Inference Response JSON Object"; Triton's binary tensor data
extension for `binary_data_size`, `binary_data` and `binary_data_output`.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from gdlib.serve import tensors
from gdlib.serve.tensors import DTYPES, ProtocolError, TensorSpec, Where, checked, shorten

_UNSUPPORTED = {"shared_memory_region": "shared memory", "classification": "the classification extension"}


class UnsupportedError(ProtocolError):
    """The request uses an extension that this server does not have."""


class Signature(NamedTuple):
    """What a model takes and gives. `feature_names` name the columns of its only input [rows, features]."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    feature_names: Sequence[str] | None = None


class InferRequest(NamedTuple):
    arrays: dict[str, NDArray[Any]]
    rows: int  # the batch size: the first axis where it may have any size, else 1
    outputs: list[tuple[str, bool]]  # those wanted, and whether in binary
    identifier: str | None


def decode(request: dict[str, Any], tail: memoryview, signature: Signature) -> InferRequest:
    """The arrays that a request holds, in the datatypes and shapes of the model's inputs.

    `tail` is what follows the JSON part. Instead of its one input a model with feature names takes an input [rows] or [rows, 1] for
    each feature. Values are first read as the datatype that the request declares, then converted, so that JSON gives what the same tensor
    would give in binary. Raises ProtocolError naming the field, or the row and feature, that is wrong; UnsupportedError for an
    extension that is not here.
    """
    sent = {}
    for tensor in checked(request.get("inputs"), list, "'inputs'"):
        name = checked(checked(tensor, dict, "An entry of 'inputs'").get("name"), str, "The input's 'name'")
        if name in sent:
            raise ProtocolError(f"The input {shorten(name)} is there twice: send each input once.")
        sent[name] = tensor
    reader = _TensorReader(tail, len(sent) > 1)
    names = signature.feature_names
    specs = {spec.name: spec for spec in signature.inputs}
    if sent.keys() == specs.keys():
        arrays = {name: reader.read(tensor, specs[name], places(specs[name], names)) for name, tensor in sent.items()}
    elif names is not None and sent.keys() == set(names):
        arrays = {signature.inputs[0].name: _stack(sent, signature, names, reader)}
    else:
        raise ProtocolError(_wrong_inputs(sent, signature))
    reader.finish()
    first = signature.inputs[0]
    rows = arrays[first.name].shape[0] if first.shape and first.shape[0] == -1 else 1
    parameters = _optional(request, "parameters", dict, "The request's 'parameters'")
    binary = False
    if parameters:
        binary = _optional(parameters, "binary_data_output", bool, "The request's 'binary_data_output'") or False
    wanted = _wanted(_optional(request, "outputs", list, "'outputs'"), binary, signature)
    return InferRequest(arrays, rows, wanted, _identifier(request) if request.get("id") is not None else None)


def encode(
    model: str, version: str, arrays: dict[str, NDArray[Any]], outputs: Sequence[tuple[str, bool]], identifier: str | None
) -> tuple[bytes, int | None]:
    """(the answer's body, the length of its JSON part where binary tensors follow it, else None).

    Raises ProtocolError when JSON has no form for a value.
    """
    described: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, binary in outputs:
        array = arrays[name]
        tensor: dict[str, Any] = {"name": name, "datatype": tensors.DATATYPE_NAMES[array.dtype], "shape": array.shape}
        if binary:
            raw = tensors.to_bytes(array)
            tensor["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            tensor["data"] = tensors.to_json(array, name)
        described.append(tensor)
    answer: dict[str, Any] = {"model_name": model, "model_version": version}
    if identifier is not None:
        answer["id"] = identifier
    answer["outputs"] = described
    body = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in body:
        for name, binary in outputs:
            if not binary:
                tensors.check_json(arrays[name], name)
    return (b"".join((body, *tail)), len(body)) if tail else (body, None)


class _TensorReader:
    """Reads the tensors of a request; those in binary take their bytes from the tail, one after the other."""

    def __init__(self, tail: memoryview, several: bool) -> None:
        self._tail = tail
        self._several = several
        self._at = 0

    def read(self, tensor: dict[str, Any], spec: TensorSpec, where: Where) -> NDArray[Any]:
        try:
            return self._read(tensor, spec, where)
        except ProtocolError as error:
            name = shorten(spec.name)
            if not self._several or name in str(error):
                raise
            raise type(error)(f"Input {name}: {error}") from None

    def _read(self, tensor: dict[str, Any], spec: TensorSpec, where: Where) -> NDArray[Any]:
        datatype = checked(tensor.get("datatype"), str, "The input's 'datatype'")
        if datatype not in DTYPES:
            raise ProtocolError(f"The input's datatype is {shorten(datatype)}: send one of {', '.join(DTYPES)}.")
        shape = tensors.check_shape(tensor.get("shape"), spec)
        if datatype != spec.datatype:
            tensors.check_convertible(datatype, shape, spec)
        parameters = _optional(tensor, "parameters", dict, "The input's 'parameters'")
        size = None
        if parameters:
            _refuse_unsupported(parameters)
            size = parameters.get("binary_data_size")
        if size is None:
            array = tensors.from_json(tensor.get("data"), datatype, shape, where)
        else:
            if tensor.get("data") is not None:
                raise ProtocolError("The input has both 'data' and 'binary_data_size': send one of them.")
            array = tensors.from_bytes(self._take(size), datatype, shape)
        return tensors.convert(array, spec, where)

    def finish(self) -> None:
        """Raises ProtocolError when bytes are left that no tensor has claimed."""
        if self._at != len(self._tail):
            raise ProtocolError("More bytes follow the JSON part than the inputs' 'binary_data_size' promise: make them agree.")

    def _take(self, size: Any) -> memoryview:
        if type(size) is not int or not 0 <= size < 2**63:
            raise ProtocolError("A 'binary_data_size' is not a number of bytes: send a non-negative integer.")
        if size > len(self._tail) - self._at:
            raise ProtocolError(
                "Fewer bytes follow the JSON part than 'binary_data_size' promises: send them, and say with the header "
                "Inference-Header-Content-Length where they begin."
            )
        self._at += size
        return self._tail[self._at - size : self._at]


def _stack(sent: dict[str, Any], signature: Signature, names: Sequence[str], reader: _TensorReader) -> NDArray[Any]:
    """X [rows, features] from an input for each feature. The tail's order is that of the request, not of the features."""
    spec = signature.inputs[0]
    columns = {}
    for name, tensor in sent.items():
        nested = type(shape := tensor.get("shape")) is list and len(shape) == 2
        column = TensorSpec(name, spec.datatype, (-1, 1) if nested else (-1,))
        columns[name] = reader.read(tensor, column, _feature_place(name)).reshape(-1)
    if len({len(column) for column in columns.values()}) != 1:
        raise ProtocolError("The features have different numbers of rows: send as many values for each.")
    return np.stack([columns[name] for name in names], axis=1)


def places(spec: TensorSpec, feature_names: Sequence[str] | None = None) -> Where:
    """The words for the values of an input, by their flat indices."""

    def place(index: int) -> str:
        if len(spec.shape) == 2 and spec.shape[1] > 0:
            row, column = divmod(index, spec.shape[1])
            return f"Row {row}, feature {column if feature_names is None else shorten(feature_names[column])}"
        return f"Value {index} of input {shorten(spec.name)}"

    return place


def _feature_place(name: str) -> Where:
    return lambda row: f"Row {row}, feature {shorten(name)}"


def _wrong_inputs(sent: Collection[str], signature: Signature) -> str:
    names = [spec.name for spec in signature.inputs]
    features = dict.fromkeys(signature.feature_names or ())
    if any(name in features for name in sent):
        missing = ", ".join(shorten(name) for name in features if name not in sent)
        unknown = ", ".join(shorten(name) for name in sent if name not in features)
        lacks = " and ".join([f"lacks {missing}"] * bool(missing) + [f"has the unknown {unknown}"] * bool(unknown))
        return f"The request {lacks[:300]}: send one input for each feature, or all as '{names[0]}'."
    either = " (or one for each feature, by its name)" if features else ""
    if len(names) > 1:
        wanted = ", ".join(shorten(name) for name in names)
        return f"The request's inputs are {', '.join(map(shorten, sent))[:300] or 'none'}: send exactly {wanted[:300]}."
    if len(sent) != 1:
        return f"The request has {len(sent)} inputs: send exactly one, named '{names[0]}'{either}."
    return f"The input is named {shorten(*sent)}: this model's only input is '{names[0]}'{either}."


def _wanted(outputs: list[Any] | None, binary: bool, signature: Signature) -> list[tuple[str, bool]]:
    if not outputs:
        return [(spec.name, binary) for spec in signature.outputs]
    names = [spec.name for spec in signature.outputs]
    wanted: dict[str, bool] = {}
    for output in outputs:
        name = checked(checked(output, dict, "An entry of 'outputs'").get("name"), str, "An output's 'name'")
        if name not in names:
            which = f"only output is '{names[0]}'" if len(names) == 1 else f"outputs are {', '.join(map(shorten, names))[:300]}"
            raise ProtocolError(f"The request wants an output named {shorten(name)}: this model's {which}.")
        if name in wanted:
            raise ProtocolError(f"The request wants output {shorten(name)} twice: name each output once.")
        parameters = _optional(output, "parameters", dict, "The output's 'parameters'") or {}
        _refuse_unsupported(parameters)
        choice = parameters.get("binary_data")
        wanted[name] = binary if choice is None else checked(choice, bool, "An output's 'binary_data'")
    return list(wanted.items())


def _refuse_unsupported(parameters: dict[str, Any]) -> None:
    for key, extension in _UNSUPPORTED.items():
        if parameters.get(key) is not None:
            raise UnsupportedError(f"The request uses {extension}, which this server does not have: send and ask for plain tensors.")


def _identifier(request: dict[str, Any]) -> str | None:
    identifier: str | None = _optional(request, "id", str, "'id'")
    if not identifier:
        return None
    try:
        identifier.encode()
    except UnicodeEncodeError:  # a lone surrogate, of which no answer in UTF-8 can be made
        raise ProtocolError("The 'id' is no Unicode text: send one without lone surrogates.") from None
    return identifier


def _optional(owner: dict[str, Any], key: str, wanted: type, what: str) -> Any:
    value = owner.get(key)  # some clients write the fields that they do not use as null
    return None if value is None else checked(value, wanted, what)

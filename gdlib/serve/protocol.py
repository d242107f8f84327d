"""Inference requests and answers of the Open Inference Protocol v2, as pure functions: a parsed request -> arrays, arrays -> body.

A tensor's values stand in its `data`, or raw after the JSON part, in the order of the tensors (the binary tensor data extension); one
request may mix both. Nothing here opens a file or a socket, and nothing trusts the request.

Source: Open Inference Protocol v2, "Inference Request JSON Object" and "Inference Response JSON Object"; Triton's binary tensor data
extension for `binary_data_size`, `binary_data` and `binary_data_output`.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from gdlib.serve import tensors
from gdlib.serve.parsing import SHORT, parse_array, parse_request, split_data
from gdlib.serve.tensors import DTYPES, ProtocolError, TensorSpec, Where, checked, shorten

MAX_PLANS, MAX_HEADER = 64, 1024  # remembered for each model, and bytes of the JSON part of each
MAX_ANSWERS = 256  # models and shapes
_UNSUPPORTED = {"shared_memory_region": "shared memory", "classification": "the classification extension"}
_NO_TAIL = memoryview(b"")


class UnsupportedError(ProtocolError):
    """The request uses an extension that this server does not have."""


class Signature:
    """What a model takes and gives. `feature_names` name the columns of its only input [rows, features]."""

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], feature_names: Sequence[str] | None = None) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.feature_names = feature_names
        # What every request needs, made once.
        self.specs = {spec.name: spec for spec in inputs}
        self.where = {spec.name: places(spec, feature_names) for spec in inputs}
        self.features = frozenset(feature_names or ())
        # Clients send all but the values again and again: planned once, it saves a quarter of the time of a request.
        self.plan_header = lru_cache(MAX_PLANS)(lambda header: plan(parse_request(header), self))
        self.usual: Frame | None = None  # that of the last request: most are like it


class InferRequest(NamedTuple):
    arrays: dict[str, NDArray[Any]]
    rows: int  # the batch size: the first axis where it may have any size, else 1
    outputs: tuple[tuple[str, bool], ...]  # those wanted, and whether in binary
    identifier: str | None


def decode(request: dict[str, Any], tail: memoryview, signature: Signature) -> InferRequest:
    """The arrays that a request holds, in the datatypes and shapes of the model's inputs; `tail` is what follows the JSON part.

    Raises ProtocolError naming the field, or the row and feature, that is wrong; UnsupportedError for an extension that is not here.
    """
    return plan(request, signature).read(tail)


def decode_json(body: bytes, signature: Signature) -> InferRequest:
    """The same for a request in JSON. Most have one flat `data`, and around it what others have had before."""
    if len(body) < SHORT:
        try:
            request = _decode_usual(body, signature)
        except ProtocolError:
            request = None  # the exact parser says what is wrong
        if request is not None:
            return request
    return decode(parse_request(body), _NO_TAIL, signature)


def _decode_usual(body: bytes, signature: Signature) -> InferRequest | None:
    usual = signature.usual
    if usual is not None and body.startswith(usual.before) and body.endswith(usual.after):
        values = parse_array(body[len(usual.before) : len(body) - len(usual.after)])
    else:
        parts = split_data(body)
        if parts is None:
            return None
        before, values, after = parts
        usual = _frame(before, after, signature)
        if usual is not None:
            signature.usual = usual
    if values is None or usual is None:
        return None
    planned = usual.plan
    sent = planned.tensors[0]
    array = tensors.convert(tensors.from_json(values, sent.datatype, sent.shape, sent.where), sent.spec, sent.where)
    return InferRequest({sent.spec.name: array}, planned.rows, planned.outputs, planned.identifier)


def _frame(before: bytes, after: bytes, signature: Signature) -> "Frame | None":
    header = before + b"[]" + after
    if len(header) > MAX_HEADER:
        return None
    planned = signature.plan_header(header)
    tensor = planned.tensors[0]
    simple = tensor.data == [] and tensor.size is None and len(planned.tensors) == 1 and planned.stacked is None
    return Frame(before, after, planned) if simple else None


def decode_binary(header: bytes, tail: memoryview, signature: Signature) -> InferRequest:
    """The same for a request whose binary tensors follow its JSON part, the header."""
    again = len(header) <= MAX_HEADER and b'"data"' not in header  # which holds values too, and comes but once
    planned = signature.plan_header(header) if again else plan(parse_request(header), signature)
    return planned.read(tail)


class SentTensor(NamedTuple):
    """A tensor of a request, checked but for its values: they are in `data`, or the next `size` bytes of the tail."""

    spec: TensorSpec  # what becomes of it
    datatype: str  # as sent
    shape: tuple[int, ...]
    where: Where
    data: Any
    size: int | None

    def read(self, raw: memoryview) -> NDArray[Any]:
        """Values are first read as the datatype that was sent, then converted, so that JSON gives what the same tensor gives in binary."""
        if self.size is None:
            array = tensors.from_json(self.data, self.datatype, self.shape, self.where)
        else:
            array = tensors.from_bytes(raw, self.datatype, self.shape)
        return tensors.convert(array, self.spec, self.where)


class Plan(NamedTuple):
    """All of a request but its values."""

    tensors: tuple[SentTensor, ...]
    tail_size: int  # bytes that must follow the JSON part
    rows: int
    outputs: tuple[tuple[str, bool], ...]
    identifier: str | None
    stacked: Signature | None  # whose features the tensors are

    def read(self, tail: memoryview) -> InferRequest:
        """The request with its values. Raises ProtocolError for those that are wrong."""
        if len(tail) != self.tail_size:
            raise self._wrong_tail(len(tail))
        at = 0
        arrays = {}
        for sent in self.tensors:
            end = at + (sent.size or 0)
            try:
                arrays[sent.spec.name] = sent.read(tail[at:end])
            except ProtocolError as error:
                raise _of_input(error, sent.spec.name, len(self.tensors)) from None
            at = end
        if self.stacked is not None:
            names = self.stacked.feature_names or ()
            # X [rows, features] from an input for each feature, in whatever order they were sent.
            arrays = {self.stacked.inputs[0].name: np.stack([arrays[name].reshape(-1) for name in names], axis=1)}
        return InferRequest(arrays, self.rows, self.outputs, self.identifier)

    def _wrong_tail(self, size: int) -> ProtocolError:
        if size > self.tail_size:
            return ProtocolError("More bytes follow the JSON part than the inputs' 'binary_data_size' promise: make them agree.")
        error = ProtocolError(
            "Fewer bytes follow the JSON part than 'binary_data_size' promises: send them, and say with the header "
            "Inference-Header-Content-Length where they begin."
        )
        ends = accumulate(sent.size or 0 for sent in self.tensors)
        first = next(sent for sent, end in zip(self.tensors, ends, strict=True) if end > size)
        return _of_input(error, first.spec.name, len(self.tensors))


class Frame(NamedTuple):
    """What stands around the array of values of a request that has one tensor, in JSON, and what the request wants."""

    before: bytes
    after: bytes
    plan: Plan


def plan(request: dict[str, Any], signature: Signature) -> Plan:
    """What a request wants, all of it checked but the values, which are left where they are.

    Instead of its one input a model with feature names takes an input [rows] or [rows, 1] for each feature. Raises what `decode` raises.
    """
    sent: dict[str, dict[str, Any]] = {}
    for tensor in checked(request.get("inputs"), list, "'inputs'"):
        name = checked(checked(tensor, dict, "An entry of 'inputs'").get("name"), str, "The input's 'name'")
        if name in sent:
            raise ProtocolError(f"The input {shorten(name)} is there twice: send each input once.")
        sent[name] = tensor
    stacked = None
    if sent.keys() == signature.specs.keys():
        planned = [_plan_tensor(tensor, signature.specs[name], signature.where[name], len(sent)) for name, tensor in sent.items()]
    elif signature.features and sent.keys() == signature.features:
        stacked = signature
        planned = [_plan_tensor(tensor, _column(name, tensor, signature), _feature_place(name), len(sent)) for name, tensor in sent.items()]
        if len({column.shape[0] for column in planned}) != 1:
            raise ProtocolError("The features have different numbers of rows: send as many values for each.")
    else:
        raise ProtocolError(_wrong_inputs(sent, signature))
    parameters = _optional(request, "parameters", dict, "The request's 'parameters'")
    binary = False
    if parameters:
        binary = _optional(parameters, "binary_data_output", bool, "The request's 'binary_data_output'") or False
    wanted = _wanted(_optional(request, "outputs", list, "'outputs'"), binary, signature)
    identifier = _identifier(request) if request.get("id") is not None else None
    return Plan(tuple(planned), sum(tensor.size or 0 for tensor in planned), _rows(planned, signature), wanted, identifier, stacked)


def _rows(planned: Sequence[SentTensor], signature: Signature) -> int:
    first = signature.inputs[0]
    if not first.shape or first.shape[0] != -1:
        return 1
    for sent in planned:
        if sent.spec is first:
            return sent.shape[0]
    return planned[0].shape[0]  # a feature's


def _plan_tensor(tensor: dict[str, Any], spec: TensorSpec, where: Where, count: int) -> SentTensor:
    try:
        datatype = checked(tensor.get("datatype"), str, "The input's 'datatype'")
        if datatype not in DTYPES:
            raise ProtocolError(f"The input's datatype is {shorten(datatype)}: send one of {', '.join(DTYPES)}.")
        shape = tensors.check_shape(tensor.get("shape"), spec)
        if datatype != spec.datatype:
            tensors.check_convertible(datatype, shape, spec)
        parameters = _optional(tensor, "parameters", dict, "The input's 'parameters'")
        data, size = tensor.get("data"), None
        if parameters:
            _refuse_unsupported(parameters)
            size = parameters.get("binary_data_size")
            if size is not None:
                if data is not None:
                    raise ProtocolError("The input has both 'data' and 'binary_data_size': send one of them.")
                if type(size) is not int or not 0 <= size < 2**63:
                    raise ProtocolError("A 'binary_data_size' is not a number of bytes: send a non-negative integer.")
        return SentTensor(spec, datatype, shape, where, data, size)
    except ProtocolError as error:
        raise _of_input(error, spec.name, count) from None


def _of_input(error: ProtocolError, name: str, count: int) -> ProtocolError:
    """The error about one of several inputs says which."""
    if count == 1 or shorten(name) in str(error):
        return error
    return type(error)(f"Input {shorten(name)}: {error}")


def _column(name: str, tensor: dict[str, Any], signature: Signature) -> TensorSpec:
    nested = type(shape := tensor.get("shape")) is list and len(shape) == 2
    return TensorSpec(name, signature.inputs[0].datatype, (-1, 1) if nested else (-1,))


def encode(
    model: str, version: str, arrays: dict[str, NDArray[Any]], outputs: Sequence[tuple[str, bool]], identifier: str | None
) -> tuple[bytes, int | None]:
    """(the answer's body, the length of its JSON part where binary tensors follow it, else None).

    Raises ProtocolError when JSON has no form for a value.
    """
    if len(outputs) == 1 and not outputs[0][1] and identifier is None:
        return _encode_values(model, version, arrays[outputs[0][0]], outputs[0][0]), None
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


def _encode_values(model: str, version: str, array: NDArray[Any], name: str) -> bytes:
    """The usual answer, one output in JSON: remembering all but the values saves 0.7 of some 13 us that a request takes."""
    before, after = _around_values(model, version, name, tensors.DATATYPE_NAMES[array.dtype], array.shape)
    values = orjson.dumps(tensors.to_json(array, name), option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in values:
        tensors.check_json(array, name)
    return before + values + after


@lru_cache(MAX_ANSWERS)
def _around_values(model: str, version: str, name: str, datatype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    output = {"name": name, "datatype": datatype, "shape": shape, "data": []}
    before, _, after = orjson.dumps({"model_name": model, "model_version": version, "outputs": [output]}).rpartition(b"[]")
    return before, after


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


def _wanted(outputs: list[Any] | None, binary: bool, signature: Signature) -> tuple[tuple[str, bool], ...]:
    if not outputs:
        return tuple((spec.name, binary) for spec in signature.outputs)
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
    return tuple(wanted.items())


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

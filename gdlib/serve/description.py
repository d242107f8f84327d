"""What the server says about its own interface: the OpenAPI document, and a model's configuration.

The document is the project's own: the protocol's published one has paths that no server can have, and leaves the errors out.

Source: OpenAPI 3.1; Open Inference Protocol v2, "HTTP/REST"; Triton's model configuration extension.
"""

from typing import Any

from gdlib.serve.protocol import Signature
from gdlib.serve.tensors import BYTES, DTYPES, TensorSpec

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]*$"
_LENGTH = "Inference-Header-Content-Length"
_RAW: dict[str, Any] = {"description": "The JSON part, and the raw tensors after it.", "contentMediaType": "application/octet-stream"}
_STRING, _INTEGER, _BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_ERRORS = {
    400: "The request is malformed; the text says where.",
    401: "No key, or none that is in force.",
    403: "The key lacks the scope, or the operation is switched off.",
    404: "There is no such model, version or path.",
    413: "The body is too large.",
    415: "The Content-Encoding is unknown.",
    421: "The Host header is not one of this server's names.",
    501: "The server does not have this extension.",
    503: "The model is not loaded, or too many requests are in flight; Retry-After says when to try again.",
}

_HEADERS: dict[str, Any] = {
    "X-Request-Id": {"description": "The request's own id, or a fresh one.", "required": True, "schema": _STRING},
    "WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}},
    "Accept-Encoding": {"required": True, "schema": {"const": "gzip, deflate"}},
    "Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 0}},
    _LENGTH: {
        "description": "The length of the JSON part, where binary tensors follow it.",
        "schema": {"type": "integer", "minimum": 0},
    },
}
_HEADERS_OF = {401: ["WWW-Authenticate"], 415: ["Accept-Encoding"], 503: ["Retry-After"]}


def model_config(name: str, platform: str, signature: Signature) -> dict[str, Any]:
    """A model's configuration. Shapes are whole, batch axis included, which `max_batch_size` 0 says."""

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        datatype = "STRING" if spec.datatype == BYTES else spec.datatype
        return {"name": spec.name, "data_type": f"TYPE_{datatype}", "dims": list(spec.shape)}

    return {
        "name": name,
        "platform": platform,
        "backend": platform.partition("_")[0],
        "max_batch_size": 0,
        "input": [tensor(spec) for spec in signature.inputs],
        "output": [tensor(spec) for spec in signature.outputs],
    }


def openapi(version: str, *, keys: bool) -> dict[str, Any]:
    """The OpenAPI document of a server of this version; `keys`: whether it wants them."""
    paths: dict[str, Any] = {
        "/v2": _get("The server", _ref("Server")),
        "/v2/health/live": _get("Whether the server runs", _ref("Health"), open_=True),
        "/v2/health/ready": _get(
            "Whether the models are loaded and requests are wanted", _ref("Health"), {503: _ref("Health")}, open_=True
        ),
        "/v2/repository/index": {"post": _operation("All versions of all models", _ref("Index"), _json_body(_ref("IndexRequest"), False))},
        "/v2/models/stats": _get("Statistics of all models", _ref("Statistics"), codes=(401, 421, 501)),
        "/metrics": {"get": _prometheus()},
        "/openapi.json": _get("This document", {"type": "object"}, open_=True),
    }
    for action in ("load", "unload"):
        operation = _operation(f"{action.capitalize()} a model", {"type": "object"}, _json_body(_ref("RepositoryRequest"), False))
        paths[f"/v2/repository/models/{{model}}/{action}"] = {"parameters": [_parameter("model")], "post": operation}
    for prefix, parameters in (("", ["model"]), ("/versions/{version}", ["model", "version"])):
        base = "/v2/models/{model}" + prefix
        shared = {"parameters": [_parameter(name) for name in parameters]}
        paths[base] = shared | _get("Names, datatypes and shapes of a model", _ref("Model"), codes=(401, 403, 404, 421, 503))
        paths[base + "/ready"] = shared | _get(
            "Whether a model is loaded", _ref("ModelReady"), {503: _ref("ModelReady")}, codes=(401, 403, 404, 421)
        )
        paths[base + "/config"] = shared | _get("Configuration of a model", _ref("Config"), codes=(401, 403, 404, 421, 503))
        paths[base + "/stats"] = shared | _get("Statistics of a model", _ref("Statistics"), codes=(401, 403, 404, 421, 501))
        paths[base + "/infer"] = shared | {"post": _infer()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gdlib predictor",
            "version": version,
            "description": "Linear models, small networks and ONNX models over the Open Inference Protocol v2.",
            "license": {"name": "BSD-3-Clause", "identifier": "BSD-3-Clause"},
        },
        "paths": paths,
        "components": {"schemas": _schemas(), "headers": _HEADERS, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}] if keys else [],
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _json_body(schema: dict[str, Any], required: bool) -> dict[str, Any]:
    return {"required": required, "content": _json(schema)}


def _response(code: int, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    names = ["X-Request-Id", *_HEADERS_OF.get(code, ())]
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return {"description": description, "headers": headers, "content": _json(schema)}


def _responses(schema: dict[str, Any], codes: tuple[int, ...], others: dict[int, dict[str, Any]]) -> dict[str, Any]:
    responses = {"200": _response(200, "Success.", schema)}
    responses |= {str(code): _response(code, _ERRORS[code], _ref("Error")) for code in codes}
    return responses | {str(code): {"description": _ERRORS[code], "content": _json(other)} for code, other in others.items()}


def _get(
    summary: str,
    schema: dict[str, Any],
    others: dict[int, dict[str, Any]] | None = None,
    *,
    codes: tuple[int, ...] = (401, 421),
    open_: bool = False,
) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": summary, "responses": _responses(schema, (421,) if open_ else codes, others or {})}
    return {"get": operation | ({"security": []} if open_ else {})}


def _operation(summary: str, schema: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    codes = (400, 401, 403, 404, 413, 415, 421, 501)
    return {"summary": summary, "requestBody": body, "responses": _responses(schema, codes, {})}


def _infer() -> dict[str, Any]:
    tensor = {"name": "input", "shape": [1, 2], "datatype": "FP32", "data": [50, 2]}
    body: dict[str, Any] = {"required": True, "content": _json(_ref("InferRequest")) | {"application/octet-stream": {"schema": _RAW}}}
    body["content"]["application/json"]["examples"] = {"row": {"summary": "One row of two features", "value": {"inputs": [tensor]}}}
    operation = _operation("Predict", _ref("InferResponse"), body)
    operation["responses"]["503"] = _response(503, _ERRORS[503], _ref("Error"))
    success = operation["responses"]["200"]
    success["content"]["application/octet-stream"] = {"schema": _RAW}
    success["headers"][_LENGTH] = {"$ref": f"#/components/headers/{_LENGTH}"}
    operation["parameters"] = [{"name": _LENGTH, "in": "header", "schema": {"type": "integer", "minimum": 0}}]
    operation["description"] = (
        "Values as JSON in `data`, or raw after the JSON part: then the header Inference-Header-Content-Length gives the length of the "
        "JSON part, and each such tensor its `parameters.binary_data_size`. Bodies may be compressed by gzip or deflate. The Content-Type "
        "makes no difference."
    )
    return operation


def _prometheus() -> dict[str, Any]:
    responses = _responses(_STRING, (401, 403, 421, 501), {})
    responses["200"]["content"] = {"text/plain": {"schema": _STRING}}
    return {"summary": "Counts and times for Prometheus", "responses": responses}


def _parameter(name: str) -> dict[str, Any]:
    schema = {"type": "string", "pattern": NAME_PATTERN if name == "model" else "^(0|[1-9][0-9]*)$"}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _schemas() -> dict[str, Any]:
    parameters = {"type": "object"}
    datatype = {"type": "string", "enum": list(DTYPES)}
    names = {"name": _STRING, "datatype": datatype}
    size = _array({"type": "integer", "minimum": 1})
    values: dict[str, Any] = {"type": "array"}
    duration = _object({"count": _INTEGER, "ns": _INTEGER})
    stages = dict.fromkeys(("compute_input", "compute_infer", "compute_output"), duration)
    inference = dict.fromkeys(("success", "fail", "queue", "cache_hit", "cache_miss"), duration) | stages
    tensor = _object({"name": _STRING, "datatype": datatype, "shape": _array(_INTEGER)})
    config_tensor = _object({"name": _STRING, "data_type": _STRING, "dims": _array(_INTEGER)})
    version = _object(
        {"name": _STRING, "version": _STRING, "state": {"type": "string", "enum": ["READY", "UNAVAILABLE"]}, "reason": _STRING}
    )
    return {
        "Error": _object({"error": _STRING}),
        "Server": _object({"name": _STRING, "version": _STRING, "extensions": _array(_STRING)}),
        "Health": _object({"live": _BOOLEAN, "ready": _BOOLEAN}),
        "ModelReady": _object({"name": _STRING, "ready": _BOOLEAN}),
        "Model": _object(
            {"name": _STRING, "versions": _array(_STRING), "platform": _STRING, "inputs": _array(tensor), "outputs": _array(tensor)},
            {"parameters": parameters},
        ),
        "Config": _object(
            {
                "name": _STRING,
                "platform": _STRING,
                "backend": _STRING,
                "max_batch_size": _INTEGER,
                "input": _array(config_tensor),
                "output": _array(config_tensor),
            }
        ),
        "Index": _array(version),
        "IndexRequest": _object({}, {"ready": {"type": ["boolean", "null"]}}),
        "RepositoryRequest": _object({}, {"parameters": {"type": ["object", "null"]}}),
        "Statistics": _object(
            {
                "model_stats": _array(
                    _object(
                        {
                            "name": _STRING,
                            "version": _STRING,
                            "last_inference": _INTEGER,
                            "inference_count": _INTEGER,
                            "execution_count": _INTEGER,
                            "inference_stats": _object(inference),
                            "batch_stats": _array(_object({"batch_size": _INTEGER} | stages)),
                        }
                    )
                )
            }
        ),
        "InferRequest": _object(
            {"inputs": _array(_object(names | {"shape": size}, {"parameters": parameters, "data": values}))},
            {"id": _STRING, "parameters": parameters, "outputs": _array(_object({"name": _STRING}, {"parameters": parameters}))},
        ),
        "InferResponse": _object(
            {
                "model_name": _STRING,
                "model_version": _STRING,
                "outputs": _array(_object(names | {"shape": _array(_INTEGER)}, {"data": values, "parameters": parameters})),
            },
            {"id": _STRING},
        ),
    }

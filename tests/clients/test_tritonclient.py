"""An unmodified tritonclient: all that it has for the extensions that the server says it has, and a clear refusal of the rest."""

import asyncio
import inspect
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.clients import models
from tests.clients.conftest import Keyed
from tests.clients.servers import Running, example

pytestmark = pytest.mark.clients
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what the client imports
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed: pip install gdlib[clients]")
    aio = pytest.importorskip("tritonclient.http.aio", reason="tritonclient is not installed: pip install gdlib[clients]")
    from tritonclient.utils import InferenceServerException

EXTENSIONS = {"binary_tensor_data", "model_repository", "statistics", "model_configuration", "parameters"}
ROWS = np.array([[50, 2], [80, 3]], np.float32)
PRICES = np.array([[165], [255]], np.float32)
MIXED = {
    "text": np.array(["a", "grüße", ""], np.object_),
    "count": np.array([1, -(2**40), 3], np.int64),
    "value": np.array([0.5, np.nan, -2.0], np.float32),
    "half": np.array([0.5, 1.0, -2.0], np.float16),
    "flag": np.array([True, False, True]),
}
DATATYPES = {"text": "BYTES", "count": "INT64", "value": "FP32", "half": "FP16", "flag": "BOOL"}
REFUSED: list[tuple[str, tuple[Any, ...]]] = [
    ("get_trace_settings", ()),
    ("get_trace_settings", ("house",)),
    ("update_trace_settings", (None, {"trace_level": ["OFF"]})),
    ("get_log_settings", ()),
    ("update_log_settings", ({"log_verbose_level": 1},)),
    ("get_system_shared_memory_status", ()),
    ("get_system_shared_memory_status", ("region",)),
    ("register_system_shared_memory", ("region", "/key", 64)),
    ("unregister_system_shared_memory", ("region",)),
    ("unregister_system_shared_memory", ()),
    ("get_cuda_shared_memory_status", ()),
    ("register_cuda_shared_memory", ("region", b"handle", 0, 64)),
    ("unregister_cuda_shared_memory", ()),
]
TESTED = {
    *("is_server_live", "is_server_ready", "is_model_ready", "get_server_metadata", "get_model_metadata", "get_model_config"),
    *("get_model_repository_index", "load_model", "unload_model", "get_inference_statistics", "infer", "async_infer"),
}
LOCAL = {"close", "plugin", "register_plugin", "unregister_plugin", "generate_request_body", "parse_response_body"}


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(server.netloc, concurrency=4) as client:
        yield client


def tensor(name: str, datatype: str, values: np.ndarray, **how: Any) -> Any:
    """An input as the client makes it."""
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, **how)
    return made


def rows(values: np.ndarray = ROWS, **how: Any) -> list[Any]:
    return [tensor("input", "FP64" if values.dtype == np.float64 else "FP32", values, **how)]


def refused(status: int, match: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    with pytest.raises(InferenceServerException, match=match) as caught:
        call(*arguments, **named)
    assert caught.value.status() == str(status)


def test_every_method_of_the_client_is_tried_here():
    methods = {name for name, _ in inspect.getmembers(triton.InferenceServerClient, inspect.isfunction) if not name.startswith("_")}
    assert methods <= TESTED | LOCAL | {name for name, _ in REFUSED}


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("house")
    assert client.is_model_ready("house", "1")
    assert not client.is_model_ready("house", "7")
    assert not client.is_model_ready("castle")
    metadata = client.get_server_metadata()
    assert metadata["name"] == "gdlib"
    assert set(metadata["extensions"]) == EXTENSIONS
    model = client.get_model_metadata("house64")
    assert model["versions"] == ["1", "2"]
    assert model["inputs"] == [{"name": "input", "datatype": "FP64", "shape": [-1, 2]}]
    assert model["parameters"]["feature_names"] == models.FEATURES
    mixed = client.get_model_metadata("mixed", "1")
    assert {each["name"]: each["datatype"] for each in mixed["inputs"]} == DATATYPES
    refused(404, "Request for unknown model: 'castle' is not found", client.get_model_metadata, "castle")


def test_the_program_of_the_document(server, capsys):
    names: dict[str, Any] = {}
    exec(example(server, "tritonclient"), names)
    names["client"].close()
    assert capsys.readouterr().out.split() == ["[[165.]", "[255.]]"]


def test_query_parameters_and_headers_are_no_hindrance(client):
    assert client.is_server_ready(query_params={"a": "b"})
    assert client.get_server_metadata(headers={"X-Anything": "x"}, query_params={"a": ["b", 1]})["name"] == "gdlib"
    assert client.infer("house", rows(), query_params={"a": 1}).as_numpy("output").tolist() == PRICES.tolist()


def test_config_and_index(client):
    config = client.get_model_config("mixed")
    assert config["max_batch_size"] == 0
    assert {each["name"]: each["data_type"] for each in config["input"]}["text"] == "TYPE_STRING"
    assert client.get_model_config("house", "1")["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [-1, 2]}]
    index = client.get_model_repository_index()
    assert [(each["name"], each["version"], each["state"]) for each in index] == [
        ("house", "1", "READY"),
        ("house64", "1", "READY"),
        ("house64", "2", "READY"),
        ("mixed", "1", "READY"),
        ("network", "1", "READY"),
    ]


def test_the_defaults_are_binary_both_ways(client):
    result = client.infer("house", rows())
    assert result.as_numpy("output").dtype == np.float32
    assert result.as_numpy("output").tolist() == PRICES.tolist()
    assert result.get_output("output")["parameters"]["binary_data_size"] == 8
    assert result.get_response()["model_name"] == "house"
    assert result.get_response()["model_version"] == "1"
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert client.infer("network", rows(x)).as_numpy("output").tolist() == models.network().predict(x).tolist()


@pytest.mark.parametrize(("binary_in", "binary_out"), list(product((True, False), (True, False, None))))
def test_json_and_binary_mixed(client, binary_in, binary_out):
    outputs = None if binary_out is None else [triton.InferRequestedOutput("output", binary_data=binary_out)]
    result = client.infer("house64", rows(ROWS.astype(np.float64), binary_data=binary_in), outputs=outputs)
    assert result.as_numpy("output").dtype == np.float64
    assert result.as_numpy("output").tolist() == [[166], [256]]
    assert ("data" in result.get_output("output")) is (binary_out is False)


@pytest.mark.parametrize("request_encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_compression(client, request_encoding, response_encoding, binary):
    x = np.arange(2000, dtype=np.float32).reshape(1000, 2)
    result = client.infer(
        "house",
        rows(x, binary_data=binary),
        outputs=[triton.InferRequestedOutput("output", binary_data=binary)],
        request_compression_algorithm=request_encoding,
        response_compression_algorithm=response_encoding,
    )
    assert np.array_equal(result.as_numpy("output"), models.house().predict(x))


def test_request_id_and_version(client):
    assert client.infer("house", rows(), request_id="a-7").get_response()["id"] == "a-7"
    assert "id" not in client.infer("house", rows()).get_response()
    x = rows(ROWS.astype(np.float64))
    assert client.infer("house64", x, model_version="1").as_numpy("output").tolist() == [[165], [255]]
    assert client.infer("house64", x, model_version="2").as_numpy("output").tolist() == [[166], [256]]
    assert client.infer("house64", x).get_response()["model_version"] == "2"
    refused(404, "Request for unknown model: 'house' version '3' is not found", client.infer, "house", rows(), model_version="3")


def test_sequence_priority_timeout_and_other_parameters_are_taken(client):
    result = client.infer("house", rows(), sequence_id=3, sequence_start=True, priority=1, timeout=10**6, parameters={"mine": "x"})
    assert result.as_numpy("output").tolist() == PRICES.tolist()


def mixed_inputs(json_for: set[str]) -> list[Any]:
    return [tensor(name, DATATYPES[name], values, binary_data=name not in json_for) for name, values in MIXED.items()]


@pytest.mark.parametrize("json_for", [set(), {"text", "count"}, {"text", "count", "value", "flag"}])
def test_text_integers_halves_and_nan(client, json_for):
    result = client.infer("mixed", mixed_inputs(json_for))
    assert [item.decode() for item in result.as_numpy("text_out")] == MIXED["text"].tolist()
    assert result.as_numpy("count_out").tolist() == [2, -(2**41), 6]
    assert np.array_equal(result.as_numpy("value_out"), 2 * MIXED["value"], equal_nan=True)
    assert result.as_numpy("half_out").dtype == np.float16
    assert result.as_numpy("half_out").tolist() == MIXED["half"].tolist()
    assert result.as_numpy("flag_out").tolist() == MIXED["flag"].tolist()


def test_some_outputs_in_json(client):
    wanted = [triton.InferRequestedOutput(name, binary_data=name == "value_out") for name in ("count_out", "text_out", "value_out")]
    result = client.infer("mixed", mixed_inputs(set()), outputs=wanted)
    assert [each["name"] for each in result.get_response()["outputs"]] == ["count_out", "text_out", "value_out"]
    assert result.as_numpy("count_out").tolist() == [2, -(2**41), 6]
    assert result.as_numpy("text_out").tolist() == MIXED["text"].tolist()
    assert np.array_equal(result.as_numpy("value_out"), 2 * MIXED["value"], equal_nan=True)
    assert result.as_numpy("half_out") is None


def test_nan_in_json_comes_back(client):
    wanted = [triton.InferRequestedOutput("value_out", binary_data=False)]
    result = client.infer("mixed", mixed_inputs({"value"}), outputs=wanted)
    assert np.array_equal(result.as_numpy("value_out"), 2 * MIXED["value"], equal_nan=True)


@pytest.mark.parametrize("binary", [True, False])
def test_nan_where_a_model_takes_none_is_named(client, binary):
    x = np.array([[1, 2], [3, np.nan]], np.float32)
    refused(400, "Row 1, feature 'rooms' is NaN", client.infer, "house", rows(x, binary_data=binary))


@pytest.mark.parametrize("datatype", ["BF16", "FP16", "FP64", "INT32", "UINT8"])
def test_other_datatypes_are_converted(client, datatype):
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes comes with the package onnx").bfloat16
    dtype = {"BF16": bfloat16, "FP16": np.float16, "FP64": np.float64, "INT32": np.int32, "UINT8": np.uint8}[datatype]
    result = client.infer("house", [tensor("input", datatype, ROWS.astype(dtype))])
    assert result.as_numpy("output").tolist() == PRICES.tolist()


def test_each_feature_as_an_input_of_its_own(client):
    for binary in (True, False):
        columns = [
            tensor("rooms", "INT64", np.array([2, 3]), binary_data=binary),
            tensor("area", "FP32", ROWS[:, :1].copy(), binary_data=binary),
        ]
        assert client.infer("house", columns).as_numpy("output").tolist() == PRICES.tolist()


def test_errors_name_what_is_wrong(client):
    refused(404, "Request for unknown model: 'castle' is not found", client.infer, "castle", rows())
    refused(400, "send rows of 2 features", client.infer, "house", rows(np.ones((1, 3), np.float32)))
    refused(400, "this model's only output is 'output'", client.infer, "house", rows(), outputs=[triton.InferRequestedOutput("y")])
    refused(400, "only input is 'input'", client.infer, "house", [tensor("x", "FP32", ROWS)])


def test_infer_in_the_background(client):
    requests = [client.async_infer("house", rows(ROWS + i)) for i in range(12)]
    for i, request in enumerate(requests):
        assert request.get_result().as_numpy("output").tolist() == (PRICES + 32 * i).tolist()
    with pytest.raises(InferenceServerException, match="unknown model"):
        client.async_infer("castle", rows()).get_result()


def test_bodies_made_and_read_apart_from_the_client(client, server):
    body, length = triton.InferenceServerClient.generate_request_body(rows())
    status, headers, content = server.ask("POST", "/v2/models/house/infer", body, {"Inference-Header-Content-Length": str(length)})
    assert status == 200
    header_length = int(headers["inference-header-content-length"])
    result = triton.InferenceServerClient.parse_response_body(content, header_length=header_length)
    assert result.as_numpy("output").tolist() == PRICES.tolist()


def test_statistics(client):
    def counted() -> dict[str, Any]:
        (statistics,) = client.get_inference_statistics("house", "1")["model_stats"]
        return statistics

    before = counted()
    client.infer("house", rows())
    refused(400, "features", client.infer, "house", rows(np.ones((1, 3), np.float32)))
    after = counted()
    assert after["execution_count"] == before["execution_count"] + 1
    assert after["inference_count"] == before["inference_count"] + 2
    assert after["inference_stats"]["fail"]["count"] == before["inference_stats"]["fail"]["count"] + 1
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    assert {each["name"] for each in client.get_inference_statistics()["model_stats"]} == {"house", "house64", "mixed", "network"}
    assert len(client.get_inference_statistics("house64")["model_stats"]) == 2
    refused(404, "unknown model", client.get_inference_statistics, "castle")


@pytest.mark.parametrize(("method", "arguments"), REFUSED)
def test_other_extensions_are_refused_by_name(client, method, arguments):
    refused(501, "This server has no such extension; it has binary_tensor_data", getattr(client, method), *arguments)


def test_other_ways_to_pass_tensors_are_refused_by_name(client):
    refused(501, "classification", client.infer, "house", rows(), outputs=[triton.InferRequestedOutput("output", class_count=2)])
    shared = triton.InferInput("input", [2, 2], "FP32")
    shared.set_shared_memory("region", 16)
    refused(501, "shared memory", client.infer, "house", [shared])
    output = triton.InferRequestedOutput("output")
    output.set_shared_memory("region", 8)
    refused(501, "shared memory", client.infer, "house", rows(), outputs=[output])


def test_load_and_unload_are_off_without_keys(client):
    refused(403, "Loading and unloading by request is switched off", client.unload_model, "house")
    refused(403, "Loading and unloading by request is switched off", client.load_model, "house")


def test_load_and_unload(keyed: Keyed):
    with triton.InferenceServerClient(keyed.server.netloc) as client:
        client.unload_model("network", headers=keyed.admin)
        assert not client.is_model_ready("network", headers=keyed.admin)
        refused(503, "unloaded by request", client.infer, "network", rows(np.ones((1, 3), np.float32)), headers=keyed.admin)
        states = {each["name"]: each for each in client.get_model_repository_index(headers=keyed.admin)}
        assert states["network"]["state"] == "UNAVAILABLE"
        assert "unloaded" in states["network"]["reason"]
        client.load_model("network", headers=keyed.admin)
        assert client.is_model_ready("network", headers=keyed.admin)
        assert client.infer("network", rows(np.ones((1, 3), np.float32)), headers=keyed.admin).as_numpy("output").shape == (1, 2)
        refused(404, "unknown model", client.load_model, "castle", headers=keyed.admin)
        refused(404, "unknown model", client.unload_model, "castle", headers=keyed.admin)
        refused(501, "send no configuration", client.load_model, "house", headers=keyed.admin, config='{"backend": "x"}')


def test_keys(keyed: Keyed):
    with triton.InferenceServerClient(keyed.server.netloc) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        refused(401, "Authorization: Bearer", client.get_server_metadata)
        refused(401, "Authorization: Bearer", client.infer, "house", rows())
        refused(403, "scope 'models:network'", client.get_model_metadata, "network", headers=keyed.reader)
        refused(403, "scope 'admin'", client.unload_model, "house", headers=keyed.reader)
        assert client.infer("house", rows(), headers=keyed.reader).as_numpy("output").tolist() == PRICES.tolist()
        assert {each["name"] for each in client.get_model_repository_index(headers=keyed.reader)} == {"house"}


def test_the_asyncio_client(server):
    async def run() -> None:
        async with aio.InferenceServerClient(server.netloc) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("house")
            assert (await client.get_server_metadata())["name"] == "gdlib"
            assert (await client.get_model_metadata("house"))["platform"] == "gdlib"
            assert (await client.get_model_config("house"))["name"] == "house"
            assert len(await client.get_model_repository_index()) == 5
            assert (await client.get_inference_statistics("house"))["model_stats"]
            results = await asyncio.gather(*(client.infer("house", rows(ROWS + i)) for i in range(8)))
            for i, result in enumerate(results):
                assert result.as_numpy("output").tolist() == (PRICES + 32 * i).tolist()
            wide = np.arange(2000, dtype=np.float32).reshape(1000, 2)
            for encoding in ("gzip", "deflate"):
                packed = {"request_compression_algorithm": encoding, "response_compression_algorithm": encoding}
                result = await client.infer("house", rows(wide), request_id="z", **packed)
                assert result.get_response()["id"] == "z"
                assert np.array_equal(result.as_numpy("output"), models.house().predict(wide))
            for call, status in (
                (client.get_trace_settings(), "501"),
                (client.get_log_settings(), "501"),
                (client.get_system_shared_memory_status(), "501"),
                (client.get_cuda_shared_memory_status(), "501"),
                (client.infer("castle", rows()), "404"),
                (client.load_model("house"), "403"),
                (client.unload_model("house"), "403"),
            ):
                with pytest.raises(InferenceServerException) as caught:
                    await call
                assert caught.value.status() == status

    asyncio.run(run())

"""The KServe SDK with its defaults, against the server at the URL given; run by a Python of its own, since it wants packages of its own."""

import asyncio
import sys

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

ROWS = np.array([[50, 2], [80, 3]], np.float32)


def tensor(name: str, datatype: str, values: np.ndarray, binary: bool) -> InferInput:
    made = InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


async def refused(status: int, text: str, request: object) -> None:
    try:
        await request
    except httpx.HTTPStatusError as raised:
        error = raised
    else:
        raise AssertionError(f"{status} is wanted")
    assert error.response.status_code == status, error
    assert text in str(error), error


async def check(url: str) -> None:
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_live(url) is True
        assert await client.is_server_ready(url) is True
        assert await client.is_model_ready(url, "house") is True
        assert await client.is_model_ready(url, "castle") is False
        for binary_in in (True, False):
            for binary_out in (None, True, False):
                wanted = None if binary_out is None else [RequestedOutput("output", {"binary_data": binary_out})]
                request = InferRequest("house", [tensor("input", "FP32", ROWS, binary_in)], request_id="k-1", request_outputs=wanted)
                headers: dict[str, str] = {}
                answer = await client.infer(url, request, model_name="house", response_headers=headers)
                assert answer.id == "k-1", answer
                assert answer.model_name == "house", answer
                assert answer.outputs[0].as_numpy().tolist() == [[165], [255]], answer
                assert headers["content-type"] == ("application/octet-stream" if binary_out else "application/json"), headers
            columns = [
                tensor("rooms", "INT32", np.array([2, 3], np.int32), binary_in),
                tensor("area", "FP32", ROWS[:, 0].copy(), binary_in),
            ]
            answer = await client.infer(url, InferRequest("house", columns), model_name="house")
            assert answer.outputs[0].as_numpy().tolist() == [[165], [255]], answer
            inputs = [
                tensor("text", "BYTES", np.array(["a", "grüße"], np.object_), binary_in),
                tensor("count", "INT64", np.array([1, -(2**40)]), binary_in),
                tensor("value", "FP32", np.array([np.nan, 0.5], np.float32), binary_in),
                tensor("half", "FP16", np.array([0.5, 1], np.float16), True),
                tensor("flag", "BOOL", np.array([True, False]), binary_in),
            ]
            names = ("text_out", "count_out", "value_out", "flag_out")
            for binary_out in (True, False):
                wanted = [RequestedOutput(name, {"binary_data": binary_out}) for name in names]
                answer = await client.infer(url, InferRequest("mixed", inputs, request_outputs=wanted), model_name="mixed")
                outputs = {output.name: output.as_numpy() for output in answer.outputs}
                text = [item.decode() if isinstance(item, bytes) else item for item in outputs["text_out"]]
                assert text == ["a", "grüße"], text
                assert outputs["count_out"].tolist() == [2, -(2**41)], outputs
                assert np.array_equal(outputs["value_out"].astype(np.float32), [np.nan, 1], equal_nan=True), outputs
                assert outputs["flag_out"].tolist() == [True, False], outputs
        plain = {"inputs": [{"name": "input", "shape": [2, 2], "datatype": "FP32", "data": ROWS.tolist()}]}
        answer = await client.infer(url, plain, model_name="house")
        assert answer.outputs[0].data == [165, 255], answer
        await refused(404, "unknown model", client.infer(url, plain, model_name="castle"))
        wide = {"inputs": [{"name": "input", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
        await refused(400, "send rows of 2 features", client.infer(url, wide, model_name="house"))


if __name__ == "__main__":
    asyncio.run(check(sys.argv[1]))
    print("passed")

"""The standard library's client against every server: JSON as anybody writes it, bodies in chunks, errors and headers."""

import gzip
import http.client
import json

import pytest

from tests.clients.servers import DOCUMENT, Running

pytestmark = pytest.mark.clients
COLUMNS = [
    {"name": "rooms", "shape": [2], "datatype": "INT32", "data": [2, 3]},
    {"name": "area", "shape": [2, 1], "datatype": "FP32", "data": [[50], [80]]},
]
INFER = "/v2/models/house/infer"


def test_each_feature_as_an_input_of_its_own(server: Running):
    status, headers, answer = server.ask("POST", INFER, {"inputs": COLUMNS})
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert answer == {
        "model_name": "house",
        "model_version": "1",
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [2, 1], "data": [165.0, 255.0]}],
    }
    assert server.ask("POST", INFER, {"inputs": COLUMNS[:1]})[::2] == (
        400,
        {"error": "The request lacks 'area': send one input for each feature, or all as 'input'."},
    )


def test_the_request_of_the_document(server: Running):
    body = DOCUMENT.split("/v2/models/house/infer \\\n      -d '")[1].split("'")[0]
    status, _, answer = server.ask("POST", INFER, body.encode(), {"Content-Type": "application/x-www-form-urlencoded"})
    assert status == 200
    assert answer["outputs"][0]["data"] == [165.0, 255.0]


def test_many_requests_on_one_connection(server: Running):
    connection = http.client.HTTPConnection(server.netloc, timeout=60)
    for i in range(20):
        if i % 5 == 4:  # errors leave the connection whole
            connection.request("POST", INFER, b'{"inputs": ')
            response = connection.getresponse()
            assert (response.status, "not valid JSON" in json.loads(response.read())["error"]) == (400, True)
        else:
            connection.request("POST", INFER, json.dumps({"inputs": COLUMNS}))
            response = connection.getresponse()
            assert json.loads(response.read())["outputs"][0]["data"] == [165.0, 255.0]
    connection.close()


def test_a_body_in_chunks(server: Running):
    if server.program == "uwsgi":
        pytest.skip("uWSGI passes no bodies in chunks on")
    body = json.dumps({"inputs": COLUMNS}).encode()
    status, _, answer = server.ask("POST", INFER, iter([body[:10], body[10:]]))
    assert (status, answer["outputs"][0]["data"]) == (200, [165.0, 255.0])


def test_a_packed_body_and_answer(server: Running):
    rows = [[i, 1] for i in range(1000)]
    request = {"inputs": [{"name": "input", "shape": [1000, 2], "datatype": "FP64", "data": rows}]}
    packed = gzip.compress(json.dumps(request).encode())
    status, headers, content = server.ask("POST", INFER, packed, {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"}, parse=False)
    assert (status, headers["content-encoding"], headers["vary"]) == (200, "gzip", "Accept-Encoding")
    assert json.loads(gzip.decompress(content))["outputs"][0]["data"] == [2.0 * i + 35 for i in range(1000)]


def test_head_has_no_body(server: Running):
    status, headers, content = server.ask("HEAD", "/v2/models/house")
    assert (status, content) == (200, b"")
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", INFER, 405),
        ("DELETE", "/v2/models/house", 405),
        ("GET", "/v2/models/%2e%2e", 404),
        ("GET", "/v3", 404),
    ],
)
def test_errors_are_json_everywhere(server: Running, method: str, path: str, status: int):
    got, headers, answer = server.ask(method, path)
    assert got == status
    assert list(answer) == ["error"]
    assert ("allow" in headers) is (status == 405)


def test_a_foreign_host_is_refused(server: Running):
    assert server.ask("GET", "/v2", headers={"Host": "attacker.example"})[0] == 421
    assert server.ask("GET", "/v2", headers={"Host": f"localhost:{server.port}"})[0] == 200


def test_a_body_over_the_limit_is_refused(server: Running):
    size = 9 * 2**20
    connection = http.client.HTTPConnection(server.netloc, timeout=60)
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", str(size))
    # waitress takes the whole body first; the others answer at once, and what the client still sends would break the connection.
    connection.endheaders(b"{" if server.program != "gdlib" else b" " * size)
    response = connection.getresponse()
    assert response.status == 413
    assert "fewer rows" in json.loads(response.read())["error"]
    connection.close()


def test_request_ids(server: Running):
    assert server.ask("GET", "/v2", headers={"X-Request-Id": "mine-1"})[1]["x-request-id"] == "mine-1"
    first, second = (server.ask("GET", "/v2")[1]["x-request-id"] for _ in range(2))
    assert first != second

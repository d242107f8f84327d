"""SIGTERM while requests are in flight: whatever the application answered has reached its client, for every server.

`gdlib serve` answers whatever was sent. The others reset connections that were made and that they had not accepted yet.
"""

import http.client
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.servers import ANSWER_SECONDS, ONE, SEVERAL, Running

pytestmark = pytest.mark.clients
ROWS = 2000
BODY = json.dumps({"inputs": [{"name": "input", "shape": [ROWS, 2], "datatype": "FP32", "data": [1] * (2 * ROWS)}]}).encode()
INFER = "/v2/models/house/infer"
CLIENTS, BEFORE, MOST = 4, 40, 20_000  # threads, answers before the signal, requests of one thread
COMMANDS = [pytest.param(words, id=kind) for kind, words in ONE.items()]
COMMANDS += [pytest.param(words, id=f"{kind}-two") for kind, words in SEVERAL.items()]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_request_that_is_half_sent_is_answered(folder: Callable[[], Path], words: list[str]):
    path = folder()
    with Running(words, path / "models", path / "log") as server:
        connection = http.client.HTTPConnection(server.netloc, timeout=ANSWER_SECONDS)
        connection.putrequest("POST", INFER)
        connection.putheader("Content-Length", str(len(BODY)))
        connection.putheader("Expect", "100-continue")
        connection.endheaders(BODY[:100])
        if server.program == "uwsgi":  # which does not say that it expects the rest, but has taken what came before this
            assert server.ask("GET", "/v2/health/live")[0] == 200
        else:
            assert connection.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        server.terminate()
        time.sleep(0.3)  # for a server that would end at once
        connection.send(BODY[100:])
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        assert answer["outputs"][0]["data"] == [37.0] * ROWS
        connection.close()
        server.wait()


@pytest.mark.parametrize("words", COMMANDS)
def test_under_load_no_answer_is_lost(folder: Callable[[], Path], words: list[str]):
    """`gdlib serve` loses no request at all; of the others, none that the application has answered."""
    path = folder()
    got: dict[str, int] = {}  # id -> status
    lost: dict[str, Exception] = {}  # id -> why there is no answer
    wrong: list[str] = []
    enough = threading.Event()

    def load(client: int) -> None:
        for i in range(MOST):
            name = f"load-{client}-{i}"
            connection = http.client.HTTPConnection(server.netloc, timeout=ANSWER_SECONDS)
            try:
                connection.connect()
            except ConnectionRefusedError:
                return  # nobody listens any more
            except ConnectionResetError:  # the port closed while the connection was made, and nothing was sent
                continue
            try:
                connection.request("POST", INFER, BODY, {"X-Request-Id": name})
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException) as error:
                lost[name] = error
                continue
            finally:
                connection.close()
            got[name] = response.status
            if response.status != 200 or answer["outputs"][0]["data"] != [37.0] * ROWS:
                wrong.append(f"{name}: {response.status}")
            if len(got) >= BEFORE:
                enough.set()

    with Running(words, path / "models", path / "log", access_log=path / "access.log") as server:
        threads = [threading.Thread(target=load, args=(client,)) for client in range(CLIENTS)]
        for thread in threads:
            thread.start()
        assert enough.wait(ANSWER_SECONDS)
        server.terminate()
        for thread in threads:
            thread.join()
        server.wait()
    lines = [json.loads(line) for line in (path / "access.log").read_text().splitlines()]
    answered = {line["id"]: line["status"] for line in lines if line["id"].startswith("load-")}
    assert not wrong
    assert answered == got
    if server.program == "gdlib":
        assert not lost

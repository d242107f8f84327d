"""The callable that servers import: every setting from the environment, and one clear sentence for each that cannot be used."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gdlib import Linear, save
from gdlib.serve.keys import add_key

SETTINGS = ("MODELS", "KEYS", "ADMIN", "ALLOWED_HOSTS", "ACCESS_LOG", "STATE_DIR", "MAX_IN_FLIGHT", "BATCH_WINDOW")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    save(Linear(2, 1, seed=0), tmp_path / "models" / "m" / "1" / "model.safetensors")
    return tmp_path / "models"


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch, models: Path) -> Any:
    """What a server finds in the module with these settings; `MODELS` is the folder of one model unless it is given, None takes it away."""

    def make(**settings: Any) -> Any:
        for name in SETTINGS:
            monkeypatch.delenv(f"GDLIB_{name}", raising=False)
        for name, value in ({"MODELS": models} | settings).items():
            if value is not None:
                monkeypatch.setenv(f"GDLIB_{name}", str(value))
        monkeypatch.delitem(sys.modules, "gdlib.serve.wsgi", raising=False)
        return importlib.import_module("gdlib.serve.wsgi").application

    return make


def test_the_models_alone_are_enough(application, call):
    app = application()
    assert call(app, "GET", "/v2/models/m").json["name"] == "m"
    assert call(app, "GET", "/v2", HTTP_HOST="example.org").status == 421
    assert call(app, "POST", "/v2/repository/models/m/unload").status == 403


def test_without_models_nothing_is_served(application):
    with pytest.raises(ValueError, match="GDLIB_MODELS is not set: set it to the folder of models"):
        application(MODELS=None)


def test_a_folder_that_is_not_there(application, tmp_path):
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        application(MODELS=tmp_path / "nowhere")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_setting_is_refused(application, name, value):
    with pytest.raises(ValueError, match=f"GDLIB_{name} is empty: give it a value, or leave it out"):
        application(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ADMIN", "yes", "GDLIB_ADMIN is 'yes': set it to 1 or 0"),
        ("ADMIN", "2", "GDLIB_ADMIN is '2'"),
        ("MAX_IN_FLIGHT", "0", "GDLIB_MAX_IN_FLIGHT is '0': set it to a whole number of 1 or more"),
        ("BATCH_WINDOW", "soon", "GDLIB_BATCH_WINDOW is 'soon': set it to a number of seconds"),
        ("BATCH_WINDOW", "-1", "batch_window is -1.0: pass seconds, 0 to 1.0"),
        ("MAX_IN_FLIGHT", "-3", "GDLIB_MAX_IN_FLIGHT is '-3'"),
        ("MAX_IN_FLIGHT", "1.5", "GDLIB_MAX_IN_FLIGHT is '1.5'"),
        ("MAX_IN_FLIGHT", "9" * 5000, "GDLIB_MAX_IN_FLIGHT is '999"),
        ("BATCH_WINDOW", "nan", "batch_window is nan"),
        ("BATCH_WINDOW", "1e9", "batch_window is 1000000000.0"),
        ("ALLOWED_HOSTS", "a,,b", "GDLIB_ALLOWED_HOSTS is 'a,,b', in which a name is empty"),
    ],
)
def test_a_bad_value_is_refused(application, name, value, message):
    with pytest.raises(ValueError, match=message):
        application(**{name: value})


def test_admin_needs_keys(application):
    with pytest.raises(ValueError, match="admin needs keys"):
        application(ADMIN="1")
    assert application(ADMIN="0")


def test_keys_that_are_not_there(application, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no key file"):
        application(KEYS=tmp_path / "keys.json")


def test_keys_and_admin(application, call, tmp_path):
    secret = add_key(tmp_path / "keys.json", "operator", ["models:*", "admin"])
    app = application(KEYS=tmp_path / "keys.json", ADMIN="1")
    assert call(app, "GET", "/v2").status == 401
    assert call(app, "GET", "/v2/health/live").status == 200
    assert call(app, "POST", "/v2/repository/models/m/unload", HTTP_AUTHORIZATION=f"Bearer {secret}").status == 200
    app = application(KEYS=tmp_path / "keys.json", ADMIN="0")
    assert call(app, "POST", "/v2/repository/models/m/unload", HTTP_AUTHORIZATION=f"Bearer {secret}").status == 403


def test_allowed_hosts(application, call):
    app = application(ALLOWED_HOSTS="Models.example.org, localhost")
    for host, status in (("models.example.org", 200), ("localhost:8000", 200), ("127.0.0.1", 421)):
        assert call(app, "GET", "/v2", HTTP_HOST=host).status == status


def test_access_log(application, call, tmp_path):
    app = application(ACCESS_LOG=tmp_path / "access.log")
    call(app, "GET", "/v2/models/m")
    (line,) = (tmp_path / "access.log").read_text().splitlines()
    assert json.loads(line)["path"] == "/v2/models/m"


def test_a_state_dir_lets_many_processes_answer(application, call, tmp_path):
    many = {"wsgi.multiprocess": True}
    assert call(application(), "GET", "/metrics", **many).status == 501
    assert call(application(STATE_DIR=tmp_path / "state"), "GET", "/metrics", **many).status == 200
    assert (tmp_path / "state").is_dir()


def test_batch_window(application, call):
    app = application(BATCH_WINDOW="0.0005")
    request = {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
    assert call(app, "POST", "/v2/models/m/infer", request).status == 200


def test_max_in_flight(application, call):
    app = application(MAX_IN_FLIGHT="1")
    request = {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
    inner = []

    class Body:
        """Asks once more while the first request is being read."""

        def read(self, size: int) -> bytes:
            inner.append(call(app, "POST", "/v2/models/m/infer", request))
            return json.dumps(request).encode()

    environ = {"wsgi.input": Body(), "CONTENT_LENGTH": str(len(json.dumps(request)))}
    assert call(app, "POST", "/v2/models/m/infer", validate=False, **environ).status == 200
    assert inner[0].status == 503
    assert "1 requests" in inner[0].json["error"] or "1 request" in inner[0].json["error"]

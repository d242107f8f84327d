"""The page's files and what travels with them, without a browser: headers, routes, and nothing from another host."""

import json
import re
from importlib import resources

import numpy as np
import pytest

import gdlib
from gdlib.serve import page
from gdlib.serve.app import App, create_app
from gdlib.serve.keys import KeyFile, add_key
from gdlib.serve.repository import Repository

STATIC = {file.name: file.read_text("utf-8") for file in (resources.files("gdlib.serve") / "static").iterdir()}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'"
)


@pytest.fixture
def app(tmp_path):
    (tmp_path / "models").mkdir()
    return App(Repository(tmp_path / "models"), keys=None)


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/static/page.css", "text/css; charset=utf-8"),
        ("/static/page.js", "text/javascript; charset=utf-8"),
        ("/static/icon.svg", "image/svg+xml"),
    ],
)
def test_files_and_headers(app, call, path, content_type):
    reply = call(app, "GET", path)
    assert reply.status == 200
    assert reply.body.decode() == STATIC[path.rpartition("/")[2] or "index.html"]
    wanted = {
        "Content-Type": content_type,
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    assert wanted.items() <= reply.headers.items()
    head = call(app, "HEAD", path)
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(reply.body)))
    assert call(app, "POST", path).status == 405


@pytest.mark.parametrize(
    "path", ["/static", "/static/", "/static/none.js", "/static/../page.py", "/static/index.html", "//", "/index.html"]
)
def test_no_other_paths(app, call, path):
    assert call(app, "GET", path).status == 404


def test_what_the_page_loads_is_there_and_relative(app, call):
    loaded = {f"/{place}" for place in re.findall(r'(?:src|href)="(static/[^"]+)"', STATIC["index.html"])}
    for name, text in STATIC.items():
        loaded |= {f"/static/{place}" for place in re.findall(r'from "\./([^"]+)"', text)} if name.endswith(".js") else set()
    assert loaded == {f"/static/{name}" for name in STATIC if name != "index.html"}
    assert all(call(app, "GET", path).status == 200 for path in loaded)
    assert not re.search(r'(?:src|href)="/', STATIC["index.html"])


@pytest.mark.parametrize("name", sorted(STATIC))
def test_nothing_from_elsewhere_and_no_markup_from_text(name):
    text = STATIC[name].replace("http://www.w3.org/2000/svg", "")  # the name of SVG's namespace, which nobody loads
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w", text)
    assert not name.endswith(".css") or not re.search(r"@import|url\(", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|localStorage|sessionStorage|cookie", text
    )
    assert not re.search(r"\sstyle=|<style|\son\w+=|\.style\b", text)
    assert len(text.splitlines()) <= 400


def test_the_page_is_open_and_what_it_asks_for_is_not(tmp_path, call):
    (tmp_path / "models").mkdir()
    add_key(tmp_path / "keys.json", "one", ["models:*"])
    app = App(Repository(tmp_path / "models"), keys=KeyFile(tmp_path / "keys.json"))
    assert [call(app, "GET", path).status for path in page.handlers() if path] == [200] * len(STATIC)
    assert call(app, "POST", "/v2/repository/index").status == 401


def test_a_mount_point_without_its_slash_moves_to_it(app, call):
    reply = call(app, "GET", "", SCRIPT_NAME="/deep/a b")
    assert (reply.status, reply.headers["Location"]) == (308, "a%20b/")
    assert call(app, "GET", "/", SCRIPT_NAME="/deep/a b").status == 200


def save(tmp_path, model, **facts):
    gdlib.save(model, tmp_path / "m/1/model.safetensors", **facts)
    return create_app(tmp_path)


def parameters(call, app):
    return call(app, "GET", "/v2/models/m/versions/1").json["parameters"]


def test_metadata_tells_what_the_page_shows(tmp_path, call):
    model = gdlib.Linear(2, 1, dtype=np.float64, seed=0)
    X = np.random.default_rng(0).standard_normal((20, 2))
    gdlib.fit(model, X, X[:, 0], loss=gdlib.MSELoss(), optimizer=gdlib.SGD(model.parameters(), lr=0.01), epochs=1000, seed=0)
    facts = {
        "feature_names": ["a", "b"],
        "target_names": ["t"],
        "feature_units": ["kg", ""],
        "target_units": ["m"],
        "feature_ranges": [[0.0, 1.0], [-2.0, 2.0]],
    }
    told = parameters(call, save(tmp_path, model, **facts))
    training = told.pop("training")
    assert told == facts | {"weight": model.weight.data.tolist(), "bias": model.bias.data.tolist()}
    assert (training["epochs"], training["final_loss"]) == (1000, model.training_summary["final_loss"])
    assert 200 <= len(training["loss"]) <= 256  # a curve, not every epoch


def test_weights_are_told_of_a_single_layer_of_moderate_size(tmp_path, call):
    assert parameters(call, save(tmp_path / "a", gdlib.Linear(10_001, 1, seed=0))) == {}
    network = gdlib.Sequential(gdlib.Linear(2, 3, seed=0), gdlib.ReLU(), gdlib.Linear(3, 1, seed=0))
    assert parameters(call, save(tmp_path / "b", network)) == {}
    without = parameters(call, save(tmp_path / "c", gdlib.Linear(2, 3, bias=False, seed=0)))
    assert without["bias"] == [0, 0, 0]
    one = gdlib.Sequential(gdlib.Linear(2, 3, seed=0))
    told = parameters(call, save(tmp_path / "d", one))
    assert json.dumps(told["weight"]) == json.dumps(one[0].weight.data.tolist())

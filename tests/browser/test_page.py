"""The page in a real headless Chromium: the form, the answer and what explains it, the plots; no console error, nothing that axe finds.

GDLIB_SCREENSHOT=<path>.png writes a picture of the page to <path>.png, and of dark and narrow ones beside it.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import gdlib
from gdlib.datasets import load_diabetes
from gdlib.preprocessing import StandardScaler

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests drive a browser with playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the page's tests check accessibility with axe")
pytest.importorskip("waitress", reason="the page's tests start the server")

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [pytest.mark.clients, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")]
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
DATA = load_diabetes()
FACTS = {
    "feature_names": DATA.feature_names,
    "feature_units": DATA.feature_units,
    "feature_ranges": np.stack([DATA.X.min(axis=0), DATA.X.max(axis=0)], axis=1),
    "target_names": ["progression"],
    "target_units": ["score"],
}
MINUS = "\u2212"  # as people write it


def diabetes_model():
    """As the quickstart makes it, with fewer epochs."""
    scaler = StandardScaler().fit(DATA.X)
    model = gdlib.Linear(10, 1, seed=0)
    optimizer = gdlib.SGD(model.parameters(), lr=0.01)
    gdlib.fit(model, scaler.transform(DATA.X), DATA.y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=30, batch_size=32, seed=0)
    return scaler.fold_into(model)


@pytest.fixture(scope="module")
def model():
    return diabetes_model()


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """A server of the diabetes model, a network without names, a wide model, and a file that is none."""
    from gdlib.serve.app import create_app
    from gdlib.serve.server import Server

    root = tmp_path_factory.mktemp("models")
    gdlib.save(model, root / "diabetes/1/model.safetensors", **FACTS)
    gdlib.save(gdlib.Sequential(gdlib.Linear(3, 4, seed=0), gdlib.ReLU(), gdlib.Linear(4, 2, seed=1)), root / "network/7/model.safetensors")
    gdlib.save(gdlib.Linear(70, 1, seed=0), root / "wide/1/model.safetensors")
    names = {"feature_names": ["one" * 20, "two" * 20], "feature_units": ["unit" * 10, ""], "target_names": ["target" * 10]}
    gdlib.save(gdlib.Linear(2, 1, seed=0), root / ("long" * 10) / "1/model.safetensors", **names)
    (root / "torn/1").mkdir(parents=True)
    (root / "torn/1/model.safetensors").write_bytes(b"torn")
    with Server(create_app(root), port=0) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def serve():
    """Starts servers that end after the pages: a page asks every few seconds, and logs an error where nothing listens."""
    from gdlib.serve.server import Server

    with contextlib.ExitStack() as servers:
        yield lambda app: servers.enter_context(Server(app, port=0)).url


@pytest.fixture
def visit(browser, serve):
    """Opens pages, and fails where one of them has logged an error, thrown one, or asked another host for something."""
    problems = []
    contexts = []

    def open_page(url, ready="#feature-0", ignore="^$", **options):
        options = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on(
            "console",
            lambda message: message.type in ("error", "warning") and not re.search(ignore, message.text) and problems.append(message.text),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(url.split("#")[0]) or problems.append(f"asked for {request.url}"))
        page.goto(url)
        page.wait_for_selector(ready, state="visible")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def shown_number(text):
    return float(re.search(rf"{MINUS}?\d[\d,]*(\.\d+)?", text).group().replace(MINUS, "-").replace(",", ""))


def violations(page):
    found = axe.Axe().run(page).response["violations"]
    return [(entry["id"], node["target"], node["failureSummary"]) for entry in found for node in entry["nodes"]]


def predict(page):
    page.get_by_role("button", name="Predict").click()
    page.wait_for_selector("#answer .value")
    page.wait_for_selector("#latency svg")


def test_models_with_their_states(visit, url):
    page = visit(url)
    entries = page.locator("#models li")
    page.wait_for_selector("#models li")
    shown = [" ".join(text.split()) for text in entries.all_inner_texts()]
    assert (shown[0], shown[2]) == ("diabetes version 1 ready", "network version 7 ready")
    torn = page.locator("#models li", has_text="torn")
    assert "unavailable" in torn.inner_text()
    assert "save the model again" in torn.inner_text()
    assert page.locator("#health").inner_text() == "4 of 5 ready"
    page.get_by_role("button", name="network").click()
    page.wait_for_selector("#model-name:has-text('network')")
    assert page.url.endswith("#network/7")
    assert [label.inner_text() for label in page.locator("#fields label").all()] == ["x0", "x1", "x2"]
    predict(page)
    assert page.locator("#answer .value").count() == 2
    assert page.locator("#why").is_hidden()


def test_the_form_gives_the_models_answer_and_explains_it(visit, url, model):
    page = visit(url)
    assert page.get_by_label("bmi").get_attribute("aria-describedby") == "unit-2 hint-2"
    assert page.locator("#unit-2").inner_text() == "kg/m²"
    assert page.locator("#hint-2").inner_text() == "18 to 42.2"
    assert page.get_by_label("age").input_value() == "49"  # the middle of 19 to 79
    row = DATA.X[5]
    for name, value in zip(DATA.feature_names, row, strict=True):
        page.get_by_label(name, exact=True).fill(str(value))
    predict(page)
    answer = float(model.predict(row[None])[0, 0])
    assert shown_number(page.locator("#answer .value").inner_text()) == pytest.approx(answer, rel=1e-5)
    assert page.locator("#answer dt").inner_text() == "progression"
    assert page.locator("#answer .unit").inner_text() == "score"

    rows = [[cell.inner_text() for cell in row.locator("th, td").all()] for row in page.locator(".contributions tbody tr").all()]
    shown = {name: shown_number(part) for name, *_, part in rows}
    weight, bias = model.weight.data[0], float(model.bias.data[0])
    for name, part in zip(DATA.feature_names, weight * row, strict=True):
        assert shown[name] == pytest.approx(part, abs=0.051)
    assert shown["constant"] == pytest.approx(bias, abs=0.051)
    assert sum(shown.values()) - shown["answer"] == pytest.approx(shown["answer"], abs=0.6)
    assert [abs(shown[name]) for name, *_ in rows[:10]] == sorted((abs(shown[name]) for name, *_ in rows[:10]), reverse=True)
    largest = rows[0][0]
    share = abs(shown[largest]) / max(abs(shown[largest]), abs(bias))
    bar = page.locator(".contributions tbody tr").first.locator("rect")
    assert bar.get_attribute("class") == ("plus" if shown[largest] > 0 else "minus")
    assert float(bar.get_attribute("width")) == pytest.approx(98 * share, rel=1e-2)


def test_the_request_works_elsewhere(visit, url, model):
    page = visit(url)
    page.get_by_label("age").fill("61.5")
    row = [61.5] + [float(page.locator(f"#feature-{i}").input_value()) for i in range(1, 10)]
    answer = float(model.predict(np.array([row]))[0, 0])
    program = subprocess.run([sys.executable, "-c", page.locator("#python").inner_text()], capture_output=True, text=True, check=True)
    name, _, values = program.stdout.partition(" ")
    assert (name, float(values.strip("[]\n"))) == ("output", pytest.approx(answer, rel=1e-5))
    command = shlex.split(page.locator("#curl").inner_text().replace("\\\n", " "))
    assert command[:2] == ["curl", "-s"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body = opener.open(command[2], data=command[command.index("-d") + 1].encode(), timeout=20).read()
    assert str(float(values.strip("[]\n"))).encode() in body
    page.get_by_role("button", name="Copy the curl command").click()
    page.wait_for_selector("#copied:not(:empty)")


def test_counts_and_curves(visit, url, model):
    page = visit(url)
    predict(page)
    counts = dict(zip(page.locator("#counts dt").all_inner_texts(), page.locator("#counts dd").all_inner_texts(), strict=True))
    before = int(counts["answered"])
    assert before >= 1
    assert counts["mean time"].endswith(("µs", "ms", "s"))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    command = shlex.split(page.locator("#curl").inner_text().replace("\\\n", " "))
    opener.open(command[2], data=command[-1].encode(), timeout=20).read()
    page.wait_for_function("wanted => document.querySelector('#counts dd').textContent === wanted", arg=str(before + 1))  # by itself
    page.locator("#latency-details summary").click()
    cells = page.locator("#latency-table td").all_inner_texts()
    assert sum(map(int, cells)) == before + 1
    assert f"of {before + 1} requests" in page.locator("#latency svg").get_attribute("aria-label")
    losses = model.training_summary["loss"]
    path = page.locator("#curve path.curve").get_attribute("d")
    points = [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]
    assert len(points) == len(losses) == 30
    xs, ys = np.array(points).T
    assert (np.diff(xs) > 0).all()
    expected = (losses[0] - np.array(losses)) / (losses[0] - min(losses))
    np.testing.assert_allclose((ys - ys[0]) / (ys.max() - ys[0]), expected, atol=0.01)
    training = dict(zip(page.locator("#training dt").all_inner_texts(), page.locator("#training dd").all_inner_texts(), strict=True))
    assert (training["optimizer"], training["epochs"], training["rows"]) == ("SGD", "30", "442")


def test_a_wide_model_is_asked_in_json_and_errors_are_told_in_words(visit, url):
    page = visit(f"{url}/#wide/1", ready="#inputs", ignore="400")
    predict(page)
    assert page.locator(".contributions tbody tr").count() == 72
    page.get_by_label("Inputs, as JSON").fill("[{")
    page.get_by_role("button", name="Predict").click()
    assert "no JSON" in page.locator("#answer .error").inner_text()
    page.get_by_label("Inputs, as JSON").fill('[{"name": "input", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]')
    page.get_by_role("button", name="Predict").click()
    page.wait_for_selector("#answer .error:has-text('70 features')")


def test_values_beyond_the_data_are_marked_and_reset_undoes(visit, url):
    page = visit(url)
    page.get_by_label("age").fill("120")
    assert page.locator("#hint-0").inner_text() == "outside 19 to 79"
    page.get_by_role("button", name="Reset").click()
    assert page.get_by_label("age").input_value() == "49"


def test_by_keyboard_alone(visit, url):
    page = visit(url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the form"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "feature-0"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer .value")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"feature-9", "reset", "copy-curl", "copy-python", "SUMMARY"} <= reached


@pytest.fixture(scope="module")
def used_url(model, tmp_path_factory):
    """A server as it may look in use: three models, and some hundred requests of different sizes."""
    from gdlib.serve.app import create_app
    from gdlib.serve.server import Server

    root = tmp_path_factory.mktemp("models")
    network = gdlib.Sequential(gdlib.Linear(10, 8, seed=0), gdlib.Tanh(), gdlib.Linear(8, 1, seed=1))
    for place, made in {"diabetes/1": model, "diabetes/2": model, "diabetes-network/1": network}.items():
        gdlib.save(made, root / place / "model.safetensors", **FACTS)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with Server(create_app(root), port=0) as server:
        for rows in [1, 1, 2, 1, 1, 4, 1, 40, 1, 1] * 20 + [400] * 5:
            data = DATA.X[:rows].ravel().tolist()
            body = {"inputs": [{"name": "input", "shape": [len(DATA.X[:rows]), 10], "datatype": "FP32", "data": data}]}
            opener.open(f"{server.url}/v2/models/diabetes/versions/2/infer", data=json.dumps(body).encode(), timeout=20).read()
        yield server.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_accessible_in_light_and_dark_wide_and_narrow(visit, used_url, scheme, width, tmp_path):
    page = visit(f"{used_url}/#diabetes/2", color_scheme=scheme, viewport={"width": width, "height": 900})
    predict(page)
    for summary in page.locator("summary").all():
        summary.click()
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 384) == (scheme == "dark")
    for summary in page.locator("summary").all():
        summary.click()
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.mouse.move(0, 0)
    wanted = Path(os.environ.get("GDLIB_SCREENSHOT", tmp_path / "page.png")).resolve()
    suffix = "".join([f"-{scheme}"] * (scheme != "light") + [f"-{width}"] * (width != 1280))
    page.screenshot(path=wanted.with_name(f"{wanted.stem}{suffix}.png"), full_page=True)


@pytest.mark.parametrize("width", [1280, 360])
def test_long_names_fit(visit, url, width):
    page = visit(f"{url}/#{'long' * 10}/1", viewport={"width": width, "height": 900})
    page.wait_for_selector("label:has-text('oneone')")
    predict(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_server_with_keys_asks_for_one(visit, serve, model, tmp_path):
    from gdlib.serve.app import create_app
    from gdlib.serve.keys import add_key

    gdlib.save(model, tmp_path / "models/diabetes/1/model.safetensors")
    key = add_key(tmp_path / "keys.json", "page", ["models:*"])
    app = create_app(tmp_path / "models", keys=tmp_path / "keys.json")
    page = visit(serve(app), ready="#key", ignore="401|403")  # the browser itself reports every refusal
    assert "wants an access key" in page.locator("#notice").inner_text()
    assert violations(page) == []
    page.get_by_label("Access key").fill("wrong")
    page.get_by_label("Access key").press("Enter")
    page.wait_for_selector("#notice:has-text('does not know this key')")
    page.get_by_label("Access key").fill(key)
    page.get_by_label("Access key").press("Enter")
    page.wait_for_selector("#feature-9")
    page.get_by_role("button", name="Predict").click()
    page.wait_for_selector("#answer .value")
    assert page.locator("#notice").is_hidden()
    page.wait_for_selector("#latency-note:has-text('metrics')")  # a scope that the key lacks
    page.wait_for_selector("#counts:has-text('answered')")
    assert key not in page.content()
    assert "Bearer $GDLIB_KEY" in page.locator("#curl").inner_text()
    program = page.locator("#python").inner_text()
    ran = subprocess.run([sys.executable, "-c", program], env=os.environ | {"GDLIB_KEY": key}, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("output [")
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_a_model_that_is_replaced_is_explained_anew(visit, serve, tmp_path):
    from gdlib.serve.app import App
    from gdlib.serve.repository import Repository

    path = tmp_path / "m/1/model.safetensors"
    line = gdlib.Linear(1, 1, dtype=np.float64)
    line.load_state_dict({"weight": [[2.0]], "bias": [1.0]})
    gdlib.save(line, path, feature_ranges=[[3, 3]])
    repository = Repository(tmp_path, settle_seconds=0.0)
    page = visit(serve(App(repository)))
    predict(page)
    assert page.locator(".contributions td:last-child").all_inner_texts() == ["+6.000", "+1.000", "7.000"]
    line.load_state_dict({"weight": [[-5.0]], "bias": [1.0]})
    gdlib.save(line, path)
    repository.refresh()
    page.get_by_role("button", name="Predict").click()
    page.wait_for_selector(f".contributions:has-text('{MINUS}15.00')")
    assert page.locator("#answer .value").inner_text() == f"{MINUS}14"
    shutil.rmtree(path.parent)
    repository.refresh()
    repository.refresh()
    page.wait_for_selector("#notice:has-text('not available any more')")


def test_a_model_with_several_inputs(visit, serve, tmp_path):
    onnx = pytest.importorskip("onnx", reason="makes an ONNX model")
    pytest.importorskip("onnxruntime", reason="ONNX models are computed by onnxruntime")
    from gdlib.serve.app import create_app

    helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
    tensors = [helper.make_tensor_value_info(name, FLOAT, [None, 2]) for name in ("left's", "right", "sum")]
    graph = helper.make_graph([helper.make_node("Add", ["left's", "right"], ["sum"])], "add", tensors[:2], tensors[2:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "add/1").mkdir(parents=True)
    onnx.save(made, tmp_path / "add/1/model.onnx")
    page = visit(serve(create_app(tmp_path)), ready="#inputs")
    box = page.get_by_label("Inputs, as JSON")
    box.fill(box.input_value().replace("[0,0]", "[1.5,-4]", 1))
    predict(page)
    assert page.locator("#answer dt").all_inner_texts() == ["sum 0", "sum 1"]
    assert page.locator("#answer .value").all_inner_texts() == ["1.5", f"{MINUS}4"]
    assert violations(page) == []
    command = shlex.split(page.locator("#curl").inner_text().replace("\\\n", " "))
    assert '"name":"left\'s"' in command[-1]


def test_under_a_mount_point(visit, serve, model, tmp_path):
    from gdlib.serve.app import create_app

    gdlib.save(model, tmp_path / "diabetes/1/model.safetensors")
    app = create_app(tmp_path)

    def mounted(environ, start_response):
        assert environ["PATH_INFO"].startswith("/deep/predictor")
        inner = environ | {"SCRIPT_NAME": "/deep/predictor", "PATH_INFO": environ["PATH_INFO"].removeprefix("/deep/predictor")}
        return app(inner, start_response)

    url = f"{serve(mounted)}/deep/predictor"
    page = visit(url)
    predict(page)
    assert page.url == f"{url}/#diabetes/1"

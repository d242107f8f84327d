"""The command line: the main job from data to an answer over HTTP, serving, and errors that a user can mend."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import gdlib
from gdlib import cli, config
from gdlib.datasets import load_diabetes


def test_quickstart_does_the_whole_job(tmp_path, monkeypatch, capsys):
    pytest.importorskip("waitress")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["quickstart"]) == 0
    out, err = capsys.readouterr()
    for words in ("354 patients", "held-out R2   0.5", "rows per second", config.get_config()["isa"], "predicted progression", "in truth"):
        assert words in out
    assert "100/100" in err  # the progress bar
    assert out.count("\n  ") == 3  # the commands to go on with
    assert "<svg" in (tmp_path / "models/diabetes/1/learning_curve.svg").read_text()
    model = gdlib.load(tmp_path / "models/diabetes/1/model.safetensors")
    data = load_diabetes()
    assert model.feature_names == data.feature_names
    assert (model.feature_units, model.target_units) == (data.feature_units, [data.target_unit])
    assert model.feature_ranges[0] == [19, 79]
    residual = model.predict(data.X)[:, 0] - data.y  # raw measurements: the standardisation is in the weights
    assert 1 - np.square(residual).sum() / np.square(data.y - data.y.mean()).sum() > 0.5
    assert model.training_summary["epochs"] == 100


def test_serve_says_where_answers_and_ends_on_sigterm(tmp_path):
    pytest.importorskip("waitress")
    model = gdlib.Linear(2, 1, seed=0)
    gdlib.save(model, tmp_path / "m" / "1" / "model.safetensors")
    command = [sys.executable, "-m", "gdlib.cli", "serve", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        url = child.stdout.readline().split(" at ")[1].split()[0]
        body = {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url}/v2/models/m/infer", data=json.dumps(body).encode(), timeout=30) as answer:
            got = json.load(answer)["outputs"][0]["data"]
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=30) == 0
    np.testing.assert_allclose(got, model.predict([[1, 2]])[0], rtol=1e-6)


def test_keys_are_made_listed_used_and_revoked(tmp_path, monkeypatch, capsys):
    pytest.importorskip("orjson")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["keys", "add", "reader", "--scope", "models:house", "--scope", "metrics"]) == 0
    out, err = capsys.readouterr()
    secret = out.strip()
    assert len(secret) > 40
    assert "Authorization: Bearer" in err
    assert secret not in (tmp_path / "keys.json").read_text()
    assert cli.main(["keys", "add", "writer"]) == 0
    assert capsys.readouterr().out.strip() != secret
    assert cli.main(["keys", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(line.split()[0], line.split()[2:]) for line in lines] == [("reader", ["metrics", "models:house"]), ("writer", ["models:*"])]
    assert cli.main(["keys", "revoke", "reader"]) == 0
    assert cli.main(["keys", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["writer"]
    for arguments, words in (
        (["keys", "revoke", "reader"], "no key 'reader'; it has 'writer'"),
        (["keys", "add", "writer"], "has a key 'writer' already"),
        (["keys", "add", "x", "--scope", "all"], "the scope is 'all'; use models:NAME"),
        (["keys", "add", "a b"], "the key's name is 'a b'"),
        (["keys", "list", "--file", "nothing.json"], "there is no key file at nothing.json"),
    ):
        assert cli.main(arguments) == 1
        assert words in capsys.readouterr().err


def test_serving_without_its_packages_says_what_to_install():
    code = (
        "import importlib.util as u; find = u.find_spec; u.find_spec = lambda name, *more: name != 'orjson' and find(name, *more) or None\n"
        "import gdlib.serve"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Serving needs the package orjson: pip install gdlib[serve]." in done.stderr


def test_info_names_what_runs(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("isa", "features", "threads", "openmp", "cuda", gdlib.__version__):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["serve", "no-such-folder"], "no-such-folder is not a folder"), (["serve", ".", "--host", "0.0.0.0"], "host is '0.0.0.0'")],
)
def test_an_error_is_one_line(arguments, words, capsys):
    pytest.importorskip("waitress")
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "quickstart" in capsys.readouterr().err


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert version("gdlib") == gdlib.__version__


def test_subpackages_come_when_they_are_asked_for():
    code = "import gdlib; print(gdlib.distributed.fit.__module__, gdlib.serve.create_app.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["gdlib.distributed.shared_memory", "gdlib.serve.app"]
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        gdlib.nonsense  # noqa: B018


def test_caches_are_those_that_a_core_reaches(capsys):
    """sysconf may give the L3 of a whole socket, ten times what a core reaches: results then never bypassed the caches."""
    listed = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = (index / "size").read_text().strip()
        listed[(index / "level").read_text().strip()] = int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
    l2, l3 = config.get_config()["caches"]
    assert (l2, l3) == (listed.get("2", l2), listed.get("3", l3))
    assert min(l2, l3) >= 1 << 14
    gdlib.show_config()
    assert f"caches   L2 of a core {l2 >> 10:,} KiB, L3 that it shares {l3 >> 10:,} KiB\n" in capsys.readouterr().out


def test_threads_can_be_set():
    before = gdlib._core.num_threads()
    gdlib.set_num_threads(3)
    assert config.get_config()["threads"] == 3
    gdlib.set_num_threads(np.int64(before))
    for bad, error in [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), (1025, ValueError), (2**40, ValueError)]:
        with pytest.raises(error, match="the number of threads is"):
            gdlib.set_num_threads(bad)
    assert gdlib._core.num_threads() == before

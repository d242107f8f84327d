"""Model files: what comes back, and what is refused."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save as to_bytes

import gdlib
from gdlib import Linear, load, save


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip(tmp_path, dtype, bias):
    model = Linear(3, 2, bias, dtype=dtype, seed=0)
    X, y = np.random.default_rng(0).standard_normal((20, 3)), np.zeros((20, 2))
    gdlib.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=gdlib.SGD(model.parameters(), lr=0.01), epochs=3)
    path = tmp_path / "models" / "m" / "1" / "model.safetensors"
    save(model, path, feature_names=["a", "b", "c"], target_names=["t", "u"])
    again = load(path)
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert again.dtype == dtype
    assert (again.feature_names, again.target_names) == (["a", "b", "c"], ["t", "u"])
    assert again.training_summary["epochs"] == 3
    assert again.training_summary["final_loss"] == model.training_summary["final_loss"]
    save(again, path)  # names are kept
    assert load(str(path)).feature_names == ["a", "b", "c"]
    assert os.listdir(path.parent) == ["model.safetensors"]


def test_names_are_checked(tmp_path):
    model = Linear(2, 1)
    for names, error in [(["a"], ValueError), (["a", "a"], ValueError), ("ab", TypeError)]:
        with pytest.raises(error, match="feature_names"):
            save(model, tmp_path / "m", feature_names=names)
    model.weight.data[0, 0] = np.inf
    with pytest.raises(ValueError, match="weight holds 1 value"):
        save(model, tmp_path / "m")
    with pytest.raises(TypeError, match=r"gdlib\.Linear"):
        save({}, tmp_path / "m")
    assert os.listdir(tmp_path) == []


FACTS = {"feature_units": ["kg/m²", ""], "target_units": ["score"], "feature_ranges": [[18.0, 42.2], [-1.0, -1.0]]}


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_large_tensors_are_read_some_rows_at_a_time(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("gdlib.serialization.CHUNK_BYTES", chunk)
    model = gdlib.Sequential(gdlib.Linear(7, 30, seed=0), gdlib.ReLU(), gdlib.Linear(30, 2, seed=1))
    path = tmp_path / "m.safetensors"
    gdlib.save(model, path)
    for name, values in gdlib.load(path).state_dict().items():
        np.testing.assert_array_equal(values, model.state_dict()[name])
    content = bytearray(path.read_bytes())
    weight = model.state_dict()["0.weight"]
    at = content.index(weight.tobytes()) + 4 * (7 * 21 + 3)
    content[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"0.weight holds 1 value that is NaN or infinite, the first \(nan\) at row 21, column 3"):
        gdlib.load(path)


def test_units_and_ranges_come_back(tmp_path):
    path = tmp_path / "m.safetensors"
    save(Linear(2, 1, seed=0), path, **FACTS | {"feature_ranges": np.array(FACTS["feature_ranges"], np.float32)})
    again = load(path)
    assert again.feature_units == FACTS["feature_units"]
    assert again.target_units == FACTS["target_units"]
    assert again.feature_ranges == np.array(FACTS["feature_ranges"], np.float32).tolist()
    save(again, path)  # they are kept
    assert load(path).feature_units == FACTS["feature_units"]
    save(Linear(2, 1, seed=0), path)
    assert [getattr(load(path), name) for name in FACTS] == [None, None, None]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"feature_units": "kg"}, TypeError, "feature_units is the text 'kg'"),
        ({"feature_units": ["kg"]}, ValueError, "feature_units has 1 units; 2 are wanted"),
        ({"feature_units": ["kg", None]}, TypeError, "feature_units holds None; texts are wanted"),
        ({"target_units": ["m", "s"]}, ValueError, "target_units has 2 units; 1 are wanted"),
        ({"feature_ranges": [[0, 1]]}, ValueError, r"feature_ranges has shape \(1, 2\); \[2, 2\] is wanted"),
        ({"feature_ranges": [[0, 1], [2, 1]]}, ValueError, r"feature_ranges holds \[2.0, 1.0\] at 1"),
        ({"feature_ranges": [[0, np.inf], [0, 1]]}, ValueError, "two finite numbers"),
        ({"feature_ranges": [[np.nan, 1], [0, 1]]}, ValueError, "two finite numbers"),
        ({"feature_ranges": [["a", "b"], ["c", "d"]]}, TypeError, "feature_ranges holds text"),
    ],
)
def test_units_and_ranges_are_checked(tmp_path, given, error, words):
    with pytest.raises(error, match=words):
        save(Linear(2, 1), tmp_path / "m", **given)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save(Linear(2, 1, seed=0), path)
    before = path.read_bytes()
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError("no space")))
            with pytest.raises(OSError, match="no space"):
                save(Linear(2, 1, seed=1), path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["m.safetensors"]


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save(Linear(3, 1, seed=0), path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="save the model again"):
            load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="save the model again"):
        load(path)


def header_with(**changes):
    architecture = {"type": "Linear", "in_features": 2, "out_features": 1, "bias": True, "dtype": "float32"}
    metadata = {
        "format": "gdlib",
        "format_version": "1",
        "architecture": json.dumps(architecture),
        "feature_names": "null",
        "target_names": "null",
        "training": "null",
    }
    return {key: value for key, value in (metadata | changes).items() if value is not None}


LINEAR = {"type": "Linear", "in_features": 2, "out_features": 1, "bias": True}
OTHER = {"type": "Linear", "in_features": 3, "out_features": 1, "bias": False}


def network_of(*layers):
    return json.dumps({"type": "Sequential", "layers": layers, "dtype": "float32"})


IN_NETWORK = {"0.weight": np.zeros((1, 2), np.float32), "0.bias": np.zeros(1, np.float32)}
GOOD = {"weight": np.zeros((1, 2), np.float32), "bias": np.zeros(1, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (GOOD, None, "was not written by gdlib"),
        (GOOD, header_with(format="pt"), "was not written by gdlib"),
        (GOOD, header_with(format_version="9"), "format version '9'"),
        (GOOD, header_with(architecture=None), "architecture"),
        (GOOD, header_with(architecture="{"), "does not hold"),
        (GOOD, header_with(architecture="[" * 100_000), "does not hold"),
        (GOOD, header_with(architecture='{"type": "Conv"}'), "unknown layer 'Conv'"),
        (GOOD, header_with(feature_names='["a"]'), "feature_names"),
        (GOOD, header_with(feature_units='["kg"]'), "feature_units"),
        (GOOD, header_with(target_units="[1]"), "target_units"),
        (GOOD, header_with(feature_ranges="[[0, 1], [NaN, 1]]"), "feature_ranges"),
        (GOOD, header_with(feature_ranges='{"a": 1}'), "feature_ranges"),
        (GOOD, header_with(training="[]"), "training summary"),
        (GOOD, header_with(architecture='{"type": "ReLU", "dtype": "float32"}'), "belong"),
        ({}, header_with(architecture='{"type": "ReLU", "dtype": "float32"}'), "lone ReLU"),
        ({}, header_with(architecture='{"type": "Sequential", "layers": [], "dtype": "float32"}'), "without a Linear"),
        (GOOD, header_with(architecture='{"type": "Sequential", "layers": "ab", "dtype": "float32"}'), "does not hold"),
        (GOOD, header_with(architecture='{"type": "Sequential", "layers": [{"type": ["ReLU"]}], "dtype": "float32"}'), "does not hold"),
        (GOOD, header_with(architecture=network_of(LINEAR, {"type": "GELU"})), "unknown layer 'GELU'"),
        (GOOD, header_with(architecture=network_of(LINEAR)), r"0\.weight"),
        (IN_NETWORK, header_with(architecture=network_of(LINEAR | {"in_features": 2**40, "out_features": 2**40})), "belong"),
        (IN_NETWORK, header_with(architecture=network_of(*[{"type": "Tanh"}] * 2, LINEAR)), r"2\.weight"),
        (IN_NETWORK | {"1.weight": np.zeros((1, 3), np.float32)}, header_with(architecture=network_of(LINEAR, OTHER)), "gives 1 features"),
        ({"weight": GOOD["weight"]}, header_with(), "bias"),
        (GOOD | {"extra": GOOD["bias"]}, header_with(), "extra"),
        (GOOD | {"weight": np.zeros((2, 1), np.float32)}, header_with(), "belong"),
        (GOOD | {"bias": np.zeros(1)}, header_with(), "F64"),
        (GOOD | {"bias": np.full(1, np.nan, np.float32)}, header_with(), "NaN"),
    ],
)
def test_a_foreign_or_false_file_is_refused(tmp_path, tensors, metadata, words):
    path = tmp_path / "m.safetensors"
    path.write_bytes(to_bytes(tensors, metadata=metadata))
    with pytest.raises(ValueError, match=words):
        load(path)


def test_the_good_header_is_good(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(to_bytes(GOOD, metadata=header_with()))
    assert load(path).in_features == 2
    assert load(path).feature_units is None  # as files were before they held units and ranges


def test_no_file_and_no_safetensors_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file"):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no model file"):
        load(tmp_path)
    for content in (b"", b"hello", b"\x80\x04pickle" * 10, b"\xff" * 64, b"PK\x03\x04" * 20):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load(tmp_path / "f")


def test_sizes_are_compared_before_memory_is_taken(tmp_path):
    """A few bytes may not make a server allocate what their header says."""
    architecture = {"type": "Linear", "in_features": 10**11, "out_features": 1, "bias": True, "dtype": "float32"}
    path = tmp_path / "m.safetensors"
    path.write_bytes(to_bytes(GOOD, metadata=header_with(architecture=json.dumps(architecture))))
    with pytest.raises(ValueError, match="100000000000"):
        load(path)


def test_a_new_file_has_the_rights_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        save(Linear(2, 1), tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert os.stat(tmp_path / "m.safetensors").st_mode & 0o777 == 0o640


def test_the_folder_is_flushed_too(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)))
    save(Linear(2, 1), tmp_path / "m.safetensors")
    assert [os.path.basename(name).startswith(".m.safetensors") for name in flushed] == [True, False]
    assert flushed[1] == str(tmp_path)


def test_the_summary_belongs_to_the_parameters(tmp_path):
    model = Linear(1, 1, seed=0)
    x = np.ones((4, 1), np.float32)
    gdlib.fit(model, x, x[:, 0], loss=gdlib.MSELoss(), optimizer=gdlib.SGD(model.parameters(), lr=0.1), epochs=1)
    assert model.training_summary is not None
    model.load_state_dict(Linear(1, 1, seed=1).state_dict())
    assert model.training_summary is None

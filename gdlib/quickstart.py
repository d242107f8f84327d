"""The main job, from data to an answer over HTTP: what `gdlib quickstart` runs."""

import json
import sys
import urllib.request
from pathlib import Path

import numpy as np

from gdlib.config import get_config
from gdlib.datasets import Dataset, load_diabetes
from gdlib.history import History
from gdlib.losses import MSELoss
from gdlib.nn import Linear
from gdlib.optim import SGD
from gdlib.preprocessing import StandardScaler
from gdlib.serialization import load, save
from gdlib.training import fit

HELD_OUT = 88  # a fifth of the 442 patients
EPOCHS = 100


def _r2(model: Linear, X: np.ndarray, y: np.ndarray) -> float:
    """1 - residual sum of squares / total sum of squares, about the mean of y."""
    residual = y - model.predict(X)[:, 0]
    return float(1.0 - residual @ residual / np.square(y - y.mean()).sum())


def _train(data: Dataset, train: np.ndarray) -> tuple[Linear, History]:
    scaler = StandardScaler().fit(data.X[train])
    model = Linear(10, 1, seed=0)
    # The mean of the targets is the best constant, and where a model of standardised features starts.
    model.load_state_dict({"weight": np.zeros((1, 10)), "bias": data.y[train].mean(keepdims=True)})
    optimizer = SGD(model.parameters(), lr=0.01)
    history = fit(
        model,
        scaler.transform(data.X[train]),
        data.y[train],
        loss=MSELoss(),
        optimizer=optimizer,
        epochs=EPOCHS,
        batch_size=32,
        seed=range(EPOCHS),
        progress=True,
    )
    model.feature_names, model.target_names = data.feature_names, [data.target_name]
    model.feature_units, model.target_units = data.feature_units, [data.target_unit]
    model = scaler.fold_into(model)  # takes raw measurements from here on
    model.feature_ranges = np.stack([data.X[train].min(axis=0), data.X[train].max(axis=0)], axis=1).tolist()
    return model, history


def _ask(port: int, row: np.ndarray) -> tuple[dict[str, object], float]:
    """One patient over HTTP: the request, and the prediction in its answer."""
    request: dict[str, object] = {"inputs": [{"name": "input", "shape": [1, 10], "datatype": "FP32", "data": row.tolist()}]}
    url = f"http://127.0.0.1:{port}/v2/models/diabetes/infer"
    # Straight to this machine: a proxy from the environment has no business here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, data=json.dumps(request).encode(), timeout=30) as answer:
        return request, float(json.load(answer)["outputs"][0]["data"][0])


def quickstart(folder: str | Path = "models") -> None:
    """Train on the diabetes study, save the model and its learning curve under `folder`, serve it, and ask it about one patient."""
    from gdlib.serve.app import create_app
    from gdlib.serve.server import Server

    data = load_diabetes()
    order = np.random.default_rng(0).permutation(len(data.y))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    config = get_config()
    print(f"The diabetes study: {len(train)} patients to learn from, {HELD_OUT} held out, 10 measurements each.")
    model, history = _train(data, train)
    print(f"loss          {history.loss[0]:.0f} in epoch 1, {history.loss[-1]:.0f} in epoch {len(history.loss)} (mean squared error)")
    print(f"held-out R2   {_r2(model, data.X[held_out], data.y[held_out]):.3f}")
    print(f"speed         {history.rows_per_second:,.0f} rows per second ({history.seconds * 1e3:.1f} ms, {config['isa']} kernels)")

    path = Path(folder) / "diabetes" / "1" / "model.safetensors"
    save(model, path)
    picture = path.with_name("learning_curve.svg")
    history.plot(picture)
    print(f"saved         {path}\nlearning curve {picture}")

    patient = held_out[0]
    with Server(create_app(folder), port=0) as server:
        request, prediction = _ask(server.port, data.X[patient])
    if not np.isclose(prediction, load(path).predict(data.X[patient : patient + 1])[0, 0], rtol=1e-6):
        raise RuntimeError("the answer over HTTP is not the model's own; please report this.")
    print(f"over HTTP     patient {patient}: predicted progression {prediction:.0f}, in truth {data.y[patient]:.0f}\n")

    program = Path(sys.argv[0]).name if sys.argv[0].endswith("gdlib") else "gdlib"
    program = str(Path(sys.executable).parent / program)
    if Path(program).is_relative_to(Path.cwd()):
        program = str(Path(program).relative_to(Path.cwd()))
    print("Go on with:")
    print(f"  {program} serve {folder}/")
    print(f"  curl -s http://127.0.0.1:8000/v2/models/diabetes/infer -d '{json.dumps(request)}'")
    print(f"  {program} info")

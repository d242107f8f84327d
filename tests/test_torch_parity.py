"""Linear and networks follow PyTorch's trajectory, with every option of SGD: the pinned one, and a live one where it is installed."""

import json

import numpy as np
import pytest

import gdlib
from tests import torch_trajectories as pins

RTOL = {"float32": 2e-5, "float64": 1e-12}
CASES = [(dtype, number) for dtype in RTOL for number in range(len(pins.OPTIONS))]
IDS = [f"{dtype}-" + "-".join(f"{k}={v}" for k, v in pins.OPTIONS[number].items()) for dtype, number in CASES]


def start(dtype):
    X, y, weight, bias = pins.data(dtype)
    model = gdlib.Linear(pins.FEATURES, pins.OUTPUTS, dtype=dtype, seed=0)
    model.load_state_dict({"weight": weight, "bias": bias})
    return model, X, y


def readable_loop(dtype, options):
    model, X, y = start(dtype)
    criterion = gdlib.MSELoss()
    optimizer = gdlib.SGD(model.parameters(), **options)
    losses = []
    for _ in range(pins.EPOCHS):
        for x, target in gdlib.DataLoader(X, y, batch_size=pins.BATCH):
            optimizer.zero_grad()
            losses.append(criterion(model(x), target))
            model.backward(criterion.backward())
            optimizer.step()
    return model, losses


def close(got, wanted, rtol):
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def matches(model, losses, wanted, rtol):
    close(losses, np.array(wanted["losses"]), rtol)
    close(model.weight.data, np.array(wanted["weight"]), rtol)
    close(model.bias.data, np.array(wanted["bias"]), rtol)


@pytest.fixture(scope="module")
def pinned():
    return json.loads(pins.PINS.read_text())


@pytest.mark.parametrize(("dtype", "number"), CASES, ids=IDS)
def test_the_readable_loop_follows_pytorch(pinned, dtype, number):
    model, losses = readable_loop(dtype, pins.OPTIONS[number])
    matches(model, losses, pinned[dtype][number], RTOL[dtype])


@pytest.mark.parametrize(("dtype", "number"), CASES, ids=IDS)
def test_fit_follows_pytorch(pinned, dtype, number):
    model, X, y = start(dtype)
    optimizer = gdlib.SGD(model.parameters(), **pins.OPTIONS[number])
    history = gdlib.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=pins.EPOCHS, batch_size=pins.BATCH, shuffle=False)
    wanted = pinned[dtype][number]
    sizes = [min(pins.BATCH, pins.ROWS - begin) for begin in range(0, pins.ROWS, pins.BATCH)]
    by_epoch = np.array(wanted["losses"]).reshape(pins.EPOCHS, -1) @ sizes / pins.ROWS
    close(history.loss, by_epoch, RTOL[dtype])
    close(model.weight.data, np.array(wanted["weight"]), RTOL[dtype])
    close(model.bias.data, np.array(wanted["bias"]), RTOL[dtype])


def test_the_pins_are_distinct(pinned):
    """Every option changes the trajectory, so that ignoring one cannot go unseen."""
    finals = [run["losses"][-1] for run in pinned["float64"]]
    assert len({f"{final:.9g}" for final in finals}) == len(finals)


@pytest.mark.parametrize(("dtype", "number"), CASES, ids=IDS)
def test_the_pins_are_what_pytorch_computes(pinned, dtype, number):
    pytest.importorskip("torch")
    live = pins.torch_run(dtype, pins.OPTIONS[number])
    for key in ("losses", "weight", "bias"):
        close(live[key], np.array(pinned[dtype][number][key]), RTOL[dtype])


def test_linear_forward_and_gradients_match_pytorch_live():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for rows, features, outputs in [(1, 1, 1), (32, 10, 1), (17, 13, 8), (64, 100, 37)]:
        model = gdlib.Linear(features, outputs, dtype=np.float64, seed=1)
        theirs = torch.nn.Linear(features, outputs, dtype=torch.float64)
        theirs.load_state_dict({name: torch.from_numpy(value) for name, value in model.state_dict().items()})
        x, t = rng.standard_normal((rows, features)), rng.standard_normal((rows, outputs))
        criterion, x_torch = gdlib.MSELoss(), torch.from_numpy(x).requires_grad_()
        loss = criterion(model(x), t)
        input_gradient = model.backward(criterion.backward())
        their_loss = torch.nn.functional.mse_loss(theirs(x_torch), torch.from_numpy(t))
        their_loss.backward()
        assert loss == pytest.approx(their_loss.item(), rel=1e-13)
        for got, wanted in [
            (input_gradient, x_torch.grad),
            (model.weight.grad, theirs.weight.grad),
            (model.bias.grad, theirs.bias.grad),
        ]:
            np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-11, atol=1e-13)


NETWORK_CASES = [(dtype, number) for dtype in RTOL for number in range(len(pins.NETWORKS))]
NETWORK_IDS = [f"{dtype}-" + "-".join(map(str, pins.NETWORKS[number][0])) for dtype, number in NETWORK_CASES]


@pytest.fixture(scope="module")
def pinned_networks():
    return json.loads(pins.NETWORK_PINS.read_text())


def start_network(dtype, number):
    model = pins.build(gdlib, number, dtype=dtype)
    model.load_state_dict(pins.network_state(number, dtype))
    X, y = pins.data(dtype)[:2]
    return model, gdlib.SGD(pins.groups(model, number), lr=1.0), X, y


@pytest.mark.parametrize(("dtype", "number"), NETWORK_CASES, ids=NETWORK_IDS)
def test_the_readable_loop_of_a_network_follows_pytorch(pinned_networks, dtype, number):
    model, optimizer, X, y = start_network(dtype, number)
    criterion, losses, wanted = gdlib.MSELoss(), [], pinned_networks[dtype][number]
    for _ in range(pins.EPOCHS):
        for x, target in gdlib.DataLoader(X, y, batch_size=pins.BATCH):
            optimizer.zero_grad()
            losses.append(criterion(model(x), target))
            model.backward(criterion.backward())
            optimizer.step()
    close(losses, np.array(wanted["losses"]), RTOL[dtype])
    assert list(model.state_dict()) == [key for key in wanted if key != "losses"]
    for name, values in model.state_dict().items():
        close(values, np.array(wanted[name]), RTOL[dtype])


@pytest.mark.parametrize(("dtype", "number"), NETWORK_CASES, ids=NETWORK_IDS)
def test_fit_of_a_network_follows_pytorch(pinned_networks, dtype, number):
    model, optimizer, X, y = start_network(dtype, number)
    history = gdlib.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=pins.EPOCHS, batch_size=pins.BATCH, shuffle=False)
    wanted = pinned_networks[dtype][number]
    sizes = [min(pins.BATCH, pins.ROWS - begin) for begin in range(0, pins.ROWS, pins.BATCH)]
    close(history.loss, np.array(wanted["losses"]).reshape(pins.EPOCHS, -1) @ sizes / pins.ROWS, RTOL[dtype])
    for name, values in model.state_dict().items():
        close(values, np.array(wanted[name]), RTOL[dtype])


@pytest.mark.parametrize(("dtype", "number"), NETWORK_CASES, ids=NETWORK_IDS)
def test_the_network_pins_are_what_pytorch_computes(pinned_networks, dtype, number):
    pytest.importorskip("torch")
    live = pins.torch_network_run(dtype, number)
    assert list(live) == list(pinned_networks[dtype][number])
    for key, values in live.items():
        close(values, np.array(pinned_networks[dtype][number][key]), RTOL[dtype])


def test_the_pinned_networks_learn_and_use_every_parameter(pinned_networks):
    for number, run in enumerate(pinned_networks["float64"]):
        assert np.mean(run["losses"][-4:]) < 0.8 * np.mean(run["losses"][:4])
        for name, values in pins.network_state(number, "float64").items():
            assert (np.array(run[name]) != values).any(), name


@pytest.mark.parametrize("kind", ["ReLU", "Tanh", "Sigmoid"])
def test_activations_match_pytorch_live(kind):
    torch = pytest.importorskip("torch")
    x = np.concatenate([np.linspace(-30, 30, 1001), [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-300, -1e-300]])
    g = np.cos(np.arange(x.size))
    layer, theirs = getattr(gdlib, kind)(), torch.from_numpy(x.copy()).requires_grad_()
    output = getattr(torch.nn, kind)()(theirs)
    output.backward(torch.from_numpy(g))
    # Their sigmoid of very negative numbers ends at 1 / inf; the absolute difference is below 1e-300.
    np.testing.assert_allclose(layer(x), output.detach().numpy(), rtol=1e-15, atol=1e-300)
    np.testing.assert_allclose(layer.backward(g), theirs.grad.numpy(), rtol=1e-13, atol=1e-15)


def test_a_torch_tensor_is_taken_without_a_copy_and_a_gradient_is_refused():
    torch = pytest.importorskip("torch")
    model = gdlib.Linear(3, 1, seed=0)
    x = torch.ones(4, 3)
    assert model(x).shape == (4, 1)
    assert np.shares_memory(model._input, x.numpy())
    with pytest.raises(TypeError, match="detach"):
        model(x.requires_grad_())

"""SGD and GD: groups, state, and what they refuse. The trajectories are in test_torch_parity."""

import numpy as np
import pytest

import gdlib
from gdlib import GD, SGD, Linear


def with_gradient(model, value=1.0):
    for parameter in model.parameters():
        parameter.grad[...] = value
    return model


def test_a_step_is_theta_minus_lr_times_gradient():
    model = with_gradient(Linear(3, 2, dtype=np.float64, seed=0))
    before = model.state_dict()
    optimizer = SGD(model.parameters(), lr=0.25)
    optimizer.step()
    for name, values in model.state_dict().items():
        np.testing.assert_allclose(values, before[name] - 0.25, rtol=1e-15)
    optimizer.zero_grad()
    assert not model.weight.grad.any()


def test_groups_have_options_of_their_own():
    model = with_gradient(Linear(3, 2, dtype=np.float64, seed=0))
    before = model.state_dict()
    optimizer = SGD([{"params": [model.weight], "weight_decay": 0.5}, {"params": model.bias, "lr": 1.0}], lr=0.1)
    optimizer.step()
    np.testing.assert_allclose(model.weight.data, before["weight"] - 0.1 * (1 + 0.5 * before["weight"]), rtol=1e-14)
    np.testing.assert_allclose(model.bias.data, before["bias"] - 1.0, rtol=1e-14)
    optimizer.param_groups[1]["lr"] = 2.0
    optimizer.step()
    np.testing.assert_allclose(model.bias.data, before["bias"] - 3.0, rtol=1e-14)
    optimizer.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr is -1"):
        optimizer.step()


def test_a_group_may_leave_parameters_out_in_fit_too():
    X, y = np.ones((8, 3)), np.ones(8)
    model = Linear(3, 1, dtype=np.float64, seed=0)
    before = model.weight.data.copy()
    gdlib.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=SGD([model.bias], lr=0.1), epochs=200, seed=0)
    np.testing.assert_array_equal(model.weight.data, before)
    np.testing.assert_allclose(model.predict(X), 1, rtol=1e-9)


def test_state_continues_a_run_bit_by_bit():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((64, 5)), rng.standard_normal((64, 2))

    def run(model, optimizer, epochs, seeds):
        gdlib.fit(model, X, y, loss=gdlib.MSELoss(), optimizer=optimizer, epochs=epochs, batch_size=8, seed=seeds)

    whole, part, resumed = (Linear(5, 2, dtype=np.float64, seed=0) for _ in range(3))
    options = {"lr": 0.01, "momentum": 0.9, "dampening": 0.3}
    run(whole, SGD(whole.parameters(), **options), 4, [1, 2, 3, 4])
    first = SGD(part.parameters(), **options)
    run(part, first, 2, [1, 2])
    state = first.state_dict()
    assert state["state"][0]["momentum_buffer"].shape == (2, 5)
    assert state["param_groups"][0]["params"] == [0, 1]
    second = SGD(resumed.parameters(), lr=1.0)
    second.load_state_dict(state)
    resumed.load_state_dict(part.state_dict())
    run(resumed, second, 2, [3, 4])
    np.testing.assert_array_equal(resumed.weight.data, whole.weight.data)
    np.testing.assert_array_equal(resumed.bias.data, whole.bias.data)


def test_the_readable_loop_and_fit_share_momentum():
    X, y = np.arange(12.0).reshape(4, 3) / 10, np.ones((4, 1))
    one, two = Linear(3, 1, dtype=np.float64, seed=0), Linear(3, 1, dtype=np.float64, seed=0)
    first, second = (SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True) for model in (one, two))
    criterion = gdlib.MSELoss()

    def step(model, optimizer):
        optimizer.zero_grad()
        criterion(model(X), y)
        model.backward(criterion.backward())
        optimizer.step()

    for _ in range(3):
        step(one, first)
    step(two, second)
    gdlib.fit(two, X, y, loss=criterion, optimizer=second, epochs=1, batch_size=4, shuffle=False)
    step(two, second)
    np.testing.assert_allclose(two.weight.data, one.weight.data, rtol=1e-13)


def test_load_state_dict_changes_nothing_when_it_refuses():
    model = Linear(3, 2, seed=0)
    optimizer = SGD(model.parameters(), lr=0.1)
    state = SGD(model.parameters(), lr=0.5).state_dict()
    bad_groups = {**state, "param_groups": state["param_groups"] * 2}
    bad_shape = {**state, "state": {0: {"momentum_buffer": np.zeros(3)}}}
    bad_lr = {**state, "param_groups": [{**state["param_groups"][0], "lr": -1}]}
    for bad, words in [(bad_groups, "groups of"), (bad_shape, "momentum of weight has shape"), (bad_lr, "lr is -1")]:
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(bad)
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": 0}, ValueError, "lr is 0"),
        ({"lr": -0.1}, ValueError, "above 0"),
        ({"lr": float("nan")}, ValueError, "lr is nan"),
        ({"lr": float("inf")}, ValueError, "finite"),
        ({"lr": "fast"}, TypeError, "a number is wanted"),
        ({"lr": None}, TypeError, "a number is wanted"),
        ({"lr": np.True_}, TypeError, "a number is wanted"),
        ({"lr": np.array([0.1, 0.2])}, TypeError, "a number is wanted"),
        ({"lr": 10**400}, ValueError, "a finite number above 0 is wanted"),
        ({"lr": 1, "momentum": -0.5}, ValueError, "momentum is -0.5"),
        ({"lr": 1, "weight_decay": -1}, ValueError, "weight_decay is -1"),
        ({"lr": 1, "nesterov": True}, ValueError, "nesterov"),
        ({"lr": 1, "nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "nesterov"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        SGD(Linear(2, 1).parameters(), **options)


def test_bad_parameters():
    model = Linear(2, 1)
    with pytest.raises(ValueError, match="no parameters"):
        SGD([], lr=1)
    with pytest.raises(TypeError, match="Parameters"):
        SGD([model.weight.data], lr=1)
    with pytest.raises(TypeError, match="dict"):
        SGD([{"weights": [model.weight]}], lr=1)
    with pytest.raises(ValueError, match="unknown options"):
        SGD([{"params": [model.weight], "beta": 1}], lr=1)
    with pytest.raises(ValueError, match="twice"):
        SGD([model.weight, model.weight], lr=1)
    with pytest.raises(ValueError, match="another model"):
        gdlib.fit(model, [[1, 2]], [1], loss=gdlib.MSELoss(), optimizer=SGD(Linear(2, 1).parameters(), lr=1), epochs=1)


def test_gd_takes_auto_in_fit_only():
    model = Linear(2, 1)
    with pytest.raises(ValueError, match="number above 0 or 'auto'"):
        GD(model.parameters(), lr="fast")
    with pytest.raises(TypeError, match="a number is wanted"):
        GD(model.parameters(), lr=np.array([0.1, 0.2]))
    with pytest.raises(ValueError, match="lr is 0"):
        GD(model.parameters(), lr=0)
    with pytest.raises(ValueError, match="auto_lr"):
        GD(model.parameters(), lr="auto").step()


def test_momentum_outlives_steps_without_it():
    """As in PyTorch, a buffer waits while the group's momentum is 0. The numbers follow the update's formula."""
    model = Linear(1, 1, bias=False, dtype=np.float64, seed=0)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    theta, buffer = float(model.weight.data[0, 0]), None
    for gradient, momentum in [(1.0, 0.9), (2.0, 0.9), (3.0, 0.0), (4.0, 0.9)]:
        optimizer.param_groups[0]["momentum"] = momentum
        model.weight.grad[...] = gradient
        optimizer.step()
        if momentum:
            buffer = gradient if buffer is None else momentum * buffer + gradient
        theta -= 0.1 * (buffer if momentum else gradient)
        assert model.weight.data[0, 0] == pytest.approx(theta, rel=1e-14)


def test_options_are_checked_at_each_step():
    model = with_gradient(Linear(2, 1, seed=0))
    before = model.state_dict()
    nan, inf = float("nan"), float("inf")
    wrong = [("lr", 0), ("lr", inf), ("lr", nan), ("lr", 10**400), ("momentum", -5.0), ("dampening", nan), ("weight_decay", -1)]
    for option, value in wrong:
        optimizer = SGD(model.parameters(), lr=0.1)
        optimizer.param_groups[0][option] = value
        with pytest.raises(ValueError, match=f"{option} is .*; a finite number"):
            optimizer.step()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["momentum"] = "much"
    with pytest.raises(TypeError, match="momentum is 'much'; a number is wanted"):
        optimizer.step()
    np.testing.assert_array_equal(model.weight.data, before["weight"])


def test_what_is_kept_of_the_parameters_is_out_of_date_before_a_step_changes_them_and_after():
    model = with_gradient(Linear(2, 1, seed=0))
    optimizer, versions = SGD(model.parameters(), lr=0.1), [model._arena.version]

    class Lr:
        def __float__(self):
            versions.append(model._arena.version)
            return 0.1

    optimizer.param_groups[0]["lr"] = Lr()
    optimizer.step()
    versions.append(model._arena.version)
    assert len(set(versions)) == len(versions) == 3


def test_what_is_no_list_of_parameters_is_named():
    for wrong in (Linear(2, 1), None, 3):
        with pytest.raises(TypeError, match=r"model\.parameters\(\)"):
            SGD(wrong, lr=0.1)
    with pytest.raises(ValueError, match="param_groups"):
        SGD(Linear(2, 1).parameters(), lr=0.1).load_state_dict({})

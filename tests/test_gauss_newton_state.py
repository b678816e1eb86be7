"""`GaussNewton` goes on where it was: states, copies, schedulers, and the hooks of torch's optimizers."""

import copy
import io
import pickle

import pytest
import torch
from least_squares_problem import EquationByAutograd, Problem, poisson

from tengrad_triton import EffectiveDimension, Exponential, GainRatio, TENGraD

SETTINGS = {
    "defaults": {},
    "spring": {"spring": 0.6, "lr": 0.3, "damping": 1.0},
    "an effective dimension": {"damping": EffectiveDimension(0.5)},
    "a schedule": {"damping": Exponential(0.1, 0.5)},
    "attempts that were taken back": {"damping": 1e-9},
    "drawn rows": {"max_rows": 20, "seed": 3, "damping": 1.0},
    "a sketch": {"sketch": 9, "seed": 3, "damping": 1.0},
    "layers": {"blocks": "layer"},
    "a line search": {"line_search": "armijo"},
    "chunks": {"max_bytes": 6000},
}


def steps(problem, optimizer, count):
    """Take steps; return all that they change."""
    losses = [optimizer.step(**problem.points) for _ in range(count)]
    state = optimizer.state_dict()
    return [*losses, problem.theta], state, optimizer.stats


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert found[2] == expected[2]
    a, b = found[1], expected[1]
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, entries in a["state"].items():
        assert torch.equal(entries["direction"], b["state"][index]["direction"])
        assert entries["directions"] == b["state"][index]["directions"]
    own, other = a["gauss_newton"], b["gauss_newton"]
    assert torch.equal(own["generator"], other["generator"])
    assert (own["steps"], own["ways"]) == (other["steps"], other["ways"])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_state_goes_on_bit_for_bit(name):
    problem = poisson()
    optimizer = problem.optimizer(**SETTINGS[name])
    steps(problem, optimizer, 3)
    file = io.BytesIO()
    torch.save({"u": problem.u.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = steps(problem, optimizer, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = poisson()
    resumed.u.load_state_dict(saved["u"])
    other = resumed.optimizer(**{**SETTINGS[name], **({"seed": 11} if "seed" in SETTINGS[name] else {})})
    steps(poisson(), poisson().optimizer(), 1)  # another optimizer in between
    other.load_state_dict(saved["optimizer"])
    assert other.stats is None
    assert not other.stopped
    assert_same(steps(resumed, other, 3), expected)


def test_a_state_from_before_the_first_step_is_taken():
    problem, other = poisson(), poisson()
    optimizer = other.optimizer()
    optimizer.load_state_dict(problem.optimizer().state_dict())
    assert_same(steps(other, optimizer, 2), steps(problem, problem.optimizer(), 2))


def test_rows_are_found_in_the_same_way_after_loading():
    """So that rounding is the same, also where the first points alone would be served by an earlier way."""
    problem = poisson(equation=EquationByAutograd)
    optimizer = problem.optimizer()
    optimizer.step(**problem.points)
    assert optimizer.state_dict()["gauss_newton"]["ways"] == {"interior": "expanded", "boundary": "by layer"}
    resumed = poisson(equation=EquationByAutograd)
    other = resumed.optimizer()
    other.load_state_dict(optimizer.state_dict())
    other.step(**resumed.points)
    assert other.state_dict()["gauss_newton"]["ways"] == {"interior": "expanded", "boundary": "by layer"}


def of_adam():
    u = poisson().u
    return torch.optim.Adam(u.parameters()).state_dict()


def of_tengrad():
    return TENGraD.paper(poisson().u).state_dict()


def of_a_wider_model():
    wide = poisson(width=5)
    optimizer = wide.optimizer(spring=0.5)
    optimizer.step(**wide.points)
    return optimizer.state_dict()


def of_fewer_parameters():
    problem = poisson()
    problem.u[0].requires_grad_(False)
    return problem.optimizer().state_dict()


REFUSED = {
    "Adam": (of_adam, "expected a state_dict of GaussNewton, with the key 'gauss_newton'; got"),
    "TENGraD": (of_tengrad, "expected a state_dict of GaussNewton"),
    "nothing": (dict, "expected a state_dict of GaussNewton"),
    "a wider model": (of_a_wider_model, "direction of shape (5, 2) for a parameter of shape (4, 2)"),
    "fewer parameters": (of_fewer_parameters, "of 2 trained parameters, but the model has 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_states_of_others_are_refused_and_nothing_changes(name):
    make, message = REFUSED[name]
    problem = poisson()
    optimizer = problem.optimizer(spring=0.5, damping=1.0)
    steps(problem, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    stats, theta = optimizer.stats, problem.theta
    with pytest.raises(ValueError) as error:  # noqa: PT011
        optimizer.load_state_dict(make())
    assert message in str(error.value)
    assert_same(([theta], optimizer.state_dict(), optimizer.stats), ([problem.theta], before, stats))


def test_other_optimizers_refuse_its_state():
    problem = poisson()
    with pytest.raises(ValueError, match="expected a state_dict of TENGraD"):
        TENGraD.paper(problem.u).load_state_dict(problem.optimizer().state_dict())


def saved(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair)), "torch.save": saved}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_copy_of_model_and_optimizer_goes_on_bit_for_bit(name, way):
    problem = poisson()
    optimizer = problem.optimizer(**SETTINGS[name])
    optimizer.register_step_pre_hook(lambda *_: None)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # puts a `step` on the optimizer
    steps(problem, optimizer, 3)
    u, other = WAYS[way]((problem.u, optimizer))
    copied = Problem(u, {}, problem.points)
    assert other.model is u
    assert other.stats == optimizer.stats
    before = problem.theta
    found = steps(copied, other, 3)
    assert torch.equal(problem.theta, before)
    assert_same(found, steps(problem, optimizer, 3))


def test_a_copy_whose_functions_hold_the_first_model_says_so():
    problem = poisson()
    u = problem.u
    problem.residuals["interior"] = lambda x: u(x) + 1
    optimizer = problem.optimizer()
    optimizer.step(**problem.points)
    other = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=r"'interior' does not depend on the trained parameters .* not from a copy"):
        other.step(**problem.points)
    optimizer.step(**problem.points)


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.5**k),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=10, cycle_momentum=False),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1e9),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_length_of_steps(name):
    problem = poisson()
    optimizer = problem.optimizer(damping=2.0, spring=0.0)
    scheduler = SCHEDULERS[name](optimizer)
    lengths = []
    for k in range(5):
        lr = optimizer.param_groups[0]["lr"]
        loss = optimizer.step(**problem.points)
        assert optimizer.stats.length == lr
        assert optimizer.stats.step == k
        scheduler.step(*([float(loss)] if name == "ReduceLROnPlateau" else []))
        lengths.append(lr)
    assert len(set(lengths)) > 1


def test_a_schedule_of_damping_counts_steps_that_were_not_taken():
    problem, asked = poisson(), []
    optimizer = problem.optimizer(damping=lambda k: asked.append(k) or 1.0)
    optimizer.step(**problem.points)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(**problem.points)
    assert not optimizer.stats.accepted
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(**problem.points)
    assert asked == [0, 1, 2]
    assert optimizer.state_dict()["gauss_newton"]["steps"] == 3


def test_hooks_of_optimizers_are_called_once_a_step():
    problem = poisson()
    optimizer, called = problem.optimizer(), []
    other = {name: x[:3] for name, x in problem.points.items()}
    optimizer.register_step_pre_hook(lambda o, args, kwargs: called.append(("pre", set(kwargs))) or (args, other))
    optimizer.register_step_post_hook(lambda o, args, kwargs: called.append(("post", o.stats.rows)))
    optimizer.register_state_dict_pre_hook(lambda o: called.append("state"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: called.append("load"))
    optimizer.step(**problem.points)
    assert called == [("pre", {"interior", "boundary"}), ("post", 6)]
    optimizer.load_state_dict(optimizer.state_dict())
    assert called[2:] == ["state", "load"]


def test_gradients_of_the_user_stay():
    problem = poisson()
    optimizer = problem.optimizer()
    problem.u(problem.points["boundary"]).sum().backward()
    grads = [p.grad.clone() for p in problem.parameters]
    optimizer.step(**problem.points)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(problem.parameters, grads, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.parameters)


def test_there_is_one_parameter_group():
    optimizer = poisson().optimizer()
    with pytest.raises(ValueError, match=r"one parameter group.* make a new GaussNewton"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2).double())]})
    assert len(optimizer.param_groups) == 1


def test_settings_that_are_changed_between_steps_are_checked():
    problem = poisson()
    optimizer, before = problem.optimizer(), problem.theta
    for key, value, message in (("lr", -1.0, "lr must be at least 0"), ("spring", 1.0, r"spring must be in \[0, 1\)")):
        kept = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match=message):
            optimizer.step(**problem.points)
        optimizer.param_groups[0][key] = kept
    assert torch.equal(problem.theta, before)


def test_parameters_that_are_frozen_later_stay():
    problem = poisson()
    optimizer = problem.optimizer(spring=0.5, damping=1.0)
    optimizer.step(**problem.points)
    problem.u[0].requires_grad_(False)
    before = [p.clone() for p in problem.u.parameters()]
    optimizer.step(**problem.points)
    changed = [not torch.equal(p, old) for p, old in zip(problem.u.parameters(), before, strict=True)]
    assert changed == [False, False, True, True]
    problem.u[0].requires_grad_(True)
    optimizer.step(**problem.points)
    assert optimizer.stats.accepted


def test_the_restored_rule_of_another_start_goes_on_with_the_saved_damping():
    problem = poisson()
    optimizer = problem.optimizer(damping=GainRatio(start=4.0))
    optimizer.step(**problem.points)
    other = problem.optimizer(damping=GainRatio(start=1e-3))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["damping"] == optimizer.param_groups[0]["damping"]

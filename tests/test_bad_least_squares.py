"""Every bad input of `GaussNewton` is one error that says what came and what to do, and nothing changes."""

import copy

import pytest
import torch
from least_squares_bad_input import CONSTRUCTION, STEPS, WITHOUT_A_STEP

from tengrad_triton import GaussNewton

pytestmark = pytest.mark.filterwarnings("ignore:the rows of .* take one backward pass")


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_what_cannot_be_made_is_refused(case):
    make, kind, message = CONSTRUCTION[case]
    with pytest.raises(kind) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("case", STEPS)
def test_a_step_that_cannot_be_taken_is_refused_and_changes_nothing(case):
    make, kind, message = STEPS[case]
    problem, settings, points = make()
    optimizer = problem.optimizer(**settings)
    theta, random, state = problem.theta, torch.get_rng_state(), copy.deepcopy(optimizer.state_dict())
    for call in (optimizer.step, optimizer.step) + (() if case in WITHOUT_A_STEP else (optimizer.loss,)):
        with pytest.raises(kind) as error:
            call(**points)
        assert message in str(error.value)
    assert torch.equal(problem.theta, theta)
    assert torch.equal(torch.get_rng_state(), random)
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    assert (now["state"], now["gauss_newton"]["steps"]) == (state["state"], 0)
    assert optimizer.stats is None


@pytest.mark.parametrize("case", STEPS)
def test_a_later_step_is_refused_in_the_same_words(case):
    """Also where a way of rows has been found for good points."""
    make, kind, message = STEPS[case]
    problem, settings, points = make()
    if settings or "interior" not in points or points["interior"] is problem.points["interior"]:
        return  # nothing was good at first
    optimizer = problem.optimizer()
    for _ in range(2):
        optimizer.step(**problem.points)
    theta, state = problem.theta, copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(kind) as error:
        optimizer.step(**points)
    assert message in str(error.value)
    assert torch.equal(problem.theta, theta)
    assert optimizer.state_dict()["param_groups"] == state
    optimizer.step(**problem.points)
    assert optimizer.stats.step == 2


def test_points_without_a_name_are_refused():
    problem, _, points = STEPS["a mean"][0]()
    optimizer = problem.optimizer()
    for positional in ((points["interior"],), (lambda: None,), (None,)):
        with pytest.raises(TypeError, match=r"by its name, step\(interior=points, boundary=points\), got"):
            optimizer.step(*positional)


def test_inference_mode_is_refused_and_what_it_made_is_taken():
    problem, _, points = STEPS["too few bytes"][0]()
    optimizer = problem.optimizer()
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="inference mode prevents: call it outside"):
            optimizer.step(**points)
        points = {name: x.clone() for name, x in points.items()}
        optimizer.loss(**points)
    optimizer.step(**points)
    assert optimizer.stats.accepted


def test_parameters_that_are_all_frozen_later_are_refused():
    problem, _, points = STEPS["too few bytes"][0]()
    optimizer = problem.optimizer()
    problem.u.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the optimizer is frozen now"):
        optimizer.step(**points)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_that_the_model_has_replaced_are_refused(bias):
    """Rows of the old ones would be zeros, or those of the new ones; `load_state_dict(assign=True)` does so, too."""
    u = torch.nn.Linear(2, 1, bias=bias).double()
    optimizer, x = GaussNewton(u, {"a": u}), torch.rand(5, 2).double()
    optimizer.step(a=x)
    u.weight = torch.nn.Parameter(u.weight.detach() * 2)
    with pytest.raises(ValueError, match=r"shape \(1, 2\) is no longer one of the model.*make a new GaussNewton"):
        optimizer.step(a=x)


def test_a_number_of_residuals_that_changes_is_refused():
    problem, _, points = STEPS["too few bytes"][0]()
    columns = [1]
    problem.residuals["interior"] = lambda x: problem.u(x).expand(-1, columns[0])
    optimizer = problem.optimizer()
    optimizer.step(**points)
    columns[0], theta = 3, problem.theta
    with pytest.raises(ValueError, match="18 residuals for 6 points, but 6 were expected"):
        optimizer.step(**points)
    assert torch.equal(problem.theta, theta)

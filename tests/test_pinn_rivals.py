"""The rivals of the study of physics-informed networks take the steps of their papers: dense formulas in float64."""

import math
from dataclasses import replace

import pytest
import torch
from pinn_rival_cases import DAMPING, LINEAR, close, dense, direction_of, eye, small
from torch import nn
from torch.nn.utils import parameters_to_vector

from studies.pinn.problems import PROBLEMS
from studies.pinn.problems.base import start
from studies.pinn.rivals import descent, woodbury
from studies.pinn.rivals.build import FAMILIES, RIVALS, build
from studies.pinn.rivals.engd import Engd, solve_symmetric
from studies.pinn.rivals.rows import FactoredRows
from studies.pinn.rivals.squares import GeneralSquares, LinearSquares, least_squares
from studies.pinn.rivals.woodbury import Woodbury


@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_are_those_of_autograd(name):
    problem, model, points = small(name)
    squares = least_squares(problem, model)
    assert isinstance(squares, LinearSquares if name in LINEAR else GeneralSquares)
    parameters = list(model.parameters())
    rows = squares.rows(points)
    assert all(type(p) is nn.Parameter for p in model.parameters())  # those of before, not what torch.func put there
    assert list(map(id, parameters)) == list(map(id, model.parameters()))
    residual, jacobian = dense(problem, model, points)
    generator = torch.Generator().manual_seed(1)
    v, y = (torch.randn(n, dtype=torch.float64, generator=generator) for n in jacobian.shape[::-1])
    close(rows.residual_N, residual)
    close(rows.matrix(), jacobian)
    close(rows.gram(), jacobian @ jacobian.T)
    close(rows.times(v), jacobian @ v)
    close(rows.transposed(y), jacobian.T @ y)
    close(rows.gram_times(y[:, None]), (jacobian @ (jacobian.T @ y))[:, None])
    assert squares.loss(points) == pytest.approx(residual.square().sum().item(), rel=1e-12)


def test_blocks_of_a_large_jacobian_add_up(monkeypatch):
    problem, model, points = small("poisson10d")
    monkeypatch.setattr("studies.pinn.rivals.rows.BLOCK", 100)
    rows = least_squares(problem, model).rows(points)
    _, jacobian = dense(problem, model, points)
    assert isinstance(rows, FactoredRows)
    close(rows.gram(), jacobian @ jacobian.T)


def test_an_equation_that_is_another_one_is_refused():
    problem, model, _ = small("heat1d")
    with pytest.raises(ValueError, match="interior"):
        least_squares(replace(problem, name="poisson2d"), model)


@pytest.mark.parametrize("per_layer", [False, True], ids=["whole", "per layer"])
@pytest.mark.parametrize("identity", [False, True], ids=["from zero", "from the identity"])
@pytest.mark.parametrize("name", ["poisson5d", "burgers"])
def test_engd(name, identity, per_layer):
    problem, model, points = small(name)
    rival = Engd(least_squares(problem, model), DAMPING, average=0.6, identity=identity, per_layer=per_layer)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model if isinstance(layer, nn.Linear)]
    mask = torch.block_diag(*(torch.ones(n, n, dtype=torch.float64) for n in sizes)) if per_layer else 1.0
    gramian = eye(sum(sizes)) * identity
    for _ in range(3):
        residual, jacobian = dense(problem, model, points)
        gramian = 0.6 * gramian + 0.4 * mask * (jacobian.T @ jacobian)
        expected = -torch.linalg.solve(gramian + DAMPING * eye(sum(sizes)), jacobian.T @ residual)
        close(direction_of(rival, points), expected)


def test_engd_refuses_a_gramian_that_no_memory_holds():
    problem = PROBLEMS["poisson10d"]
    with pytest.raises(ValueError, match="118145 parameters"):
        build("engd", problem, problem.build())


def test_engd_without_damping_is_the_solution_of_lapack():
    generator = torch.Generator().manual_seed(0)
    root, right = (torch.randn(12, n, dtype=torch.float64, generator=generator) for n in (5, 1))
    gramian = root @ root.T
    expected = torch.linalg.lstsq(gramian, right, driver="gelsd").solution
    close(solve_symmetric(gramian, 0.0, right[:, 0]), expected[:, 0])


@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["ENGD-W", "SPRING"])
@pytest.mark.parametrize("name", ["poisson5d", "heat1d", "burgers", "convection", "inverse"])
def test_engd_w_and_spring(name, momentum):
    problem, model, points = small(name)
    rival = Woodbury(least_squares(problem, model), DAMPING, momentum=momentum)
    phi = 0.0 * parameters_to_vector(model.parameters()).detach()
    for k in range(1, 4):
        residual, jacobian = dense(problem, model, points)
        normal = jacobian.T @ jacobian + DAMPING * eye(len(phi))
        phi = momentum * phi + torch.linalg.solve(normal, jacobian.T @ (-residual - momentum * jacobian @ phi))
        corrected = phi / math.sqrt(1 - momentum ** (2 * k))
        close(direction_of(rival, points), corrected)


def test_the_first_step_of_spring_is_longer_by_its_bias_correction():
    problem, model, points = small("poisson2d")
    squares = least_squares(problem, model)
    plain, _ = Woodbury(squares, DAMPING).direction(points)
    spring, _ = Woodbury(squares, DAMPING, momentum=0.8).direction(points)
    close(spring, plain / math.sqrt(1 - 0.8**2))


def test_the_norm_constraint_bounds_a_fixed_step():
    problem, model, points = small("poisson2d")
    squares = least_squares(problem, model)
    before = parameters_to_vector(model.parameters()).detach()
    rival = Woodbury(squares, DAMPING, momentum=0.8, norm=1e-4, lr=1.0)
    rival.step(points)
    moved = parameters_to_vector(model.parameters()).detach() - before
    assert moved.norm().item() == pytest.approx(1e-2 / math.sqrt(1 - 0.8**2), rel=1e-9)


def test_a_sketch_as_wide_as_the_rows_is_exact():
    problem, model, points = small("poisson5d")
    rows = least_squares(problem, model).rows(points)
    _, jacobian = dense(problem, model, points)
    target = rows.residual_N
    found = woodbury.nystrom_solve(rows, target, DAMPING, len(target), torch.Generator().manual_seed(0))
    shifted = jacobian @ jacobian.T + DAMPING * eye(len(target))
    # the shift ν of the sketch is the one difference, up to ν / λ
    close(found, torch.linalg.solve(shifted, target), rtol=10 * woodbury.SHIFT / DAMPING)


def test_the_line_search_takes_the_lowest_loss_of_its_grid_or_stays():
    problem, model, points = small("poisson2d")
    squares = least_squares(problem, model)
    here = parameters_to_vector(model.parameters()).detach()
    direction, loss = Woodbury(squares, DAMPING).direction(points)
    size = descent.search_grid(squares, points, direction, loss)
    reached = squares.loss(points)
    losses = []
    for candidate in descent.GRID:
        nn.utils.vector_to_parameters(here + candidate * direction, model.parameters())
        losses.append(squares.loss(points))
    assert size == descent.GRID[losses.index(min(losses))]
    assert reached == min(losses) < loss
    nn.utils.vector_to_parameters(here, model.parameters())
    assert descent.search_grid(squares, points, direction, min(losses) / 2) == 0.0
    close(parameters_to_vector(model.parameters()).detach(), here)


@pytest.mark.parametrize("rival", RIVALS)
def test_each_entrant_lowers_the_loss(rival):
    problem, model, points = small("heat1d")
    squares = least_squares(problem, model)
    before = squares.loss(points)
    entrant = FAMILIES[rival]["published"](problem, model)
    for _ in range(12):
        entrant.step(points)
    assert squares.loss(points) < before
    assert entrant.name == rival
    assert "-pinns exp" in entrant.setting


def test_points_are_kept_as_long_as_the_published_run_kept_them():
    problem = PROBLEMS["poisson5d"]
    model = start(problem, 0)
    entrant = build("kfac", problem, model)
    generator = torch.Generator().manual_seed(0)
    draws = [{name: x[:5] for name, x in problem.points(generator).items()} for _ in range(2)]
    twin = start(problem, 0)
    other = build("kfac", problem, twin)
    for place in range(2):
        entrant.step(draws[place])
        other.step(draws[0])
    close(parameters_to_vector(model.parameters()).detach(), parameters_to_vector(twin.parameters()).detach())

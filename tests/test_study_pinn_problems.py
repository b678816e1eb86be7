"""The problems of the study of differential equations have the solutions and the sizes that they claim."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from studies.pinn import least_squares  # noqa: E402
from studies.pinn.problems import PROBLEMS, burgers, convection, inverse, sampling  # noqa: E402
from studies.pinn.problems.base import inputs_of, loss, mlp, start  # noqa: E402
from tengrad_triton import derivatives  # noqa: E402

NOISE = 6 * inverse.NOISE  # six standard deviations


class Exact(nn.Module):
    """A module without parameters that returns the solution."""

    def __init__(self, solution):
        super().__init__()
        self.solution = solution

    def forward(self, x):
        return self.solution(x)


def exact(problem):
    model = Exact(problem.solution)
    if problem.name == "inverse":
        model = inverse.WithDiffusivity(model)
        model.diffusivity.data.fill_(inverse.DIFFUSIVITY)
    return model


# The problems of Dangel, Müller and Zeinhofer: parameters, points inside and on the boundary, how often they are new,
# points of the error.
PUBLISHED = {
    "poisson2d": (257, 900, 120, 0, 9000),
    "poisson5d": (449, 3000, 500, 1, 30000),
    "poisson10d": (118145, 3000, 1000, 1, 30000),
    "heat1d": (257, 900, 120, 0, 9000),
    "heat4d": (449, 3000, 500, 1, 30000),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_solution_satisfies_the_residuals(name):
    problem = PROBLEMS[name]
    model, points = exact(problem), problem.points(sampling.generator(7))
    for term, residual in problem.terms(model).items():
        bound = NOISE if term == "measured" else 1e-10
        r_NO = residual(*inputs_of(points[term]))
        assert r_NO.shape == (len(inputs_of(points[term])[0]), 1)
        assert r_NO.abs().max() < bound, term
    assert problem.error(model) < 1e-14


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_network_does_not_satisfy_the_residuals_and_its_loss_is_their_mean_square(name):
    problem = PROBLEMS[name]
    model, points = start(problem, 0), problem.points(sampling.generator(0))
    terms = problem.terms(model)
    squares = {t: residual(*inputs_of(points[t])).square().mean() for t, residual in terms.items()}
    assert set(squares) == set(points)
    assert min(value for term, value in squares.items() if term != "periodic") > 1e-5
    expected = sum(problem.weights.get(term, 1.0) * value for term, value in squares.items())
    torch.testing.assert_close(loss(problem, terms, points), expected, rtol=1e-14, atol=0)
    assert problem.error(model) > 0.1


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    problem, (parameters, inside, boundary, fresh, evaluated) = PROBLEMS[name], PUBLISHED[name]
    model, points = start(problem, 0), problem.points(sampling.generator(0))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (len(points["interior"]), len(points["boundary"]), problem.fresh_every) == (inside, boundary, fresh)
    assert len(problem.evaluation()) == evaluated
    assert problem.weights == {}


@pytest.mark.parametrize("name", PROBLEMS)
def test_weights_and_points_follow_from_the_seed(name):
    problem = PROBLEMS[name]
    before = torch.get_rng_state()
    first, again, other = (start(problem, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.float64}
    draws = [inputs_of(problem.points(sampling.generator(seed))["interior"])[0] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_networks_have_torchs_default_weights():
    torch.manual_seed(3)
    expected = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    torch.manual_seed(3)
    own = mlp(2, 4, 1)
    assert [type(layer) for layer in own] == [type(layer) for layer in expected]
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), expected.parameters(), strict=True))


def test_points_are_where_they_shall_be():
    x_ND = sampling.sides(400, 3, sampling.generator(0))
    on_side_ND = (x_ND == 0) | (x_ND == 1)
    assert (on_side_ND.sum(1) == 1).all()
    faces = {(d, side) for d in range(3) for side in (0.0, 1.0) if (x_ND[:, d] == side).any()}
    assert len(faces) == 6
    points = burgers.PROBLEM.points(sampling.generator(0))
    assert points["interior"][:, 1].min() < -0.9
    assert (points["boundary"][:, 1].abs() == 1).all()
    assert (points["initial"][:, 0] == 0).all()
    left, right = convection.points(sampling.generator(0))["periodic"]
    assert torch.equal(left[:, 0], right[:, 0])
    assert (right[:, 1] - left[:, 1] == 2 * math.pi).all()


def by_gauss_hermite(x_N2, nodes):
    """Return Burgers' solution by Cole and Hopf's formula with another quadrature, in numpy."""
    z_Z, w_Z = np.polynomial.hermite.hermgauss(nodes)
    t, x = x_N2[:, :1].numpy(), x_N2[:, 1:].numpy()
    angle_NZ = np.pi * (x - np.sqrt(4 * burgers.VISCOSITY * t) * z_Z)
    f_NZ = w_Z * np.exp(-(np.cos(angle_NZ) + 1) / (2 * np.pi * burgers.VISCOSITY))
    return -(np.sin(angle_NZ) * f_NZ).sum(1, keepdims=True) / f_NZ.sum(1, keepdims=True)


def test_burgers_solution_is_that_of_gauss_hermite():
    x_N2 = sampling.cube(500, 2, sampling.generator(5)) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    np.testing.assert_allclose(burgers.solution(x_N2).numpy(), by_gauss_hermite(x_N2, 250), atol=1e-9)


def test_burgers_steepest_slope_is_the_published_one():
    """Basdevant et al. (1986): |∂u/∂x| at x = 0 is largest at t = 1.6037 / π, where it is 152.00516."""
    times_T = torch.linspace(1.6, 1.61, 101, dtype=torch.float64) / math.pi
    slope_T = -derivatives(burgers.solution, sampling.grid(times_T, torch.zeros(1, dtype=torch.float64))).first[:, 1, 0]
    assert slope_T.max().item() == pytest.approx(152.00516, abs=1e-4)
    assert math.pi * times_T[slope_T.argmax()].item() == pytest.approx(1.6037, abs=1e-4)


def test_rows_of_scipy_are_the_loss_and_its_gradient():
    problem = PROBLEMS["inverse"]
    model, points = start(problem, 0), problem.points(sampling.generator(0))
    rows = least_squares.Rows(problem, model, points)
    theta_P = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()
    r_N, J_NP = rows.residuals(theta_P), rows.jacobian(theta_P)
    value = loss(problem, problem.terms(model), points)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    np.testing.assert_allclose(r_N @ r_N, value.item(), rtol=1e-12)
    expected_P = torch.cat([gradient.flatten() for gradient in gradients]).numpy()
    np.testing.assert_allclose(2 * J_NP.T @ r_N, expected_P, rtol=1e-9, atol=1e-9)


def test_the_noise_alone_bounds_the_diffusivity():
    """The standard deviation of κ, found by least squares with all else known, over many draws of the noise."""
    x_N2 = inverse.points(sampling.generator(0))["measured"][0]
    step = 1e-5
    up, down = (inverse.waves(x_N2, torch.tensor(inverse.DIFFUSIVITY + sign * step).double()) for sign in (1, -1))
    slope_N1 = (up - down) / (2 * step)
    noise_NS = inverse.NOISE * torch.randn(len(x_N2), 2000, dtype=torch.float64, generator=sampling.generator(1))
    found_S = torch.linalg.lstsq(slope_N1, noise_NS).solution[0] / inverse.DIFFUSIVITY
    assert inverse.noise_alone() == pytest.approx(found_S.std().item(), rel=0.08)  # five standard deviations of it

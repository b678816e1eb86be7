"""Steps of `GaussNewton` are dense solves: spaces, blocks, momentum, line searches, fewer rows, damping."""

import pytest
import torch
import torch.nn.functional as F
from least_squares_problem import Equation, EquationByAutograd, curve, poisson, solved
from torch import nn
from torch.func import functional_call, jvp

from tengrad_triton import EffectiveDimension, Exponential, GainRatio, GaussNewton
from tengrad_triton.least_squares import attempts

TOLERANCE = 1e-9
SPACES = {"fewer residuals": (5, 3), "fewer parameters": (40, 20)}
ALPHA = 2.0


def assert_near(found, expected, tolerance=TOLERANCE):
    assert (found - expected).norm() <= tolerance * expected.norm()


def step_of(problem, **settings):
    """Take a step that is not repeated; return θ before it minus θ after it, and the optimizer."""
    optimizer, before = problem.optimizer(**{"damping": ALPHA, "spring": 0.0, **settings}), problem.theta
    loss = optimizer.step(**problem.points)
    assert optimizer.stats.accepted
    assert optimizer.stats.attempts == 1
    assert float(loss) == optimizer.stats.loss
    return before - problem.theta, optimizer


def longest_of(lr, r_R, j_RK, delta_K):
    """Return lr, or the length at which the linear model's loss is least."""
    image_R = j_RK @ delta_K
    return min(lr, float(r_R @ image_R) / float(image_R.square().sum()))


def columns_of(problem, blocks):
    """Return the columns of each of two layers, where they are blocks."""
    first = sum(p.numel() for p in problem.parameters[:2])
    K = len(problem.theta)
    return None if blocks in ("network", [["0", "2"]], [[""]]) else [torch.arange(first), torch.arange(first, K)]


@pytest.mark.parametrize("acceleration", [True, False])
@pytest.mark.parametrize("lr", [1.0, 0.3])
@pytest.mark.parametrize("blocks", ["network", "layer", [["0"]], [["0"], ["2"]], [["0", "2"]], [[""]]], ids=str)
@pytest.mark.parametrize("equation", [Equation, EquationByAutograd])
@pytest.mark.parametrize("space", SPACES)
def test_a_step_is_the_dense_solve(space, equation, blocks, lr, acceleration):
    problem = poisson(*SPACES[space], equation)
    (r_R, j_RK), columns = problem.jacobian(), columns_of(problem, blocks)
    delta_K = solved(j_RK, r_R, ALPHA, columns)
    expected = lr * delta_K
    if acceleration:
        expected = expected + lr**2 * curve(problem, delta_K, r_R, j_RK, ALPHA, columns)
    loss = problem.loss_at(problem.theta)
    taken, optimizer = step_of(problem, blocks=blocks, lr=lr, acceleration=acceleration)
    assert_near(taken, expected)
    assert optimizer.stats.loss == pytest.approx(loss, rel=1e-12)
    assert optimizer.stats.loss_after == pytest.approx(problem.loss_at(problem.theta), rel=1e-12)
    assert optimizer.stats.rows == len(r_R)
    assert optimizer.stats.length == lr
    predicted = r_R.square().sum() - (r_R - lr * j_RK @ delta_K).square().sum()
    assert optimizer.stats.ratio == pytest.approx(float((loss - optimizer.stats.loss_after) / predicted), rel=1e-9)


def test_acceleration_is_half_the_second_derivative(monkeypatch):
    """With a short difference q is that of the exact second derivative, by torch.func."""
    monkeypatch.setattr(attempts, "_PROBE", 1e-4)
    problem = poisson()
    r_R, j_RK = problem.jacobian()
    delta_K = solved(j_RK, r_R, ALPHA)
    names = [name for name, _ in problem.u.named_parameters()]

    def values(theta_K):
        parts = theta_K.split([p.numel() for p in problem.parameters])
        tensors = {name: part.view_as(p) for name, part, p in zip(names, parts, problem.parameters, strict=True)}

        class Terms(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.u = problem.u

            def forward(self):
                return torch.cat(list(problem.terms().values()))

        return functional_call(Terms(), {f"u.{name}": x for name, x in tensors.items()}, ())

    second_R = jvp(lambda theta: jvp(values, (theta,), (delta_K,))[1], (problem.theta,), (delta_K,))[1]
    q_K = 0.5 * solved(j_RK, second_R, ALPHA)
    assert q_K.norm() > 1e-3 * delta_K.norm()
    taken, _ = step_of(problem)
    assert_near(taken - delta_K, q_K, 1e-3)


@pytest.mark.parametrize("acceleration", [True, False])
@pytest.mark.parametrize("space", SPACES)
def test_spring_keeps_a_part_of_the_last_direction(space, acceleration):
    """Three steps, with the bias correction 1 / √(1 − μ²ᵏ)."""
    problem, mu, lr = poisson(*SPACES[space]), 0.7, 0.1
    optimizer = problem.optimizer(damping=ALPHA, spring=mu, lr=lr, acceleration=acceleration)
    kept_K = torch.zeros_like(problem.theta)
    for k in range(1, 4):
        r_R, j_RK = problem.jacobian()
        own_K = mu * kept_K + solved(j_RK, r_R - j_RK @ (mu * kept_K), ALPHA)
        delta_K = own_K / (1 - mu ** (2 * k)) ** 0.5
        length = longest_of(lr, r_R, j_RK, delta_K)
        expected = length * delta_K
        if acceleration:
            expected = expected + length**2 * curve(problem, delta_K, r_R, j_RK, ALPHA)
        before = problem.theta
        optimizer.step(**problem.points)
        assert optimizer.stats.attempts == 1
        assert_near(before - problem.theta, expected)
        kept_K = own_K


class WithWeight(Equation):
    """Holds a weight of the model, which a batch of parameters does not reach."""

    def __init__(self, u):
        super().__init__(u)
        self.weight = u[0].weight

    def __call__(self, x):
        return super().__call__(x) - F.linear(x, self.weight).square().sum(1)


@pytest.mark.parametrize("equation", [Equation, EquationByAutograd, WithWeight])
@pytest.mark.parametrize("lr", [1.0, 4.0])
def test_the_grid_takes_the_lowest_loss(lr, equation):
    problem = poisson(equation=equation)
    r_R, j_RK = problem.jacobian()
    start_K, delta_K = problem.theta, solved(j_RK, r_R, ALPHA)
    q_K = curve(problem, delta_K, r_R, j_RK, ALPHA)
    lengths = [2 * longest_of(lr, r_R, j_RK, delta_K) / 2**k for k in range(12)]
    losses = [problem.loss_at(start_K - length * delta_K - length**2 * q_K) for length in lengths]
    taken, optimizer = step_of(problem, lr=lr, line_search="grid")
    best = lengths[losses.index(min(losses))]
    assert optimizer.stats.length == pytest.approx(best, rel=1e-12)
    assert optimizer.stats.loss_after == pytest.approx(min(losses), rel=1e-12)
    assert_near(taken, best * delta_K + best**2 * q_K)


@pytest.mark.parametrize("lr", [0.5, 1.0, 8.0, 64.0])
def test_armijo_takes_the_first_length_that_lowers_the_loss_enough(lr):
    problem = poisson()
    r_R, j_RK = problem.jacobian()
    start_K, delta_K = problem.theta, solved(j_RK, r_R, ALPHA)
    loss, slope = problem.loss_at(start_K), 2 * float(r_R @ (j_RK @ delta_K))
    suffices = lambda length: problem.loss_at(start_K - length * delta_K) <= loss - 1e-4 * length * slope  # noqa: E731
    longest = longest_of(lr, r_R, j_RK, delta_K)
    expected = next(longest / 2**k for k in range(11) if suffices(longest / 2**k))
    taken, optimizer = step_of(problem, lr=lr, line_search="armijo", acceleration=False)
    assert optimizer.stats.length == pytest.approx(expected, rel=1e-12)
    assert_near(taken, expected * delta_K)


def test_as_many_rows_as_residuals_are_all_of_them():
    taken = [step_of(poisson(), acceleration=False, max_rows=most)[0] for most in (None, 60, 1000)]
    assert_near(taken[1], taken[0])
    assert_near(taken[2], taken[0])


@pytest.mark.parametrize("most", [12, 30])
def test_drawn_rows_are_damped_with_the_gradient_of_all(most):
    problem, generator = poisson(), torch.Generator().manual_seed(5)
    some = {}
    for name, x in problem.points.items():
        some[name] = x[torch.randperm(len(x), generator=generator)[: len(x) * most // 60]]
    r_R, j_RK = problem.jacobian()
    _, drawn_SK = problem.jacobian(some)
    matrix_KK = drawn_SK.mT @ drawn_SK + ALPHA * torch.eye(17).double()
    taken, optimizer = step_of(problem, max_rows=most, seed=5)
    assert_near(taken, torch.linalg.solve(matrix_KK, j_RK.mT @ r_R))
    assert optimizer.stats.rows == most
    assert optimizer.stats.loss == pytest.approx(float(r_R.square().sum()), rel=1e-12)


@pytest.mark.parametrize("sketch", [4, 8, 16, 17, 40, 60, 1000])
@pytest.mark.parametrize("space", SPACES)
def test_a_sketch_is_the_nystroem_approximation(space, sketch):
    problem, generator = poisson(*SPACES[space]), torch.Generator().manual_seed(5)
    r_R, j_RK = problem.jacobian()
    omega_RS = torch.randn(len(r_R), min(sketch, len(r_R)), generator=generator, dtype=torch.float64)
    omega_RS = torch.linalg.qr(omega_RS).Q
    gram_RR = j_RK @ j_RK.mT
    y_RS = gram_RR @ omega_RS
    approximation_RR = y_RS @ torch.linalg.pinv(omega_RS.mT @ y_RS, rtol=1e-12, hermitian=True) @ y_RS.mT
    direction = lambda v_R: j_RK.mT @ torch.linalg.solve(approximation_RR + ALPHA * torch.eye(len(v_R)).double(), v_R)  # noqa: E731
    taken, _ = step_of(problem, sketch=sketch, seed=5, acceleration=False, lr=0.1)
    assert_near(taken, 0.1 * direction(r_R), 1e-6)
    if sketch >= min(len(r_R), 17):
        assert_near(taken, 0.1 * solved(j_RK, r_R, ALPHA), 1e-6)


@pytest.mark.parametrize("equation", [Equation, EquationByAutograd])
@pytest.mark.parametrize("max_bytes", [5300, 6000, 12700])
def test_rows_in_chunks_make_the_same_steps(max_bytes, equation):
    problems = [poisson(equation=equation), poisson(equation=equation)]
    optimizers = [problem.optimizer(max_bytes=most) for problem, most in zip(problems, (2**30, max_bytes), strict=True)]
    for _ in range(4):
        for problem, optimizer in zip(problems, optimizers, strict=True):
            optimizer.step(**problem.points)
        assert_near(problems[1].theta, problems[0].theta)
        assert optimizers[1].stats.rows == 60
        assert optimizers[1].stats.attempts == optimizers[0].stats.attempts


def test_too_many_bytes_are_refused_before_anything_is_computed():
    problem = poisson()
    optimizer, before = problem.optimizer(max_bytes=4000), problem.theta
    with pytest.raises(ValueError, match=r"60 residuals and 17 parameters take .* give fewer points"):
        optimizer.step(**problem.points)
    assert torch.equal(problem.theta, before)


@pytest.mark.parametrize("mixing", ["mean", "count", "noise"])
def test_chunks_of_residuals_that_depend_on_the_batch_are_refused(mixing):
    functions = {
        "mean": lambda u, x: u(x) - u(x).mean(),
        "count": lambda u, x: u(x) * len(x),
        "noise": lambda u, x: u(x + 0.1 * torch.randn_like(x)),
    }
    problem = poisson()
    problem.residuals["interior"] = lambda x: functions[mixing](problem.u, x)
    optimizer, before, state = problem.optimizer(max_bytes=6000), problem.theta, torch.get_rng_state()
    with (
        pytest.warns(UserWarning, match="one backward pass") if mixing == "mean" else torch.no_grad(),
        pytest.raises(ValueError, match="'interior' cannot be computed in chunks"),
    ):
        optimizer.step(**problem.points)
    assert torch.equal(problem.theta, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("space", SPACES)
def test_the_effective_dimension_is_a_share_of_all(space, share):
    problem = poisson(*SPACES[space])
    _, j_RK = problem.jacobian()
    values = torch.linalg.svdvals(j_RK).square()
    optimizer = problem.optimizer(damping=EffectiveDimension(share))
    found = optimizer._jacobian.system(problem.parameters, optimizer._terms.points_of(problem.points))[1]
    optimizer._rule.begin(group := dict(optimizer.param_groups[0]), 0, found)
    alpha = group["damping"]
    assert float((values / (values + alpha)).sum()) == pytest.approx(share * len(values), rel=1e-9)
    assert_near(found.spectrum().flip(0), values, 1e-9)


DAMPINGS = {
    "a number": (0.3, lambda k: 0.3),
    "a whole number": (1, lambda k: 1),
    "a function": (lambda k: 0.5 / (k + 1), lambda k: 0.5 / (k + 1)),
    "Exponential": (Exponential(2.0, 0.5, 0.3), lambda k: max(0.3, 2.0 * 0.5**k)),
}


@pytest.mark.parametrize("name", DAMPINGS)
def test_given_dampings_are_those_of_the_steps(name):
    damping, expected = DAMPINGS[name]
    problem = poisson()
    optimizer = problem.optimizer(damping=damping, acceleration=False, spring=0.0)
    for k in range(4):
        r_R, j_RK = problem.jacobian()
        before = problem.theta
        optimizer.step(**problem.points)
        assert optimizer.stats.attempts == 1
        assert_near(before - problem.theta, solved(j_RK, r_R, expected(k)))
        assert optimizer.stats.damping == expected(k)


def test_the_gain_ratio_changes_the_damping():
    problem = poisson()
    optimizer = problem.optimizer(damping=GainRatio(start=4.0, decrease=0.25), acceleration=False, spring=0.0)
    alpha = 4.0
    for _ in range(5):
        r_R, j_RK = problem.jacobian()
        before = problem.theta
        optimizer.step(**problem.points)
        assert optimizer.stats.attempts == 1
        assert_near(before - problem.theta, solved(j_RK, r_R, alpha))
        alpha *= max(0.25, 1 - (2 * min(optimizer.stats.ratio, 1) - 1) ** 3)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(alpha, rel=1e-12)


def test_points_and_their_number_may_differ_at_every_step():
    problem = poisson()
    optimizer = problem.optimizer(damping=ALPHA, acceleration=False, spring=0.0)
    for count in (5, 30, 1, 12):
        problem.points = {name: torch.rand(count, 2).double() for name in problem.points}
        (r_R, j_RK), before = problem.jacobian(), problem.theta
        loss = optimizer.loss(**problem.points)
        assert optimizer.step(**problem.points) == loss
        assert_near(before - problem.theta, solved(j_RK, r_R, ALPHA))


def test_the_summary_says_what_the_rows_are_made_of():
    problem = poisson()
    optimizer = problem.optimizer()
    assert "no step was taken yet" in str(optimizer.summary())
    optimizer.step(**problem.points)
    found = optimizer.summary()
    assert [term.name for term in found.terms] == list(problem.points)
    assert sum(term.loss for term in found.terms) == pytest.approx(optimizer.stats.loss)
    assert sum(term.residuals for term in found.terms) == found.rows == optimizer.stats.rows
    assert found.side == min(found.rows, found.parameters)
    assert all(line in str(found) for line in ("linear layers", f"{found.rows} rows, {found.parameters} parameters"))


@pytest.mark.parametrize("count", [3, 200])
def test_the_summary_warns_of_residuals_that_may_all_vanish(count):
    u = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()  # 33 parameters
    optimizer = GaussNewton(u, {"all": u})
    optimizer.step(all=torch.rand(count, 2, dtype=torch.float64))
    assert ("draw new points at every step" in str(optimizer.summary())) == (count < 33)

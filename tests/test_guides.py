"""The guides to least squares: what they compute is what they say, and a tiny version of each writes its page."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from torch.nn.utils import parameters_to_vector

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples import curve_fitting, pinn, vmc  # noqa: E402


def flat(parameters):
    return parameters_to_vector(parameters).detach().clone()


@pytest.fixture
def waves():
    torch.manual_seed(0)
    log_psi = vmc.LogPsi(3, 5).double()
    return log_psi, vmc.move(log_psi, torch.randn(40, 3).double(), 20), vmc.chain(3)[0]


def local_energies(log_psi, x_ND, c_DD):
    """Return e: [N], from ψ itself, one sample at a time: −½ Δψ / ψ + ½ xᵀ C x."""

    def psi(x_D):
        return log_psi(x_D[None])[0, 0].exp()

    energies = []
    for x_D in x_ND:
        bend = torch.autograd.functional.hessian(psi, x_D).diagonal().sum()
        energies.append(-bend / psi(x_D) / 2 + x_D @ c_DD @ x_D / 2)
    return torch.stack(energies).detach()


def test_the_local_energy_is_that_of_psi(waves):
    torch.testing.assert_close(vmc.local_energy(*waves)[:, 0], local_energies(*waves), rtol=1e-10, atol=1e-10)


def test_a_step_is_stochastic_reconfiguration(waves):
    """(S + α I) δ = ⟨(O − Ō) (e − E)⟩, with dense S, to which the norm adds α / (s² + α) Ō Ōᵀ."""
    log_psi, x_ND, c_DD = waves
    damping, lr, scale = 0.1, 0.2, 1e3
    e_N = local_energies(log_psi, x_ND, c_DD)
    trained = list(log_psi.network.parameters())
    rows = (torch.autograd.grad(value, trained, retain_graph=True) for value in log_psi(x_ND)[:, 0])
    o_NK = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    centred_NK = o_NK - o_NK.mean(0)
    s_KK = centred_NK.mT @ centred_NK / len(x_ND)
    force_K = centred_NK.mT @ (e_N - e_N.mean()) / len(x_ND)
    expected = lr * torch.linalg.solve(s_KK + damping * torch.eye(len(s_KK)).double(), force_K)
    first = flat(trained)
    optimizer = vmc.reconfiguration(log_psi, scale, lr=lr, damping=damping)
    optimizer.step(evolution=(x_ND, log_psi(x_ND).detach(), (e_N - e_N.mean())[:, None]))
    assert optimizer.stats.attempts == 1
    added = o_NK.mean(0).norm() ** 2 / scale**2  # beside α I
    assert (first - flat(trained) - expected).norm() < added * expected.norm()


def test_the_chain_has_its_exact_energy():
    c_DD, exact = vmc.chain(2)
    assert exact == pytest.approx((math.sqrt(1.5) + math.sqrt(2.5)) / 2, rel=1e-12)
    torch.testing.assert_close(c_DD, torch.tensor([[2.0, -0.5], [-0.5, 2.0]]).double())


def test_a_short_run_comes_near_the_ground_state(waves):
    log_psi, _, c_DD = waves
    torch.manual_seed(0)
    energies = vmc.minimize(log_psi, c_DD, samples=100, steps=25, **vmc.SETTINGS)
    assert energies[-1][1] < energies[0][1] / 20  # the variance of e is 0 in an eigenstate


def test_the_fit_is_scipys():
    t_N1, y_N1 = curve_fitting.data(60, 0)
    model = curve_fitting.Oscillation(**curve_fitting.GUESS)
    curve_fitting.fit(model, t_N1, y_N1)
    t_N, y_N = t_N1[:, 0].numpy(), y_N1[:, 0].numpy()

    def residual(p):
        return p[0] * np.exp(-p[1] * t_N) * np.cos(p[2] * t_N + p[3]) + p[4] - y_N

    expected = least_squares(residual, list(curve_fitting.GUESS.values()), ftol=1e-12, xtol=1e-12, gtol=1e-12).x
    assert flat(model.parameters()).numpy() == pytest.approx(expected, rel=1e-4)


def test_the_front_solves_burgers_equation():
    torch.manual_seed(0)
    x_ND = pinn.inside(20).requires_grad_()
    v_N = pinn.front(x_ND)[:, 0]
    (slope_ND,) = torch.autograd.grad(v_N.sum(), x_ND, create_graph=True)
    bend_N = torch.autograd.grad(slope_ND[:, 0].sum(), x_ND)[0][:, 0]
    residual_N = slope_ND[:, 1] + v_N * slope_ND[:, 0] - pinn.VISCOSITY * bend_N
    assert residual_N.abs().max() < 1e-12 * bend_N.abs().max()


def test_the_contract_of_the_loss_is_kept():
    lines = pinn.contract()
    assert len(lines) == 3
    assert all(loss == by_hand for _, loss, by_hand in lines)


def test_what_the_page_calls_refused_is_refused():
    torch.manual_seed(0)
    u, x_ND = pinn.network(2, 1), pinn.inside(8)
    first = flat(u.parameters())
    said = {what: pinn.said_of(residual, u, x_ND) for what, residual in pinn.bad_residuals(u).items()}
    assert "taken" not in said.values(), said
    assert torch.equal(first, flat(u.parameters()))


@pytest.mark.parametrize(
    ("example", "name", "scale"),
    [
        (pinn, "pinn", {"steps": 3, "points": 24}),
        (vmc, "vmc", {"samples": 40, "steps": 3}),
        (curve_fitting, "curve-fitting", {"count": 20}),
    ],
)
def test_a_tiny_run_writes_the_page(example, name, scale, tmp_path, monkeypatch):
    monkeypatch.setattr(curve_fitting, "MOST_STEPS", 5)
    monkeypatch.setattr(curve_fitting, "MOST_EVALUATIONS", 5)
    example.main(out=tmp_path, threads=torch.get_num_threads(), **scale)
    text = (tmp_path / f"{name}.md").read_text()
    assert "GaussNewton" in text
    assert str(tmp_path) not in text
    assert name == "pinn" or (tmp_path / f"{name}.png").stat().st_size > 10_000

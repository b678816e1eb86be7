"""On fixed points the loss of `GaussNewton` never rises and stays finite, from any damping, for four equations.

The whole table has 20 seeds, which `slow` runs; the suite takes two of them.
"""

from itertools import pairwise

import pytest
import torch
from torch import nn

from tengrad_triton import EffectiveDimension, GainRatio, GaussNewton, derivatives, laplacian

STEPS = 30


def poisson(u, x):
    return laplacian(u, x)[:, 0] + x.sin().sum(1)


def heat(u, x):
    d = derivatives(u, x)
    return d.first[:, 0] - 0.1 * d.second[:, 1]


def burgers(u, x):
    d = derivatives(u, x)
    return d.first[:, 0] + d.value * d.first[:, 1] - 0.01 * d.second[:, 1]


def stiff(u, x):
    """An equation whose exponential overflows where u is large."""
    return laplacian(u, x)[:, 0] - (3 * u(x)[:, 0]).exp()


EQUATIONS = {"poisson": poisson, "heat": heat, "burgers": burgers, "stiff": stiff}
STARTS = [1e-4, 1e-6, 1e-8, 1e-10]
RULES = {
    **{f"GainRatio({start:.0e})": (lambda start=start: {"damping": GainRatio(start=start)}) for start in STARTS},
    **{f"{alpha:.0e}": (lambda alpha=alpha: {"damping": alpha}) for alpha in STARTS},
    "defaults": dict,
    "EffectiveDimension": lambda: {"damping": EffectiveDimension()},
    "no acceleration": lambda: {"damping": GainRatio(start=1e-8), "acceleration": False},
    "grid": lambda: {"damping": GainRatio(start=1e-8), "line_search": "grid"},
    "armijo": lambda: {"damping": GainRatio(start=1e-8), "line_search": "armijo"},
    "spring": lambda: {"damping": GainRatio(start=1e-8), "spring": 0.9},
    "sketch": lambda: {"damping": GainRatio(start=1e-8), "sketch": 20},
    "layers": lambda: {"damping": GainRatio(start=1e-8), "blocks": "layer"},
}


def losses_of(equation, rule, seed, dtype=torch.float64):
    """Return the losses of all steps, and that after the last one; and the optimizer."""
    torch.manual_seed(seed)
    u = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    inside, edge = torch.rand(40, 2, dtype=dtype), torch.rand(16, 2, dtype=dtype)
    edge[:, 1] = edge[:, 1].round()
    optimizer = GaussNewton(
        u, {"interior": lambda x: EQUATIONS[equation](u, x), "edge": lambda x: u(x) - x[:, :1].sin()}, **RULES[rule]()
    )
    losses = [float(optimizer.step(interior=inside, edge=edge)) for _ in range(STEPS)]
    return [*losses, float(optimizer.loss(interior=inside, edge=edge))], optimizer


def check(equation, rule, seed):
    losses, optimizer = losses_of(equation, rule, seed)
    assert all(torch.isfinite(torch.tensor(losses)))
    # The loss of a step is computed with the rows, that after the step before without: they differ by rounding.
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses)), losses
    assert losses[-1] < losses[0]
    assert all(bool(p.isfinite().all()) for p in optimizer.model.parameters())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_losses_fall(equation, rule):
    check(equation, rule, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 20))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_losses_fall_for_all_seeds(equation, rule, seed):
    check(equation, rule, seed)

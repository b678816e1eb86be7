"""Losses that steps have trouble with: of any size, with flat directions, or that rise along the last direction."""

import pytest
import torch
from torch import nn

from tengrad_triton import EffectiveDimension, GaussNewton


class Power(nn.Module):
    """(w x)⁴ at points x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[2.0]]).double())

    def forward(self, x):
        return nn.functional.linear(x, self.w) ** 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def losses(optimizer, x, steps):
    return torch.stack([optimizer.step(term=x) for _ in range(steps)])


@pytest.mark.parametrize("settings", [{}, {"line_search": "grid", "acceleration": False, "damping": 1e-3}])
def test_a_quartic_falls(settings):
    model = Power()
    found = losses(GaussNewton(model, {"term": model}, **settings), torch.ones(1, 1).double(), 20)
    assert (found.diff() < 0).all()
    assert found[-1] < 1e-6 * found[0]


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_a_loss_of_any_size_falls(scale):
    model, x = network(), torch.linspace(-1, 1, 30).double()[:, None]
    optimizer = GaussNewton(model, {"term": lambda x: scale * (model(x) - torch.sin(3 * x))})
    found = losses(optimizer, x, 80)
    assert (found.diff() <= 0).all()
    assert found[-1] < 1e-2 * found[0]


def test_the_effective_dimension_is_a_share_of_the_rank():
    model = network()
    optimizer = GaussNewton(
        model, {"term": lambda x: model(x) - 1}, damping=EffectiveDimension(0.5), acceleration=False
    )
    optimizer.step(term=torch.zeros(20, 1).double())  # twenty times the same point: one eigenvalue is not zero
    assert optimizer.stats.damping > 1e-3


def test_an_upward_last_direction_is_dropped():
    model, x = network(), torch.linspace(-1, 1, 30).double()[:, None]
    optimizer = GaussNewton(model, {"term": lambda x: model(x) - torch.sin(3 * x)}, spring=0.9)
    optimizer.step(term=x)
    for p in model.parameters():
        optimizer.state[p]["direction"].mul_(-1e3)
    optimizer.step(term=x)
    assert optimizer.stats.accepted
    assert optimizer.stats.length > 0


def test_a_damping_that_hides_every_step_falls():
    model, x = network(), torch.linspace(-1, 1, 30).double()[:, None]
    optimizer = GaussNewton(model, {"term": lambda x: model(x) - torch.sin(3 * x)})
    optimizer.step(term=x)
    optimizer.param_groups[0]["damping"] = 1e20
    found = losses(optimizer, x, 20)
    assert not optimizer.stopped
    assert found[-1] < 0.5 * found[0]


def test_a_step_of_no_length_is_no_stop():
    model, x = network(), torch.linspace(-1, 1, 30).double()[:, None]
    optimizer = GaussNewton(model, {"term": lambda x: model(x) - torch.sin(3 * x)}, lr=0.0)
    before = [p.clone() for p in model.parameters()]
    optimizer.step(term=x)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert (optimizer.stats.attempts, optimizer.stopped) == (0, False)


def test_another_type_of_the_model_keeps_the_direction():
    model, x = network(), torch.linspace(-1, 1, 30).double()[:, None]
    optimizer = GaussNewton(model, {"term": lambda x: model(x) - torch.sin(3 * x)})
    optimizer.step(term=x)
    model.float()
    optimizer.step(term=x.float())
    assert optimizer.stats.accepted

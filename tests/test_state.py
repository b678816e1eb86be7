"""The optimizer's state: it continues bit for bit, and another model's is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_conv import assert_same, batch, flat, resumed_at, small_model, take_steps
from torch import nn

from tengrad_triton import TENGraD


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("representation", ["factored", "per_sample"])
@pytest.mark.parametrize("pause", range(1, 7))
def test_state_dict_continues_bit_for_bit_in_mid_interval(pause, representation, fisher):
    options = {"refresh_every": 3, "fisher": fisher, "representation": representation, "weight_decay": 0.01}
    whole = small_model()
    take_steps(whole, TENGraD(whole, **options), 0, 8)
    assert torch.equal(flat(resumed_at(pause, TENGraD, options)), flat(whole))


def test_state_of_another_model_is_refused_and_changes_nothing():
    other = nn.Sequential(nn.Linear(36, 4))
    optimizer = TENGraD(other)
    x, y = batch()
    F.cross_entropy(other(x.flatten(1)), y).backward()
    optimizer.step()
    saved = optimizer.state_dict()

    model = nn.Sequential(nn.Conv2d(1, 4, 6), nn.Flatten(), nn.Linear(4, 4))
    target = TENGraD(model)
    with pytest.raises(ValueError, match=r"parameter group|another model"):
        target.load_state_dict(saved)
    with pytest.raises(ValueError, match="'tengrad'"):
        target.load_state_dict(torch.optim.SGD(model.parameters(), lr=1).state_dict())
    assert target._steps == 0
    assert target._curvature is None


@pytest.mark.parametrize("width", [3, 7, 64])
def test_state_of_another_width_is_refused_and_changes_nothing(width):
    """Its momentum does not fit, and the update would write past the end of a smaller one."""
    narrow, wide = (nn.Sequential(nn.Flatten(), nn.Linear(36, w), nn.ReLU(), nn.Linear(w, 4)) for w in (5, width))
    optimizer, target = TENGraD(narrow), TENGraD(wide)
    take_steps(narrow, optimizer, 0, 2)
    take_steps(wide, target, 0, 1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=rf"of shape \(5, 36\) for a parameter of shape \({width}, 36\)"):
        target.load_state_dict(optimizer.state_dict())
    assert_same(target.state_dict(), before)


def test_drawn_rows_continue_under_another_initial_seed():
    states = []
    for later in (0, 1):
        torch.manual_seed(0)
        model = small_model()
        optimizer = TENGraD(model, fisher_rows=4, refresh_every=1)
        take_steps(model, optimizer, 0, 2)
        torch.manual_seed(later)
        resumed = TENGraD(model, fisher_rows=4, refresh_every=1)
        resumed.load_state_dict(optimizer.state_dict())
        take_steps(model, resumed, 2, 4)
        states.append(flat(model))
    assert torch.equal(*states)

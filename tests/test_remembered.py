"""What steps remember of their targets outlives no change: they are the steps of a loop that remembers nothing."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD
from tengrad_triton.curvature.target import RememberedTargets, rate_indices, targets_of

STEPS = 9


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 5)
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(7, 2, 6, 6, generator=generator), torch.randint(3, (7,), generator=generator)


def other_data(net, optimizer):
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()


def other_layout(net, optimizer):
    net.to(memory_format=torch.channels_last)


def transposed(net, optimizer):
    net[5].weight.data = net[5].weight.data.t()  # square, at the same address


def swapped(net, optimizer):
    optimizer.zero_grad()
    for parameter in net.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))


def other_momenta(net, optimizer):
    for state in optimizer.state.values():
        state["momentum_buffer"] = 0.5 * state["momentum_buffer"]


def load(net, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def settings(**changes):
    def change(net, optimizer):
        optimizer.param_groups[0].update(changes)

    return change


def freeze(net, optimizer):
    net[0].weight.requires_grad_(False)


# What happens to the model and the optimizer before a step that reuses the curvature.
EVENTS = {
    "parameters' data": other_data,
    "parameters' layout": other_layout,
    "parameters' strides": transposed,
    "swapped parameters": swapped,
    "momenta": other_momenta,
    "a loaded state": load,
    "learning rate": settings(lr=1e-3),
    "tensor learning rate": settings(lr=torch.tensor(2e-3)),
    "Nesterov": settings(nesterov=False),
    "the sign": settings(maximize=True),
    "weight decay": settings(weight_decay=0.1),
    "a frozen parameter": freeze,
}


class Forgetful(RememberedTargets):
    def of(self, trained, groups, settings):
        return targets_of(trained, groups, settings, rate_indices(groups))


@pytest.mark.parametrize("options", [{}, {"spring": 0.9, "momentum": 0.0}], ids=["momentum", "SPRING"])
@pytest.mark.parametrize("event", EVENTS)
def test_steps_are_those_of_a_loop_that_remembers_nothing(event, options):
    ends = []
    for remembered in (RememberedTargets, Forgetful):
        net = model()
        optimizer = TENGraD(net, refresh_every=6, seed=0, **options)
        optimizer._remembered = remembered(lambda trained: None)
        for step in range(STEPS):
            x, y = batch(step)
            if step == 3:
                EVENTS[event](net, optimizer)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*ends)


def test_a_plan_lasts_for_the_steps_of_a_curvature():
    net = model()
    optimizer = TENGraD(net, refresh_every=6, seed=0)
    plans = []
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        plans += optimizer._curvature.last_plan
    assert [plan is plans[0] for plan in plans] == [True] * 6 + [False] * 3


def test_a_step_keeps_no_gradient():
    net = model()
    optimizer = TENGraD(net, refresh_every=6, seed=0)
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    grads = [weakref.ref(p.grad) for p in net.parameters()]
    optimizer.zero_grad()
    assert not any(grad() is not None for grad in grads)

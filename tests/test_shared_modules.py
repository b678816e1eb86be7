"""Modules at two places of a model, and parameters that the optimizer does not have, in compiled steps and reruns."""

import copy

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.layers.stateless import call_with, places_of


def twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Sequential(layer, nn.Tanh()), nn.Sequential(layer, nn.Tanh()), nn.Linear(4, 3))


def shared_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("build", [twice, shared_weight])
def test_the_tensors_of_a_module_at_two_places_are_put_back(build):
    model = build()
    before = [*map(id, model.parameters())]
    doubled = {name: p.detach() * 2 for name, p in model.named_parameters()}
    x = torch.randn(5, 4)
    found = call_with(model, places_of(model), doubled, (x,))
    assert [*map(id, model.parameters())] == before
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("build", [twice, shared_weight])
def test_a_compiled_step_of_a_model_with_a_module_at_two_places(build):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = build().double()
    twin = copy.deepcopy(model)
    plain, optimizer = (TENGraD(one, seed=0, refresh_every=3) for one in (model, twin))
    step = compile_train_step(twin, F.cross_entropy, optimizer, backend="eager")
    before = [*map(id, twin.parameters())]
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(8, 4, generator=generator).double(), torch.randint(3, (8,), generator=generator)
        plain.zero_grad()
        F.cross_entropy(model(x), y).backward()
        plain.step()
        step(x, y)
    assert [*map(id, twin.parameters())] == before
    assert dense.relative_error(dict(twin.named_parameters()), dict(model.named_parameters())) < 1e-12
    optimizer.state_dict()


def test_a_compiled_step_leaves_parameters_alone_that_the_optimizer_does_not_have():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = TENGraD(model, model[2].parameters(), seed=0, refresh_every=3)
    step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager")
    before = copy.deepcopy(model[0].state_dict())
    for seed in range(3):
        torch.manual_seed(seed)
        step(torch.randn(8, 4).double(), torch.randint(3, (8,)))
    assert {id(p) for p in optimizer.state} == {id(p) for p in model[2].parameters()}
    assert set(optimizer.state_dict()["state"]) == {0, 1}
    assert all(torch.equal(x, before[name]) for name, x in model[0].state_dict().items())

"""A model that is converted in mid-training: curvature and momenta are converted with it."""

import pytest
import torch
from situation_loops import DATA
from situation_models import mlp
from torch.nn.functional import cross_entropy

from tengrad_triton import TENGraD
from tengrad_triton.baselines import KBFGS, KFAC

OPTIMIZERS = {
    "sampled": lambda model: TENGraD(model, refresh_every=4, seed=0),
    "empirical": lambda model: TENGraD(model, refresh_every=4, fisher="empirical"),
    "one block": lambda model: TENGraD(model, refresh_every=4, seed=0, blocks="network"),
    "factors": lambda model: TENGraD(model, refresh_every=4, seed=0, representation="factored"),
    "scaled": lambda model: TENGraD(model, refresh_every=4, seed=0, scaling="kronecker"),
    "K-FAC": lambda model: KFAC(model, refresh_every=4, seed=0),
    "K-BFGS": lambda model: KBFGS(model, seed=0),
}


def ends(make, conversions):
    """Return the parameters after six steps; ``conversions`` has the type from a step on."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model)
    for number in range(6):
        model.to(conversions.get(number, model[0].weight.dtype))

        def closure(number=number):
            optimizer.zero_grad()
            loss = cross_entropy(model(DATA[number][0].to(model[0].weight.dtype)), DATA[number][1])
            loss.backward()
            return loss

        optimizer.step(closure)
    dtypes = {p.dtype for p in model.parameters()} | {s["momentum_buffer"].dtype for s in optimizer.state.values()}
    assert len(dtypes) == 1
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("first", [1, 2, 4])  # the next step reuses, or refreshes
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_converted_model_trains_on(optimizer, first):
    make = OPTIMIZERS[optimizer]
    usual = ends(make, {})
    for conversions in ({first: torch.float64}, {first: torch.float64, first + 1: torch.float32}):
        assert (ends(make, conversions) - usual).norm() < 1e-4 * usual.norm()

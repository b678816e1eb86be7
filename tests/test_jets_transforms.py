"""Derivatives with respect to the inputs can be differentiated, batched and compiled."""

import pytest
import torch
from derivative_cases import assert_same, network, points, reference
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from tengrad_triton import derivatives, laplacian


@pytest.mark.parametrize("name", ["tanh", "gelu by tanh", "elu", "strange", "residual", "own forward", "parametrized"])
def test_they_can_be_differentiated_further(name):
    u, x = network(name), points().requires_grad_()
    places = [x, *u.parameters()]

    def gradients(lap):
        loss = (lap.square().sum(1) * x[:, 0]).sum()
        once = torch.autograd.grad(loss, places, create_graph=True, materialize_grads=True)
        return *once, *torch.autograd.grad(sum(g.square().sum() for g in once), places, materialize_grads=True)

    assert_same(gradients(laplacian(u, x)), gradients(reference(u, x)[2].sum(1)))


@pytest.mark.parametrize("name", ["tanh", "silu", "strange", "own forward"])
def test_rows_of_single_points_are_those_of_the_batch(name):
    u, x = network(name), points()
    parameters = {key: p.detach() for key, p in u.named_parameters()}

    def at(parameters, x_ND, lap):
        def function(x):
            return functional_call(u, parameters, (x,))

        return lap(function, x_ND)

    class Equation(nn.Module):  # functional_call around the laplacian of a module
        def __init__(self):
            super().__init__()
            self.u = u

        def forward(self, x):
            return laplacian(self.u, x)

    def swapped(parameters, x_D):
        return functional_call(Equation(), {f"u.{key}": p for key, p in parameters.items()}, (x_D[None],)).sum()

    expected = jacrev(at)(parameters, x, lambda f, x: reference(f, x)[2].sum((1, 2)))
    closed = vmap(grad(lambda p, x_D: at(p, x_D[None], laplacian).sum()), (None, 0))(parameters, x)
    swapped_rows = vmap(grad(swapped), (None, 0))(parameters, x)
    batch = jacrev(at)(parameters, x, lambda f, x: laplacian(f, x).sum(1))
    for rows in (closed, swapped_rows, batch):
        assert_same([rows[key] for key in expected], expected.values())


def test_many_networks_at_once():
    u, x = network("tanh"), points()
    many = {key: torch.stack([p, 2 * p, -p]).detach() for key, p in u.named_parameters()}

    def lap(parameters):
        return laplacian(lambda x: functional_call(u, parameters, (x,)), x)

    each = [lap({key: p[i] for key, p in many.items()}) for i in range(3)]
    assert_same(vmap(lap)(many), each)


def test_single_precision():
    u, x = network("tanh"), points()
    expected = laplacian(u, x)
    result = laplacian(u.float(), x.float())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


COMPILED = {
    "eager": ["tanh", "gelu", "strange", "residual", "own forward", "layer norm"],
    "inductor": ["tanh", "gelu", "strange"],  # inductor itself fails on nested forward mode through linear layers
}
CASES = [
    pytest.param(backend, name, marks=[pytest.mark.slow] if backend == "inductor" else [])
    for backend, names in COMPILED.items()
    for name in names
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_they_are_compiled_as_one_graph(backend, name):
    u, x = network(name), points()

    def loss(x):
        d = derivatives(u, x)
        return (laplacian(u, x) + d.value * d.first[:, 0] + d.second[:, 1]).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    places = list(u.parameters())
    results = [(f(x), *torch.autograd.grad(f(x), places)) for f in (compiled, loss)]
    assert_same(*results)

"""Frozen parameters of any type are nobody's business; what is thawed is checked before a step changes anything."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mixed_types import Cast
from torch import nn

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.baselines import KFAC

N = 6


class Adapted(nn.Module):
    """A frozen base of any type beside a trained layer."""

    def __init__(self, dtype):
        super().__init__()
        weight = torch.randn(4, 4)
        base = torch.complex(weight, weight) if dtype.is_complex else (weight * 10).to(dtype)
        self.base, self.adapter = nn.Parameter(base, requires_grad=False), nn.Linear(4, 4)

    def forward(self, x):
        base = self.base.abs() if self.base.is_complex() else self.base.float() / 10
        return x @ base + self.adapter(x)


class Tables(nn.Module):
    """A table whose gradient is not the derivative of the loss, and a trained layer."""

    def __init__(self, table, **options):
        super().__init__()
        self.table, self.out = table(10, 4, **options), nn.Linear(4, 4)
        self.table.requires_grad_(False)

    def forward(self, ids):
        return self.out(self.table(ids))


def vectors():
    return torch.randn(N, 4)


def ids():
    return torch.randint(0, 10, (N,))


def bags():
    return torch.randint(0, 10, (N, 3))


NOT_REAL = (TypeError, "must be real floating point")
MODELS = {
    "int8": (lambda: Adapted(torch.int8), vectors, None),
    "uint8": (lambda: Adapted(torch.uint8), vectors, None),
    "bool": (lambda: Adapted(torch.bool), vectors, None),
    "complex64": (lambda: Adapted(torch.complex64), vectors, NOT_REAL),
    "complex128": (lambda: Adapted(torch.complex128), vectors, NOT_REAL),
    "float64": (lambda: Adapted(torch.float64), vectors, None),
    "max_norm": (lambda: Tables(nn.Embedding, max_norm=1.0), ids, (ValueError, "table has max_norm=1.0")),
    "sparse": (lambda: Tables(nn.Embedding, sparse=True), ids, (ValueError, "table has sparse=True")),
    "by frequency": (
        lambda: Tables(nn.Embedding, scale_grad_by_freq=True),
        ids,
        (ValueError, "table has scale_grad_by_freq=True"),
    ),
    "bags": (lambda: Tables(nn.EmbeddingBag, max_norm=1.0), bags, (ValueError, "table has max_norm=1.0")),
}
"""For each frozen parameter the model, its batch, and the error that thawing it raises; None if it cannot be thawed."""
OPTIMIZERS = {
    "sampled": TENGraD,
    "empirical": lambda *args, **options: TENGraD(*args, fisher="empirical", **options),
    "network": lambda *args, **options: TENGraD(*args, blocks="network", **options),
    "kfac": KFAC,
}


def made(case, optimizer, all_parameters=True):
    torch.manual_seed(0)
    make, batch, _ = MODELS[case]
    net = make()
    params = None if all_parameters else [p for p in net.parameters() if p.requires_grad]
    return net, batch(), OPTIMIZERS[optimizer](net, params, refresh_every=2, seed=0, unsupported="sgd")


def backward(net, x, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(net(x), torch.arange(N) % 4).backward()


@pytest.mark.filterwarnings("ignore:no exact rows")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", MODELS)
def test_a_frozen_parameter_of_the_optimizer_is_as_if_it_had_not_got_it(case, optimizer):
    ends = []
    for all_parameters in (True, False):
        net, x, own = made(case, optimizer, all_parameters)
        for _ in range(3):
            backward(net, x, own)
            own.step()
        ends.append(net.state_dict())
        own.load_state_dict(copy.deepcopy(own.state_dict()))
        str(own.summary())
    for name in ends[0]:
        assert torch.allclose(*(end[name].to(torch.complex128) for end in ends), rtol=1e-6, atol=1e-7), name


@pytest.mark.filterwarnings("ignore:no exact rows")
@pytest.mark.parametrize("steps", [1, 2])  # the next step reuses, or refreshes
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", [case for case, (_, _, error) in MODELS.items() if error])
def test_what_is_thawed_is_refused_until_it_is_frozen_again(case, optimizer, steps):
    error, message = MODELS[case][2]
    net, x, own = made(case, optimizer)
    for _ in range(steps):
        backward(net, x, own)
        own.step()
    net.requires_grad_(True)
    momenta = {p: state["momentum_buffer"].clone() for p, state in own.state.items()}
    for _ in range(2):  # and not the first time only
        backward(net, x, own)
        before = copy.deepcopy(net.state_dict())  # with max_norm, a forward changes the table
        with pytest.raises(error, match=message):
            own.step()
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert all(torch.equal(own.state[p]["momentum_buffer"], momentum) for p, momentum in momenta.items())
    (net.base if isinstance(net, Adapted) else net.table).requires_grad_(False)
    own.zero_grad()
    backward(net, x, own)
    own.step()


@pytest.mark.filterwarnings("ignore:no exact rows", "ignore:.*takes the plain step")
@pytest.mark.parametrize("case", ["complex64", "sparse"])
def test_what_is_thawed_is_refused_by_a_compiled_step(case):
    error, message = MODELS[case][2]
    net, x, own = made(case, "sampled")
    step, y = compile_train_step(net, F.cross_entropy, own, backend="eager"), torch.arange(N) % 4
    for _ in range(3):
        step(x, y)
    net.requires_grad_(True)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=message):
        step(x, y)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def mixed(first, second):
    torch.manual_seed(0)
    layers = (nn.Linear(4, 5).to(first), Cast(second), nn.Tanh(), nn.Linear(5, 4).to(second))
    return nn.Sequential(Cast(first), *layers, Cast(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_half_precision_beside_float32_is_trained(dtype, fisher):
    net = mixed(torch.float32, dtype)
    optimizer = TENGraD(net, refresh_every=2, fisher=fisher)
    before = copy.deepcopy(net.state_dict())
    for _ in range(3):
        backward(net, vectors(), optimizer)
        optimizer.step()
    assert not any(torch.equal(before[name], value) for name, value in net.state_dict().items())

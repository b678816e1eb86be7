"""A step and a refresh launch as many kernels for a deep model as for a shallow one."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.curvature import refresh, woodbury
from tengrad_triton.curvature.choices import ops_for
from tengrad_triton.curvature.jacobians import per_sample


class Counting(TorchDispatchMode):
    """Counts operations that compute something; each of the kernels' ops counts as one."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def linear(depth):
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth))), torch.randn(16, 6)


def convolutions(depth):
    layers = [nn.Conv2d(2, 2, 3, padding=1) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(50, 6)), torch.randn(16, 2, 5, 5)


MODELS = {"linear layers": linear, "convolutions": convolutions}
OPTIONS = {
    "as it comes": {},
    "one block": {"blocks": "network"},
    "unscaled": {"scaling": "none"},
    "unscaled, bf16": {"scaling": "none", "representation": "per_sample_bf16"},
    "unscaled, Nesterov": {"scaling": "none", "nesterov": True, "weight_decay": 0.1},
    "unscaled, trust region": {"scaling": "none", "trust_region": 1e-3},
}


def with_ops(optim):
    """Have an optimizer on a CPU call the ops, as one on a GPU does."""
    optim._ops_for = partial(ops_for, "auto")
    optim._ops = ops_for("auto")
    return optim


def counts(make, depth, options, monkeypatch):
    """Return what a step that reuses the curvature calls, and what a refresh does once J is there."""
    torch.manual_seed(0)
    model, x = make(depth)
    optim = with_ops(TENGraD(model, lr=1e-3, refresh_every=2, seed=0, **options))
    refreshing = Counting()

    def counted(*args, **kwargs):
        with refreshing:
            return woodbury.factor(*args, **kwargs)

    monkeypatch.setattr(refresh, "factor", counted)
    monkeypatch.setattr(per_sample, "worth_a_batch", lambda matrices: False)  # batched products are used on a CPU only
    for _ in range(2):
        F.cross_entropy(model(x), torch.zeros(16, dtype=torch.long)).backward()
        with Counting() as stepping:
            optim.step()
    return stepping.calls, refreshing.calls


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_launches_do_not_grow_with_depth(model, options, monkeypatch):
    """Those of a step, and of a factorization, for which scaled damping takes the root of each D."""
    shallow, deep = (counts(MODELS[model], depth, OPTIONS[options], monkeypatch) for depth in (3, 12))
    pairs = list(zip(shallow, deep, strict=True))
    for few, many in pairs if "unscaled" in options else pairs[:1]:
        assert sorted(few) == sorted(many)
    assert any("update_" in call for call in shallow[0])
    assert len(shallow[0]) <= 32


@pytest.mark.parametrize("representation", ["factored", "per_sample", "per_sample_bf16", "compressed"])
@pytest.mark.parametrize("model", MODELS)
def test_ops_take_the_steps_of_their_torch_code(model, representation):
    ends = []
    for prepare in (with_ops, lambda optim: optim):
        torch.manual_seed(0)
        net, x = MODELS[model](2)
        optim = prepare(TENGraD(net, refresh_every=2, seed=0, representation=representation))
        for _ in range(3):
            optim.zero_grad()
            F.cross_entropy(net(x), torch.arange(16) % 6).backward()
            optim.step()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*ends)


def compiled_calls(make, depth):
    """Return the kernels' ops that the graphs of a compiled step call beside those that make J; reuse comes first."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = make(depth)
    graphs = []

    def backend(graph, inputs):
        calls = [str(node.target) for node in graph.graph.nodes if "tengrad_triton" in str(node.target)]
        graphs.append([call for call in calls if "sample_grads" not in call])
        return graph.forward

    optim = with_ops(TENGraD(model, refresh_every=2, seed=0))
    step = compile_train_step(model, F.cross_entropy, optim, backend=backend)
    for _ in range(3):
        step(x, torch.zeros(16, dtype=torch.long))
    return graphs


@pytest.mark.parametrize("model", MODELS)
def test_launches_of_a_compiled_step_do_not_grow_with_depth(model):
    shallow, deep = (compiled_calls(MODELS[model], depth) for depth in (1, 2))
    assert [len(graph) for graph in shallow] == [len(graph) for graph in deep]
    assert all(any("update_" in call for call in graph) for graph in deep)

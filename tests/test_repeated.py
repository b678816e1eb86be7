"""Steps that repeat the launches of the step before them: those of PyTorch's code, whatever changed in between.

The tests run under Triton's interpreter (see `test_kernels.test_under_the_interpreter`) or on a GPU.
"""

import os
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD
from tengrad_triton.curvature.choices import ops_for
from tengrad_triton.curvature.jacobians.factored import Factored
from tengrad_triton.kernels import RepeatedProducts, dispatch, launches, pointer_table
from tengrad_triton.kernels.spec import Repeated
from tengrad_triton.layers import ConvInput, OuterProducts

HARDWARE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HARDWARE else "cpu")
pytestmark = pytest.mark.skipif(
    not HARDWARE and os.environ.get("TRITON_INTERPRET") != "1",
    reason="test_kernels.test_under_the_interpreter runs these",
)
N = 5
STEPS = 4  # a refresh, a step that calls ops, one that prepares launches, and one that repeats them


def linear():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(N, 6)


def convolutional():
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(4, 4)
    )
    return net, torch.randn(N, 4, 4, 4)


def channels_last():
    """Factors in all orders: a depthwise convolution has one output in each group."""
    net = nn.Sequential(nn.Conv2d(4, 4, 2, groups=4), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 4))
    return net, torch.randn(N, 4, 4, 4).to(memory_format=torch.channels_last)


class Tokens(nn.Module):
    """An embedding, whose products share no launch, and a layer of fewer parameters than samples, so of fewer rows."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x))).mean(1)


def tokens():
    return Tokens(), torch.randint(7, (N, 3))


MODELS = {"linear": linear, "convolutional": convolutional, "channels-last": channels_last, "tokens": tokens}
OPTIONS = {
    "plain": {"nesterov": False},
    "rows and decay": {"representation": "per_sample", "weight_decay": 0.1},
    "factors": {"representation": "factored"},
    "one block, few rows": {"blocks": "network", "fisher_rows": 3},
    "trust region": {"trust_region": 1e-3},
    "SPRING": {"spring": 0.5, "momentum": 0.0},
    "scaled": {"scaling": "kronecker", "damping": 1.0, "relative_damping": False},
    "scaled, SPRING": {"scaling": "diagonal", "damping": 1.0, "relative_damping": False, "spring": 0.5},
}

QUICK = {
    *(("linear", "rows and decay"), ("linear", "SPRING"), ("convolutional", "factors")),
    *(("convolutional", "trust region"), ("tokens", "one block, few rows"), ("convolutional", "scaled")),
}
CASES = [
    pytest.param(model, options, marks=[] if (model, options) in QUICK else pytest.mark.slow)
    for model in MODELS
    for options in OPTIONS
]


class Run:
    """A training run of which every step but the first reuses the curvature."""

    reuses = False

    def __init__(self, model, on_kernels, dtype=torch.float32, **options):
        torch.manual_seed(0)
        net, x = MODELS[model]()
        self.net = net.to(DEVICE, dtype)
        self.x = x.to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE)
        self.optimizer = TENGraD(self.net, refresh_every=100, seed=0, **{"scaling": "none", **options})
        self.optimizer._ops_for = partial(ops_for, "auto" if on_kernels else "torch")
        self.optimizer._ops = self.optimizer._ops_for()
        self.set_to_none, self.held = True, []  # earlier gradients, so that later ones have other addresses

    def backward(self, step):
        labels = torch.randint(4, (N,), generator=torch.Generator().manual_seed(step)).to(DEVICE)
        self.optimizer.zero_grad(self.set_to_none)
        F.cross_entropy(self.net(self.x), labels).backward()
        self.held += [p.grad for p in self.net.parameters()]

    def update(self, step):
        Run.reuses = step > 0
        self.optimizer.step()

    def step(self, step):
        self.backward(step)
        self.update(step)

    def end(self):
        return torch.cat([p.detach().flatten().double() for p in self.net.parameters()])

    def repeated(self):
        prepared = self.optimizer._curvature.last_plan[0]._products._prepared
        return None if prepared is None else prepared[0]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """Have steps run kernels on this machine once they reuse a curvature: other tests are of the refresh."""
    monkeypatch.setattr(dispatch, "is_on_gpu", lambda x: HARDWARE or Run.reuses)


def assert_as_exact_as_torch(runs):
    """Of the same run in double precision, on the kernels and in PyTorch's code: the second errs at most twice as much.

    The errors after some steps are sums of all steps' roundings.
    """
    exact, on_kernels, in_torch = (run.end() for run in runs)
    assert (on_kernels - exact).norm() <= 2 * (in_torch - exact).norm()


def runs_of(model, **options):
    return [
        Run(model, on_kernels, dtype, **options)
        for on_kernels, dtype in ((False, torch.float64), (True, torch.float32), (False, torch.float32))
    ]


@pytest.mark.parametrize(("model", "options"), CASES)
def test_steps_are_those_of_torch_code(model, options):
    runs = runs_of(model, **OPTIONS[options])
    for run in runs:
        for step in range(STEPS):
            run.step(step)
    assert (runs[1].repeated() is None) == (options == "scaled, SPRING")  # its directions go elsewhere than its V
    assert_as_exact_as_torch(runs)


def with_factors(optimizer, changed):
    """Change the factors of all weights that an optimizer has factored."""
    curvature = optimizer._curvature
    curvature.last_plan.clear()
    for layer in curvature.jacobians.values():
        for name, one in layer.items():
            if isinstance(one, Factored):
                a, g = one.factors.a, one.factors.g_NGPO
                a = replace(a, x_NCHW=changed(a.x_NCHW)) if isinstance(a, ConvInput) else changed(a)
                layer[name] = replace(one, factors=OuterProducts(a, changed(g)))


def permuted(x):
    """The same entries, with samples in the place of positions in memory."""
    return x.transpose(0, 2).contiguous().transpose(0, 2)


@pytest.mark.parametrize("model", ["tokens", "convolutional"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, permuted])
def test_half_precision_factors_are_widened_in_each_step(model, layout):
    ends = []
    for changed in (lambda x: layout(x.half()), lambda x: x.half().float()):
        run = Run(model, on_kernels=True, representation="factored")
        run.step(0)
        with_factors(run.optimizer, changed)
        for step in range(1, STEPS):
            run.step(step)
        ends.append(run.end())
        assert run.repeated() is not None
    assert torch.equal(*ends)


def in_place(run, step):
    run.set_to_none = False


def other_data(run, step):
    for parameter in run.net.parameters():
        parameter.data = parameter.data.clone()


def channels_last_grads(run, step):
    for parameter in run.net.parameters():
        if parameter.dim() == 4:
            parameter.grad = parameter.grad.to(memory_format=torch.channels_last)


def offset_grads(run, step):
    for parameter in run.net.parameters():
        storage = torch.zeros(parameter.numel() + 1, dtype=parameter.dtype, device=DEVICE)
        parameter.grad = storage[1:].view(parameter.shape).copy_(parameter.grad)


def captured(run, step):
    launches._is_capturing = lambda device: step == STEPS


# What happens between the backward and each step, once a step has repeated the launches of another.
EVENTS = {
    "gradients in place": in_place,
    "parameters' data": other_data,
    "channels-last gradients": channels_last_grads,
    "unaligned gradients": offset_grads,
    "a captured step": captured,
}


@pytest.mark.parametrize("event", EVENTS)
def test_steps_follow_every_change(event, monkeypatch):
    monkeypatch.setattr(launches, "_is_capturing", lambda device: False)
    runs = runs_of("convolutional")
    for run in runs:
        for step in range(STEPS + 3):
            run.backward(step)
            if step >= STEPS:
                EVENTS[event](run, step)
            run.update(step)
    assert_as_exact_as_torch(runs)


def test_a_step_writes_once_and_adds_once(monkeypatch):
    run = Run("linear", on_kernels=True, representation="factored")
    started, start = [], Repeated.start

    def noted(self, *arguments):
        started.append(self._config.kernel.fn.__name__.strip("_"))
        return start(self, *arguments)

    for step in range(STEPS):
        run.backward(step)
        started.clear()
        monkeypatch.setattr(Repeated, "start", noted)
        run.update(step)
        monkeypatch.setattr(Repeated, "start", start)
    kernels = [
        *("change", "project", "project_rows", "add_partial_sums", "solve"),
        *("expand_update", "expand_rows_update"),
    ]
    assert started == [f"{name}_kernel" for name in kernels]


def test_a_captured_step_repeats_nothing(monkeypatch):
    """A replay must write the tables that it reads, and a later step would not know that it did."""
    run = Run("linear", on_kernels=True)
    for step in range(STEPS):
        run.step(step)
    monkeypatch.setattr(launches, "_is_capturing", lambda device: True)
    monkeypatch.setattr(pointer_table.Addresses, "become", None)
    made, make = [], pointer_table.Table.__init__
    monkeypatch.setattr(pointer_table.Table, "__init__", lambda *given: made.append(make(*given)))
    run.step(STEPS)
    assert made


def test_an_interrupted_write_is_made_again(monkeypatch):
    runs = runs_of("linear")
    for run in runs:
        for step in range(STEPS):
            run.step(step)
    change = pointer_table._change

    def interrupted(codes, table_FE):
        change([code if at % 2 == 0 else pointer_table._CODE_OF_ZERO for at, code in enumerate(codes)], table_FE)
        raise KeyboardInterrupt

    runs[1].backward(STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(pointer_table, "_change", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs[1].optimizer.step()
    for run in runs:
        run.step(STEPS)
    assert_as_exact_as_torch(runs)


def test_a_weight_whose_op_is_torch_code_repeats_nothing():
    runs = runs_of("linear")
    for run in runs:
        run.optimizer._ops_for = lambda overrides=(): ops_for("auto", {*overrides, "project_rows"})
        run.optimizer._ops = run.optimizer._ops_for()
        for step in range(STEPS):
            run.step(step)
    _, others = runs[1].optimizer._curvature.last_plan[0]._products._prepared
    assert len(others) == 1
    assert_as_exact_as_torch(runs)


def test_a_step_keeps_neither_gradients_nor_temporaries(monkeypatch):
    run, read = Run("convolutional", on_kernels=True, representation="factored"), []
    follow = RepeatedProducts.follow

    def noted(self, grads, scaled=None):
        made = follow(self, grads, scaled)
        read.extend(weakref.ref(x) for tensors in made for x in tensors)
        return made

    monkeypatch.setattr(RepeatedProducts, "follow", noted)
    for step in range(STEPS):
        run.step(step)
    plan = run.optimizer._curvature.last_plan[0]
    plan.curvature_along([p.grad for p in run.net.parameters()])
    # Both convolutions have patches and output gradients, in two steps and along a direction.
    assert len(read) == 3 * 2 * 2
    run.held.clear()
    grads = [weakref.ref(p.grad) for p in run.net.parameters()]
    run.optimizer.zero_grad()
    assert not any(tensor() is not None for tensor in (*read, *grads))


def test_steps_and_directions_alternate_with_scaled_damping():
    """Products along a direction, as of adapted damping, take no D⁻¹ V: launches of a step do not fit them."""
    runs = runs_of("convolutional", **OPTIONS["scaled"])
    for run in runs:
        for step in range(STEPS + 2):
            run.step(step)
            if step in (0, 1, STEPS):
                plan = run.optimizer._curvature.last_plan[0]
                plan.curvature_along([p.grad for p in run.net.parameters()])
    assert_as_exact_as_torch(runs)


def test_a_convolution_repeats_its_launches_in_every_layout():
    run = Run("channels-last", on_kernels=True, representation="factored")
    run.net.to(memory_format=torch.channels_last)
    for step in range(STEPS):
        run.step(step)
    repeated, others = run.optimizer._curvature.last_plan[0]._products._prepared
    assert repeated._temporaries
    assert others == []


def test_autograd_sees_that_parameters_change(monkeypatch):
    run = Run("linear", on_kernels=True)
    for step in range(STEPS):
        run.step(step)
    loss = run.net(run.x).square().sum()
    run.backward(STEPS)
    versions = [p._version for p in run.net.parameters()]
    monkeypatch.setattr(launches.Launch, "start", lambda launch: None)  # the interpreter itself counts versions
    run.update(STEPS)
    assert all(p._version > version for p, version in zip(run.net.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

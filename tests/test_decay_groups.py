"""A layer's parameters may be in several groups: every step equals the dense one with each parameter's own settings."""

import copy

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import LevenbergMarquardt, TENGraD, compile_train_step
from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC

TOLERANCE, SAMPLES, REFRESH, DAMPING = 1e-9, 7, 2, 0.03
USUAL = {"lr": 0.05, "momentum": 0.9, "nesterov": False, "spring": 0.0, "weight_decay": 0.0}
USUAL |= {"decoupled_weight_decay": False, "maximize": False}
PLAIN = {"scaling": "none", "trust_region": None, "fisher": "empirical", "refresh_every": REFRESH}


def perceptron():
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        x = x.view(-1, 3, 2).repeat(1, 1, 2)
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


MODELS = {
    "perceptron": perceptron,
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ),
    "attention": Attention,
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
}
ONE_BLOCK = {"blocks": "network"}
REGION = {"trust_region": 1e-4}

# The model; what the group of weights and the group of biases and norms have of their own; the optimizer's settings.
CASES = {
    "decay": ("perceptron", {"weight_decay": 0.1}, {}, {}),
    "decay, convolution": ("convolution", {"weight_decay": 0.1}, {}, REGION),
    "decay, attention": ("attention", {"weight_decay": 0.1}, {}, REGION),
    "decay, weight norm": ("weight norm", {"weight_decay": 0.1}, {}, REGION),
    "decay, one block": ("perceptron", {"weight_decay": 0.1}, {}, ONE_BLOCK | REGION),
    "decoupled decay": ("perceptron", {"weight_decay": 0.1, "decoupled_weight_decay": True}, {}, REGION),
    "two rates": ("convolution", {"lr": 0.5}, {"lr": 0.01}, {}),
    "two rates, trust region": ("perceptron", {"lr": 0.5}, {"lr": 0.01}, REGION),
    "two rates the other way round, trust region": ("convolution", {"lr": 0.01}, {"lr": 2.0}, REGION),
    "two rates, attention, trust region": ("attention", {"lr": 1.0}, {"lr": 0.03}, REGION),
    "two rates, one block, trust region": ("perceptron", {"lr": 0.5}, {"lr": 0.01}, REGION | ONE_BLOCK),
    "no rate for biases, trust region": ("perceptron", {"lr": 0.5}, {"lr": 0.0}, REGION),
    "two momenta": ("convolution", {"momentum": 0.9}, {"momentum": 0.0}, REGION),
    "Nesterov for some": ("perceptron", {"nesterov": True}, {"nesterov": False}, REGION),
    "two springs": ("perceptron", {"spring": 0.9}, {"spring": 0.3}, REGION),
    "two springs and rates, one block": (
        *("convolution", {"spring": 0.9, "lr": 0.5}, {"spring": 0.3, "lr": 0.01}),
        REGION | ONE_BLOCK,
    ),
    "a spring beside momentum and decay": ("perceptron", {"spring": 0.9}, {"weight_decay": 0.1}, REGION),
    "both signs, one block": ("perceptron", {"maximize": True}, {"maximize": False}, REGION | ONE_BLOCK),
}
COMPILED = ["decay, one block", "two rates, trust region", "two springs and rates, one block", "Nesterov for some"]


def groups_of(model, weights, others):
    parts = [[p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False)]
    return [{"params": part, **own} for part, own in zip(parts, (weights, others), strict=True)]


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (SAMPLES,), generator=generator)


class DenseSteps:
    """The formulas M4, M6, M13 and M14 with F as a matrix, and the settings of each parameter by its name."""

    def __init__(self, model, blocks, settings, region):
        self.model, self.blocks, self.settings, self.region = model, blocks, settings, region
        self.momenta = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def refresh(self, x, y):
        rows = dense.sample_gradients(self.model, x, y, F.cross_entropy)
        j = [torch.cat([rows[name].flatten(1) for name in block], 1) for block in self.blocks]
        self.damped = [j_NK.mT @ j_NK / len(j_NK) + DAMPING * torch.eye(j_NK.shape[1]).double() for j_NK in j]

    def directions(self, v):
        found, norm = {}, 0.0
        for block, damped in zip(self.blocks, self.damped, strict=True):
            d = torch.linalg.solve(damped, torch.cat([v[name].flatten() for name in block]))
            parts = d.split([v[name].numel() for name in block])
            delta = torch.cat([self.settings[name]["lr"] * part for name, part in zip(block, parts, strict=True)])
            norm += delta @ damped @ delta
            found |= {name: part.view_as(v[name]) for name, part in zip(block, parts, strict=True)}
        scale = 1.0 if self.region is None else min(1.0, (self.region / norm).sqrt().item())
        return {name: scale * d for name, d in found.items()}

    @torch.no_grad()
    def step(self, grads):
        v = {}
        for name, grad in grads.items():
            own = self.settings[name]
            v[name] = (-grad if own["maximize"] else grad) + DAMPING * own["spring"] * self.momenta[name]
        for name, d in self.directions(v).items():
            own, theta, m = self.settings[name], self.model.get_parameter(name), self.momenta[name]
            mu = 0.0 if own["spring"] else own["momentum"]
            coupled, shrink = (0.0, 1.0)[:: 1 if own["decoupled_weight_decay"] else -1]
            along = d + coupled * own["weight_decay"] * theta
            m.mul_(mu).add_(along)
            theta.mul_(1 - own["lr"] * shrink * own["weight_decay"])
            theta.sub_(own["lr"] * (along + mu * m if own["nesterov"] else m))


def prepared(case):
    """Return a model, its optimizer, and the dense steps of a twin."""
    name, weights, others, options = CASES[case]
    torch.manual_seed(0)
    model = MODELS[name]().double()
    twin = copy.deepcopy(model)
    optimizer = TENGraD(
        model, groups_of(model, weights, others), damping=DAMPING, **{**USUAL, "nesterov": False}, **PLAIN | options
    )
    names = [name for name, _ in twin.named_parameters()]
    blocks = [names] if "blocks" in options else dense.blocks_of(twin)
    settings = {name: USUAL | (weights if p.dim() > 1 else others) for name, p in twin.named_parameters()}
    return model, optimizer, DenseSteps(twin, blocks, settings, (PLAIN | options)["trust_region"])


def gradients(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def take_steps(model, optimizer, oracle, compiled, events=None):
    torch.compiler.reset()  # each test compiles anew
    step_ours = compile_train_step(model, F.cross_entropy, optimizer, backend="aot_eager") if compiled else None
    for step in range(6):
        x, y = batch(step)
        if events is not None:
            events(step, optimizer, oracle)
        if step % REFRESH == 0:
            oracle.refresh(x, y)
        if step_ours is not None:
            step_ours(x, y)
        else:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        oracle.step(gradients(oracle.model, x, y))
    assert step_ours is None or step_ours.why_plain is None
    return dense.relative_error(dict(model.named_parameters()), dict(oracle.model.named_parameters()))


@pytest.mark.parametrize(
    ("case", "compiled"),
    [*((case, False) for case in CASES), *((case, True) for case in COMPILED)],
    ids=[*CASES, *(f"{case}, compiled" for case in COMPILED)],
)
def test_steps_equal_the_dense_ones(case, compiled):
    assert take_steps(*prepared(case), compiled) < TOLERANCE


PLAIN_AND_COMPILED = [pytest.param(False, id="plain"), pytest.param(True, id="compiled", marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiled", PLAIN_AND_COMPILED)
@pytest.mark.parametrize("case", ["decay, convolution", "two rates, trust region"])
def test_rates_may_come_apart_and_meet_between_two_steps(case, compiled):
    """A schedule of one group only: whether a block has one rate is not a constant of the curvature."""

    def events(step, optimizer, oracle):
        rates = {0: (0.2, 0.2), 1: (0.2, 0.01), 2: (0.3, 0.01), 3: (0.1, 0.1), 5: (0.02, 0.4)}.get(step)
        for group, rate in zip(optimizer.param_groups, rates or (), strict=False):
            group["lr"] = rate
        for name, own in oracle.settings.items():
            if rates is not None:
                own["lr"] = rates[oracle.model.get_parameter(name).dim() < 2]

    assert take_steps(*prepared(case), compiled, events) < TOLERANCE


@pytest.mark.parametrize("compiled", PLAIN_AND_COMPILED)
@pytest.mark.parametrize("options", [{}, ONE_BLOCK], ids=["layers", "one block"])
@pytest.mark.parametrize("first", ["weights", "others"])
def test_an_added_group_completes_the_blocks(first, options, compiled):
    """Biases and norms, or weights, that are added later are solved together with what is there."""
    torch.manual_seed(0)
    model = perceptron().double()
    twin = copy.deepcopy(model)
    own = {"weights": {"weight_decay": 0.1}, "others": {"lr": 0.01}}
    groups = dict(zip(own, groups_of(model, *own.values()), strict=True))
    settings = {name: USUAL | own["weights" if p.dim() > 1 else "others"] for name, p in twin.named_parameters()}
    blocks = [list(settings)] if options else dense.blocks_of(twin)
    start = [
        [name for name in block if (twin.get_parameter(name).dim() > 1) == (first == "weights")] for block in blocks
    ]
    optimizer = TENGraD(model, [groups.pop(first)], damping=DAMPING, **USUAL, **PLAIN | REGION | options)
    oracle = DenseSteps(twin, [block for block in start if block], settings, REGION["trust_region"])

    def events(step, optimizer, oracle):
        if step == REFRESH:
            optimizer.add_param_group(*groups.values())
            oracle.blocks = blocks

    assert take_steps(model, optimizer, oracle, compiled, events) < TOLERANCE


LM, OTHER_LM = LevenbergMarquardt(), LevenbergMarquardt(increase=2.0)
LEVEL = {"trust_region": None}
# An optimizer, what the group of biases has of its own, settings of the optimizer, and what the refusal says.
REFUSED = {
    "damping": (TENGraD, {"damping": 0.5}, {}, "block '0' .* need one damping, got 0.5, 10.0"),
    "damping, one block": (TENGraD, {"damping": 0.5}, ONE_BLOCK, "block 'network' .* need one damping, got 0.5, 10.0"),
    "schedules of the damping": (TENGraD, {"damping": lambda step: 0.5}, {}, "need one damping, got 0.5, 10.0"),
    "one adapted damping": (TENGraD, {"damping": "lm"}, {"damping": 0.1, **LEVEL}, "adapted in different ways"),
    "two adaptations": (TENGraD, {"damping": OTHER_LM}, {"damping": LM, **LEVEL}, "adapted in different ways"),
    "adapted, both signs": (TENGraD, {"maximize": True}, {"damping": "lm", **LEVEL}, "the same maximize"),
    "K-FAC, damping": (KFAC, {"damping": 0.5}, {}, "need one damping, got 0.03, 0.5"),
    "EKFAC, damping": (EKFAC, {"damping": 0.5}, {}, "need one damping, got 0.03, 0.5"),
    "K-BFGS, damping": (KBFGS, {"damping": 0.5}, {}, "need one damping, got 0.03, 0.5"),
    "K-BFGS, both signs": (KBFGS, {"maximize": True}, {}, "one Hessian for all parameters of '0'.* the same maximize"),
    "K-BFGS(L), both signs": (KBFGSL, {"maximize": True}, {}, "the same maximize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_block_needs_together_is_refused_at_once(case):
    make, biases, options, message = REFUSED[case]
    model = perceptron()
    with pytest.raises(ValueError, match=message):
        make(model, groups_of(model, {}, biases), **options)
    weights, others = groups_of(model, {}, biases)
    optimizer = make(model, [weights], **options)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(others)
    assert len(optimizer.param_groups) == len(optimizer._damping_schedules) == 1


@pytest.mark.parametrize("make", [TENGraD, KFAC, EKFAC])
def test_a_damping_that_comes_apart_later_is_refused_before_the_step(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = make(model, groups_of(model, {}, {"lr": 0.1}), refresh_every=1)
    gradients(model, *batch(0))
    optimizer.param_groups[1]["damping"] = 0.5
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="need one damping"):
        optimizer.step()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


BASELINES = {"kfac": KFAC, "ekfac": EKFAC, "kbfgs": KBFGS, "kbfgsl": KBFGSL}


def baseline_step(make, weights, others, kl_clip=None):
    """Return what one step of a baseline subtracted from each parameter, with the model before it and the optimizer."""
    torch.manual_seed(0)
    model = perceptron().double()
    before, (x, y) = copy.deepcopy(model), batch(0)
    bound = {"kl_clip": kl_clip} if make in (KFAC, EKFAC) else {}
    optimizer = make(model, groups_of(model, weights, others), lr=0.1, momentum=0.0, seed=0, **bound)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="no Kronecker factors"):
        optimizer.step(closure)
    taken = {name: p - model.get_parameter(name) for name, p in before.named_parameters()}
    return taken, before, optimizer


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_take_each_parameters_own_settings(baseline):
    make = BASELINES[baseline]
    free, before, _ = baseline_step(make, {}, {})
    ours, _, _ = baseline_step(make, {"weight_decay": 0.3}, {"lr": 0.7})
    for name, p in before.named_parameters():
        wanted = free[name] + 0.1 * 0.3 * p if p.dim() > 1 else 7 * free[name]
        assert torch.allclose(ours[name], wanted, rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("rates", [(0.5, 0.02), (0.02, 0.5), (0.1, 0.1)])
@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_kl_clip_bounds_the_scaled_step(make, rates):
    """Σ δᵀ F δ with δ = lr d, where F is the dense inverse of what preconditions: M15."""
    groups = [{"lr": rate} for rate in rates]
    free, _, optimizer = baseline_step(make, *groups)
    total = 0.0
    for layer, state in optimizer._curvature.layers.items():
        step = torch.cat([free[f"{layer.module}.weight"], free[f"{layer.module}.bias"][:, None]], 1)
        eye = torch.eye(step.numel(), dtype=step.dtype).view(-1, 1, *step.shape)
        fisher = torch.linalg.inv(torch.stack([state.solve(one).flatten() for one in eye], 1))
        total += step.flatten() @ fisher @ step.flatten()
    clipped, _, _ = baseline_step(make, *groups, kl_clip=0.09 * total.item())
    factored = [f"{layer.module}.{name}" for layer in optimizer._curvature.layers for name in layer.param_names]
    assert len(factored) == 4
    for name, step in free.items():
        assert torch.allclose(clipped[name], (0.3 if name in factored else 1.0) * step, rtol=1e-7, atol=1e-14), name

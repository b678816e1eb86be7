"""The rivals as torch optimizers: state, settings, what they do not cover, profiles, and that they learn."""

import copy
import io
import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from tengrad_triton import PerSampleGrads, TENGraD, canonical, compile_train_step
from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC

# Each optimizer, with settings that make every schedule of its own fall into an interval.
RIVALS = {
    "kfac": (KFAC, {"factors_every": 2}),
    "ekfac": (EKFAC, {"rescale_every": 2, "factors_every": 2}),
    "kbfgs": (KBFGS, {}),
    "kbfgsl": (KBFGSL, {"memory": 2}),
}


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 8), nn.ReLU()),
        nn.Linear(8, 4),
    )


def batch(seed=0, samples=10):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, 6, 6, generator=generator), torch.randint(4, (samples,), generator=generator)


def closure_of(model, optimizer, x, y, sign=1):
    def closure():
        optimizer.zero_grad()
        loss = sign * F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return closure


def take_steps(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.step(closure_of(model, optimizer, *batch(step)))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("pause", range(1, 7))
def test_state_dict_continues_bit_for_bit_in_mid_interval(rival, pause):
    make, own = RIVALS[rival]
    options = {"refresh_every": 3, "weight_decay": 0.01, **own}
    whole = small_model()
    take_steps(whole, make(whole, **options), 0, 8)

    model = small_model()
    optimizer = make(model, **options)
    take_steps(model, optimizer, 0, pause)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    torch.manual_seed(99)
    resumed = nn.Sequential(*(copy.deepcopy(layer) for layer in small_model()))
    resumed.load_state_dict(saved["model"])
    continued = make(resumed, seed=1, **options)
    continued.load_state_dict(saved["optimizer"])
    take_steps(resumed, continued, pause, 8)
    assert torch.equal(flat(resumed), flat(whole))


@pytest.mark.parametrize("rival", RIVALS)
def test_state_of_another_optimizer_or_model_is_refused(rival):
    make, own = RIVALS[rival]
    model = small_model()
    optimizer = make(model, **own)
    with pytest.raises(ValueError, match=f"expected a state_dict of {make.__name__} with '{rival}'"):
        optimizer.load_state_dict(TENGraD(model).state_dict())
    take_steps(model, optimizer, 0, 1)
    other = make(nn.Sequential(nn.Linear(36, 4)), **own)
    with pytest.raises(ValueError, match="saved for another model"):
        other.load_state_dict(optimizer.state_dict())
    assert other._curvature is None


# Bad settings: the optimizers, the arguments, the error, and what its message says.
ALL, FISHERS = tuple(RIVALS), ("kfac", "ekfac")
BAD = {
    "negative lr": (ALL, {"lr": -1.0}, ValueError, "lr must be at least 0"),
    "zero damping": (ALL, {"damping": 0.0}, ValueError, "damping must be positive, got 0.0"),
    "adaptive damping": (ALL, {"damping": "lm"}, ValueError, "'lm' is TENGraD's alone"),
    "momentum of one": (ALL, {"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
    "nesterov without momentum": (ALL, {"momentum": 0.0, "nesterov": True}, ValueError, "nesterov=True needs momentum"),
    "negative weight decay": (ALL, {"weight_decay": -1e-3}, ValueError, "weight_decay must be at least 0"),
    "refresh_every 0": (ALL, {"refresh_every": 0}, ValueError, "refresh_every must be at least 1, got 0"),
    "refresh_every 1.5": (ALL, {"refresh_every": 1.5}, TypeError, "refresh_every must be a whole number"),
    "stat_decay of one": (ALL, {"stat_decay": 1.0}, ValueError, r"stat_decay must be in \[0, 1\), got 1.0"),
    "unsupported": (ALL, {"unsupported": "skip"}, ValueError, "unsupported must be one of"),
    "kl_clip 0": (FISHERS, {"kl_clip": 0.0}, ValueError, "kl_clip must be positive, or None"),
    "factors_every 0": (FISHERS, {"factors_every": 0}, ValueError, "factors_every must be at least 1"),
    "fisher": (FISHERS, {"fisher": "true"}, ValueError, "fisher must be one of 'sampled', 'empirical', 'exact'"),
    "likelihood": (FISHERS, {"likelihood": "poisson"}, ValueError, "categorical, gaussian, bernoulli"),
    "fisher_samples 0": (FISHERS, {"fisher_samples": 0}, ValueError, "fisher_samples must be at least 1"),
    "draws": (FISHERS, {"fisher": "empirical", "fisher_samples": 2}, ValueError, "use fisher='sampled'"),
    "rescale_every 0": (("ekfac",), {"rescale_every": 0}, ValueError, "rescale_every must be at least 1"),
    "memory 0": (("kbfgsl",), {"memory": 0}, ValueError, "memory must be at least 1"),
}


@pytest.mark.parametrize(
    ("case", "rival"), [(case, rival) for case, (rivals, *_) in BAD.items() for rival in rivals]
)  # fmt: skip
def test_bad_settings(case, rival):
    _, arguments, error, message = BAD[case]
    model = small_model()
    with pytest.raises(error, match=message):
        RIVALS[rival][0](model, **arguments)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("rival", RIVALS)
def test_groups_have_their_own_settings(rival):
    make, own = RIVALS[rival]
    model = small_model()
    optimizer = make(model, [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[4:].parameters()}], **own)
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, 0, 2)
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"4.weight", "4.bias", "6.weight", "6.bias"}
    with pytest.raises(ValueError, match="spring is TENGraD's alone"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "spring": 0.5})


@pytest.mark.parametrize("rival", RIVALS)
def test_ascending_is_descending_on_the_negative_loss(rival):
    make, own = RIVALS[rival]
    models = [small_model().double(), small_model().double()]
    options = {"fisher": "empirical"} if rival in FISHERS else {}
    for model, sign in zip(models, (1, -1), strict=True):
        optimizer = make(model, maximize=sign < 0, **own, **options)
        for step in range(3):
            x, y = batch(step)
            optimizer.step(closure_of(model, optimizer, x.double(), y, sign))
    assert torch.allclose(flat(models[0]), flat(models[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rival", RIVALS)
def test_what_has_no_factors_takes_the_sgd_step_and_is_named(rival):
    make, own = RIVALS[rival]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    optimizer = make(model, lr=0.1, momentum=0.0, **own)
    before = model[2].weight.detach().clone()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    gradient = model[2].weight.grad.clone()
    with pytest.warns(UserWarning, match=r"2.weight \(no Kronecker factors\); 2.bias \(no Kronecker factors\)"):
        optimizer.step(closure_of(model, optimizer, x, y))
    assert torch.allclose(model[2].weight, before - 0.1 * gradient)
    rows = {row.parameter: row for row in optimizer.summary().parameters}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert {name for name, row in rows.items() if row.representation.startswith("sgd")} == {"2.weight", "2.bias"}
    assert rows["1.weight"].bytes > 0
    assert rows["1.bias"].representation == "with weight"
    optimizer.close()
    strict = make(model, unsupported="error", **own)
    with pytest.raises(ValueError, match="no Kronecker factors"):
        take_steps(model, strict, 0, 1)


@pytest.mark.parametrize("rival", RIVALS)
def test_a_rule_without_factors_is_not_enough(rival):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(36))

        def forward(self, x):
            return x * self.weight

    @canonical.register
    def _(layer: Scale, x: torch.Tensor, grad_y: torch.Tensor):
        return {"weight": PerSampleGrads(grad_y * x)}

    make, own = RIVALS[rival]
    model = nn.Sequential(nn.Flatten(), Scale(), nn.Linear(36, 4))
    optimizer = make(model, **own)
    with pytest.warns(UserWarning, match=r"1.weight \(no Kronecker factors\)"):
        take_steps(model, optimizer, 0, 1)
    take_steps(model, optimizer, 1, 2)  # which says nothing again
    rows = {row.parameter: row.representation for row in optimizer.summary().parameters}
    assert rows["1.weight"] == "sgd (no Kronecker factors)"


@pytest.mark.parametrize("rival", ["kbfgs", "kbfgsl"])
def test_a_refresh_needs_a_closure_and_evaluates_it_twice(rival):
    make, own = RIVALS[rival]
    model = small_model()
    optimizer = make(model, refresh_every=3, **own)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    before = flat(model)
    with pytest.raises(RuntimeError, match=r"call step\(closure\)"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    calls = itertools.count()
    closure = closure_of(model, optimizer, x, y)
    counts = []
    for _ in range(4):
        start = next(calls)
        optimizer.step(lambda: (next(calls), closure())[1])
        counts.append(next(calls) - start - 1)
    assert counts == [2, 1, 1, 2]
    optimizer.step()  # in between no closure is needed


def test_a_factor_that_is_not_positive_definite_is_survived_and_counted():
    """Equal inputs of great size make A singular, and the damping is far below its rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    optimizer = KFAC(model, lr=1e-3, damping=1e-30, refresh_every=1)
    x, y = torch.full((40, 6), 1e3), torch.arange(40) % 4
    for _ in range(2):
        optimizer.step(closure_of(model, optimizer, x, y))
    assert optimizer.summary().failures > 0
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("rival", RIVALS)
def test_the_compiled_step_is_the_same_and_is_compiled_once(rival):
    make, own = RIVALS[rival]
    plain, compiled = small_model(), small_model()
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for model in (plain, compiled):
        optimizer = make(model, lr=0.01, refresh_every=2, seed=0, **own)
        if model is compiled:
            optimizer.compile_step(backend=counter)
        take_steps(model, optimizer, 0, 6)
        optimizer.param_groups[0]["lr"] = 0.02
        take_steps(model, optimizer, 6, 8)
    assert torch.allclose(flat(compiled), flat(plain), rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1


def test_tengrads_compiled_step_is_not_for_rivals():
    model = small_model()
    with pytest.raises(TypeError, match=r"must be a TENGraD, got KFAC: .* compile_step"):
        compile_train_step(model, F.cross_entropy, KFAC(model))


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11's own, of every profile
@pytest.mark.parametrize("make", [TENGraD, KFAC, EKFAC, KBFGS, KBFGSL])
def test_a_profile_shows_the_phases(make):
    model = small_model()
    optimizer = make(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        take_steps(model, optimizer, 0, 1)
    assert {"capture", "curvature", "solve", "update"} <= {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("rival", RIVALS)
def test_learns_digits(rival):
    from sklearn.datasets import load_digits

    make, own = RIVALS[rival]
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )
    optimizer = make(model, lr=0.03, refresh_every=5, **own)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:300], order[300:]

    def accuracy():
        with torch.no_grad():
            return (model(x[held]).argmax(1) == y[held]).double().mean().item()

    start = accuracy()
    for part in rest.split(64):
        optimizer.step(closure_of(model, optimizer, x[part], y[part]))
    assert start < 0.3
    assert accuracy() > 0.6

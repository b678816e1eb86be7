"""The baselines as torch optimizers: state, parameters without factors, closures, compiled steps, and learning."""

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from baseline_cases import BASELINES, closure_of, take_steps
from small_conv import batch, flat, resumed_at, small_model
from torch import nn

from tengrad_triton import PerSampleGrads, TENGraD, canonical, compile_train_step
from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC


def with_intervals(baseline):
    make, own = BASELINES[baseline]
    return make, {"refresh_every": 3, "weight_decay": 0.01, **own}


@pytest.fixture(scope="module")
def uninterrupted():
    """The parameters after eight steps, for each baseline."""
    results = {}
    for baseline in BASELINES:
        make, options = with_intervals(baseline)
        model = small_model()
        take_steps(model, make(model, **options), 0, 8)
        results[baseline] = flat(model)
    return results


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("pause", range(1, 7))
def test_state_dict_continues_bit_for_bit_in_mid_interval(baseline, pause, uninterrupted):
    resumed = resumed_at(pause, *with_intervals(baseline), take_steps)
    assert torch.equal(flat(resumed), uninterrupted[baseline])


@pytest.mark.parametrize("baseline", BASELINES)
def test_state_of_another_optimizer_or_model_is_refused(baseline):
    make, own = BASELINES[baseline]
    model = small_model()
    optimizer = make(model, **own)
    with pytest.raises(ValueError, match=f"expected a state_dict of {make.__name__}, with an entry '{baseline}'"):
        optimizer.load_state_dict(TENGraD(model).state_dict())
    take_steps(model, optimizer, 0, 1)
    other = make(nn.Sequential(nn.Linear(36, 4)), **own)
    with pytest.raises(ValueError, match="saved for another model"):
        other.load_state_dict(optimizer.state_dict())
    assert other._curvature is None


@pytest.mark.parametrize("baseline", BASELINES)
def test_what_has_no_factors_takes_the_sgd_step_and_is_named(baseline):
    make, own = BASELINES[baseline]
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
    summary = {one.parameter: one for one in optimizer.summary().parameters}
    assert list(summary) == [name for name, _ in model.named_parameters()]
    assert {name for name, one in summary.items() if one.representation.startswith("sgd")} == {"2.weight", "2.bias"}
    assert summary["1.weight"].bytes > 0
    assert summary["1.bias"].representation == "with weight"
    optimizer.close()
    strict = make(model, unsupported="error", **own)
    with pytest.raises(ValueError, match="no Kronecker factors"):
        take_steps(model, strict, 0, 1)


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_rule_without_factors_is_not_enough(baseline):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(36))

        def forward(self, x):
            return x * self.weight

    @canonical.register
    def _(layer: Scale, x: torch.Tensor, grad_y: torch.Tensor):
        return {"weight": PerSampleGrads(grad_y * x)}

    make, own = BASELINES[baseline]
    model = nn.Sequential(nn.Flatten(), Scale(), nn.Linear(36, 4))
    optimizer = make(model, **own)
    with pytest.warns(UserWarning, match=r"1.weight \(no Kronecker factors\)"):
        take_steps(model, optimizer, 0, 1)
    take_steps(model, optimizer, 1, 2)  # no second warning
    kept = {one.parameter: one.representation for one in optimizer.summary().parameters}
    assert kept["1.weight"] == "sgd (no Kronecker factors)"


@pytest.mark.parametrize("baseline", ["kbfgs", "kbfgsl"])
def test_a_refresh_needs_a_closure_and_evaluates_it_twice(baseline):
    make, own = BASELINES[baseline]
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


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_compiled_step_is_the_same_and_is_compiled_once(baseline):
    make, own = BASELINES[baseline]
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


def test_tengrads_compiled_step_takes_no_baseline():
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


@pytest.mark.parametrize("baseline", BASELINES)
def test_learns_digits(baseline):
    from sklearn.datasets import load_digits

    make, own = BASELINES[baseline]
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

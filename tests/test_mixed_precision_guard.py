"""Where rounding would decide a step, the damping is the least one that keeps it small, and everybody can see that."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.curvature import woodbury
from tengrad_triton.curvature.woodbury import FLOAT32_ERROR, MARGIN, TF32_ERROR
from tengrad_triton.optim.state.packed import packed_of, unpacked_of

SAMPLES = 64
LEAST = MARGIN * FLOAT32_ERROR * math.sqrt(SAMPLES)
RELATIVE = {"relative_damping": True, "scaling": "none", "trust_region": None, "momentum": 0.0, "refresh_every": 1}
DRAWN = torch.Generator().manual_seed(0)
X = 3 * torch.randn(SAMPLES, 60, generator=DRAWN)
Y = torch.randint(10, (SAMPLES,), generator=DRAWN)
KINDS = {
    "alike": lambda j: j,
    "one direction": lambda j: j[:1].abs() * (1 + 1e-3 * j),
    "positive": torch.abs,
    "many scales": lambda j: j * torch.logspace(0, -3, len(j))[:, None],
}


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 10)).to(dtype)


def stepped(dtype=torch.float32, steps=1, compiled=False, **options):
    """A model and its optimizer after some steps."""
    model = model_of(dtype)
    optimizer = TENGraD(model, **{"lr": 0.1, "seed": 0, "fisher": "empirical", **RELATIVE, **options})
    step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager") if compiled else None
    for _ in range(steps):
        if step is not None:
            step(X.to(dtype), Y)
            continue
        optimizer.zero_grad()
        F.cross_entropy(model(X.to(dtype)), Y).backward()
        optimizer.step()
    return model, optimizer


def moved(model):
    before = torch.cat([p.detach().double().flatten() for p in model_of().parameters()])
    return torch.cat([p.detach().double().flatten() for p in model.parameters()]) - before


@pytest.mark.parametrize("samples", [64, 512, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_float32_is_at_most_as_declared(kind, samples):
    """That of K and of its factors together; the bound of the spectral norm is a Frobenius norm over the trace."""
    j = KINDS[kind](torch.randn(samples, 4000, generator=torch.Generator().manual_seed(samples)))
    k, exact = j @ j.mT, j.double() @ j.double().mT
    shift = MARGIN * FLOAT32_ERROR * math.sqrt(samples) * exact.trace()
    c = torch.linalg.cholesky(k + shift.float() * torch.eye(samples)).double()
    off = c @ c.mT - shift * torch.eye(samples) - exact
    assert torch.linalg.matrix_norm(off, 2) <= FLOAT32_ERROR * math.sqrt(samples) * exact.trace()


@pytest.mark.filterwarnings("ignore:block '")
@pytest.mark.parametrize("scaling", ["none", "kronecker"])
@pytest.mark.parametrize("damping", [1e-4, 2 * LEAST, LEAST / 2, 1e-9, 1e-30])
def test_the_damping_is_the_one_asked_for_or_the_least(damping, scaling):
    _, optimizer = stepped(damping=damping, scaling=scaling)
    stats, curvature = optimizer.stats, optimizer._curvature
    layers = curvature.jacobians.values()
    traces = [
        sum(float(one.for_gram().explicit_rows().double().square().sum()) for one in layer.values()) for layer in layers
    ]
    for (name, used), trace in zip(stats.damping.items(), traces, strict=True):
        mean = trace / SAMPLES
        assert used == pytest.approx(max(damping * max(1.0, mean), LEAST * mean), rel=1e-5)
        if damping > LEAST:
            assert name not in stats.asked
        else:
            assert stats.asked[name] == pytest.approx(damping * max(1.0, mean), rel=1e-5)
    assert stats.failures == 0


@pytest.mark.filterwarnings("ignore:block '")
@pytest.mark.parametrize("representation", ["factored", "per_sample", "compressed"])
def test_the_step_is_that_of_float64_with_the_damping_that_stats_show(representation):
    options = {"representation": representation, "tol": 1e-6}
    model, optimizer = stepped(damping=1e-12, **options)
    used = optimizer.stats.damping
    groups = model_of(torch.float64)
    exact = TENGraD(
        groups,
        [{"params": groups[int(name)].parameters(), "damping": damping} for name, damping in used.items()],
        **{"lr": 0.1, "seed": 0, "fisher": "empirical", **RELATIVE, **options, "relative_damping": False},
    )
    F.cross_entropy(groups(X.double()), Y).backward()
    exact.step()
    assert exact.stats.damping == pytest.approx(used)
    assert (moved(model) - moved(groups)).norm() <= moved(groups).norm() / 7


@pytest.mark.filterwarnings("ignore:block '")
def test_with_scaled_damping_a_raised_damping_makes_no_longer_step():
    """α in front of (F + α D)⁻¹ stays the one that is asked for."""
    options = {"scaling": "kronecker", "clip_threshold": None, "relative_damping": False, "lr": 1e6}
    lengths = [moved(stepped(torch.float64, damping=damping, **options)[0]).norm() for damping in (1e-3, 1e-2)]
    assert lengths[0] < lengths[1]  # in float64 a larger damping makes longer ones
    model, optimizer = stepped(damping=1e-9, **options)
    assert optimizer.stats.asked.keys() == optimizer.stats.damping.keys()
    assert moved(model).norm() <= moved(stepped(torch.float64, damping=1e-9, **options)[0]).norm() * (1 + 1 / 7)


def test_one_warning_says_what_was_done():
    with pytest.warns(UserWarning, match="damping") as said:
        _, optimizer = stepped(damping=1e-9, steps=3)
    (message,) = {str(one.message) for one in said}
    assert len(said) == 1
    stats = optimizer.stats
    assert message.startswith("block '0' uses a damping of ")
    assert "the rounding of float32 products would decide the step" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = pickle.loads(pickle.dumps(optimizer))  # which was said by the original
        F.cross_entropy(copied.model(X), Y).backward()
        copied.step()
    assert stats.asked.keys() == copied.stats.asked.keys() == {"0", "2"}


@pytest.mark.parametrize("options", [{"dtype": torch.float64, "damping": 1e-12}, {"damping": 1e-4}])
def test_nothing_changes_where_rounding_is_small(options, monkeypatch):
    model, optimizer = stepped(**options)
    monkeypatch.setattr(woodbury, "MARGIN", 0)
    assert torch.equal(moved(model), moved(stepped(**options)[0]))
    assert optimizer.stats.asked == {}


def test_where_torch_multiplies_in_tf32_the_least_damping_is_that_of_tf32(monkeypatch):
    monkeypatch.setattr(woodbury, "rounds_products", lambda device: True)
    monkeypatch.setattr("tengrad_triton.optim.reports.rounds_products", lambda device: True)
    with pytest.warns(UserWarning, match=r"products in TF32, which torch\.set_float32_matmul_precision\('highest'\)"):
        _, optimizer = stepped(damping=1e-3)
    stats = optimizer.stats
    for name, used in stats.damping.items():
        assert used / stats.asked[name] == pytest.approx(MARGIN * TF32_ERROR / 1e-3, rel=1e-4)
    assert stepped(damping=MARGIN * TF32_ERROR * 1.01)[1].stats.asked == {}


@pytest.mark.filterwarnings("ignore:block '")
def test_a_compiled_refresh_uses_the_same_damping():
    options = {"damping": 1e-9, "lr": 1e-9, "fisher": "sampled", "refresh_every": 2, "steps": 3}
    plain, compiled = (stepped(**options, compiled=one) for one in (False, True))
    assert compiled[1].stats.asked.keys() == {"0", "2"}
    for name, used in compiled[1].stats.damping.items():
        assert used == pytest.approx(plain[1].stats.damping[name], rel=1e-3)


@pytest.mark.filterwarnings("ignore:block '")
def test_a_state_has_both_dampings():
    model, optimizer = stepped(damping=1e-9)
    other = TENGraD(model, fisher="empirical", damping=1e-9, **RELATIVE)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.stats.asked == optimizer.stats.asked != {}
    old = copy.deepcopy(optimizer.state_dict())
    own = old["state"][0]["tengrad"]
    curvature = unpacked_of(own["curvature"])
    del curvature["asked_L"]  # as of an earlier version
    own["curvature"] = packed_of(curvature, torch.device("cpu"))
    other.load_state_dict(old)
    assert other.stats.asked == {}

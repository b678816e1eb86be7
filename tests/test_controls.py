"""What bounds or changes a step (trust region, relative damping, SPRING, …), against dense computations."""

import copy
import math

import dense
import pytest
import torch
import torch.nn.functional as F
from one_step import (
    BLOCKS,
    CHOICES,
    DAMPING,
    LAYERS,
    LR,
    NETWORK,
    PLAIN,
    TOLERANCE,
    N,
    Recording,
    batch,
    drawn_rows,
    gradients,
    natural,
    one_step,
    small_model,
)

from tengrad_triton import Categorical, Growing, TENGraD
from tengrad_triton.curvature.choices import ops_for
from tengrad_triton.curvature.jacobians.per_sample import PerSample
from tengrad_triton.curvature.step import curvature_along
from tengrad_triton.curvature.woodbury import factor


@pytest.mark.parametrize("region", [1e-5, 1e3])
@pytest.mark.parametrize("blocks", ["layer", "network"])
def test_trust_region_bounds_the_fisher_norm_of_the_step(blocks, region):
    recording = Recording(Categorical())
    taken, model, grads, _, x = one_step(recording, trust_region=region, blocks=blocks)
    direction = natural(drawn_rows(model, x, recording.targets, recording.nll), grads, BLOCKS[blocks])
    quadratic = LR**2 * sum((direction[name] * grads[name]).sum() for name in grads)
    scale = min(1.0, math.sqrt(region / quadratic))
    assert (scale < 1) == (region < 1)
    assert dense.relative_error(taken, {name: scale * d for name, d in direction.items()}) < TOLERANCE


@pytest.mark.parametrize("factor", [1.0, 30.0])  # of the inputs
@pytest.mark.parametrize("blocks", BLOCKS)
def test_relative_damping_is_in_units_of_the_trace(blocks, factor):
    model, recording = small_model(), Recording(Categorical())
    twin, (x, y) = copy.deepcopy(model), batch(0)
    options = {**PLAIN, "relative_damping": True, "blocks": CHOICES[blocks], "likelihood": recording}
    optimizer = TENGraD(model, lr=LR, damping=DAMPING, momentum=0.0, **options)
    F.cross_entropy(model(factor * x), y).backward()
    optimizer.step()
    rows = drawn_rows(twin, factor * x, recording.targets, recording.nll)
    grads = gradients(twin, factor * x, y, F.cross_entropy)
    traces = [sum(rows[name].square().sum() for name in block).item() / N for block in BLOCKS[blocks]]
    expected = {}
    for block, trace in zip(BLOCKS[blocks], traces, strict=True):
        expected |= natural(rows, grads, [block], DAMPING * max(trace, 1.0))
    assert max(traces) > 1
    assert factor > 1 or blocks == "network" or min(traces) < 1
    taken = {name: (p - model.get_parameter(name)) / LR for name, p in twin.named_parameters()}
    assert dense.relative_error(taken, expected) < TOLERANCE


def test_spring_is_the_residual_formulation():
    """φ ← μ φ + (F + α I)⁻¹ (V − μ F φ) (Goldshlager, Abrahamsen, Lin 2024, equation 22), densely."""
    mu, model, recording = 0.8, small_model(), Recording(Categorical())
    twin = copy.deepcopy(model)
    optimizer = TENGraD(
        model, lr=LR, damping=DAMPING, spring=mu, refresh_every=1, blocks="network", likelihood=recording, **PLAIN
    )
    phi = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        rows = drawn_rows(twin, x, recording.targets[-1:], recording.nll)
        j = torch.cat([rows[name] for name in NETWORK[0]], 1)
        seen = j.mT @ (j @ torch.cat([phi[name].flatten() for name in NETWORK[0]])) / len(j)
        pieces = seen.split([phi[name].numel() for name in NETWORK[0]])
        grads = gradients(twin, x, y, F.cross_entropy)
        residual = {n: grads[n] - mu * f.view_as(grads[n]) for n, f in zip(NETWORK[0], pieces, strict=True)}
        solved = natural(rows, residual, NETWORK)
        optimizer.step()
        phi = {name: mu * phi[name] + solved[name] for name in phi}
        for name, direction in phi.items():
            twin.get_parameter(name).data.sub_(LR * direction)
        assert dense.relative_error(dict(model.named_parameters()), dict(twin.named_parameters())) < TOLERANCE


def test_maximize_goes_the_other_way():
    down, *_ = one_step(seed=2)
    up, *_ = one_step(seed=2, maximize=True)
    assert dense.relative_error(up, {name: -d for name, d in down.items()}) < TOLERANCE


def closure_of(model, optimizer, x, y, losses):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    return closure


@pytest.mark.parametrize(("lr", "grows"), [(0.05, False), (30.0, True)])
def test_levenberg_marquardt_follows_the_reduction_ratio(lr, grows):
    model, recording, losses = small_model(), Recording(Categorical()), []
    before = copy.deepcopy(model)
    optimizer = TENGraD(model, lr=lr, damping="lm", momentum=0.5, likelihood=recording, refresh_every=2, **PLAIN)
    x, y = batch(0)
    start = optimizer.param_groups[0]["damping"]
    optimizer.step(closure_of(model, optimizer, x, y, losses))
    assert len(losses) == 2  # before and after
    rows = drawn_rows(before, x, recording.targets[:1], recording.nll)
    grads = gradients(before, x, y, F.cross_entropy)
    delta = {
        n: new.detach() - old.detach()
        for (n, new), old in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    linear = sum((grads[name] * delta[name]).sum() for name in grads)
    parts = [sum(rows[name] @ delta[name].flatten() for name in block) for block in LAYERS]
    predicted = linear + sum(part.square().mean() for part in parts) / 2
    ratio = (losses[1] - losses[0]) / predicted.item()
    good = predicted < 0 and ratio > 0.75
    assert good != grows
    assert optimizer.param_groups[0]["damping"] == pytest.approx(start * (1.5 if grows else 2 / 3))
    optimizer.step(closure_of(model, optimizer, x, y, losses))
    assert len(losses) == 3  # a step that reuses the curvature evaluates once


@pytest.mark.parametrize("representation", ["factored", "per_sample", "compressed"])
def test_curvature_along_a_direction_is_that_of_the_rows(representation):
    """δᵀ F δ, which the quadratic model needs, from whatever a block keeps of J."""
    recording = Recording(Categorical())
    _, model, grads, optimizer, x = one_step(recording, representation=representation, tol=1e-6)
    rows = drawn_rows(model, x, recording.targets, recording.nll)
    actual = curvature_along(optimizer._curvature, *optimizer._targets())
    parts = [sum(rows[name] @ grads[name].flatten() for name in block) for block in LAYERS]
    assert actual.item() == pytest.approx(sum(part.square().mean() for part in parts).item(), rel=1e-4)


def test_levenberg_marquardt_needs_a_closure():
    model = small_model()
    optimizer = TENGraD(model, damping="lm")
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"call step\(closure\)"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_paper_settings_are_one_call_away():
    optimizer = TENGraD.paper(small_model(), lr=0.01)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert (optimizer.param_groups[0]["damping"], optimizer.refresh_every) == (0.1, 100)
    assert not optimizer.param_groups[0]["nesterov"]
    options = optimizer._options
    assert (options.relative_damping, options.trust_region, options.scaling) == (False, None, "none")


def test_settings_without_scaling_are_one_call_away():
    optimizer = TENGraD.unscaled(small_model(), momentum=0.5)
    group, options = optimizer.param_groups[0], optimizer._options
    assert (group["lr"], group["damping"], group["momentum"]) == (0.03, 0.003, 0.5)
    assert (options.relative_damping, options.trust_region, options.scaling) == (True, 3e-4, "none")
    assert optimizer.refresh_every == Growing(10)


@pytest.mark.parametrize("relative_damping", [False, True])
def test_each_failure_raises_the_damping_tenfold(relative_damping):
    torch.manual_seed(0)
    j_NK, ops, blocks = 10 * torch.randn(5, 9, dtype=torch.float64), ops_for("torch"), ["never", "once", "twice"]
    jacobians = {block: {"weight": PerSample(j_NK, ops, "samples")} for block in blocks}
    failures_L, epsilon_L = torch.arange(3, dtype=torch.float64), torch.full((3,), 0.01, dtype=torch.float64)
    by_name = {block: [block] for block in blocks}
    curvature = factor(jacobians, by_name, (5,), epsilon_L, failures_L, ops, {}, relative_damping, {}, {})
    unit = max(1, j_NK.square().sum().item() / 5) if relative_damping else 1
    torch.testing.assert_close(curvature.damping_L, 0.01 * unit * torch.tensor([1.0, 10, 100], dtype=torch.float64))
    assert torch.equal(curvature.failures_L, failures_L)
    assert curvature.history == (5,)

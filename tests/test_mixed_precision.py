"""Steps under autocast and a `GradScaler`: they are those of the same run without a scaler, whatever the scale."""

import copy

import pytest
import torch
import torch.nn.functional as F
from situation_loops import Doubled, registered
from torch import nn
from torch.utils._pytree import tree_flatten

from tengrad_triton import OuterProducts, PerSampleGrads, TENGraD

STEPS, SAMPLES = 7, 16
REFRESH_EVERY = 2
DRAWN = torch.Generator().manual_seed(0)
X = torch.randn(STEPS, SAMPLES, 6, generator=DRAWN)
LABELS = torch.randint(3, (STEPS, SAMPLES), generator=DRAWN)
VALUES = torch.randn(STEPS, SAMPLES, 3, generator=DRAWN)
BITS = torch.randint(2, (STEPS, SAMPLES, 3), generator=DRAWN).float()


FISHERS = {
    "sampled": ({}, F.cross_entropy, LABELS),
    "two draws": ({"fisher_samples": 2}, F.cross_entropy, LABELS),
    "fewer rows": ({"fisher_rows": 9}, F.cross_entropy, LABELS),
    "history": ({"history": 2}, F.cross_entropy, LABELS),
    "exact": ({"fisher": "exact"}, F.cross_entropy, LABELS),
    "empirical": ({"fisher": "empirical"}, F.cross_entropy, LABELS),
    "sampled, gaussian": ({"likelihood": "gaussian"}, F.mse_loss, VALUES),
    "Gauss-Newton": ({"likelihood": "gaussian", "fisher": "exact"}, F.mse_loss, VALUES),
    "bernoulli": ({"likelihood": "bernoulli"}, F.binary_cross_entropy_with_logits, BITS),
    "without scaling": ({"fisher": "empirical", "scaling": "none", "trust_region": 1e-3}, F.cross_entropy, LABELS),
}
"""Settings, the loss, and its targets."""


class Clipped:
    """A loop that divides the gradients by the scale and clips them before the step."""

    scales, micro_batches, most = (1024.0,), 1, 0.1


class Plain:
    scales, micro_batches, most = (1024.0,), 1, None


class Changing(Plain):
    scales = (8.0, 65536.0, 0.5)


class Accumulated(Plain):
    micro_batches = 2


class All(Clipped):
    scales, micro_batches = Changing.scales, 2


LOOPS = {loop.__name__: loop for loop in (Plain, Changing, Clipped, Accumulated, All)}


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def optimizer_of(model, settings):
    return TENGraD(model, **{"lr": 0.1, "refresh_every": REFRESH_EVERY, "seed": 0, **settings})


def step_of(model, optimizer, fisher, loop, number, scaler=None, autocast=None, factor=1.0):
    """Take a step of a loop, with a scaler if there is one."""
    _, loss_fn, targets = FISHERS[fisher]
    optimizer.zero_grad()
    for place in range(loop.micro_batches):
        part = slice(place, None, loop.micro_batches)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            output = model(X[number][part])
        loss = factor * loss_fn(output.float(), targets[number][part]) / loop.micro_batches
        (loss if scaler is None else scaler.scale(loss)).backward()
    if loop.most is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), loop.most)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update(loop.scales[(number + 1) % len(loop.scales)])


def run(fisher, loop, scaled, autocast=None, skipped=None):
    """Return the optimizer and its parameters after a run; ``skipped`` is a step that infinite gradients precede."""
    model = model_of()
    optimizer = optimizer_of(model, FISHERS[fisher][0])
    scaler = torch.amp.GradScaler("cpu", init_scale=loop.scales[0]) if scaled else None
    for number in range(STEPS):
        if number == skipped and scaler is not None:
            step_of(model, optimizer, fisher, loop, number, scaler, autocast, factor=float("inf"))
            scaler.update(loop.scales[number % len(loop.scales)])
        step_of(model, optimizer, fisher, loop, number, scaler, autocast)
    return optimizer, torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_same(one, other):
    (optimizer, parameters), (expected_optimizer, expected) = one, other
    assert torch.equal(parameters, expected)
    assert optimizer.stats == expected_optimizer.stats
    leaves, structure = tree_flatten(optimizer.state_dict())
    expected_leaves, expected_structure = tree_flatten(expected_optimizer.state_dict())
    assert structure == expected_structure
    for x, y in zip(leaves, expected_leaves, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fisher", FISHERS)
def test_powers_of_two_change_no_bit(fisher, loop):
    assert_same(run(fisher, LOOPS[loop], scaled=True), run(fisher, LOOPS[loop], scaled=False))


@pytest.mark.parametrize("skipped", [0, 3, 4])  # the first refresh, a step that reuses its curvature, another refresh
@pytest.mark.parametrize("loop", ["Plain", "All"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_step_that_is_skipped_leaves_no_trace(fisher, loop, skipped):
    assert_same(run(fisher, LOOPS[loop], True, skipped=skipped), run(fisher, LOOPS[loop], False))


@pytest.mark.parametrize("loop", ["Plain", "Clipped", "Accumulated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fisher", FISHERS)
def test_under_autocast_steps_differ_by_its_rounding(fisher, dtype, loop):
    """bfloat16 has the exponents of float32, so that powers of two round nothing; float16 rounds small numbers."""
    scaled, plain = (run(fisher, LOOPS[loop], one, dtype)[1] for one in (True, False))
    moved = torch.cat([p.detach().flatten() for p in model_of().parameters()]) - plain
    most = 0.0 if dtype == torch.bfloat16 else torch.finfo(dtype).eps * moved.norm()
    assert (scaled - plain).norm() <= most


@pytest.mark.parametrize("fisher", FISHERS)
def test_any_scale_is_divided_out(fisher):
    class Odd(Plain):
        scales = (1000.0, 3.0)

    scaled, plain = (run(fisher, Odd, one)[1] for one in (True, False))
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loop", ["Plain", "Clipped"])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_after_an_error_the_scaler_tries_again(fisher, loop):
    """The gradients are as they were, and the scale is not multiplied by itself."""
    ends = []
    for fails in (False, True):
        model = model_of()
        optimizer = optimizer_of(model, FISHERS[fisher][0])
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        step_of(model, optimizer, fisher, LOOPS[loop], 0, scaler)
        if fails:
            ops, optimizer._ops = optimizer._ops, None
            with pytest.raises(AttributeError):
                step_of(model, optimizer, fisher, LOOPS[loop], 1, scaler)
            optimizer._ops = ops
            assert not {"found_inf", "grad_scale"} & vars(optimizer).keys()
            before = [p.grad.clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaled = 1.0 if LOOPS[loop].most else scaler.get_scale()
            assert all(torch.equal(p.grad * scaled, g) for p, g in zip(model.parameters(), before, strict=True))
        else:
            step_of(model, optimizer, fisher, LOOPS[loop], 1, scaler)
        ends.append(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


class OwnScaler(torch.amp.GradScaler):
    def step(self, optimizer, *args, **kwargs):
        return super().step(optimizer, *args, **kwargs)


def test_a_scaler_of_another_class_is_found():
    ends = []
    for scaler in (None, OwnScaler("cpu", init_scale=1024.0)):
        model = model_of()
        optimizer = optimizer_of(model, FISHERS["empirical"][0])
        torch.optim.lr_scheduler.StepLR(optimizer, 100)  # which wraps the method `step`
        step_of(model, optimizer, "empirical", Clipped, 0, scaler)
        ends.append(model.state_dict())
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_rows_of_a_scaled_loss_are_refused_where_no_scaler_tells_the_scale():
    model = model_of()
    optimizer = optimizer_of(model, FISHERS["empirical"][0])
    (8 * F.cross_entropy(model(X[0]), LABELS[0])).backward()
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"no torch\.amp\.GradScaler calls this step"):
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_scaled_loss_is_still_compared_with_the_likelihood():
    model = model_of()
    optimizer = optimizer_of(model, {})
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.warns(UserWarning, match="is 3 times"):
        step_of(model, optimizer, "sampled", Clipped, 0, scaler, factor=3.0)


class Partly(nn.Module):
    """Begins in float32, and goes on under autocast: what is rounded there comes back to the first layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 32), nn.LayerNorm(32)
        self.second, self.head = nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.norm(self.first(x.float())).tanh()
        return self.head(self.second(x).tanh())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_rules_give_the_rows_of_float32_layers_before_narrower_ones(fisher, dtype):
    torch.manual_seed(0)
    model = Partly()
    optimizer = optimizer_of(model, FISHERS[fisher][0])
    step_of(model, optimizer, fisher, Plain, 0, autocast=dtype)
    rows_without_rules = [one for one in optimizer.summary().parameters if "by " in one.representation]
    assert rows_without_rules == []
    assert optimizer._reports.apart == {}


def doubled_rule(layer, x, grad_y):
    return {"weight": OuterProducts(2 * x, grad_y), "bias": PerSampleGrads(grad_y)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_a_wrong_rule_before_narrower_layers_is_still_refuted(fisher, dtype):
    torch.manual_seed(0)
    model = Partly()
    model.first = Doubled(6, 32)
    optimizer = optimizer_of(model, FISHERS[fisher][0])
    with registered(Doubled, doubled_rule):
        step_of(model, optimizer, fisher, Plain, 0, autocast=dtype)
    assert optimizer._reports.apart.keys() == {"first.weight"}

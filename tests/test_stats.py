"""`optimizer.stats`: each number is what the last step did."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_mlp import backward, batch, small_model
from torch import nn

from tengrad_triton import Growing, TENGraD, compile_train_step


def after(steps, samples=6, **settings):
    """Return a model and its optimizer after a number of steps with one batch."""
    model = small_model()
    optimizer = TENGraD(model, seed=0, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, samples)
        optimizer.step()
    return model, optimizer


def test_before_the_first_step_nothing_is_known():
    stats = after(0)[1].stats
    assert (stats.steps, stats.last_refresh, stats.interval, stats.rows, stats.failures) == (0, None, 1, 0, 0)
    assert (stats.damping, stats.clip, stats.trust_region) == ({}, {}, None)
    assert (stats.actual_change, stats.predicted_change) == (None, None)


# (settings, steps, the last refresh, the interval, the rows)
REFRESHES = [
    ({}, 1, 0, 1, 6),
    ({}, 14, Growing(20).refreshes(14)[-1], Growing(20)(14), 6),
    ({"refresh_every": 4}, 10, 8, 4, 6),
    ({"refresh_every": 2, "history": 3}, 7, 6, 2, 18),
    ({"fisher_rows": 4}, 3, 2, 1, 4),
    ({"fisher_samples": 2}, 3, 2, 1, 12),
    ({"step_share": 1000.0}, 9, 7, 3, 6),
]


@pytest.mark.parametrize(("settings", "steps", "last", "interval", "rows"), REFRESHES)
def test_the_curvature_is_that_of_the_last_refresh(settings, steps, last, interval, rows):
    stats = after(steps, **settings)[1].stats
    assert (stats.steps, stats.last_refresh, stats.interval, stats.rows) == (steps, last, interval, rows)
    assert stats.damping == {"0": 10.0, "2": 10.0}


@pytest.mark.parametrize("blocks", ["layer", "network"])
@pytest.mark.parametrize("name", ["clip_threshold", "trust_region"])
def test_bounds_are_what_they_multiplied_the_step_by(name, blocks):
    """The first step with a bound, over the same step without one."""
    start, others = small_model(), {"blocks": blocks, "clip_threshold": None, "trust_region": None}
    free, unbounded = after(1, **others)
    for bound, shortens in ((1e-3, True), (1e3, False)):
        bounded, optimizer = after(1, **{**others, name: bound})
        stats = optimizer.stats
        known = stats.clip if name == "clip_threshold" else dict.fromkeys(stats.damping, stats.trust_region)
        assert set(known) == set(stats.damping) == {"layer": {"0", "2"}, "network": {"network"}}[blocks]
        for key, parameter in bounded.named_parameters():
            factor = known[key.split(".")[0] if blocks == "layer" else "network"]
            assert (factor < 1) == shortens
            step, whole = (p.detach() - start.get_parameter(key) for p in (parameter, free.get_parameter(key)))
            torch.testing.assert_close(step, factor * whole, rtol=1e-3, atol=1e-6)
    assert (unbounded.stats.clip, unbounded.stats.trust_region) == ({}, None)


def test_changes_of_the_loss_are_those_of_the_closure():
    model, losses = small_model(), []
    optimizer = TENGraD.unscaled(model, damping="lm", trust_region=None, refresh_every=2, seed=0)

    def closure():
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(batch()[0]), batch()[1]))
        losses[-1].backward()
        return losses[-1]

    for step in range(3):
        optimizer.step(closure)
        if step == 0:
            first = optimizer.stats.actual_change
            assert first == losses[1].item() - losses[0].item()
        if step == 1:
            assert optimizer.stats.actual_change == first  # this step reused the curvature
    assert optimizer.stats.actual_change == losses[-1].item() - losses[-2].item()
    assert optimizer.stats.predicted_change < 0


@pytest.mark.filterwarnings("ignore:block")
def test_a_failed_factorization_is_counted_and_its_damping_is_the_one_used(monkeypatch):
    """Equal samples of great size make K singular, and without a margin the damping is far below its rounding."""
    monkeypatch.setattr("tengrad_triton.curvature.woodbury.MARGIN", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    optimizer = TENGraD.paper(model, lr=1e-3, damping=1e-12, refresh_every=1)
    F.cross_entropy(model(torch.full((40, 6), 1e3)), torch.arange(40) % 4).backward()
    optimizer.step()
    stats = optimizer.stats
    assert 0 < stats.failures == optimizer.summary().failures
    assert sum(damping > 1.0 for damping in stats.damping.values()) == stats.failures == len(stats.asked)


def test_a_compiled_step_does_not_tell_its_bounds():
    model, optimizer = after(2)
    assert optimizer.stats.clip
    step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager")
    for _ in range(4):
        step(*batch())
    stats = optimizer.stats
    assert (stats.steps, stats.rows, stats.clip) == (6, 6, {})


def test_a_copy_knows_the_last_step_and_a_loaded_state_does_not():
    optimizer = after(3, clip_threshold=1e-3)[1]
    assert copy.deepcopy(optimizer).stats == optimizer.stats
    other = after(3, clip_threshold=1e-3)[1]
    other.load_state_dict(optimizer.state_dict())
    known = optimizer.stats
    assert other.stats.clip == {}
    assert (other.stats.steps, other.stats.last_refresh, other.stats.rows) == (known.steps, known.last_refresh, 6)


# Settings: what holds the pivots differs.
HELD = [
    {"scaling": "none", "damping": 0.1},
    {"blocks": "network"},
    {"representation": "factored"},
    {"representation": "compressed", "tol": 1e-6, "scaling": "none", "damping": 0.1},
]


@pytest.mark.parametrize("settings", HELD)
def test_pivots_are_those_of_the_dense_matrix(settings):
    model = small_model().double()
    optimizer = TENGraD(model, seed=0, **settings)
    x, y = batch(6)
    F.cross_entropy(model(x.double()), y).backward()
    optimizer.step()
    stats = optimizer.stats
    for block in stats.damping:
        own = "" if block == "." else block
        rows = optimizer._curvature.rows
        matrix = optimizer._curvature.inverses
        inverse = next(one.inverse_BNN[one.blocks.index(own)] for one in matrix if own in one.blocks)
        shift = rows * stats.damping[block]
        eigenvalues = 1 / torch.linalg.eigvalsh(inverse.mT @ inverse) / shift
        finite = eigenvalues[eigenvalues.isfinite()]
        assert stats.pivot[block] >= 1 - 1e-9
        assert finite.min() - 1e-9 <= stats.pivot[block]
        assert 1 <= stats.condition[block] <= finite.max() / finite.min() * (1 + 1e-9)
        assert stats.bytes[block] >= inverse.nbytes
    assert stats.share > 0
    assert stats.age == 1


@pytest.mark.filterwarnings("ignore:block ")  # the damping is larger than asked after a failure
def test_a_block_that_failed_has_no_pivot(monkeypatch):
    monkeypatch.setattr("tengrad_triton.curvature.woodbury.MARGIN", 0)
    model = small_model()
    optimizer = TENGraD(model, seed=0, scaling="none", damping=1e-30)
    backward(model, 20)
    optimizer.step()
    stats = optimizer.stats
    failed = [block for block, pivot in stats.pivot.items() if pivot == 0]
    assert len(failed) == stats.failures > 0
    assert all(stats.condition[block] == float("inf") for block in failed)


def test_between_a_forward_and_its_step_nothing_is_held():
    model, optimizer = after(1)
    backward(model, 6)
    assert (optimizer.stats.pivot, optimizer.stats.condition, optimizer.stats.rows) == ({}, {}, 0)

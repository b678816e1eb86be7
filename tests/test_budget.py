"""What a budget pays for: rows, the matrices in D and the interval, by the cost model; and what it refuses."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from small_conv import batch, flat, resumed_at, small_model, take_steps
from torch import nn

from tengrad_triton import Growing, TENGraD, compile_train_step
from tengrad_triton.curvature.geometry import Geometry
from tengrad_triton.tuning.budget import Budget, Chooser, Work
from tengrad_triton.tuning.plan import Plan

N, MANY = 64, 10**12


def geometry(positions=1, inputs=40, outputs=30, samples=N):
    stored = 4 * samples * positions * (inputs + outputs)
    return Geometry(samples, 1, positions, inputs, outputs, 4, stored, "dense", "cpu")


def work(history=1, sides=None, **weights):
    sizes = {"first": geometry(), "second": geometry(49, 27, 16)} | weights
    return Work(sizes, N, 1, history, sides or {}, 2)


def chooser(given=None, max_bytes=MANY, explicit=()):
    return Chooser(Plan({}), given, explicit, refresh_every=20, max_bytes=max_bytes)


def step_share(sizes, rows):
    """What the products of a step add to SGD's by M18, for sizes whose refreshes do not decide the form of J."""
    added = scale = sgd = 0
    for name, g in sizes.weights.items():
        entries, r = g.inputs * g.outputs, rows * sizes.history
        of_factors = 4 * r * g.positions * entries + 2 * 8 * (4 * r * g.positions * (g.inputs + g.outputs))
        added += min(of_factors, 2 * 8 * 4 * r * entries)
        sgd += 6 * N * g.positions * entries + 5 * 8 * 4 * entries
        if name in sizes.sides:
            scale += 2 * sum(sizes.sides[name]) * entries + 10 * 8 * 4 * entries
    return (added + scale) / sgd


@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 1.0, 5.0])
def test_the_most_rows_within_the_share(share, history):
    sizes = work(history, {"second": (16,)})
    spending = Budget(share, MANY, None).spend(sizes, chooser())
    fitting = [rows for rows in range(1, N + 1) if step_share(sizes, rows) <= share / 2]
    assert spending.rows == max(fitting)
    assert spending.step == pytest.approx(step_share(sizes, spending.rows))
    assert spending.of == N
    assert (spending.why == f"step_share={share:g}") == (spending.rows < N)
    assert spending.refresh / spending.interval <= share / 2
    assert spending.interval == 1 or spending.refresh / (spending.interval - 1) > share / 2


@pytest.mark.parametrize("given", [None, "per_sample", "per_sample_bf16", {"first": "per_sample"}])
@pytest.mark.parametrize("max_bytes", [7_000, 20_000, 60_000, 10**9])
def test_the_most_rows_within_the_memory(max_bytes, given):
    """The user's own representations are not bounded where they are all given, as before."""
    spending = Budget(None, max_bytes, None).spend(work(), chooser(given, max_bytes))

    def stored(rows):
        first, second = 4 * rows * 1200, 4 * rows * 27 * 16
        of_factors = 4 * rows * 70, 4 * rows * 49 * 43
        return (first if given else min(first, of_factors[0])) + min(second, of_factors[1])

    bounded = given is None or isinstance(given, dict)
    assert spending.rows == max([rows for rows in range(1, N + 1) if not bounded or stored(rows) <= max_bytes] or [0])
    assert spending.why == ("" if spending.rows == N else f"max_bytes={max_bytes}")


def test_the_tightest_setting_is_named():
    assert Budget(1.0, MANY, 3).spend(work(), chooser()).why == "fisher_rows=3"
    assert Budget(None, MANY, None).spend(work(), chooser()).why == ""
    assert Budget(0.1, MANY, 60).spend(work(), chooser()).why == "step_share=0.1"


def test_what_leaves_no_row_says_what_would():
    with pytest.raises(ValueError, match=r"step_share=0.001 leaves no row of J: .* is enough$") as said:
        Budget(0.001, MANY, None).spend(work(), chooser())
    enough = float(str(said.value).split("step_share=")[2].split(" ")[0])
    assert Budget(enough, MANY, None).spend(work(), chooser()).rows == 1
    with pytest.raises(ValueError, match=r"max_bytes=100 leaves no row of J: one row takes 2,008 bytes"):
        Budget(None, 100, None).spend(work(), chooser(max_bytes=100))


# In the optimizer


@pytest.mark.parametrize(("samples", "inputs", "width"), [(32, 8, 16), (32, 32, 64), (64, 100, 40), (8, 2, 256)])
def test_the_share_that_is_said_to_be_enough_is(samples, inputs, width):
    """Also where it pays for matrices in D, which the smaller one did not."""

    def step(share):
        model = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 4))
        optimizer = TENGraD(model, step_share=share)
        F.cross_entropy(model(torch.randn(samples, inputs)), torch.arange(samples) % 4).backward()
        optimizer.step()
        return optimizer

    with pytest.raises(ValueError, match=r"is enough, or use TENGraD\.unscaled, which needs less") as said:
        step(1e-3)
    assert step(float(str(said.value).split("step_share=")[2].split(" ")[0])).summary().spending.rows >= 1


def test_a_smaller_batch_keeps_the_rows_of_a_larger_one():
    model = perceptron()
    optimizer = TENGraD(model, step_share=2.3, scaling="diagonal", refresh_every=1)
    kept = []
    for samples in (64, 64, 6, 64, 3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(samples, 36)), torch.arange(samples) % 4).backward()
        optimizer.step()
        kept.append(optimizer._curvature.rows)
    rows = optimizer.summary().spending.rows
    assert 6 < rows < 64
    assert kept == [rows, rows, 6, rows, 3]


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))


def taken(steps=3, **options):
    model = perceptron().double()
    optimizer = TENGraD(model, seed=0, refresh_every=2, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = torch.randn(64, 36, generator=generator).double(), torch.randint(4, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return flat(model), optimizer


@pytest.mark.parametrize("setting", [{"step_share": 2.3}, {"max_bytes": 20_000}])
def test_a_step_is_the_one_with_as_many_rows(setting):
    """`fisher_rows` is tested against dense computations; D is that of all rows in both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the memory
        ours, optimizer = taken(scaling="diagonal", **setting)
    rows = optimizer.summary().spending.rows
    assert 1 < rows < 64
    assert optimizer._curvature.history == (rows,)
    same, _ = taken(scaling="diagonal", fisher_rows=rows)
    assert torch.equal(ours, same)


def test_d_is_that_of_all_rows():
    _, few = taken(steps=1, fisher_rows=5)
    _, all_rows = taken(steps=1)
    for layer, parameters in all_rows._curvature.moments.items():
        for name, moments in parameters.items():
            for ours, theirs in zip(few._curvature.moments[layer][name], moments, strict=True):
                assert torch.equal(ours, theirs)


def test_less_memory_is_said_once_and_kept_to():
    with pytest.warns(UserWarning, match=r"J of all 64 rows takes more than max_bytes=20000: \d+ of them") as said:
        _, optimizer = taken(max_bytes=20_000, scaling="none")
    assert len(said) == 1
    weights = [entry for entry in optimizer.summary().parameters if entry.parameter.endswith("weight")]
    assert sum(entry.bytes for entry in weights) <= 20_000


def test_the_summary_says_what_was_chosen_and_why():
    _, optimizer = taken(step_share=1.9)
    spending, said = optimizer.summary().spending, str(optimizer.summary())
    assert f"{spending.rows} of 64 rows (step_share=1.9)" in said
    assert f"a step adds {spending.step:.2f} of SGD's time, a refresh {spending.refresh:.2f}" in said
    assert spending.step <= 0.95
    assert TENGraD(perceptron()).summary().spending is None


def test_a_small_share_makes_sides_of_d_diagonal():
    forms = {}
    for share in (None, 1.0, 0.58):  # 64 channels at 8 × 36 positions cost 64 / (3 × 288) = 0.07 of SGD's step
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)
        model = nn.Sequential(nn.Conv2d(1, 64, 3), nn.Tanh(), *pooled)
        optimizer = TENGraD(model, step_share=share)
        F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8) % 3).backward()
        optimizer.step()
        forms[share] = str(optimizer._curvature.scales["0"]["weight"])
    assert forms == {None: "64² ⊗ 1", 1.0: "64² ⊗ 1", 0.58: "64 ⊗ 1"}


def test_a_share_that_leaves_no_row_changes_nothing():
    model = small_model()
    optimizer, before = TENGraD(model, step_share=1e-3), flat(model)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"step_share=0\.001 leaves no row"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    assert optimizer.stats.steps == 0


def refreshed(steps, **options):
    """Return the steps that refreshed."""
    model, found = perceptron(), []
    optimizer = TENGraD(model, seed=0, **options)
    for step in range(steps):
        before = optimizer._curvature
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(64, 36)), torch.zeros(64, dtype=torch.long)).backward()
        optimizer.step()
        if optimizer._curvature is not before:
            found.append(step)
    return found, optimizer


def test_the_interval_grows_to_what_the_share_pays_for():
    found, optimizer = refreshed(60, step_share=0.5, refresh_every=Growing(2), scaling="none")
    interval = optimizer.summary().spending.interval
    assert interval > 2
    assert found == Growing(interval).refreshes(60)
    assert refreshed(9, step_share=0.5, refresh_every=3, scaling="none")[0] == [0, 3, 6]  # the user's own
    assert refreshed(9, refresh_every=Growing(2))[0] == Growing(2).refreshes(9)


def test_a_state_continues_within_the_budget():
    options = {"step_share": 2.2, "refresh_every": Growing(2)}
    whole = small_model()
    optimizer = TENGraD(whole, **options)
    take_steps(whole, optimizer, 0, 8)
    assert 1 < optimizer.summary().spending.rows < 10
    for pause in (1, 3, 5):
        assert torch.equal(flat(resumed_at(pause, TENGraD, options)), flat(whole))


@pytest.mark.parametrize("share", [1.5, 100.0])
def test_a_compiled_step_keeps_to_the_budget(share):
    """Fewer rows take the plain refresh; with all rows the interval outlives a compiled one."""
    model = perceptron()
    optimizer = TENGraD(model, step_share=share, refresh_every=2, seed=0)
    step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager")
    for _ in range(4):
        step(torch.randn(64, 36), torch.zeros(64, dtype=torch.long))
    spending = optimizer.summary().spending
    if share == 100.0:
        assert step.why_plain is None
        assert spending.rows == 64
    else:
        assert f"step_share=1.5 leaves {spending.rows} of 64" in step.why_plain

"""TENGraD as a torch optimizer: groups, schedules, state, half precision, batches in place."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_conv import assert_same, batch, flat, small_model, take_steps
from torch import nn

from tengrad_triton import TENGraD, compile_train_step, kernels
from tengrad_triton.tuning.plan import MAX_BYTES


def test_a_step_before_any_backward_does_nothing():
    model = small_model()
    before = flat(model)
    optimizer = TENGraD(model)
    optimizer.step()
    assert torch.equal(flat(model), before)
    assert optimizer._steps == 0


def test_closure_is_evaluated_and_returned():
    model = small_model()
    optimizer = TENGraD(model)
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_torch_schedulers_and_tensor_lr():
    runs = []
    for lr in (0.02, torch.tensor(0.02)):
        model = small_model()
        optimizer = TENGraD(model, lr=lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        take_steps(model, optimizer, 0, 4, scheduler)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.02 / 16)
        runs.append(flat(model))
    assert torch.allclose(runs[0], runs[1], rtol=1e-6)


def test_groups_have_their_own_settings():
    model = small_model()
    optimizer = TENGraD.paper(
        model,
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[4:].parameters(), "damping": 1.0}],
        lr=0.1,
    )
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, 0, 2)
    after = model.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["6.weight"], after["6.weight"])
    curvature = optimizer._curvature
    dampings = dict(zip(curvature.blocks, curvature.damping_L.tolist(), strict=True))
    assert dampings == pytest.approx({"0": 0.1, "4": 1.0, "6": 1.0})


def test_added_group_takes_part_from_the_next_step():
    model = small_model()
    optimizer = TENGraD(model, model[6].parameters())
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, 0, 2)
    assert torch.equal(before["4.weight"], model.state_dict()["4.weight"])
    optimizer.add_param_group({"params": model[4].parameters()})
    take_steps(model, optimizer, 2, 3)
    assert not torch.equal(before["4.weight"], model.state_dict()["4.weight"])
    assert {row.parameter: row.block for row in optimizer.summary().parameters}["4.weight"] == "4"


def test_callable_damping_and_refresh_take_effect_at_the_refresh():
    model = small_model()
    optimizer = TENGraD.paper(
        model, damping=lambda step: 1.0 / (1 + step), refresh_every=lambda step: 2 if step < 4 else 1
    )
    seen = []
    for step in range(6):
        take_steps(model, optimizer, step, step + 1)
        seen.append(optimizer._curvature.damping_L[0].item())
    assert seen == pytest.approx([1, 1, 1 / 3, 1 / 3, 1 / 5, 1 / 6])


def test_damping_changed_between_refreshes_waits_for_the_next():
    """The factor and the divisor hold the same damping at all times; half a change would be no natural gradient."""
    model, twin = small_model(), small_model()
    changed, steady = TENGraD(model, refresh_every=3), TENGraD(twin, refresh_every=3)
    take_steps(model, changed, 0, 1)
    take_steps(twin, steady, 0, 1)
    changed.param_groups[0]["damping"] = 1.0
    take_steps(model, changed, 1, 3)
    take_steps(twin, steady, 1, 3)
    assert torch.equal(flat(model), flat(twin))
    take_steps(model, changed, 3, 4)
    take_steps(twin, steady, 3, 4)
    assert not torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_update_rule_around_the_natural_gradient(nesterov, decoupled):
    """With damping far above the curvature the natural gradient is ∇L / damping: torch's SGD at lr / damping."""
    damping, lr, decay = 1e9, 0.1, 0.01
    model, twin = small_model().double(), small_model().double()
    optimizer = TENGraD.paper(
        model, lr=lr * damping, damping=damping, nesterov=nesterov, seed=0,
        weight_decay=decay / damping, decoupled_weight_decay=decoupled,
    )  # fmt: skip
    sgd = torch.optim.SGD(
        twin.parameters(), lr=lr, momentum=0.9, nesterov=nesterov, weight_decay=0 if decoupled else decay
    )
    for step in range(4):
        x, y = batch(step)
        for net, opt in ((model, optimizer), (twin, sgd)):
            opt.zero_grad()
            F.cross_entropy(net(x.double()), y).backward()
            if net is twin and decoupled:
                with torch.no_grad():
                    for p in twin.parameters():
                        p.mul_(1 - lr * decay)
            opt.step()
    assert torch.allclose(flat(model), flat(twin), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("max_bytes", [MAX_BYTES, MAX_BYTES - 1])
def test_a_step_that_fails_leaves_everything_as_it_was(monkeypatch, max_bytes):
    model = small_model()
    optimizer = TENGraD(model, refresh_every=1, max_bytes=max_bytes)
    take_steps(model, optimizer, 0, 2)
    x, y = batch(2)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())

    failing = SimpleNamespace(**{name: getattr(kernels, name) for name in kernels.__all__})
    failing.cholesky_solve = fail
    monkeypatch.setattr(optimizer, "_ops", failing)
    with pytest.raises(MemoryError):
        optimizer.step()
    monkeypatch.undo()
    assert torch.equal(flat(model), before)
    assert_same(optimizer.state_dict(), state)
    if max_bytes < MAX_BYTES:  # the batch was used up
        with pytest.raises(RuntimeError, match="no forward and backward of the model since"):
            optimizer.step()
        assert torch.equal(flat(model), before)
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(flat(model), before)


def fail(*args):
    raise MemoryError


@pytest.mark.filterwarnings("ignore:block")
def test_a_factorization_that_fails_is_survived_counted_and_damped(monkeypatch):
    """Equal samples of great size make K singular, and without a margin the damping is far below its rounding."""
    monkeypatch.setattr("tengrad_triton.curvature.woodbury.MARGIN", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    optimizer = TENGraD.paper(model, lr=1e-3, damping=1e-12, refresh_every=1)
    x, y = torch.full((40, 6), 1e3), torch.arange(40) % 4
    raised = []
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        raised.append(optimizer.summary().failures)
    assert 0 < raised[0] < raised[1]
    assert f"{raised[1]} factorizations failed" in str(optimizer.summary())
    assert flat(model).isfinite().all()


def test_half_precision_parameters():
    model = small_model().bfloat16()
    optimizer = TENGraD(model, lr=1e-2)
    before = flat(model)
    x, y = batch()
    F.cross_entropy(model(x.bfloat16()), y).backward()
    optimizer.step()
    assert flat(model).dtype == torch.bfloat16
    assert flat(model).isfinite().all()
    assert not torch.equal(flat(model), before)


def test_summary_shows_every_parameter():
    model = small_model()
    optimizer = TENGraD(model)
    assert all("next refresh" in row.representation for row in optimizer.summary().parameters)
    take_steps(model, optimizer, 0, 1)
    summary = optimizer.summary()
    assert [row.parameter for row in summary.parameters] == [name for name, _ in model.named_parameters()]
    assert {row.parameter: row.representation for row in summary.parameters if row.parameter.endswith("weight")} == {
        "0.weight": "per_sample, D 3² ⊗ 1",
        "4.weight": "factored, D 8 ⊗ 27",
        "6.weight": "factored, D 4 ⊗ 8",
    }
    assert sum(row.bytes for row in summary.parameters) > 0
    assert "\n4\n  weight" in str(summary)


def test_representation_by_hand():
    model = small_model()
    optimizer = TENGraD(model, representation={"0.weight": "factored", "6.weight": "per_sample"})
    take_steps(model, optimizer, 0, 1)
    chosen = {row.parameter: row.representation for row in optimizer.summary().parameters}
    weights = (chosen[f"{place}.weight"].split(",")[0] for place in (0, 4, 6))
    assert tuple(weights) == ("factored", "factored", "per_sample")


# The cost model: sizes (N, G, P, I, O) and the cheaper representation at a refresh in 100 steps, and at each step.


def tokens_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(15, 4))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("kind", ["vectors", "tokens"])
def test_the_loop_may_write_every_batch_into_the_same_tensor(kind, compiled):
    """What a refresh keeps of a batch is its own: the next batch of a loader with a static buffer does not reach it."""

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)) if kind == "vectors" else tokens_model()
    optimizer = TENGraD(model, refresh_every=3, representation="factored", seed=0)
    compiled_step = compile_train_step(model, F.cross_entropy, optimizer, backend="aot_eager") if compiled else None

    def train(seeds, lent=None):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            if kind == "vectors":
                x = torch.randn(7, 3, generator=generator)
            else:
                x = torch.randint(9, (7, 3), generator=generator)
            x = x if lent is None else lent.copy_(x)
            y = torch.randint(4, (7,), generator=generator)
            if compiled_step is not None:
                compiled_step(x, y)
            else:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        return flat(model)

    buffer = torch.empty(7, 3) if kind == "vectors" else torch.empty(7, 3, dtype=torch.long)
    train(range(4), buffer)
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    lent = train(range(4, 12), buffer)
    model.load_state_dict(start[0])
    optimizer.load_state_dict(start[1])
    assert torch.equal(lent, train(range(4, 12)))

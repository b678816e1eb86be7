"""TENGraD as a torch optimizer: groups, schedules, state, errors."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD, compile_train_step, kernels
from tengrad_triton.curvature.geometry import Geometry
from tengrad_triton.tuning.plan import MAX_BYTES, Plan, choose, total_bytes


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 8), nn.ReLU()),
        nn.Linear(8, 4),
    )


def batch(seed=0, samples=10):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, 6, 6, generator=generator), torch.randint(4, (samples,), generator=generator)


def take_steps(model, optimizer, first, last, scheduler=None):
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("representation", ["factored", "per_sample"])
@pytest.mark.parametrize("pause", range(1, 7))
def test_state_dict_continues_bit_for_bit_in_mid_interval(pause, representation, fisher):
    options = {"refresh_every": 3, "fisher": fisher, "representation": representation, "weight_decay": 0.01}
    whole = small_model()
    take_steps(whole, TENGraD(whole, **options), 0, 8)

    model = small_model()
    optimizer = TENGraD(model, **options)
    take_steps(model, optimizer, 0, pause)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    torch.manual_seed(99)
    resumed = nn.Sequential(*(copy.deepcopy(layer) for layer in small_model()))
    resumed.load_state_dict(saved["model"])
    continued = TENGraD(resumed, seed=1, **options)
    continued.load_state_dict(saved["optimizer"])
    take_steps(resumed, continued, pause, 8)
    assert torch.equal(flat(resumed), flat(whole))


def test_state_of_another_model_is_refused_and_changes_nothing():
    other = nn.Sequential(nn.Linear(36, 4))
    optimizer = TENGraD(other)
    x, y = batch()
    F.cross_entropy(other(x.flatten(1)), y).backward()
    optimizer.step()
    saved = optimizer.state_dict()

    model = nn.Sequential(nn.Conv2d(1, 4, 6), nn.Flatten(), nn.Linear(4, 4))
    target = TENGraD(model)
    with pytest.raises(ValueError, match=r"parameter group|another model"):
        target.load_state_dict(saved)
    with pytest.raises(ValueError, match="'tengrad'"):
        target.load_state_dict(torch.optim.SGD(model.parameters(), lr=1).state_dict())
    assert target._steps == 0
    assert target._curvature is None


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
    changed.param_groups[0]["damping"] = 10.0
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


def assert_same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def test_a_factorization_that_fails_is_survived_counted_and_damped():
    """Equal samples of great size make K singular, and the damping is far below its rounding."""
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
        "0.weight": "per_sample",
        "4.weight": "factored",
        "6.weight": "factored",
    }
    assert sum(row.bytes for row in summary.parameters) > 0
    assert "4.weight" in str(summary)


def test_representation_by_hand():
    model = small_model()
    optimizer = TENGraD(model, representation={"0.weight": "factored", "6.weight": "per_sample"})
    take_steps(model, optimizer, 0, 1)
    chosen = {row.parameter: row.representation for row in optimizer.summary().parameters}
    assert (chosen["0.weight"], chosen["4.weight"], chosen["6.weight"]) == ("factored", "factored", "per_sample")


# The analytic rule: sizes (N, G, P, I, O) and the cheaper representation at a refresh in 100 steps, and at each step.
GEOMETRIES = {
    "3c1f convolution": ((128, 1, 784, 1152, 128), "per_sample", "per_sample"),
    "3c1f linear": ((128, 1, 1, 10368, 500), "factored", "factored"),
    "resnet-50, 3x3 on 7x7": ((128, 1, 49, 4608, 512), "per_sample", "per_sample"),
    "512 channels on 4x4": ((128, 1, 16, 4608, 512), "factored", "factored"),
    "512 channels on 5x5": ((128, 1, 25, 4608, 512), "per_sample", "factored"),
    "depthwise": ((128, 96, 3136, 9, 1), "per_sample", "per_sample"),
    "transformer linear": ((128, 1, 512, 4096, 4096), "per_sample", "per_sample"),
}


@pytest.mark.parametrize("layer", GEOMETRIES)
def test_analytic_rule(layer):
    sizes, *expected = GEOMETRIES[layer]
    geometry = Geometry(*sizes, itemsize=4, factored_bytes=0, layout="dense")
    chosen = [choose({layer: geometry}, None, max_bytes=2**60, refresh_every=every)[layer] for every in (100, 1)]
    assert chosen == expected


def test_memory_budget_is_respected_where_factors_are_smaller():
    geometries = {
        "big": Geometry(8, 1, 100, 50, 50, 4, factored_bytes=1000, layout="dense"),
        "small": Geometry(8, 1, 100, 20, 20, 4, factored_bytes=1000, layout="dense"),
    }
    plenty = choose(geometries, None, max_bytes=10**6, refresh_every=100)
    assert plenty == {"big": "per_sample", "small": "per_sample"}
    tight = choose(geometries, None, max_bytes=20_000, refresh_every=100)
    assert tight == {"big": "factored", "small": "per_sample"}
    assert total_bytes(geometries, tight) <= 20_000
    # Rows save ever more arithmetic for their bytes the more positions there are, so these keep theirs the longest.
    few, many = (Geometry(8, 1, p, 50, 50, 4, factored_bytes=1000, layout="dense") for p in (50, 500))
    assert choose({"few": few, "many": many}, None, 100_000, 100) == {"few": "factored", "many": "per_sample"}
    assert choose(geometries, "per_sample", max_bytes=0, refresh_every=100) == plenty  # by hand is by hand


def test_memory_budget_is_respected_where_rows_are_smaller():
    wide = {"wide": Geometry(128, 1, 16, 4608, 512, 4, factored_bytes=1_300_000_000, layout="dense")}
    assert choose(wide, None, max_bytes=2**60, refresh_every=1) == {"wide": "factored"}  # no way to K is dearer
    assert choose(wide, None, max_bytes=1_250_000_000, refresh_every=1) == {"wide": "per_sample"}


def test_a_budget_that_nothing_exact_fits_is_said():
    geometries = {"w": Geometry(8, 1, 100, 50, 50, 4, factored_bytes=1000, layout="dense")}
    with pytest.warns(UserWarning, match=r"J takes 1,000 bytes at least, and max_bytes is 10: fewer rows"):
        assert Plan({}).choose(geometries, None, 1, max_bytes=10)["w"].representation == "factored"


# Bad settings: the arguments, the error, and what its message says.
BAD = {
    "negative lr": ({"lr": -1.0}, ValueError, "lr must be at least 0"),
    "lr not a number": ({"lr": "fast"}, TypeError, "lr must be a number"),
    "lr tensor of two": ({"lr": torch.ones(2)}, ValueError, "one element"),
    "zero damping": ({"damping": 0.0}, ValueError, "damping must be positive, got 0.0"),
    "negative damping": ({"damping": -0.1}, ValueError, "damping must be positive"),
    "nan damping": ({"damping": float("nan")}, ValueError, "damping must be positive"),
    "damping schedule out of range": ({"damping": lambda step: -1.0}, ValueError, "damping must be positive"),
    "damping not a number": ({"damping": "large"}, TypeError, "damping must be a number, 'lm' or a function"),
    "momentum of one": ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
    "nesterov without momentum": ({"momentum": 0.0, "nesterov": True}, ValueError, "nesterov=True needs momentum"),
    "negative weight decay": ({"weight_decay": -1e-3}, ValueError, "weight_decay must be at least 0"),
    "refresh_every 0": ({"refresh_every": 0}, ValueError, "refresh_every must be at least 1, got 0"),
    "refresh_every 1.5": ({"refresh_every": 1.5}, TypeError, "refresh_every must be a whole number"),
    "fisher": ({"fisher": "true"}, ValueError, "fisher must be one of 'sampled', 'empirical', 'exact', got 'true'"),
    "likelihood": ({"likelihood": "poisson"}, ValueError, "categorical, gaussian, bernoulli"),
    "likelihood object": ({"likelihood": object()}, TypeError, "must have sample"),
    "blocks": ({"blocks": "net"}, ValueError, "blocks must be 'layer', 'network' or lists"),
    "representation": ({"representation": "dense"}, ValueError, "representation must be one of"),
    "representation of a weight": ({"representation": {"0.weight": "dense"}}, ValueError, "representation must be"),
    "unsupported": ({"unsupported": "skip"}, ValueError, "unsupported must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "max_bytes": ({"max_bytes": -1}, ValueError, "max_bytes must be at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    arguments, error, message = BAD[case]
    model = small_model()
    with pytest.raises(error, match=message):
        TENGraD(model, **arguments)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_models():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        TENGraD(list(small_model().parameters()))
    with pytest.raises(ValueError, match="no trainable parameters"):
        TENGraD(nn.ReLU())
    frozen = small_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        TENGraD(frozen)


def test_a_weight_and_its_bias_in_different_groups():
    model = small_model()
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    with pytest.raises(ValueError, match="weight, bias of '0' are in different parameter groups"):
        TENGraD(model, [{"params": weights}, {"params": biases, "weight_decay": 0.0}])
    assert not any(module._forward_hooks for module in model.modules())


def test_a_bad_added_group_is_not_added():
    model = small_model()
    optimizer = TENGraD(model, model[6].parameters())
    with pytest.raises(ValueError, match="damping must be positive"):
        optimizer.add_param_group({"params": model[4].parameters(), "damping": 0.0})
    optimizer.add_param_group({"params": [model[4].weight]})
    with pytest.raises(ValueError, match="different parameter groups"):
        optimizer.add_param_group({"params": [model[4].bias]})
    take_steps(model, optimizer, 0, 1)


def test_frozen_parameters_and_parameters_of_no_module():
    model = small_model()
    model[0].requires_grad_(False)
    model[4].weight.requires_grad_(False)  # a bias alone is a block too
    scale = nn.Parameter(torch.ones(()))
    with pytest.warns(UserWarning, match="not a parameter of the model"):
        optimizer = TENGraD(model, [*model.parameters(), scale])
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    F.cross_entropy(model(x) * scale, y).backward()
    optimizer.step()
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"4.bias", "6.weight", "6.bias"}
    assert scale.item() != 1


BAD_ROWS = {
    "entries": (lambda rows: rows[:, :5], r"returned rows of 5 entries for '1.weight', which has 36"),
    "samples": (lambda rows: rows[:2], r"returned 2 rows for '1.weight', but the batch has \d+ samples"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_custom_rule_of_the_wrong_size_is_named(case):
    from tengrad_triton import PerSampleGrads, canonical

    spoil, message = BAD_ROWS[case]

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(36))

        def forward(self, x):
            return x * self.weight

    @canonical.register
    def _(layer: Scale, x: torch.Tensor, grad_y: torch.Tensor):
        return {"weight": PerSampleGrads(spoil(grad_y * x))}

    model = nn.Sequential(nn.Flatten(), Scale(), nn.Linear(36, 4))
    optimizer = TENGraD(model)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=f"rule for Scale {message}"):
        optimizer.step()


def tokens_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(15, 4))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("kind", ["vectors", "tokens"])
def test_the_loop_may_write_every_batch_into_the_same_tensor(kind, compiled):
    """What a refresh keeps of a batch is its own: the next batch of a loader with a static buffer does not reach it."""

    def trained(lent):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)) if kind == "vectors" else tokens_model()
        optimizer = TENGraD(model, refresh_every=3, representation="factored", seed=0)
        step = compile_train_step(model, F.cross_entropy, optimizer, backend="aot_eager") if compiled else None
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            fresh = (
                torch.randn(7, 3, generator=generator)
                if kind == "vectors"
                else torch.randint(9, (7, 3), generator=generator)
            )
            x = fresh if lent is None else lent.copy_(fresh)
            y = torch.randint(4, (7,), generator=generator)
            if step is not None:
                step(x, y)
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return flat(model)

    buffer = torch.empty(7, 3) if kind == "vectors" else torch.empty(7, 3, dtype=torch.long)
    assert torch.equal(trained(buffer), trained(None))

"""Parameters in half precision, whose steps change copies in float32; and float32 beside float64 in one model."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from mixed_types import Cast
from torch import nn
from torch.func import functional_call, grad, vmap

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.baselines import KFAC

HALVES = (torch.bfloat16, torch.float16)
FISHERS = ("sampled", "exact", "empirical")
STEPS, SAMPLES = 6, 16
DRAWN = torch.Generator().manual_seed(0)
X = torch.randn(STEPS, SAMPLES, 6, generator=DRAWN)
LABELS = torch.randint(3, (STEPS, SAMPLES), generator=DRAWN)
pytestmark = pytest.mark.filterwarnings("ignore:no exact rows")  # K-FAC has none of layer norms
TENGRADS = {
    "default": TENGraD,
    "unscaled": TENGraD.unscaled,
    "spring": lambda model, **options: TENGraD(model, spring=0.9, momentum=0.0, **options),
    "decayed": lambda model, **options: TENGraD(model, weight_decay=0.1, decoupled_weight_decay=True, **options),
    "K-FAC": lambda model, fisher="sampled", **options: KFAC(model, **options),
}


def model_of(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def step_of(model, optimizer, number):
    optimizer.zero_grad()
    output = model(X[number].to(next(model.parameters()).dtype))
    wide = torch.promote_types(output.dtype, torch.float32)
    F.cross_entropy(output.to(wide), LABELS[number]).backward()
    optimizer.step()


def copies_of(model, optimizer):
    return {name: optimizer.state[p]["wide_copy"] for name, p in model.named_parameters()}


def assert_rounded(model, optimizer):
    for name, p in model.named_parameters():
        own = optimizer.state[p]["wide_copy"]
        assert own.dtype == optimizer.state[p]["momentum_buffer"].dtype == torch.float32
        assert torch.equal(p, own.to(p.dtype)), name


@pytest.mark.parametrize("make", ["default", "unscaled", "decayed"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_copy_takes_the_step_of_float32(dtype, make):
    """Small whole numbers are exact in half precision: gradient and rows are those of a model in float32."""
    generator = torch.Generator().manual_seed(1)
    weight, x, y = (torch.randint(-3, 4, size, generator=generator).float() for size in ((2, 3), (8, 3), (8, 2)))
    ends = []
    for own in (dtype, torch.float32):
        model = nn.Sequential(nn.Linear(3, 2, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        model.to(own)
        optimizer = TENGRADS[make](model, fisher="empirical", likelihood="gaussian", lr=0.1, seed=0)
        F.mse_loss(model(x.to(own)), y.to(own)).backward()
        optimizer.step()
        ends.append((model[0].weight.detach(), optimizer.state[model[0].weight]))
    (parameter, state), (expected, expected_state) = ends
    assert torch.equal(state["wide_copy"], expected)
    assert torch.equal(state["momentum_buffer"], expected_state["momentum_buffer"])
    assert torch.equal(parameter, expected.to(dtype))


@pytest.mark.parametrize("make", TENGRADS)
@pytest.mark.parametrize("dtype", HALVES)
def test_no_step_is_lost(dtype, make):
    """Each step is below half a unit in the last place of nearly all weights, and rounded ones would change nothing."""
    model = model_of(dtype)
    optimizer = TENGRADS[make](model, lr=3e-4 * torch.finfo(dtype).eps, seed=0)
    before = copy.deepcopy(model.state_dict())
    moved = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    for number in range(STEPS):
        old = {name: p.detach().float() for name, p in model.named_parameters()}
        old |= {name: own.clone() for name, own in copies_of(model, optimizer).items()} if number else {}
        step_of(model, optimizer, number)
        for name, own in copies_of(model, optimizer).items():
            moved[name] += own - old[name]
        assert_rounded(model, optimizer)
    for name, own in copies_of(model, optimizer).items():
        assert moved[name].norm() > 0
        torch.testing.assert_close(own, before[name].float() + moved[name])
    assert (model[0].weight == before["0.weight"]).float().mean() > 0.8
    assert (copies_of(model, optimizer)["0.weight"] == before["0.weight"].float()).float().mean() < 0.2


def reloaded(model, optimizer, make):
    """A model and an optimizer made anew from saved states."""
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    state, own = torch.load(file, weights_only=True)
    twin = model_of(next(model.parameters()).dtype)
    other = make(twin)
    other.load_state_dict(own)  # before the model's, which a loop may do
    twin.load_state_dict(state)
    return twin, other


RESUMED = {
    "state_dict": reloaded,
    "deepcopy": lambda model, optimizer, make: copy.deepcopy((model, optimizer)),
    "pickle": lambda model, optimizer, make: pickle.loads(pickle.dumps((model, optimizer))),
    "taken back": lambda model, optimizer, make: taken_back(model, optimizer),
}


def taken_back(model, optimizer):
    """The same objects after some steps more, and their states of before."""
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for number in range(3):
        step_of(model, optimizer, number)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    return model, optimizer


@pytest.mark.parametrize("how", RESUMED)
@pytest.mark.parametrize("make", ["default", "spring", "K-FAC"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_run_resumes_bit_for_bit(dtype, make, how):
    ends = []
    for resumes in (False, True):
        model = model_of(dtype)

        def made(model):
            return TENGRADS[make](model, lr=1e-3, seed=0, refresh_every=2)

        optimizer = made(model)
        for number in range(STEPS):
            if resumes and number == 3:
                model, optimizer = RESUMED[how](model, optimizer, made)
            step_of(model, optimizer, number)
        ends.append((model.state_dict(), copies_of(model, optimizer)))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_a_state_without_copies_goes_on_from_the_parameters():
    """As of an earlier version, whose momenta were in half precision."""
    model = model_of(torch.bfloat16)
    optimizer = TENGraD(model, lr=1e-3, seed=0)
    step_of(model, optimizer, 0)
    saved = optimizer.state_dict()
    for one in saved["state"].values():
        one["momentum_buffer"] = one["momentum_buffer"].bfloat16()
        del one["wide_copy"]
    twin = copy.deepcopy(model)
    other = TENGraD(twin, lr=1e-3, seed=0)
    other.load_state_dict(saved)
    step_of(twin, other, 1)
    assert_rounded(twin, other)
    assert all(own.isfinite().all() for own in copies_of(twin, other).values())


def test_what_is_written_to_a_parameter_counts():
    """Also by `.data`, which no version counter shows; entries that were not written to keep their lower bits."""
    model = model_of(torch.bfloat16)
    optimizer = TENGraD(model, lr=0.0, momentum=0.0, seed=0)
    step_of(model, optimizer, 0)
    with torch.no_grad():
        own = copies_of(model, optimizer)["0.weight"]
        own.mul_(1 + 2.0**-12)
        model[0].weight.copy_(own)
    kept = own.clone()
    model[0].weight.data[0, 0] = 7.0
    step_of(model, optimizer, 1)
    kept[0, 0] = 7.0
    assert torch.equal(own, kept)
    assert model[0].weight[0, 0] == 7.0


def test_a_converted_model_has_no_copies():
    model = model_of(torch.bfloat16)
    optimizer = TENGraD(model, seed=0)
    for number, dtype in enumerate((torch.bfloat16, torch.float32, torch.float64, torch.float16)):
        model.to(dtype)
        step_of(model, optimizer, number)
        for p in model.parameters():
            assert ("wide_copy" in optimizer.state[p]) == (dtype in HALVES)
            assert optimizer.state[p]["momentum_buffer"].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("make", ["default", "K-FAC"])
def test_a_step_that_fails_changes_neither_copies_nor_parameters(make):
    model = model_of(torch.bfloat16)
    optimizer = TENGRADS[make](model, lr=0.1, seed=0, refresh_every=1)
    step_of(model, optimizer, 0)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with pytest.raises(RuntimeError, match="no forward and backward"):
        optimizer.step()
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


def test_an_adapted_damping_compares_the_loss_of_the_rounded_parameters():
    model = model_of(torch.bfloat16)
    optimizer = TENGraD(model, lr=1.0, damping="lm", scaling="none", fisher="exact", seed=0)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(copy.deepcopy(model.state_dict()))
        loss = F.cross_entropy(model(X[0].bfloat16()).float(), LABELS[0])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(seen[0]["0.weight"], seen[1]["0.weight"])
    torch.testing.assert_close(seen[1], model.state_dict(), rtol=0, atol=0)
    assert_rounded(model, optimizer)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_compiled_step_updates_the_same_copies(dtype):
    ends = []
    for compiled in (False, True):
        model = model_of(dtype)
        optimizer = TENGraD(model, lr=1e-3, seed=0, refresh_every=2)
        step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager") if compiled else None
        for number in range(STEPS):
            if step is None:
                step_of(model, optimizer, number)
            else:
                step(X[number].to(dtype), LABELS[number])
        assert_rounded(model, optimizer)
        ends.append(torch.cat([own.flatten() for own in copies_of(model, optimizer).values()]))
    before = torch.cat([p.detach().flatten().float() for p in model_of(dtype).parameters()])
    assert (ends[0] - ends[1]).norm() <= 4 * torch.finfo(dtype).eps * (ends[0] - before).norm()


@pytest.mark.filterwarnings("ignore:block '")  # so small a gradient makes D small
@pytest.mark.parametrize("loss_scale", [2.0**16, 1.0])
def test_gradients_in_float16_are_divided_in_float32(loss_scale):
    """A loss of 1e-6 has gradients below the least number of float16; scaled, they are above."""
    model = model_of(torch.float16)
    optimizer = TENGraD(model, momentum=0.0, seed=0, verify="never")
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    optimizer.zero_grad()
    scaler.scale(1e-6 * F.cross_entropy(model(X[0].half()).float(), LABELS[0])).backward()
    scaled = model[3].weight.grad.float()
    scaler.step(optimizer)
    found = optimizer.state[model[3].weight]["momentum_buffer"]
    assert torch.equal(found, scaled / loss_scale)
    assert (found != 0).all() == (loss_scale > 1.0)


# -- float32 beside float64 ------------------------------------------------------------------------------------------


LAYERS = {
    "linear": lambda: (nn.Linear(6, 5), nn.Linear(5, 3)),
    "convolution": lambda: (
        nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.Flatten()),
        nn.Linear(48, 3),
    ),
    "layer norm": lambda: (nn.Linear(6, 5), nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))),
    "depthwise": lambda: (
        nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2), nn.Flatten()),
        nn.Linear(8, 3),
    ),
}
ALPHA, TINY = 0.3, 100 * torch.finfo(torch.float32).eps  # the condition of F + α I is below 100


def mixed(kind, first, second):
    torch.manual_seed(0)
    one, other = LAYERS[kind]()
    return nn.Sequential(Cast(first), one.to(first), nn.Tanh(), Cast(second), other.to(second), Cast(torch.float64))


def widened(model):
    """A copy in float64."""
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        if isinstance(module, Cast):
            module.dtype = torch.float64
    return wide


def dense_step(model, x, y):
    """The step −(F + α I)⁻¹ V by torch.func, in float64, with the empirical F of each layer."""
    wide = widened(model)
    params = dict(wide.named_parameters())

    def loss_of(params, x, y):
        return F.cross_entropy(functional_call(wide, params, (x[None],)), y[None])

    rows = vmap(grad(loss_of), in_dims=(None, 0, 0))({name: p.detach() for name, p in params.items()}, x.double(), y)
    steps = {}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in params):
        names = [name for name in params if name.rpartition(".")[0] == layer]
        j_NK = torch.cat([rows[name].flatten(1) for name in names], 1)
        fisher = j_NK.mT @ j_NK / len(j_NK) + ALPHA * torch.eye(j_NK.shape[1], dtype=torch.float64)
        step = torch.linalg.solve(fisher, j_NK.mean(0)).split([params[name].numel() for name in names])
        steps |= {name: own.view_as(params[name]) for name, own in zip(names, step, strict=True)}
    return steps


@pytest.mark.parametrize("representation", ["factored", "per_sample"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("kind", LAYERS)
def test_float32_beside_float64_is_exact(kind, dtypes, representation):
    model = mixed(kind, *dtypes)
    options = {"scaling": "none", "momentum": 0.0, "fisher": "empirical", "representation": representation}
    optimizer = TENGraD(model, lr=1.0, damping=ALPHA, refresh_every=1, **options)
    for number in range(3):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        F.cross_entropy(model(X[number]), LABELS[number]).backward()
        optimizer.step()
        old = dict(before.named_parameters())
        for name, expected in dense_step(before, X[number], LABELS[number]).items():
            own = optimizer.state[model.get_parameter(name)].get("wide_copy", model.get_parameter(name))
            assert own.dtype == torch.float64
            error = (old[name].double() - own.detach() - expected).norm()
            assert error <= TINY * (expected.norm() + old[name].norm()), name
    assert optimizer._reports.apart == {}


@pytest.mark.parametrize("fisher", FISHERS)
def test_float32_beside_float64_is_near_float64_with_scaled_damping(fisher):
    ends = []
    for is_wide in (False, True):
        model = mixed("layer norm", torch.float64, torch.float32)
        if is_wide:
            model = widened(model)
        optimizer = TENGraD(model, lr=0.1, refresh_every=2, fisher=fisher, seed=0)
        for number in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(X[number]), LABELS[number]).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=STEPS * TINY)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
def test_a_compiled_step_mixes_float64_with_other_types(dtypes):
    ends = []
    for compiled in (False, True):
        model = mixed("layer norm", *dtypes)
        optimizer = TENGraD(model, lr=0.1, refresh_every=2, seed=0)
        step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager") if compiled else None
        for number in range(STEPS):
            if step is None:
                optimizer.zero_grad()
                F.cross_entropy(model(X[number]), LABELS[number]).backward()
                optimizer.step()
            else:
                step(X[number], LABELS[number])
        assert step is None or step.why_plain is None
        ends.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
    before = torch.cat([p.detach().double().flatten() for p in mixed("layer norm", *dtypes).parameters()])
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    assert (ends[0] - ends[1]).norm() <= 4 * eps * (ends[0] - before).norm()


def test_a_layer_that_becomes_float64_is_trained_on():
    model = mixed("linear", torch.float32, torch.float32)
    optimizer = TENGraD(model, lr=0.1, refresh_every=4, seed=0)
    for number in range(STEPS):
        if number == 2:
            model[3].dtype = torch.float64
            model[4].double()
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        F.cross_entropy(model(X[number]), LABELS[number]).backward()
        optimizer.step()
        assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(value.isfinite().all() for value in model.state_dict().values())
    assert model[4].weight.dtype == torch.float64
    assert optimizer.state[model[1].weight]["wide_copy"].dtype == torch.float64

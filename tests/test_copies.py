"""Copies of the optimizer and its model train on exactly as the originals would, which stay as they are."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_conv import assert_same, flat
from torch import nn
from torch.utils.hooks import RemovableHandle

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC


class Tied(nn.Module):
    """Tokens, a weight of two modules, a parameter without a module of its own, dropout and batch norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.drop = nn.Embedding(9, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.out = nn.Linear(4, 9)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        ids = (3 * x).long() % 9
        return self.out(self.drop(self.norm(self.embed(ids).sum(1))) * self.scale)


MODELS = {
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)
    ),
    "tied": Tied,
    "perceptron": lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)),
    "many layers": lambda: nn.Sequential(
        *(nn.Linear(8, 8) if k % 2 == 0 else nn.Tanh() for k in range(10)), nn.Linear(8, 5)
    ),
}


def damping(step):
    return 0.1 / (1 + step)


def decay_groups(model):
    parts = [[p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False)]
    return [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1], "lr": 0.01}]


# The model, the optimizer, its settings, and what is called before the first step.
CASES = {
    "defaults": ("convolution", TENGraD, {}),
    "tied": ("tied", TENGraD, {"seed": 3}),
    "factored": ("many layers", TENGraD, {"representation": "factored", "refresh_every": 4}),
    "per_sample": ("many layers", TENGraD, {"representation": "per_sample", "refresh_every": 4}),
    "bfloat16": ("convolution", TENGraD, {"representation": "per_sample_bf16"}),
    "compressed": ("many layers", TENGraD, {"representation": "compressed", "refresh_every": 4}),
    "exact, history, rows": ("tied", TENGraD, {"fisher": "exact", "history": 2, "fisher_rows": 9}),
    "empirical, one block": ("convolution", TENGraD, {"fisher": "empirical", "blocks": "network"}),
    "little memory": ("convolution", TENGraD, {"max_bytes": 10_000, "refresh_every": 4}),
    "SPRING": ("perceptron", TENGraD, {"spring": 0.9, "momentum": 0.0}),
    "schedules": ("perceptron", TENGraD, {"damping": damping, "lr": torch.tensor(0.02)}),
    "adapted damping": ("perceptron", TENGraD, {"damping": "lm", "trust_region": None}),
    "groups": ("convolution", TENGraD, {"params": decay_groups}),
    "sgd for some": ("tied", TENGraD, {"unsupported": "sgd"}),
    "kfac": ("convolution", KFAC, {"refresh_every": 4, "factors_every": 2}),
    "kfac, compiled": ("perceptron", KFAC, {"refresh_every": 4, "compile": True}),
    "ekfac": ("convolution", EKFAC, {"refresh_every": 4, "rescale_every": 2}),
    "kbfgs": ("convolution", KBFGS, {"refresh_every": 2, "params": decay_groups}),
    "kbfgsl": ("perceptron", KBFGSL, {"memory": 3}),
}


def saved(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair)), "torch.save": saved}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(7, 8, generator=generator), torch.randint(5, (7,), generator=generator)


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, first, last):
    torch.manual_seed(first)  # dropout's
    for step in range(first, last):
        optimizer.step(closure_of(model, optimizer, *batch(step)))


def prepared(case, steps):
    """Return a model and its optimizer after some steps."""
    name, make, settings = CASES[case]
    torch.manual_seed(0)
    model, settings = MODELS[name](), dict(settings)
    groups = settings.pop("params", lambda model: None)(model)
    compiles = settings.pop("compile", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some parameters take the SGD step
        optimizer = make(model, groups, **settings)
        if compiles:
            optimizer.compile_step(backend="eager")
        train(model, optimizer, 0, steps)
    return model, optimizer


def expect_twins(model, optimizer, twin, copied, first):
    """Train both on, without a warning: the copy ends where the original does."""
    assert_same(copied.state_dict(), optimizer.state_dict())
    assert copied.model is twin
    assert {id(p) for group in copied.param_groups for p in group["params"]} <= {id(p) for p in twin.parameters()}
    assert str(copied.summary()).split() == str(optimizer.summary()).split()
    for pair in ((twin, copied), (model, optimizer)):
        train(*pair, first, first + 6)
    assert torch.equal(flat(twin), flat(model))
    assert_same(copied.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("steps", [0, 1, 6])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error:no exact rows")
def test_a_copy_trains_on_as_the_original_would(case, way, steps):
    model, optimizer = prepared(case, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if steps == 0 else "error", UserWarning)  # the first refresh may warn
        expect_twins(model, optimizer, *WAYS[way]((model, optimizer)), steps)
    expected = prepared(case, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(*expected, steps, steps + 6)
    assert torch.equal(flat(model), flat(expected[0]))  # the original has not noticed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["defaults", "tied", "kfac", "kbfgs"])
def test_an_optimizer_alone_brings_its_model(case, way):
    model, optimizer = prepared(case, 3)
    copied = WAYS[way](optimizer)
    assert copied.model is not model
    expect_twins(model, optimizer, copied.model, copied, 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_scheduler_and_several_optimizers_come_along(way):
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    optimizers = [TENGraD(model, model[k].parameters(), seed=k) for k in (0, 2)]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5)

    def run(model, optimizers, scheduler):
        for step in range(3):
            x, y = batch(step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
            scheduler.step()
        return flat(model)

    run(model, optimizers, scheduler)
    twin = WAYS[way]((model, optimizers, scheduler))
    assert "step" in vars(optimizers[0])  # the scheduler's own
    before = flat(model)
    ended = run(*twin)
    assert torch.equal(flat(model), before)
    assert torch.equal(ended, run(model, optimizers, scheduler))
    assert twin[1][0].param_groups[0]["lr"] == optimizers[0].param_groups[0]["lr"]


# How far a batch has come when the copy is taken.
MOMENTS = {
    "before the forward": lambda model, x, y: None,
    "after the forward": lambda model, x, y: F.cross_entropy(model(x), y),
    "after the backward": lambda model, x, y: F.cross_entropy(model(x), y).backward(),
}


@pytest.mark.parametrize("steps", [0, 4])  # steps that refresh
@pytest.mark.parametrize("case", ["defaults", "little memory", "ekfac"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.filterwarnings("ignore:no exact rows")
def test_a_batch_that_has_begun_belongs_to_the_original(moment, case, steps):
    """The copy has no gradients, as with torch.optim, and no rows of that batch either."""
    model, optimizer = prepared(case, steps)
    optimizer.zero_grad()
    loss = MOMENTS[moment](model, *batch(steps))
    twin, copied = copy.deepcopy((model, optimizer))
    before = flat(twin)
    copied.step()
    assert torch.equal(flat(twin), before)
    for parameter in twin.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="no forward and backward of the model since"):
        copied.step()
    assert torch.equal(flat(twin), before)
    train(twin, copied, steps, steps + 1)  # its own forward and backward of the same batch
    if loss is not None:
        loss.backward()
    if moment == "before the forward":
        train(model, optimizer, steps, steps + 1)
        assert torch.equal(flat(twin), flat(model))
    else:
        optimizer.step()
    expected = prepared(case, steps)
    train(*expected, steps, steps + 1)
    assert torch.equal(flat(model), flat(expected[0]))


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("way", WAYS)
def test_copies_of_copies_gather_no_hooks(way):
    pair = prepared("defaults", 0)
    expected = hooks_on(pair[0])
    for _ in range(3):
        pair = WAYS[way](pair)
        assert hooks_on(pair[0]) == expected
    train(*pair, 0, 2)


def scaled(module, args, output):
    return 0.8 * output


ELSEWHERE = """
import pickle, sys, torch
sys.path[:0] = [{tests!r}]
import test_copies
model, optimizer = pickle.load(open({path!r}, "rb"))
test_copies.train(model, optimizer, 0, 2)
torch.save(test_copies.flat(model), {path!r})
"""


def test_another_process_keeps_the_users_hooks(tmp_path, monkeypatch):
    """There torch numbers hooks from 0 again, and would drop a hook that came with the model for one of ours."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    for _ in range(6):
        model[0].register_forward_hook(scaled)
    optimizer, path = TENGraD(model, seed=0), str(tmp_path / "pair")
    with open(path, "wb") as file:
        pickle.dump((model, optimizer), file)
    code = ELSEWHERE.format(tests=str(Path(__file__).parent), path=path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    train(model, optimizer, 0, 2)
    assert torch.equal(torch.load(path), flat(model))


@pytest.mark.parametrize("steps", [0, 2, 5])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("begin", ["model", "child", "optimizer"])
def test_a_model_may_contain_its_optimizer(begin, way, steps):
    model, optimizer = prepared("schedules", steps)
    holder = model[0] if begin == "child" else model
    holder.optimizer = optimizer
    begun = {"model": model, "child": model[0], "optimizer": optimizer}[begin]
    copied = getattr(WAYS[way](begun), "optimizer", None) if begin != "optimizer" else WAYS[way](optimizer)
    for pair in ((copied.model, copied), (model, optimizer)):
        train(*pair, steps, steps + 4)
    assert torch.equal(flat(copied.model), flat(model))


def compiled_step():
    model, optimizer = prepared("schedules", 1)
    return compile_train_step(model, F.cross_entropy, optimizer, backend="aot_eager")


# What is copied, how, and the error.
REFUSED = {
    "a compiled step": (compiled_step, "deepcopy", TypeError, "a compiled step is not copied: .* compile_train_step"),
    "a compiled step, pickled": (compiled_step, "pickle", TypeError, "a compiled step is not copied"),
    "a lambda": (
        lambda: TENGraD(MODELS["perceptron"](), damping=lambda step: 0.1),
        *("torch.save", (pickle.PicklingError, AttributeError), "lambda"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_copied_is_refused_at_once(case):
    make, way, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        WAYS[way](make())


def test_a_copy_stays_on_its_type_of_device():
    file = io.BytesIO()
    torch.save(prepared("defaults", 2), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match=r"copied on cpu cannot go on on meta, .* without map_location"):
        torch.load(file, map_location="meta", weights_only=False)


def test_a_closed_optimizer_stays_closed():
    model, optimizer = prepared("defaults", 0)
    optimizer.close()
    twin, copied = copy.deepcopy((model, optimizer))
    assert hooks_on(twin) == 0
    F.cross_entropy(twin(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(RuntimeError, match="no forward and backward"):
        copied.step()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_model_wrapped_by_torch_compile_is_copied_with_its_wrapper(way):
    torch.manual_seed(0)
    model = torch.compile(MODELS["perceptron"](), backend="aot_eager")
    optimizer = TENGraD(model, refresh_every=3)
    train(model, optimizer, 0, 2)
    twin, copied = WAYS[way]((model, optimizer))
    assert copied.model is twin
    assert type(twin) is type(model)
    for pair in ((twin, copied), (model, optimizer)):
        train(*pair, 2, 8)
    assert torch.equal(flat(twin), flat(model))

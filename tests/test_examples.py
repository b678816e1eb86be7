"""The examples: what they compute is what they say, and a tiny version of each runs and writes its page."""

import copy
import math
import re
import sys
from pathlib import Path

import dense
import pytest
import torch
import torch.nn.functional as F
from helpers.pages import blocks_of, run_python
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

from tengrad_triton import Categorical, TENGraD, canonical

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples import finetune, gpt, poisson, theorem1  # noqa: E402
from examples.text import VOCABULARY, batch, code, prose  # noqa: E402


def residuals(model, params, x_ND):
    """Return r(x): [N], with the Laplacian by `torch.func.hessian` of a plain MLP of the same weights."""

    def u(x):
        for index in range(len(model.network.layers)):
            x = x.tanh() if index else x
            weight, bias = (params[f"network.layers.{index}.{name}"] for name in ("weight", "bias"))
            x = F.linear(x, weight, bias)
        return x[0]

    def one(x):
        inside = ((x > 0) & (x < 1)).all()
        source = len(x) * math.pi**2 * poisson.solution(x[None])[0]
        return torch.where(inside, hessian(u)(x).diagonal().sum() + source, model.weight * u(x))

    return vmap(one)(x_ND)


@pytest.fixture(scope="module")
def pinn():
    torch.manual_seed(0)
    model = poisson.Residual((2, 5, 4, 1)).double()
    return model, poisson.points(6, 4, torch.Generator().manual_seed(0))


def test_the_model_returns_the_residual(pinn):
    model, x_ND = pinn
    assert (((x_ND == 0) | (x_ND == 1)).any(1)).tolist() == [False] * 6 + [True] * 4
    expected = residuals(model, dict(model.named_parameters()), x_ND)
    torch.testing.assert_close(model(x_ND)[:, 0], expected, rtol=1e-12, atol=1e-12)


def test_rows_are_residual_gradients_and_a_step_is_gauss_newton(pinn):
    """min ‖J δ + r‖² / N + α ‖δ‖² / 2 for the mean squared residual, whose Hessian is 2 Jᵀ J / N."""
    model, x_ND = copy.deepcopy(pinn[0]), pinn[1]
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = vmap(grad(lambda p, x: residuals(model, p, x[None])[0]), in_dims=(None, 0))(params, x_ND)
    j_NK = torch.cat([own[name].flatten(1) for name in params], 1)
    r_N = residuals(model, params, x_ND)
    damping, n = 1e-2, len(x_ND)
    settings = {**poisson.SETTINGS, "damping": damping, "lr": 1.0}
    optimizer = TENGraD(model, **settings)
    optimizer.step(poisson.loss_of(model, optimizer, lambda: x_ND))
    fisher = 2 * j_NK.mT @ j_NK / n
    step = torch.linalg.solve(fisher + damping * torch.eye(len(fisher)).double(), 2 * j_NK.mT @ r_N / n)
    pieces = step.split([p.numel() for p in params.values()])
    taken = {name: params[name] - p.detach() for name, p in model.named_parameters()}
    assert all(row.block != "-" for row in optimizer.summary().parameters)
    expected = {name: piece.view_as(params[name]) for name, piece in zip(params, pieces, strict=True)}
    assert dense.relative_error(taken, expected) < 1e-9


def test_a_step_on_your_own_equation_is_gauss_newton():
    """The same minimum, with rows by one backward pass a sample through derivatives by `autograd.grad`."""
    torch.manual_seed(0)
    model, x_ND = poisson.OwnResidual(6, 4).double(), poisson.points(6, 4, torch.Generator().manual_seed(0))
    params = list(model.parameters())
    x_ND.requires_grad_(True)
    value_N = model.u(x_ND)[:, 0]
    (slope_ND,) = torch.autograd.grad(value_N.sum(), x_ND, create_graph=True)
    bends = [torch.autograd.grad(slope_ND[:, d].sum(), x_ND, create_graph=True)[0][:, d] for d in range(2)]
    inside_N, boundary_N = value_N**3 - sum(bends) - 1, value_N
    r_N = torch.cat([(10 / 6) ** 0.5 * inside_N[:6], (10 * 10 / 4) ** 0.5 * boundary_N[6:]])  # w = 10 on the boundary
    mean_of_terms = inside_N[:6].square().mean() + 10 * boundary_N[6:].square().mean()
    torch.testing.assert_close(r_N.square().mean(), mean_of_terms)
    rows = (torch.autograd.grad(r, params, retain_graph=True, materialize_grads=True, allow_unused=True) for r in r_N)
    j_NK = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    optimizer = TENGraD(model, **{**poisson.SETTINGS, "damping": 1e-2, "lr": 1.0})
    old = torch.cat([p.detach().flatten() for p in params])
    optimizer.step(poisson.loss_of(model, optimizer, x_ND.detach))
    fisher = 2 * j_NK.mT @ j_NK / 10 + 1e-2 * torch.eye(len(old)).double()
    expected = torch.linalg.solve(fisher, 2 * j_NK.mT @ r_N.detach() / 10)
    taken = old - torch.cat([p.detach().flatten() for p in params])
    assert (taken - expected).norm() < 1e-9 * expected.norm()
    ways = [row.representation for row in optimizer.summary().parameters]
    assert all("by torch.func in a batched pass" in way for way in ways[:-1])
    assert ways[-1] == "per_sample"  # no derivative depends on the last bias: one call of its layer gives its rows


def test_a_short_race_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(poisson, "WIDTHS", (2, 6, 1))
    monkeypatch.setattr(poisson, "INSIDE", 20)
    monkeypatch.setattr(poisson, "BOUNDARY", 8)
    poisson.main(out=tmp_path, seconds=0.2, threads=torch.get_num_threads())
    text = (tmp_path / "poisson.md").read_text()
    assert text.count("| Adam | lr") == len(poisson.ADAM_LR)
    assert "class Residual(nn.Module)" in text
    assert "times lower than Adam's" in text
    assert (tmp_path / "poisson.png").stat().st_size > 10_000
    assert str(tmp_path) not in text


@pytest.fixture(scope="module")
def wide():
    model, x_ND, y_N1 = theorem1.problem(width=32768, seed=0)
    return model, *theorem1.descend(copy.deepcopy(model), x_ND, y_N1, share=0.95, steps=10), x_ND


def test_theorem_1_holds_where_its_assumptions_do(wide):
    _, run, _, _ = wide
    constants = run.constants
    assert 0 < constants.damping <= 4 * constants.least / (9 * constants.samples)
    assert 0 < run.lr < constants.largest_lr
    assert constants.c <= 0.5
    assert max(run.cs) <= constants.c  # assumption 2 at every point of the run,
    assert max(run.distances) <= 1  # none of which is outside of its ball
    assert all(r <= (1 - run.lr) ** k * run.residuals[0] for k, r in enumerate(run.residuals))


def test_lambda_0_is_that_of_the_layers_jacobians(wide):
    model, run, least, x_ND = wide
    params = {name: p.detach() for name, p in model.named_parameters()}
    own = vmap(grad(lambda p, x: functional_call(model, p, (x[None],))[0, 0]), in_dims=(None, 0))(params, x_ND)
    grams = {name.removesuffix(".weight"): j.flatten(1) @ j.flatten(1).mT for name, j in own.items()}
    expected = {name: torch.linalg.eigvalsh(k)[0].item() for name, k in grams.items()}
    assert least == pytest.approx(expected, rel=1e-9)
    assert run.constants.least == min(least.values())


def test_a_narrow_theorem_writes_the_page(tmp_path):
    theorem1.main(out=tmp_path, width=64, steps=6, threads=torch.get_num_threads())
    text = (tmp_path / "theorem1.md").read_text()
    assert text.count("\n| 0.") == len(theorem1.SHARES)
    assert (tmp_path / "theorem1.png").stat().st_size > 10_000


def test_the_layer_of_the_guide_is_exact(capsys):
    page = ROOT / "docs" / "guides" / "your-own-layer.md"
    first, *others = blocks_of(page.read_text())
    names = run_python(page, [first], {})
    rule = canonical.dispatch(names["FirstTokenLinear"])
    run_python(page, others, names)  # which end with a wrong rule
    canonical.register(names["FirstTokenLinear"], rule)
    said = capsys.readouterr().out
    assert re.search(r"^0\n +weight +\(8, 4\) +(factored|per_sample)", said, re.MULTILINE)
    assert "the rule for FirstTokenLinear agrees with autograd for 6 samples; errors: weight" in said
    assert "the rule for FirstTokenLinear is wrong for 'bias': relative error" in said
    torch.manual_seed(0)
    model = nn.Sequential(names["FirstTokenLinear"](4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)).double()
    nn.init.normal_(model[0].scale)
    twin, recording = copy.deepcopy(model), dense.Recording(Categorical())
    plain = {"scaling": "none", "momentum": 0.0}
    optimizer = TENGraD(model, lr=0.1, damping=0.03, likelihood=recording, **plain)
    oracle = dense.DenseNGD(twin, dense.blocks_of(twin), lr=0.1, damping=0.03, momentum=0.0, weight_decay=0.0)
    x, y = torch.randn(7, 5, 4).double(), torch.randint(3, (7,))
    for each in (model, twin):
        F.cross_entropy(each(x), y).backward()
    optimizer.step()
    oracle.refresh(dense.sample_gradients(twin, x, recording.target, recording.nll))
    oracle.step({name: p.grad for name, p in twin.named_parameters()})
    assert dense.relative_error(dict(model.named_parameters()), dict(twin.named_parameters())) < 1e-9


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(gpt, "SIZES", {"features": 8, "heads": 2, "blocks": 1})
    monkeypatch.setattr(gpt, "SAMPLES", 4)
    monkeypatch.setattr(gpt, "LENGTH", 6)
    monkeypatch.setattr(gpt, "ADAMW_LR", (1e-3, 1e-2))


def test_a_tiny_gpt_writes_the_page(tiny, tmp_path):
    gpt.main(out=tmp_path, seconds=0.3, threads=torch.get_num_threads())
    text = (tmp_path / "gpt.md").read_text()
    assert text.count("| AdamW | lr") == 2
    assert "nats a character" in text
    assert (tmp_path / "gpt.png").stat().st_size > 10_000


def test_fine_tuning_covers_every_parameter(tiny, tmp_path):
    model = gpt.untrained(0)
    rows = finetune.summary(model).parameters
    assert len(rows) == len(list(model.parameters()))  # the tied one once
    assert all(row.block != "-" for row in rows)
    finetune.main(out=tmp_path, seconds=0.3, threads=torch.get_num_threads())
    text = (tmp_path / "finetune.md").read_text()
    assert f"**{len(rows)} of {len(rows)} parameters have an exact block.**" in text
    assert "\nblocks.0.attention\n  in_proj_weight " in text


def test_the_texts_are_those_of_python():
    for text in (prose(), code()):
        assert len(text.train) > 5 * len(text.test) > 50_000
        assert 0 <= text.train.min() <= text.train.max() < VOCABULARY
    x, y = batch(prose().train, 3, 5, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (3, 5)
    assert torch.equal(x[:, 1:], y[:, :-1])

"""Dense blocks and rows are those of autograd in float64, and a block's inverse times V is the step's direction."""

import copy
import re
from pathlib import Path

import dense
import pytest
import torch
import torch.nn.functional as F
from exact_cases import CLASSES, LAYERS, TOLERANCE, Case, batches
from graph_rows import cotangents_of, rows_of_graph
from helpers.pages import blocks_of, run_python
from scaled import dense_d
from torch import nn

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.likelihoods import LIKELIHOODS, likelihood_of

PURE = {"momentum": 0.0, "clip_threshold": None, "trust_region": None, "lr": 1.0, "damping": 0.03}
PERCEPTRON = Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)), (4,))


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(CLASSES, 4), nn.Linear(4, CLASSES)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids).mean(1).tanh())


TIED = Case(Tied, (6,), CLASSES)


class Trial:
    """A model with its optimizer, after some steps; the last one was along a known gradient, with known rows."""

    def __init__(self, case, steps=1, fisher="sampled", groups=None, **options):
        torch.manual_seed(0)
        self.model = case.model().double()
        recording = dense.Recording(LIKELIHOODS["categorical"])
        likelihood = "categorical" if fisher == "exact" else recording
        given = groups(self.model) if groups else None
        settings = {"refresh_every": 1, "seed": 0, **PURE, **options}
        self.optimizer = TENGraD(self.model, given, fisher=fisher, likelihood=likelihood, **settings)
        history = options.get("history", 1)
        self.rows, self.before, self.grads = [], {}, {}
        for x, labels in batches(case, steps):
            twin = copy.deepcopy(self.model)
            self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), labels).backward()
            self.grads = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            self.optimizer.step()
            target = recording.target if fisher == "sampled" else labels
            self.rows = [rows_of(twin, x, fisher, target), *self.rows[: history - 1]]

    def rows_of(self, name):
        return torch.cat([rows[name].flatten(1) for rows in self.rows])

    def direction(self, names):
        after = dict(self.model.named_parameters())
        return torch.cat([(self.before[name] - after[name].detach()).flatten() for name in names])

    def grad(self, names):
        return torch.cat([self.grads[name].flatten() for name in names])


def rows_of(model, x, fisher, target):
    """Return the rows by autograd: of the likelihood at ``target``, or of the Hessian's factor at the output."""
    if fisher != "exact":
        return dense.sample_gradients(model, x, target, F.cross_entropy)
    seen = model(x)
    cotangents = cotangents_of("exact", [seen], None, likelihood_of("categorical"), None, len(x))
    return rows_of_graph(model, [seen], cotangents)


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def check_block(trial, name):
    """Compare all that the optimizer shows of a block with the dense matrices; return the parameters' names."""
    optimizer = trial.optimizer
    block = optimizer.block(name)
    names = list(block.parameters)
    j_NK = torch.cat([trial.rows_of(one) for one in names], 1)
    fisher = j_NK.mT @ j_NK / block.rows
    params = dict(trial.model.named_parameters())
    layers = {x.full_name_of(p): (x.name, p) for x in optimizer._layers for p in x.parameters}
    scales = {one: optimizer._curvature.scales.get(layers[one][0], {}).get(layers[one][1]) for one in names}
    eye = {one: torch.eye(params[one].numel(), dtype=torch.float64) for one in names}
    d = torch.block_diag(*(eye[n] if scales[n] is None else dense_d(scales[n], params[n]) for n in names))
    factor = 1.0 if scales[names[0]] is None else block.damping
    inverse = factor * torch.linalg.inv(fisher + block.damping * d)
    assert [block.parameters[one].stop - block.parameters[one].start for one in names] == [len(eye[n]) for n in names]
    assert not block.failed
    assert error(optimizer.fisher_block(name), fisher) < TOLERANCE
    assert error(optimizer.scale_block(name), d) < TOLERANCE
    assert error(optimizer.inverse_block(name), inverse) < TOLERANCE
    assert error(optimizer.inverse_block(name) @ trial.grad(names), trial.direction(names)) < TOLERANCE
    rows = optimizer.rows(name)
    assert {one: x.shape[1:] for one, x in rows.items()} == {one: params[one].shape for one in names}
    own = torch.cat([rows[one].flatten(1) for one in names], 1)
    if len(own) == len(j_NK) and optimizer.choices()[names[0]].representation != "compressed":
        assert error(own, j_NK) < TOLERANCE
    assert error(own.mT @ own / block.rows, fisher) < TOLERANCE
    return names


def check_all_blocks(trial):
    blocks = dict.fromkeys(entry.block for entry in trial.optimizer.summary().parameters)
    seen = [name for block in blocks for name in check_block(trial, block)]
    assert sorted(seen) == sorted(name for name, _ in trial.model.named_parameters())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer(layer):
    check_all_blocks(Trial(LAYERS[layer], representation="factored"))


THREE = LAYERS["3c1f"]
SETTINGS = {
    f"{fisher}, {scaling}": (THREE, {"fisher": fisher, "scaling": scaling, "relative_damping": True})
    for fisher in ("sampled", "exact", "empirical")
    for scaling in ("none", "diagonal", "kronecker")
} | {
    "one block": (PERCEPTRON, {"blocks": "network"}),
    "one block, unscaled": (PERCEPTRON, {"blocks": "network", "scaling": "none"}),
    "a list of layers": (THREE, {"blocks": [["0", "2"]]}),
    "history": (THREE, {"history": 2, "steps": 3}),
    "history, exact rows, unscaled": (PERCEPTRON, {"history": 2, "steps": 3, "fisher": "exact", "scaling": "none"}),
    "history, explicit rows": (THREE, {"history": 2, "steps": 2, "representation": "per_sample"}),
    "compressed": (THREE, {"representation": "compressed", "tol": 1e-14}),
    "compressed, unscaled": (THREE, {"representation": "compressed", "tol": 1e-14, "scaling": "none"}),
    "tied": (TIED, {}),
    "tied, explicit rows, unscaled": (TIED, {"representation": "per_sample", "scaling": "none"}),
    "tied, one block": (TIED, {"blocks": "network", "fisher": "exact"}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting(setting):
    case, options = SETTINGS[setting]
    check_all_blocks(Trial(case, **options))


def test_the_damping_is_the_one_that_was_factored():
    trial = Trial(PERCEPTRON, damping=lambda step: 0.5 / (1 + step), refresh_every=2, steps=2, scaling="none")
    assert trial.optimizer.param_groups[0]["damping"] == 0.5
    assert trial.optimizer.block("0").damping == pytest.approx(0.5)
    relative = Trial(PERCEPTRON, damping=0.5, relative_damping=True, scaling="none")
    trace = relative.optimizer.fisher_block("0").trace().item()
    assert relative.optimizer.block("0").damping == pytest.approx(0.5 * max(1.0, trace))


def test_rows_that_are_drawn_are_some_of_all():
    trial = Trial(THREE, fisher="exact", fisher_rows=7, representation="per_sample")
    rows, all_rows = trial.optimizer.rows("0")["0.weight"].flatten(1), trial.rows_of("0.weight")
    assert trial.optimizer.block("0").rows == len(rows) == 7
    distances = torch.cdist(rows, all_rows, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert (distances < TOLERANCE * rows.norm(dim=1)).all()


def test_a_block_of_fewer_parameters_than_rows_shows_rows_of_the_same_fisher():
    trial = Trial(PERCEPTRON, fisher="exact", representation="per_sample")
    check_all_blocks(trial)
    assert len(trial.optimizer.rows("2")["2.bias"]) == len(trial.rows_of("2.bias")) == 15
    norm = Trial(LAYERS["layer norm"], fisher="exact", representation="per_sample")
    assert len(norm.optimizer.rows("layer")["layer.weight"]) == 8
    assert norm.optimizer.block("layer").rows == 15
    check_all_blocks(norm)


def test_single_precision_and_failed_factorizations():
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES)
    optimizer = TENGraD(model, scaling="none", lr=1.0, momentum=0.0)
    F.cross_entropy(model(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long)).backward()
    before = model.weight.detach().clone()
    optimizer.step()
    inverse, places = optimizer.inverse_block("."), optimizer.block(".").parameters
    assert inverse.dtype == optimizer.fisher_block(".").dtype == optimizer.rows(".")["weight"].dtype == torch.float32
    grads = torch.cat([model.weight.grad.flatten(), model.bias.grad])
    step = (inverse @ grads)[places["weight"]].view(CLASSES, 4)
    torch.testing.assert_close(before - model.weight.detach(), step)
    optimizer._curvature.inverses[0].inverse_BNN.zero_()  # what a factorization that fails leaves
    assert optimizer.block(".").failed
    torch.testing.assert_close(optimizer.inverse_block("."), torch.eye(15) / optimizer.block(".").damping)


def test_compiled_steps_and_copies_show_the_same():
    torch.manual_seed(0)
    model = PERCEPTRON.model().double()
    optimizer = TENGraD(model, fisher="empirical", refresh_every=2, **PURE)
    step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager")
    for number, (x, labels) in enumerate(batches(PERCEPTRON, 4)):
        if number == 2:  # a compiled refresh, and one step with it
            rows = dense.sample_gradients(copy.deepcopy(model), x, labels, F.cross_entropy)
        step(x, labels)
    assert step.why_plain is None
    names = list(optimizer.block("0").parameters)
    j_NK = torch.cat([rows[name].flatten(1) for name in names], 1)
    fisher = j_NK.mT @ j_NK / len(j_NK)
    assert error(optimizer.fisher_block("0"), fisher) < TOLERANCE
    damped = fisher + 0.03 * optimizer.scale_block("0")
    assert error(optimizer.inverse_block("0"), 0.03 * torch.linalg.inv(damped)) < TOLERANCE
    _, twin = copy.deepcopy((model, optimizer))
    assert torch.equal(twin.inverse_block("0"), optimizer.inverse_block("0"))


def optimizer_for_refusals():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES), nn.Linear(CLASSES, CLASSES))
    model[3].requires_grad_(False)
    optimizer = TENGraD(model, refresh_every=2)
    return model, optimizer


def take_step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long)).backward()
    optimizer.step()


REFUSED = {
    "unknown": ("7", {}, ValueError, "no Fisher block is named '7': the blocks are '0', '2', '3'"),
    "a parameter": ("0.weight", {}, ValueError, "'0.weight' is a part of block '0'"),
    "another kind of name": (
        0, {}, ValueError, "no Fisher block is named 0 (did you mean '0'?): the blocks are '0', '2', '3'"
    ),
    "frozen": ("3", {}, ValueError, "block '3' had no part in the last refresh"),
    "no number of bytes": ("0", {"max_bytes": "1"}, TypeError, "max_bytes must be a number of bytes, got '1'"),
    "too large": (
        "0", {"max_bytes": 1000}, ValueError,
        "block '0' has 30 parameters and 5 rows: a matrix of all pairs and the rows take 8,400 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", ["fisher_block", "inverse_block", "scale_block"])
def test_refusals(case, method):
    name, options, kind, message = REFUSED[case]
    model, optimizer = optimizer_for_refusals()
    take_step(model, optimizer)
    with pytest.raises(kind, match=re.escape(message)):
        getattr(optimizer, method)(name, **options)


def test_refused_rows_say_their_size():
    model, optimizer = optimizer_for_refusals()
    take_step(model, optimizer)
    with pytest.raises(ValueError, match=r"its rows take 1,200 bytes, .* have fewer rows by fisher_rows=, or raise"):
        optimizer.rows("0", max_bytes=1199)
    assert optimizer.rows("0", max_bytes=1200)["0.weight"].shape == (5, 6, 4)


def test_there_is_nothing_to_see_before_the_first_refresh_and_while_it_is_released():
    model, optimizer = optimizer_for_refusals()
    with pytest.raises(RuntimeError, match="block '0' has no curvature yet: take a step first"):
        optimizer.fisher_block("0")
    take_step(model, optimizer)
    take_step(model, optimizer)
    kept = optimizer.fisher_block("0")
    assert torch.equal(kept, optimizer.fisher_block("0"))
    model(torch.randn(5, 4))  # the next step refreshes
    with pytest.raises(RuntimeError, match="the curvature of block '0' is released"):
        optimizer.fisher_block("0")


def test_parameters_that_take_the_sgd_step_have_no_block():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale

    model = nn.Sequential(Own(), nn.Linear(4, CLASSES))
    with pytest.warns(UserWarning, match="no exact rows for 0"):
        optimizer = TENGraD(model, unsupported="sgd")
    take_step(model, optimizer)
    with pytest.raises(ValueError, match=r"the parameters of '0' take the SGD step \(no rule for Own\)"):
        optimizer.rows("0")
    assert list(optimizer.block("1").parameters) == ["1.weight", "1.bias"]


def test_the_guide_says_what_is_the_case(capsys):
    page = Path(__file__).parent.parent / "docs" / "guides" / "inspect.md"
    blocks = blocks_of(page.read_text())
    names = run_python(page, blocks, {})
    assert len(blocks) == 6
    assert names["fisher"].shape == (56, 56)
    assert {name: tuple(j.shape) for name, j in names["rows"].items()} == {"0.weight": (96, 8, 6), "0.bias": (96, 8)}
    said = capsys.readouterr().out
    assert "FisherBlock(parameters={'0.weight': slice(0, 48, None), '0.bias': slice(48, 56, None)}, rows=96" in said
    assert "block '0' has 56 parameters and 96 rows: a matrix of all pairs and the rows take 68,096 bytes" in said

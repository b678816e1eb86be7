"""Scaled damping: D is what M17 says, and in float64 every step with it equals the dense solve."""

import copy
import math
import warnings

import dense
import pytest
import torch
import torch.nn.functional as F
from exact_cases import CLASSES, LAYERS, TOLERANCE, Case, batches
from scaled import FLOOR, KEEP, LEAST, DenseScaled, Settings, dense_d, unit
from torch import nn

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.layers import tensors_in
from tengrad_triton.likelihoods import LIKELIHOODS

OFF = {"relative_damping": False, "trust_region": None}
REFRESH = 2


class Trial:
    """A model, its optimizer and the oracle, which follow the same batches."""

    def __init__(self, case, *, compiled=False, groups=None, **options):
        torch.manual_seed(0)
        self.model = case.model().double()
        self.plain = copy.deepcopy(self.model)
        self.recording = dense.Recording(LIKELIHOODS["categorical"])
        self.fisher = "empirical" if compiled else "sampled"
        own = {name: options.pop(name) for name in list(options) if name in Settings.__dataclass_fields__}
        given = groups(self.model) if groups else [{"params": list(self.model.parameters())}]
        base = {
            name: getattr(Settings(**own), name) for name in ("lr", "damping", "momentum", "weight_decay", "spring")
        }
        bounds = {name: getattr(Settings(**own), name) for name in ("clip_threshold", "trust_region")}
        extra = {} if own.get("spring") else {"nesterov": own.get("nesterov", True)}
        if own.get("shrink"):
            extra |= {"weight_decay": own["shrink"], "decoupled_weight_decay": True}
        self.optimizer = TENGraD(
            self.model, given, fisher=self.fisher, likelihood=self.recording, tol=1e-14,
            **{"refresh_every": REFRESH, "relative_damping": False, **base, **bounds, **extra, **options},
        )  # fmt: skip
        by_id = {id(p): name for name, p in self.model.named_parameters()}
        settings = {
            by_id[id(p)]: Settings(**{**own, **{k: g[k] for k in ("lr", "spring") if k in g}})
            for g in given
            for p in g["params"]
        }
        names = [name for name, _ in self.model.named_parameters()]
        blocks = [names] if options.get("blocks") == "network" else dense.blocks_of(self.model)
        self.oracle = DenseScaled(settings, blocks)
        self.case, self.history, self.rows = case, options.get("history", 1), []
        self.step = (
            compile_train_step(self.model, F.cross_entropy, self.optimizer, backend="aot_eager") if compiled else None
        )

    def scales(self):
        layers = {x.full_name_of(name): (x.name, name) for x in self.optimizer._layers for name in x.parameters}
        return {full: self.optimizer._curvature.scales[at][name] for full, (at, name) in layers.items()}

    def run(self, steps=3):
        """Return the largest relative error of a step."""
        worst = 0.0
        for number, (x, labels) in enumerate(batches(self.case, steps)):
            self.plain.load_state_dict(self.model.state_dict())
            before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            grads = self.take(x, labels)
            if number % REFRESH == 0:  # with a history, F is that of the rows of two refreshes
                own = (
                    (labels, F.cross_entropy)
                    if self.fisher == "empirical"
                    else (self.recording.target, self.recording.nll)
                )
                self.rows = [dense.sample_gradients(self.plain, x, *own), *self.rows[: self.history - 1]]
                self.oracle.refresh({name: torch.cat([rows[name] for rows in self.rows]) for name in before})
            d_of = {name: dense_d(scale, before[name]) for name, scale in self.scales().items()}
            after = self.oracle.step(before, grads, d_of)
            change = {name: p.detach() - before[name] for name, p in self.model.named_parameters()}
            worst = max(worst, dense.relative_error(change, {name: after[name] - before[name] for name in before}))
        return worst

    def take(self, x, labels):
        """Take a step; return the gradients."""
        if self.step is None:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), labels).backward()
            grads = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            self.optimizer.step()
            return grads
        self.plain.zero_grad()
        self.step(x, labels)
        F.cross_entropy(self.plain(x), labels).backward()
        return {name: p.grad for name, p in self.plain.named_parameters()}


FORMS = [("kronecker", "factored"), ("kronecker", "per_sample"), ("diagonal", "compressed")]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("scaling", "representation"), FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_step_equals_the_dense_solve(layer, scaling, representation):
    trial = Trial(LAYERS[layer], scaling=scaling, representation=representation, weight_decay=0.01)
    assert trial.run() < TOLERANCE


def two_groups(model):
    layers = [module for module in model if isinstance(module, nn.Linear)]
    return [{"params": [*layers[0].parameters()], "lr": 0.3}, {"params": [*layers[1].parameters()], "lr": 0.02}]


def two_groups_in_a_layer(model):
    weights, biases = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    return [{"params": weights, "lr": 0.3}, {"params": biases, "lr": 0.02}]


def spring_in_one(model):
    first, second = two_groups(model)
    return [{**first, "spring": 0.7, "nesterov": False}, second]


PERCEPTRON = Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)), (4,))
SETTINGS = {
    "one block": {"blocks": "network"},
    "two learning rates": {"groups": two_groups},
    "trust region": {"trust_region": 1e-4},
    "trust region, two learning rates": {"trust_region": 1e-4, "groups": two_groups},
    "trust region, two learning rates in a block": {"trust_region": 1e-4, "groups": two_groups_in_a_layer},
    "trust region, two learning rates in one block": {"trust_region": 1e-4, "groups": two_groups, "blocks": "network"},
    "no look-ahead": {"nesterov": False},
    "no momentum": {"momentum": 0.0, "nesterov": False},
    "SPRING": {"spring": 0.8},
    "SPRING in one group": {"groups": spring_in_one, "blocks": "network"},
    "no bound": {"clip_threshold": None},
    "a narrow bound": {"clip_threshold": 0.01},
    "a narrow bound, one block": {"clip_threshold": 0.01, "blocks": "network"},
    "decoupled weight decay": {"shrink": 0.1},
    "history, factored": {"history": 2, "representation": "factored"},
    "history, explicit rows": {"history": 2, "representation": "per_sample", "blocks": "network"},
    "a trust region that no step leaves": {"trust_region": 1e9, "groups": two_groups},
}
COMPILED = ("trust region, two learning rates in a block", "SPRING in one group")


@pytest.mark.parametrize(
    ("setting", "compiled"),
    [*((one, False) for one in SETTINGS), (COMPILED[0], True), pytest.param(COMPILED[1], True, marks=pytest.mark.slow)],
)
def test_settings_of_steps(setting, compiled):
    trial = Trial(PERCEPTRON, scaling="kronecker", compiled=compiled, **SETTINGS[setting])
    assert trial.run(steps=5) < TOLERANCE
    if compiled:
        assert trial.step.why_plain is None


def seen_at(layer):
    """Return a list to which every call of a layer adds its input and, after the backward, its output gradient."""
    seen = []

    def note(module, args, output):
        seen.append([args[0].detach(), None])
        output.register_hook(lambda grad, at=seen[-1]: at.__setitem__(1, grad.detach()))

    layer.register_forward_hook(note)
    return seen


def outer(x_NPn):
    return torch.einsum("npi,npj->ij", x_NPn, x_NPn)


def of_linear(x, g, _):
    x, g = x.flatten(1, -2) if x.dim() > 2 else x[:, None], g.flatten(1, -2) if g.dim() > 2 else g[:, None]
    return [outer(g)], [outer(x)], g.shape[1]


def of_conv(x, g, layer):
    """The groups' moments; those of inputs are over all pixels, as many as there are taps times positions."""
    x_NSC, g_NPO = x.flatten(2).mT, g.flatten(2).mT
    factor = math.prod(layer.kernel_size) * g_NPO.shape[1] / x_NSC.shape[1]
    rows = [outer(part) for part in g_NPO.chunk(layer.groups, 2)]
    return rows, [factor * outer(part) for part in x_NSC.chunk(layer.groups, 2)], g_NPO.shape[1]


def of_embedding(ids, g, layer):
    counts = torch.bincount(ids.flatten(), minlength=layer.num_embeddings).double()
    return [torch.diag(counts)], [outer(g)], ids.shape[1]


def root(moments, is_matrix):
    """Return √(M + FLOOR (mean λ) I) of each group, with a root mean square of its eigenvalues of 1 over all groups."""
    if not is_matrix:
        moments = [torch.diag(m.diagonal()) for m in moments]
    n = sum(len(m) for m in moments)
    mean = sum(m.trace() for m in moments) / n
    roots = [matrix_root(m + FLOOR * mean * torch.eye(len(m))) for m in moments]
    size = (sum(r.square().sum() for r in roots) / n).sqrt()
    return [r / size for r in roots]


def matrix_root(m):
    """Return the root by the iteration of Denman and Beavers, which needs no eigenvectors."""
    y, z = m, torch.eye(len(m), dtype=m.dtype)
    for _ in range(60):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return y


LAYER = {
    "linear": (LAYERS["linear"], of_linear, (False, False)),
    "linear over tokens": (LAYERS["linear over tokens"], of_linear, (True, True)),
    "conv": (LAYERS["conv"], of_conv, (True, True)),
    "conv, groups": (LAYERS["conv, groups"], of_conv, (True, True)),
    "embedding": (LAYERS["embedding"], of_embedding, (False, True)),
}


@pytest.mark.parametrize("layer", LAYER)
def test_d_is_that_of_its_definition(layer, monkeypatch):
    """D of a weight after two refreshes, from the inputs and the output gradients of its layer."""
    monkeypatch.setattr("tengrad_triton.curvature.moments.running.SIDE_SHARE", 1 / 6)
    case, moments_of, is_matrix = LAYER[layer]
    torch.manual_seed(0)
    model = copy.deepcopy(case.model()).double()  # the case keeps its layer: it would keep the hook
    seen = seen_at(model.layer)
    optimizer = TENGraD(model, lr=0.05, fisher="empirical", refresh_every=1, scaling="kronecker", **OFF)
    sums = None
    for x, labels in batches(case, 2):
        weight = model.layer.weight
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        square, squares = weight.grad.square().mean(), [p.grad.square().mean() for p in model.parameters()]
        a, g = seen[-1]
        rows, columns, positions = moments_of(a, len(x) * g, model.layer)
        trace_r, trace_c = sum(m.trace() for m in rows), sum(m.trace() for m in columns)
        rows = [m * (trace_c / trace_r / positions).sqrt() / len(x) for m in rows]
        columns = [m * (trace_r / trace_c / positions).sqrt() / len(x) for m in columns]
        new = [rows, columns, [square], squares, [torch.ones(())]]
        sums = [[KEEP * old for old in part] for part in sums] if sums else [[0 * x for x in part] for part in new]
        sums = [
            [old + (1 - KEEP) * one for old, one in zip(*pair, strict=True)] for pair in zip(sums, new, strict=True)
        ]
        optimizer.step()
    rows, columns, (square,), squares, (share,) = sums
    r, c = root(rows, is_matrix[0]), root(columns, is_matrix[1])
    size = max(square / share, LEAST**2 * (sum(squares) / len(squares)) / share).sqrt() * unit(weight)
    scale = optimizer._curvature.jacobians["layer"]["weight"].scale
    assert (scale.rows.basis_Gnn is not None, scale.columns.basis_Gnn is not None) == is_matrix
    taps = torch.eye(weight[0, 0].numel())
    expected = torch.block_diag(*[torch.kron(torch.kron(a, b), taps) for a, b in zip(r, c, strict=True)])
    torch.testing.assert_close(dense_d(scale, weight), size * expected, rtol=1e-6, atol=1e-9)


def test_history_of_convolutions_and_embeddings():
    for layer in ("conv, groups", "embedding", "tied embedding and head", "3c1f"):
        trial = Trial(LAYERS[layer], scaling="kronecker", history=2, representation="factored")
        assert trial.run(steps=6) < TOLERANCE, layer


@pytest.mark.parametrize("scaling", ["none", "kronecker"])
def test_rounded_rows_are_solved_exactly(scaling):
    """With rows in bfloat16, the step is that of the rounded rows: K and both products read the same numbers."""
    torch.manual_seed(0)
    model = PERCEPTRON.model().double()
    optimizer = TENGraD(
        model, lr=1.0, damping=0.3, momentum=0.0, scaling=scaling, representation="per_sample_bf16",
        clip_threshold=None, fisher="empirical", **OFF,
    )  # fmt: skip
    x, labels = next(batches(PERCEPTRON, 1))
    F.cross_entropy(model(x), labels).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for layer in ("0", "2"):
        names = [f"{layer}.weight", f"{layer}.bias"]
        stored = [optimizer._curvature.jacobians[layer][name] for name in ("weight", "bias")]
        assert stored[0].j_NK.dtype == torch.bfloat16
        d = torch.eye(sum(before[name].numel() for name in names), dtype=torch.float64)
        if scaling != "none":
            d = torch.block_diag(*[dense_d(one.scale, before[name]) for one, name in zip(stored, names, strict=True)])
        j_NK = torch.cat([one.j_NK.double() for one in stored], 1) @ d
        v = torch.cat([dict(model.named_parameters())[name].grad.flatten() for name in names])
        factor = 1.0 if scaling == "none" else 0.3
        expected = factor * torch.linalg.solve(j_NK.mT @ j_NK / len(j_NK) + 0.3 * d, v)
        change = torch.cat([(before[name] - dict(model.named_parameters())[name].detach()).flatten() for name in names])
        assert (change - expected).norm() < 1e-5 * expected.norm()  # K of rounded rows is in float32


def some_steps(model, optimizer, numbers):
    for number, (x, labels) in enumerate(batches(PERCEPTRON, 7)):
        if number in numbers:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()


def perceptron(**options):
    torch.manual_seed(0)
    model = PERCEPTRON.model().double()
    return model, TENGraD(model, lr=0.05, damping=0.03, refresh_every=REFRESH, seed=0, **OFF, **options)


@pytest.mark.parametrize("scaling", ["diagonal", "kronecker"])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_training_goes_on_bit_for_bit(scaling, how):
    model, optimizer = perceptron(scaling=scaling, history=2)
    some_steps(model, optimizer, range(3))
    if how == "deepcopy":
        other, twin = copy.deepcopy((model, optimizer))
    else:
        other, twin = perceptron(scaling=scaling, history=2)
        other.load_state_dict(model.state_dict())
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    some_steps(model, optimizer, range(3, 7))
    some_steps(other, twin, range(3, 7))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("saved", "own"), [("none", "kronecker"), ("kronecker", "none"), ("diagonal", "kronecker")])
def test_a_state_of_another_scaling_is_refused(saved, own):
    model, optimizer = perceptron(scaling=saved)
    some_steps(model, optimizer, range(2))
    other, twin = perceptron(scaling=own)
    some_steps(other, twin, range(3))
    before = copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError, match=f"scaling='{saved}', but this optimizer has scaling='{own}'"):
        twin.load_state_dict(optimizer.state_dict())
    after, unchanged = (tensors_in(state) for state in (twin.state_dict(), before))
    assert len(after) == 6  # four momenta, the generator's state and the curvature
    assert all(torch.equal(x, y) for x, y in zip(after, unchanged, strict=True))


@pytest.mark.parametrize(
    ("options", "kind", "error"),
    [
        ({"scaling": "full"}, ValueError, "scaling must be one of 'none', 'diagonal', 'kronecker', got 'full'"),
        ({"scaling": None}, ValueError, "scaling must be one of"),
        ({"clip_threshold": 0.0}, ValueError, "clip_threshold must be positive, or None for no bound, got 0.0"),
        ({"clip_threshold": True}, TypeError, "clip_threshold must be"),
    ],
)
def test_bad_settings(options, kind, error):
    with pytest.raises(kind, match=error):
        perceptron(**options)


def test_parameters_without_rows_are_scaled_by_the_size_of_their_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), OwnScale(6), nn.Linear(6, CLASSES)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which names the parameter
        optimizer = TENGraD(
            model, lr=0.05, unsupported="sgd", scaling="kronecker", momentum=0.0, clip_threshold=None, **OFF
        )
    x, labels = next(batches(PERCEPTRON, 1))
    F.cross_entropy(model(x), labels).backward()
    before = model[2].factor.detach().clone()
    grad = model[2].factor.grad
    optimizer.step()
    torch.testing.assert_close(before - model[2].factor.detach(), 0.05 * grad / grad.square().mean().sqrt())


class OwnScale(nn.Module):
    """Has no rule."""

    def __init__(self, features):
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, features))

    def forward(self, x):
        return x * self.factor


def test_the_summary_says_the_form_of_d():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 200), nn.Tanh(), nn.Flatten(), nn.Linear(1600, 3))
    optimizer = TENGraD(net, scaling="kronecker", **OFF)
    F.cross_entropy(net(torch.randn(5, 8, 4)), torch.zeros(5, dtype=torch.long)).backward()
    optimizer.step()
    entries = {entry.parameter: entry for entry in optimizer.summary().parameters}
    assert "D 6² ⊗ 4²" in entries["0.weight"].representation
    assert "D 200 ⊗ 6²" in entries["2.weight"].representation
    assert "D 3 ⊗ 1600" in entries["5.weight"].representation
    jacobian = optimizer._curvature.jacobians["0"]["weight"]
    d_bytes = 4 * (6 + 36 + 4 + 16)
    assert entries["0.weight"].bytes == jacobian.nbytes + d_bytes


@pytest.mark.filterwarnings("ignore:no exact rows for group 1")
def test_a_state_without_curvature_of_another_scaling_is_refused():
    model, optimizer = perceptron(scaling="none")
    some_steps(model, optimizer, range(2))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    assert optimizer._curvature is None
    _, twin = perceptron(scaling="kronecker")
    twin.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    with pytest.raises(ValueError, match="make it with scaling='none'"):
        twin.load_state_dict(optimizer.state_dict())


def test_heads_in_turn_keep_their_moments():
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 6).double(), nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]).double()
    model = InTurn(trunk, heads)
    optimizer = TENGraD(model, lr=0.01, scaling="kronecker", refresh_every=1, **OFF)
    for number, (x, labels) in enumerate(batches(PERCEPTRON, 6)):
        model.turn = number % 2
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    for head in ("heads.0", "heads.1"):
        weight = optimizer._curvature.moments[head]["weight"].weight.item()
        assert weight == pytest.approx(1 - KEEP**3)  # each was seen by three refreshes


class InTurn(nn.Module):
    """One of two heads, in turn."""

    def __init__(self, trunk, heads):
        super().__init__()
        self.trunk, self.heads, self.turn = trunk, heads, 0

    def forward(self, x):
        return self.heads[self.turn](self.trunk(x).tanh())


def test_a_small_first_batch_does_not_decide_the_form_of_d():
    torch.manual_seed(0)
    model = nn.Linear(4, 6).double()
    optimizer = TENGraD(model, lr=0.01, scaling="kronecker", refresh_every=1, **OFF)
    forms = []
    for samples in (1, 64, 1):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(samples, 4).double()), torch.zeros(samples, dtype=torch.long)).backward()
        optimizer.step()
        forms.append(str(optimizer._curvature.jacobians[""]["weight"].scale))
    assert forms == ["6 ⊗ 4", "6² ⊗ 4²", "6² ⊗ 4²"]


def test_moments_without_full_rank_do_not_amplify_rounding():
    """A last layer of zeros, and more rows than samples: the moments of the layers before it have few directions."""
    ends = []
    for representation in ("factored", "per_sample"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, CLASSES)).double()
        nn.init.zeros_(model[2].weight)
        optimizer = TENGraD(
            model, lr=0.05, scaling="kronecker", fisher="exact", refresh_every=2, representation=representation, **OFF
        )
        generator = torch.Generator().manual_seed(1)
        for _ in range(8):
            x = (
                torch.randn(64, 3, generator=generator, dtype=torch.float64)
                @ torch.linspace(0, 9, 120).view(3, 40).double().sin()
            )
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.randint(CLASSES, (64,), generator=generator)).backward()
            optimizer.step()
        ends.append({name: p.detach() for name, p in model.named_parameters()})
    assert dense.relative_error(*ends) < TOLERANCE

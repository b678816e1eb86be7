"""Projections in sample space (docs/math.md, M19): the plain loop's parameters, and fewer products with gradients."""

import copy

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from tengrad_triton import TENGraD, compile_train_step

SAMPLES, INPUTS, REFRESH = 4, 12, 4
TOLERANCE = 1e-12


class Twice(nn.Module):
    """One layer that is called twice, and has two positions, before one that has one."""

    def __init__(self):
        super().__init__()
        self.twice, self.head = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, 7)

    def forward(self, x):
        return self.head(self.twice(self.twice(x).tanh()).tanh())


def mlp():
    return nn.Sequential(nn.Linear(INPUTS, 40), nn.Tanh(), nn.Linear(40, 24, bias=False), nn.Tanh(), nn.Linear(24, 5))


MODELS = {
    "perceptron": (mlp, {"0", "2", "4"}),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(INPUTS, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 5)),
        {"0", "3"},
    ),
    "a layer called twice": (Twice, {"head"}),
    "tokens": (lambda: nn.Sequential(nn.Unflatten(1, (4, 3)), nn.Linear(3, 6), nn.Flatten(), nn.Linear(24, 5)), {"3"}),
}
SETTINGS = {
    "default": {},
    "paper's form": {"scaling": "none", "damping": 0.1, "trust_region": 0.1},
    "diagonal, no bound": {"scaling": "diagonal", "clip_threshold": None},
    "half of the rows": {"fisher_rows": SAMPLES // 2},
    "one block": {"blocks": "network"},
    "maximized": {"maximize": True, "lr": 1e-4},
    "no momentum": {"momentum": 0.0},
    "no look-ahead": {"nesterov": False, "weight_decay": 0.1},
    "empirical": {"fisher": "empirical"},
}
LONGER = 2 * REFRESH + 3  # with refreshes that are compiled, a graph of their own
ROWS = [
    pytest.param("perceptron", "default", LONGER, id="default, with refreshes"),
    *(pytest.param("perceptron", one, 3, id=one) for one in ("half of the rows", "maximized", "no look-ahead")),
    *(pytest.param(model, "default", 3, id=model) for model in MODELS if model != "perceptron"),
    *(pytest.param("perceptron", one, LONGER, id=f"{one}, with refreshes", marks=pytest.mark.slow) for one in SETTINGS),
]


def batches(steps, start=0):
    for seed in range(start, start + steps):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
        yield x, torch.randint(5, (SAMPLES,), generator=generator)


class Pair:
    """The same training twice: with plain steps, and with compiled ones."""

    def __init__(self, build=mlp, backend="eager", groups=None, **settings):
        torch.compiler.reset()
        torch.manual_seed(0)
        self.model = build().double()
        self.twin = copy.deepcopy(self.model)
        made = [
            TENGraD(model, groups and groups(model), seed=1, **{"refresh_every": REFRESH, **settings})
            for model in (self.model, self.twin)
        ]
        self.plain, self.optimizer = made
        self.compiled_step = compile_train_step(self.twin, F.cross_entropy, self.optimizer, backend=backend)

    @staticmethod
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def train(self, steps, start=0):
        for x, y in batches(steps, start):
            self.step(self.model, self.plain, x, y)
            self.compiled_step(x, y)

    @property
    def error(self):
        return dense.relative_error(dict(self.twin.named_parameters()), dict(self.model.named_parameters()))

    @property
    def projected(self):
        return self.optimizer._curvature.projected


@pytest.mark.parametrize(("model", "settings", "steps"), ROWS)
def test_the_steps_are_those_of_the_plain_loop(model, settings, steps):
    build, dense_layers = MODELS[model]
    pair = Pair(build, **SETTINGS[settings])
    pair.train(steps)
    assert pair.error < TOLERANCE
    assert set(pair.projected["means"]) == (set() if settings == "paper's form" else dense_layers)


def test_groups_with_their_own_averages():
    def groups(model):
        kinds = ({"momentum": 0.5}, {"spring": 0.3, "momentum": 0.0}, {"nesterov": False})
        return [
            {"params": list(model[place].parameters()), **kind} for place, kind in zip((0, 2, 4), kinds, strict=True)
        ]

    pair = Pair(groups=groups)
    pair.train(3)
    assert pair.error < TOLERANCE
    assert set(pair.projected["means"]) == {"0", "4"}  # SPRING adds to V what has no factors


def products_with_weights(graph):
    """Return how many matrix products of a traced graph have an operand with as many entries as the largest weight."""
    products = [node for node in graph.graph.nodes if node.target in PRODUCTS]
    sizes = [[arg.meta["val"].numel() for arg in node.args if hasattr(arg, "meta")] for node in products]
    return sum(40 * 24 in of_operands for of_operands in sizes)


PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "mv", "baddbmm")}


@pytest.mark.parametrize("settings", ["default", "half of the rows"])
def test_no_product_takes_the_gradient(settings):
    """The second layer's weight is in two products: in the forward, and in the derivative of its input."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    pair = Pair(backend=aot_autograd(fw_compiler=keep), **SETTINGS[settings])
    pair.train(3)  # a plain refresh, and two that reuse its curvature
    assert [products_with_weights(graph) for graph in graphs] == [2]
    assert pair.error < TOLERANCE


def test_other_changes_of_the_means_are_followed():
    """A plain step in between; a mean that the user changes, in the run and after loading."""
    pair = Pair(refresh_every=100)
    pair.train(3)
    twins = (pair.model, pair.plain), (pair.twin, pair.optimizer)
    for x, y in batches(1, start=3):
        for model, optimizer in twins:
            pair.step(model, optimizer, x, y)
    pair.train(1, start=4)
    for loads in (False, True):
        for model, optimizer in twins:
            if loads:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.state[model[2].weight]["momentum_buffer"].mul_(-2.0)
        pair.train(1, start=5 + loads)
        assert pair.error < TOLERANCE


def test_a_resumed_run_is_the_same_bit_for_bit():
    pair = Pair()
    pair.train(3)
    state = copy.deepcopy((pair.twin.state_dict(), pair.optimizer.state_dict()))
    pair.train(1, start=3)
    expected = copy.deepcopy(pair.twin.state_dict())
    pair.twin.load_state_dict(state[0])
    pair.optimizer.load_state_dict(state[1])
    for x, y in batches(1, start=3):
        pair.compiled_step(x, y)
    assert all(torch.equal(x, expected[name]) for name, x in pair.twin.state_dict().items())


class Changing(nn.Module):
    """A linear layer whose weight is used once more, or that is called once more, as soon as ``kind`` says so."""

    def __init__(self):
        super().__init__()
        self.layer, self.head, self.kind = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, 7), None

    def forward(self, x):
        h = self.layer(x).tanh()
        if self.kind == "another use":
            h = F.linear(h, self.layer.weight)
        if self.kind == "another call":
            h = self.layer(h).tanh()
        return self.head(h)


@pytest.mark.parametrize("kind", ["another use", "another call"])
def test_a_weight_that_gets_another_use_is_no_longer_projected_from_one_call(kind):
    pair = Pair(Changing, refresh_every=100)
    pair.train(3)
    pair.model.kind = pair.twin.kind = kind
    pair.train(2, start=3)
    assert pair.error < TOLERANCE
    assert not pair.projected.get("means")


def test_nor_at_a_compiled_refresh():
    pair = Pair(Changing, refresh_every=1)
    pair.train(3)
    assert set(pair.projected["means"]) == {"layer", "head"}
    pair.twin.kind = "another use"
    pair.train(1, start=3)
    assert not pair.projected.get("means")


@pytest.mark.filterwarnings("ignore:compiled for")  # each kind of batch is compiled when it comes again
def test_the_dtype_may_change_and_come_back():
    pair = Pair()
    for start, dtype in ((0, torch.float64), (3, torch.float32), (8, torch.float64)):
        for model in (pair.model, pair.twin):
            model.to(dtype)
        for x, y in batches(3, start):
            pair.step(pair.model, pair.plain, x.to(dtype), y)
            pair.compiled_step(x.to(dtype), y)
    assert pair.error < 1e-5  # of float32


def test_a_small_change_of_a_mean_is_followed_after_loading_too():
    pair = Pair(refresh_every=100)
    pair.train(3)
    for model, optimizer in ((pair.model, pair.plain), (pair.twin, pair.optimizer)):
        state = copy.deepcopy(optimizer.state_dict())
        place = next(i for i, p in enumerate(model.parameters()) if p is model[2].weight)
        state["state"][place]["momentum_buffer"].mul_(1.0005)
        optimizer.load_state_dict(state)
    pair.train(1, start=3)
    assert pair.error < TOLERANCE


def test_autocast_rounds_what_is_projected_as_it_rounds_the_gradient():
    """The products of both are of bfloat16: 8 bits, over some steps."""

    def loss_of(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), y)

    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = mlp()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x).float()

    pair = Pair(Autocast)
    for model in (pair.model, pair.twin):
        model.float()
    for x, y in batches(3):
        pair.step(pair.model, pair.plain, x.float(), y)
        pair.compiled_step(x.float(), y)
    assert pair.error < 2**-9

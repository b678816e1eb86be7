"""What the table of layers in test_exact.py leaves out: dropout, memory, refused options, notes in the summary."""

import layer_cases as cases
import pytest
import torch
import torch.nn.functional as F
from dense import Recording
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tengrad_triton import Categorical, TENGraD
from tengrad_triton.layers import flatten_rows

N = 5


class Reparametrized(nn.Module):
    """A module without a rule, with its own parameter and with dropout."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6, 4) + 0.5)  # more entries than there are samples

    def forward(self, x):
        return F.dropout(x * self.scale, 0.5, self.training)


def twice(layer, x):
    return cases.attend(layer, cases.attend(layer, x))


class Around(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.call(self.layer, x).flatten(1))


RANDOM = {
    "attention": lambda: Around(nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True), cases.attend),
    "attention without its weights": lambda: Around(
        nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True),
        lambda layer, x: cases.attend(layer, x, need_weights=False),
    ),
    "attention called twice": lambda: Around(nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True), twice),
    "lstm": lambda: Around(nn.LSTM(4, 3, num_layers=3, dropout=0.5, batch_first=True), cases.recurrent),
    "gru, both directions": lambda: Around(
        nn.GRU(4, 3, num_layers=2, dropout=0.5, bidirectional=True, batch_first=True), cases.recurrent
    ),
    "encoder layer": lambda: Around(
        nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True), nn.Module.__call__
    ),
    "a module of its own kind": lambda: Around(Reparametrized(), nn.Module.__call__),
}


@pytest.mark.filterwarnings("ignore:no exact rows for layer:UserWarning")  # once, for the empirical Fisher
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("case", RANDOM)
def test_rows_are_those_of_the_forward_that_was_made(case, fisher):
    """With dropout, the rows are those of the units that this forward dropped, as autograd finds sample by sample."""
    torch.manual_seed(0)
    x, y = torch.randn(N, 6, 4, dtype=torch.float64), torch.randint(3, (N,))
    model = RANDOM[case]().double()
    model(x)  # lazy shapes
    named = dict(model.named_parameters())
    recording = Recording(Categorical())
    optimizer = TENGraD(
        model, lr=0.0, likelihood=recording, representation="per_sample", fisher=fisher, refresh_every=1,
        scaling="none",
    )  # fmt: skip
    for _ in range(2):  # the second refresh uses what the first one found out about a module
        optimizer.zero_grad()
        output = model(x)
        if fisher == "sampled":
            losses = F.cross_entropy(output, recording.target, reduction="none")
            rows = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
        F.cross_entropy(output, y).backward()
        optimizer.step()
    blocks = optimizer._curvature.jacobians.items()
    taken = {f"{name}.{label}": rows.j_NK for name, block in blocks for label, rows in block.items()}
    assert taken.keys() == named.keys()
    for index, (name, parameter) in enumerate(named.items()):
        if fisher == "sampled":
            found, expected = taken[name], flatten_rows(torch.stack([row[index] for row in rows]))
        else:  # the hooks would record further passes too, so compare the mean of the rows with the loss's gradient
            found, expected = taken[name].mean(0), flatten_rows(parameter.grad[None])[0]
        assert (found - expected).norm() <= 1e-9 * expected.norm().clamp(min=1e-9), name


class Largest(TorchDispatchMode):
    """Records the size of the largest new tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        old = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(returned):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in old:
                self.entries = max(self.entries, leaf.numel())
        return returned


def largest_in_a_refresh(model, x, labels, **options):
    optimizer = TENGraD(model, refresh_every=1, **options)
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        with Largest() as largest:
            optimizer.step()
        if step == 1:  # the first step allocates the momentum
            return largest.entries
    raise AssertionError


def test_an_embedding_makes_nothing_of_the_vocabularys_size():
    vocabulary, entries = 50_000, 8
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(vocabulary, entries), nn.Flatten(), nn.Linear(6 * entries, 3))
    ids = torch.randint(vocabulary, (N, 6))
    assert largest_in_a_refresh(model, ids, torch.randint(3, (N,)), scaling="none") < vocabulary


def test_a_sequence_never_takes_memory_of_its_length_squared():
    tokens = 96
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(5 * tokens, 3))
    entries = largest_in_a_refresh(model, torch.randn(N, tokens, 4), torch.randint(3, (N,)), representation="factored")
    assert entries < tokens**2


REFUSED = {
    "sparse": ({"sparse": True}, "sparse=True"),
    "max_norm": ({"max_norm": 1.0}, r"max_norm=1\.0, which rewrites"),
    "scale_grad_by_freq": ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True, whose gradient"),
}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("option", REFUSED)
def test_options_that_make_gradients_no_derivatives_are_refused(option, kind):
    options, message = REFUSED[option]
    with pytest.raises(ValueError, match=f"1 has {message}"):
        TENGraD(nn.Sequential(nn.Identity(), kind(7, 3, **options)))


def test_complex_parameters_are_refused():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))

    with pytest.raises(TypeError, match=r"real floating point, got torch\.complex64"):
        TENGraD(Complex())


def test_summary_names_what_is_no_rule_and_no_sample_of_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), cases.OwnForward(4, 3))
    optimizer = TENGraD(model)
    F.cross_entropy(model(torch.randn(N, 4)), torch.zeros(N, dtype=torch.long)).backward()
    optimizer.step()
    shown = {row.parameter: row.representation for row in optimizer.summary().parameters}
    assert shown["1.weight"] == "per_sample, detached batch statistics, D 4 ⊗ 1"
    assert shown["2.weight"] == "per_sample, explicit (OwnForward has its own forward), D 3 ⊗ 4"
    assert shown["0.weight"] == "factored, D 4 ⊗ 4"


def test_rows_beyond_the_memory_take_the_sgd_step_and_say_so():
    model = nn.Sequential(cases.OwnForward(4, 3))
    optimizer = TENGraD(model, max_bytes=100)
    F.cross_entropy(model(torch.randn(N, 4)), torch.zeros(N, dtype=torch.long)).backward()
    with pytest.warns(UserWarning, match="its rows would take .* raise max_bytes, or register a rule"):
        optimizer.step()


def test_a_batch_norm_leaves_the_losss_gradient_as_it_is():
    torch.manual_seed(0)
    x, y = torch.randn(8, 2, 5, 5), torch.randint(3, (8,))
    bare = cases.normalized(nn.BatchNorm2d(4))
    hooked = cases.normalized(nn.BatchNorm2d(4))
    hooked.load_state_dict(bare.state_dict())
    _optimizer = TENGraD(hooked)
    for model in (bare, hooked):
        F.cross_entropy(model(x), y).backward()
    for (name, ours), theirs in zip(hooked.named_parameters(), bare.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    for ours, theirs in zip(hooked.buffers(), bare.buffers(), strict=True):
        assert torch.equal(ours, theirs)

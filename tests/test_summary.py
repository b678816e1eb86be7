"""The summary of every kind of model: its text, its HTML and its data frame."""

import re
import sys
import warnings
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.nn.utils import parametrizations

from tengrad_triton import TENGraD
from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC
from tengrad_triton.optim.summary.names import fold, folded_names
from tengrad_triton.recipes.models import image_model

LONG = "a_module_whose_name_takes_very_many_characters_because_it_says_what_it_is_for"
MARKUP = '<script>"a & b"</script>'


class Reads(nn.Module):
    """Modules by name, the first of which returns a tuple or a tensor; the mean of its sequence goes to the last."""

    def __init__(self, first, out, call=lambda first, x: first(x)[0]):
        super().__init__()
        self.first, self.out, self.call = first, out, call

    def forward(self, x):
        return self.out(self.call(self.first, x).mean(1))


class Own(nn.Module):
    """A parameter of the model itself, which no rule covers."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(8)), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(x * self.scale)


class Named(nn.Module):
    """Linear layers below a name."""

    def __init__(self, name, count):
        super().__init__()
        self.inner = nn.ModuleDict({name: nn.ModuleList([nn.Linear(8, 8) for _ in range(count)])})
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        for layer in next(iter(self.inner.values())):
            x = layer(x).tanh()
        return self.out(x)


def perceptron(depth=2):
    return nn.Sequential(*(one for _ in range(depth) for one in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 4))


def tied():
    model = Reads(nn.Embedding(20, 16), nn.Linear(16, 20, bias=False), lambda first, ids: first(ids))
    model.out.weight = model.first.weight
    return model


def frozen():
    model = perceptron()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def batch_norm():
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(128, 4))


def parametrized():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 16)), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(16, 4))
    )


def vectors():
    return torch.randn(12, 8)


def sequences():
    return torch.randn(12, 5, 8)


def images():
    return torch.randn(12, 3, 8, 8)


def recurrent():
    return Reads(nn.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(32, 4))


def attention():
    inner = nn.MultiheadAttention(8, 2, batch_first=True)
    return Reads(inner, nn.Linear(8, 4), lambda first, x: first(x, x, x)[0])


MODELS = {
    "perceptron": (perceptron, vectors),
    "one layer": (lambda: nn.Linear(8, 4), vectors),
    "100 layers": (lambda: perceptron(100), vectors),
    "vision transformer": (lambda: image_model("vit-tiny").build((3, 8, 8), 10, 12), images),
    "LSTM": (recurrent, sequences),
    "attention": (attention, sequences),
    "transformer layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 4)),
        sequences,
    ),
    "tied weights": (tied, lambda: torch.randint(0, 20, (12, 5))),
    "batch norm": (batch_norm, images),
    "parametrized": (parametrized, vectors),
    "frozen": (frozen, vectors),
    "a parameter of its own": (Own, vectors),
    "long names": (lambda: Named(f"{LONG}_{LONG}", 2), vectors),
    "markup": (lambda: Named(MARKUP, 4), vectors),
}
"""For each kind of model the function that makes it, and a batch."""
OPTIMIZERS = {
    "defaults": (TENGraD, {}),
    "paper": (TENGraD.paper, {"lr": 1e-3}),
    "sgd": (TENGraD, {"unsupported": "sgd"}),
    "network": (TENGraD, {"blocks": "network"}),
    "compressed": (TENGraD, {"representation": "compressed"}),
    "K-FAC": (KFAC, {}),
    "EKFAC": (EKFAC, {}),
    "K-BFGS": (KBFGS, {}),
    "K-BFGS(L)": (KBFGSL, {}),
}


def optimizer_of(model, batch, optimizer="defaults", steps=1, params=None):
    make, options = OPTIMIZERS[optimizer]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some parameters take the SGD step
        made = make(model, params, **options)

        def closure():
            made.zero_grad()
            loss = F.cross_entropy(model(batch), torch.arange(len(batch)) % 4)
            loss.backward()
            return loss.detach()

        for _ in range(steps):
            made.step(closure)
    return made


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    make, batch = MODELS[request.param]
    return make(), batch()


def unfolded(heading):
    """Yield the layers that a heading names."""
    found = re.search(r"\{(.*?)\}", heading)
    if found is None:
        yield heading
        return
    for part in found[1].split(","):
        first, last, step = re.fullmatch(r"(\d+)(?:-(\d+)(?: by (\d+))?)?", part).groups()
        for number in range(int(first), int(last or first) + 1, int(step or 1)):
            yield from unfolded(heading.replace(found[0], str(number), 1))


def parameters_in(text):
    """Return the full names of the parameters that a summary shows, by headings and first columns."""
    names, layers, lines = set(), [], text.split("\n\n")[0].splitlines()[2:]
    for line in lines:
        if not line.startswith(" "):
            heading = line.rpartition(" layers alike")[0].rpartition(", ")[0] if "layers alike" in line else line
            layers = list(unfolded(heading.partition(", in block")[0]))
        elif line.startswith("  ") and line[2:3].strip():
            own = line.split()[0]
            names |= {own if layer == "the model itself" else f"{layer}.{own}" for layer in layers}
    return names


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_text_fits_100_columns_and_has_every_parameter_and_reason(case, optimizer, request):
    summary = optimizer_of(*case, optimizer).summary()
    text = str(summary)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert [entry.parameter for entry in summary.parameters] == [name for name, _ in case[0].named_parameters()]
    words = set(text.replace(",", "").split())
    for entry in summary.parameters:
        assert set(f"{entry.representation} {entry.kernels}".replace(",", "").split()) <= words | {"-"}, entry
    if "long names" in request.node.name:
        joined = "".join(text.split())
        assert all(f"inner.{LONG}_{LONG}.{number}" in joined for number in range(2))
    else:
        assert parameters_in(text) == {entry.parameter for entry in summary.parameters}


def test_what_is_frozen_is_called_so_and_what_is_not_is_not(case):
    model, batch = case
    for summary in (optimizer_of(model, batch, steps=steps).summary() for steps in (0, 1)):
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert {entry.parameter: entry.step != "frozen" for entry in summary.parameters} == trained
        count = sum(not value for value in trained.values())
        assert (f"{count} frozen" in str(summary)) == (count > 0)
        assert str(summary).count("frozen") == (count + 1 if count else 0)


def test_what_is_frozen_after_a_refresh_keeps_its_rows_until_the_next():
    model = perceptron()
    optimizer = optimizer_of(model, vectors())
    before = optimizer.summary().parameters[0]
    model[0].weight.requires_grad_(False)
    after = optimizer.summary().parameters[0]
    assert (after.step, after.representation) == ("frozen", f"frozen, {before.representation}")
    assert (after.block, after.bytes) == (before.block, before.bytes)


def test_parameters_that_the_optimizer_has_not_got_are_counted():
    model = frozen()
    summary = optimizer_of(model, vectors(), params=[*model[2].parameters(), *model[4].parameters()]).summary()
    assert "not given to this optimizer: 2 parameters of the model, 2 of them frozen" in str(summary)
    assert "not given" not in str(optimizer_of(model, vectors()).summary())


def test_the_reason_of_an_sgd_step_is_there():
    summary = optimizer_of(Own(), vectors(), "sgd").summary()
    assert "sgd (no rule for Own)" in str(summary)
    assert "3 parameters: 2 preconditioned, in 1 block, a layer each; 1 taking the SGD step" in str(summary)


class Forward(nn.Module):
    """Two numbers a sample by a function of a network and the batch."""

    def __init__(self, function, *more):
        super().__init__()
        self.net, self.function = nn.Sequential(nn.Linear(8, 8), *more, nn.Tanh(), nn.Linear(8, 2)), function

    def forward(self, x):
        return self.function(self.net, x)


def by_autograd(net, x):
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(net(x).square().sum(), x, create_graph=True)[0]


def by_func(net, x):
    return vmap(grad(lambda point: net(point).square().sum()))(x)


def cut(net, x):
    y, chosen = net(x).new_zeros(len(x), 2), x[:, 0] > 0
    y[chosen] = F.linear(x[chosen], net[0].weight[:2]) + net(x[chosen])
    return y


def of_the_batch(net, x):
    return F.linear(x, net[0].weight) + net(x).sum(1, keepdim=True) * len(x)


def outside(net, x):
    return F.linear(x, net[0].weight) + net(x).sum(1, keepdim=True)


BATCHED = "rows by torch.func in a batched pass: "
NOT_TRANSFORMED = "rows by one backward pass a sample: torch.func cannot run the model again on single samples"
# What a forward does, and how the summary says that the rows of its first weight were found.
WAYS = {
    "derivatives by torch.func": (lambda: Forward(by_func), BATCHED),
    "a use outside of the layer": (lambda: Forward(outside), f"{BATCHED}it is used outside of its layer too"),
    "derivatives by autograd.grad": (lambda: Forward(by_autograd), NOT_TRANSFORMED),
    "a batch cut by its values": (lambda: Forward(cut), NOT_TRANSFORMED),
    "random numbers": (
        lambda: Forward(lambda net, x: outside(net, x) * torch.rand(len(x), 1)),
        NOT_TRANSFORMED,
    ),
    "the size of the batch": (
        lambda: Forward(of_the_batch),
        "rows by one backward pass a sample: the model computes something else when it is run again",
    ),
    "batch norm": (
        lambda: Forward(outside, nn.BatchNorm1d(8)),
        "rows by one backward pass a sample: batch norm mixes samples in training",
    ),
}


@pytest.mark.parametrize("case", WAYS)
def test_how_rows_without_calls_were_found_is_there(case):
    torch.manual_seed(0)
    make, said = WAYS[case]
    model = make()
    optimizer = TENGraD(model, refresh_every=1, likelihood="gaussian")
    for _ in range(2):
        optimizer.zero_grad()
        output = model(vectors())
        (output.square().sum() / 2 / len(output)).backward()
        optimizer.step()
        assert said in optimizer.summary().parameters[0].representation


def test_another_name_of_a_tied_weight_is_there():
    assert "also out.weight" in str(optimizer_of(tied(), torch.randint(0, 20, (12, 5))).summary())


def test_a_shared_block_stands_beside_its_layers():
    text = str(optimizer_of(perceptron(), vectors(), "network").summary())
    assert all(f"\n{layer}, in block network\n" in text for layer in (0, 2, 4))


class Cells(HTMLParser):
    """The tags of a page, and the texts between them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_a_notebook_gets_the_same_cells(case):
    summary = optimizer_of(*case).summary()
    page = Cells(summary._repr_html_())
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td", "div"}
    assert {entry.representation for entry in summary.parameters} <= set(page.texts)
    assert {entry.name for entry in summary.parameters} <= set(page.texts)
    totals = str(summary).rpartition("\n\n")[2].splitlines()
    assert [line for line in totals if not line.startswith(" ")][-1] in page.texts


def test_names_are_escaped():
    page = optimizer_of(Named(MARKUP, 4), vectors()).summary()._repr_html_()
    assert "<script>" not in page
    assert f"inner.{MARKUP}.{{0-3}}, 4 layers alike" in Cells(page).texts


def test_a_data_frame_has_a_row_for_each_parameter(case):
    summary = optimizer_of(*case).summary()
    frame = summary.to_frame()
    assert list(frame.parameter) == [entry.parameter for entry in summary.parameters]
    assert list(frame.columns) == ["parameter", "layer", "shape", "step", "block", "representation", "kernels", "bytes"]
    assert frame.bytes.sum() == sum(entry.bytes for entry in summary.parameters)


def test_a_data_frame_without_pandas_is_one_sentence(monkeypatch):
    summary = optimizer_of(perceptron(), vectors()).summary()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"^to_frame needs pandas, which is not installed: pip install pandas$"):
        summary.to_frame()


# Names, and the text that they fold to.
NAMES = {
    "three": (["a.0.w", "a.1.w", "a.2.w"], "a.{0-2}.w"),
    "two are not many": (["a.0", "a.1"], "a.0, a.1"),
    "one missing": (["a.0", "a.1", "a.3"], "a.{0-1,3}"),
    "each second": (["0", "2", "4"], "{0-4 by 2}"),
    "two numbers": ([f"a.{i}.b.{k}" for i in range(3) for k in range(4)], "a.{0-2}.b.{0-3}"),
    "what is between stays": (["a.0", "b", "a.1", "a.2", "c"], "a.{0-2}, b, c"),
    "other depth": (["a.0", "a.1", "a.2.b"], "a.0, a.1, a.2.b"),
    "no numbers": (["a.x", "a.y", "a.z"], "a.x, a.y, a.z"),
    "leading zeros": (["a.00", "a.01", "a.02"], "a.00, a.01, a.02"),
    "none": ([], ""),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_fold(case):
    names, text = NAMES[case]
    assert folded_names(names) == text
    assert sorted(place for one in fold(names, [0] * len(names)) for place in one.places) == list(range(len(names)))


def test_what_differs_does_not_fold():
    assert [str(one) for one in fold(["0", "1", "2", "3"], "aaab")] == ["{0-2}", "3"]
    model = perceptron(6)
    model[4].weight.requires_grad_(False)
    text = str(optimizer_of(model, vectors()).summary())
    assert "\n{0,2,6,8,10}, 5 layers alike\n" in text
    assert "\n4\n" in text

"""`check_rule` confirms every rule of the library, and names what is wrong with a wrong one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import Call, OuterProducts, PerSampleGrads, canonical, check_rule
from tengrad_triton.layers import arguments

N = 4


def x(*shape, dtype=torch.float64):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def ids(*shape, most=7):
    return torch.randint(most, (N, *shape), generator=torch.Generator().manual_seed(1))


def attention(**options):
    return nn.MultiheadAttention(4, 2, batch_first=True, **options)


RULES = {
    "linear": (lambda: nn.Linear(3, 2), (x(3),), {}),
    "linear over tokens": (lambda: nn.Linear(3, 2), (x(5, 3),), {}),
    "linear in two calls": (lambda: nn.Linear(3, 2), (Call((x(3),)), Call((), {"input": 2 * x(3)})), {}),
    "linear of half precision": (lambda: nn.Linear(3, 2).bfloat16(), (x(3, dtype=torch.bfloat16),), {}),
    "bilinear": (lambda: nn.Bilinear(3, 2, 2), (x(3), x(2)), {}),
    "bilinear by keyword": (lambda: nn.Bilinear(3, 2, 2), (x(3),), {"input2": x(2)}),
    "conv": (lambda: nn.Conv2d(2, 4, 3, groups=2, stride=2), (x(2, 6, 5),), {}),
    "transposed conv": (lambda: nn.ConvTranspose2d(2, 4, 3, groups=2), (x(2, 4, 5),), {}),
    "embedding": (lambda: nn.Embedding(7, 3), (ids(5),), {}),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 3), (ids(5),), {}),
    "layer norm": (lambda: nn.LayerNorm(3), (x(5, 3),), {}),
    "batch norm in training": (lambda: nn.BatchNorm1d(3), (x(3),), {}),
    "prelu": (lambda: nn.PReLU(3), (x(3, 2),), {}),
    "attention": (attention, (x(5, 4), x(5, 4), x(5, 4)), {"need_weights": True}),
    "attention with dropout": (lambda: attention(dropout=0.5), (x(5, 4), x(5, 4), x(5, 4)), {}),
    "attention, sequence first": (
        lambda: nn.MultiheadAttention(4, 2), tuple(x(5, 4).transpose(0, 1) for _ in range(3)), {"need_weights": False}
    ),
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2, batch_first=True, dropout=0.5), (x(5, 3),), {}),
    "gru, sequence first": (lambda: nn.GRU(3, 4), (x(5, 3).transpose(0, 1),), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_the_librarys_rules_pass_and_nothing_changes(case):
    make, args, kwargs = RULES[case]
    torch.manual_seed(0)
    layer = make()
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    layer.get_parameter(next(iter(dict(layer.named_parameters())))).requires_grad_(False)
    before, state = copy.deepcopy(layer), torch.get_rng_state()
    report = check_rule(layer, *args, **kwargs)
    assert report.errors.keys() == dict(layer.named_parameters()).keys()
    assert max(report.errors.values()) < 1e-12
    assert report.samples == N
    assert str(report).startswith(f"the rule for {type(layer).__name__} agrees with autograd for {N} samples")
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training == before.training
    for own, old in zip(layer.parameters(), before.parameters(), strict=True):
        assert own.dtype == old.dtype
        assert own.requires_grad == old.requires_grad
        assert torch.equal(own, old)
        assert torch.equal(own.grad, torch.ones_like(own))
    for own, old in zip(layer.buffers(), before.buffers(), strict=True):
        assert torch.equal(own, old)


class Affine(nn.Module):
    """A linear layer and a scale; ``how`` says what is wrong with its rule, or with what it returns."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.weight, self.scale = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.rand(2) + 0.5)
        if how == "has a further parameter":
            self.bias = nn.Parameter(torch.zeros(2))
        if how == "does not use one":
            self.idle = nn.Parameter(torch.zeros(2))

    def forward(self, x, factor=1.0):
        y = factor * self.scale * F.linear(x, self.weight)
        if self.how == "has a further parameter":
            y = y + self.bias
        if self.how == "returns an object":
            return Held(y)
        return {"detached": y.detach(), "sum": y.sum(), "one": y[:1]}.get(self.how, y)


class Held:
    def __init__(self, y):
        self.y = y


@canonical.register
def _(layer: Affine, x, grad_y):
    named = arguments(layer, x)
    x, grad_y = named["x"], grad_y * named["factor"]
    weight = OuterProducts(x[:, None, None], (grad_y * layer.scale)[:, None, None])
    scale = PerSampleGrads(grad_y * F.linear(x, layer.weight))
    wrong = {
        "forgets the scale": {"weight": OuterProducts(x[:, None, None], grad_y[:, None, None])},
        "takes the mean": {"scale": PerSampleGrads(scale.j_NK / N)},
        "swaps samples": {"scale": PerSampleGrads(scale.j_NK.flip(0))},
        "rounds": {"scale": PerSampleGrads(scale.j_NK * (1 + 1e-7))},
        "returns a tensor": {"scale": scale.j_NK},
        "takes the sum": {"scale": PerSampleGrads(scale.j_NK.sum(0, keepdim=True))},
        "divides by zero": {"scale": PerSampleGrads(scale.j_NK / 0)},
        "has another size": {"scale": PerSampleGrads(grad_y[:, :1])},
        "does not use one": {"idle": PerSampleGrads(0 * grad_y)},
        "is wrong twice": {
            "weight": OuterProducts(x[:, None, None], grad_y[:, None, None]), "scale": PerSampleGrads(2 * scale.j_NK)
        },
    }  # fmt: skip
    found = {"weight": weight, "scale": scale, **wrong.get(layer.how, {})}
    return {"returns nothing": None, "returns pairs": list(found.items())}.get(layer.how, found)


WRONG = {
    "forgets the scale": r"wrong for 'weight': relative error [0-9.]+; the worst is sample \d of 4, whose row has norm "
    r"[0-9.]+, but [0-9.]+ by autograd$",
    "takes the mean": r"wrong for 'scale': relative error 0\.75; .*; all rows are 0\.25 times those of autograd$",
    "rounds": r"wrong for 'scale': relative error 1e-07; the worst is sample .* by autograd$",
    "swaps samples": "wrong for 'scale': .*; the sum over the samples is right, so gradients are assigned to the wrong",
    "takes the sum": r"returned 1 rows for 'scale', but the batch has 4 samples",
    "divides by zero": "wrong for 'scale': relative error inf; the worst is sample",
    "has another size": "returned rows of 1 entries for 'scale', which has 2",
    "has a further parameter": "returned nothing for 'bias', only 'weight', 'scale': it must return a contribution for",
    "does not use one": "autograd's rows of 'idle' are all 0 for these inputs",
    "is wrong twice": "wrong for 'weight': .*; wrong too: scale$",
    "returns an object": "Affine returned a Held, whose tensors a rule cannot get gradients of: return a tensor, or",
    "detached": "Affine returned no tensor that depends on its parameters: nothing to check",
    "sum": r"Affine returned \(\): expected one number of samples, at least 2, in the first dimension",
    "one": r"Affine returned \(1, 2\): expected one number of samples, at least 2",
}


NO_CONTRIBUTIONS = {
    "returns a tensor": "the rule for Affine returned a Tensor for 'scale': return a contribution, PerSampleGrads",
    "returns nothing": "the rule for Affine returned a NoneType: return a dictionary from the names of parameters",
    "returns pairs": "the rule for Affine returned a list: return a dictionary .*rows\\)}$",
}


@pytest.mark.parametrize("how", NO_CONTRIBUTIONS)
def test_what_is_no_contribution_is_named(how):
    with pytest.raises(TypeError, match=NO_CONTRIBUTIONS[how]):
        check_rule(Affine(how), x(3))


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_is_named(how):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=WRONG[how]):
        check_rule(Affine(how), x(3, dtype=torch.float32))


def test_a_right_rule_of_ones_own_passes():
    torch.manual_seed(0)
    layer = Affine("is right").eval()
    assert max(check_rule(layer, x(3)).errors.values()) < 1e-12
    assert max(check_rule(layer, x(3), factor=x(1)).errors.values()) < 1e-12
    assert check_rule(layer, Call((x(3),)), Call((x(3), x(1)))).calls == 2
    with pytest.raises(ValueError, match=r"Affine returned \(4, 2\), \(3, 2\): expected one number of samples"):
        check_rule(layer, Call((x(3),)), Call((x(3)[:3],)))


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2)), "no rule for Sequential: there is no rule to check"),
        (
            OwnForward(3, 2),
            "OwnForward has its own forward: there is no rule to check, and the rows come from autograd",
        ),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "parametrized: there is no rule to check"),
    ],
)
def test_layers_without_a_rule_say_so(layer, message):
    with pytest.raises(TypeError, match=message):
        check_rule(layer, x(3))


def test_a_layer_without_parameters_is_refused():
    with pytest.raises(ValueError, match="LayerNorm has no parameters: its rule gives no rows"):
        check_rule(nn.LayerNorm(3, elementwise_affine=False), x(3))

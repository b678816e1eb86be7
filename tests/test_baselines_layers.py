"""The baselines on every kind of layer: what has Kronecker factors uses them, and what has none is named."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC

pytestmark = pytest.mark.usefixtures("float64")

N = 7


class Tied(nn.Module):
    """An embedding whose table is the head's weight, and two linear layers that share theirs and not their biases."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight, self.second.weight = self.table.weight, self.first.weight

    def forward(self, ids):
        return self.head(self.second(self.first(self.table(ids)).tanh()).mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


# Models, inputs, and what K-FAC leaves to SGD; K-BFGS leaves a transposed convolution too.
OTHERS = {
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)),
        lambda: torch.randn(N, 2, 6), set()),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(16, 3)),
        lambda: torch.randn(N, 1, 3, 3, 3), set()),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 3), nn.Flatten(), nn.Linear(50, 3)),
        lambda: torch.randn(N, 2, 3, 3), {"0.bias"}),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)),
        lambda: torch.randn(N, 1, 4, 4), {"1.weight", "1.bias"}),
    "tied": (Tied, lambda: torch.randint(6, (N, 5)), {"table.weight", "head.bias", "first.bias", "second.bias"}),
    "attention": (Attention, lambda: torch.randn(N, 5, 4), {"norm.weight", "norm.bias"}),
    "recurrent": (Recurrent, lambda: torch.randn(N, 5, 3), set()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:no exact rows for")
@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("make", [KFAC, EKFAC, KBFGS, KBFGSL])
def test_every_layer_is_stepped_and_what_has_no_factors_is_named(make, case):
    torch.manual_seed(0)
    model_of, input_of, without = OTHERS[case]
    model, x, y = model_of(), input_of(), torch.randint(3, (N,))
    optimizer = make(model, lr=1e-3, refresh_every=2)
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    losses = [optimizer.step(closure).item() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert not any(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    left = {one.parameter for one in optimizer.summary().parameters if one.representation.startswith("sgd")}
    exchanged = {"0.weight"} if case == "transposed" and make in (KBFGS, KBFGSL) else set()
    assert left == without | exchanged

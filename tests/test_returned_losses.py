"""Models that return their loss beside tensors that it is computed from: rows of the empirical Fisher count each once.

The reference is the gradient of each sample's own loss, from a forward of that sample alone.
"""

import pytest
import torch
import torch.nn.functional as F
from dense import blocks_of
from graph_rows import SETTINGS, assert_steps, dense_steps
from situation_models import batches
from torch import nn

from tengrad_triton import TENGraD


class Returning(nn.Module):
    """Returns what a function makes of the batch and of its tensors in the order of their computation."""

    def __init__(self, make):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.make = make

    def forward(self, x, y):
        early = self.first(x).tanh()
        hidden = self.second(early).tanh()
        logits = self.last(hidden)
        return self.make(x, y, early, hidden, logits)


def _ce(logits, y):
    return F.cross_entropy(logits, y)


def _with_a_leaf(x, y, early, hidden, logits):
    x = x.detach().requires_grad_()
    return {"loss": _ce(logits + x.sum(1, keepdim=True) * early[:, :3], y), "x": x, "early": early, "logits": logits}


RETURNS = {
    "logits only": lambda x, y, early, hidden, logits: {"loss": _ce(logits, y), "logits": logits},
    "hidden states too": lambda x, y, early, hidden, logits: {
        "loss": _ce(logits, y), "logits": logits, "hidden": (early, hidden),
    },
    "hidden states first": lambda x, y, early, hidden, logits: {
        "hidden": (early, hidden), "logits": logits, "loss": _ce(logits, y),
    },
    "a loss of all of them": lambda x, y, early, hidden, logits: {
        "loss": _ce(logits, y) + hidden.square().mean() + early.sin().mean(), "hidden": (early, hidden),
        "logits": logits,
    },
    "two losses, both used": lambda x, y, early, hidden, logits: {
        "loss": _ce(logits, y), "other": early.square().mean(), "early": early, "logits": logits,
    },
    "a tensor twice": lambda x, y, early, hidden, logits: {
        "loss": _ce(logits, y) + hidden.square().mean(), "logits": logits, "last": hidden, "hidden": (early, hidden),
    },
    "parts of one tensor": lambda x, y, early, hidden, logits: {
        "loss": _ce(logits, y), "parts": hidden.chunk(2, 1), "logits": logits,
    },
    "a leaf": _with_a_leaf,
}  # fmt: skip


def total(output):
    return output["loss"] + output.get("other", 0.0)


@pytest.mark.parametrize("case", RETURNS)
def test_each_derivative_counts_once(case):
    torch.manual_seed(0)
    model = Returning(RETURNS[case]).double()
    optimizer = TENGraD(model, fisher="empirical", **SETTINGS)
    for x, y in batches(3):
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        rows = {name: [] for name in old}
        for n in range(len(x)):
            with torch.enable_grad():
                own = total(model(x[n : n + 1], y[n : n + 1]))
                grads = torch.autograd.grad(own, list(model.parameters()), materialize_grads=True, allow_unused=True)
            for name, grad in zip(rows, grads, strict=True):
                rows[name].append(grad)
        optimizer.zero_grad()
        total(model(x, y)).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        used = {name: torch.stack(rows[name]) for name in grads}
        assert_steps(model, old, dense_steps(blocks_of(model), used, grads), case)

"""Calls of a layer that no row depends on: they need not have an entry for each sample."""

import pytest
import torch
import torch.nn.functional as F
from graph_rows import check_steps
from situation_models import batches
from torch import nn

FISHERS = ("sampled", "empirical", "exact")


class Magnitudes(nn.Module):
    """A layer scaled by the norm of its product with another one, which is a constant: the calls of DoRA."""

    def __init__(self, also_outside=False):
        super().__init__()
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.scale, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.also_outside = also_outside

    def forward(self, x):
        norm = self.up(self.down(torch.eye(4, dtype=x.dtype))).norm(dim=0).detach()
        y = self.scale(self.up(self.down(x)) / norm)
        if self.also_outside:
            y = y + F.linear(F.linear(x, self.down.weight), self.up.weight).sin()
        return self.head(y.tanh())


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("samples", [4, 5])  # as many as the identity has rows, and another number
def test_a_call_for_a_constant_costs_nothing(fisher, samples):
    optimizers = []
    data = [(x[:samples], y[:samples]) for x, y in batches(3)]
    check_steps(Magnitudes, data, fisher, before=lambda model, optimizer, number: optimizers.append(optimizer))
    assert optimizers[-1]._reports.apart == {}  # all rows follow from the rules of the layers


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_call_for_a_constant_hides_no_use_outside_of_the_layer(fisher):
    data = [(x[:4], y[:4]) for x, y in batches(3)]
    check_steps(lambda: Magnitudes(also_outside=True), data, fisher, verify="never")

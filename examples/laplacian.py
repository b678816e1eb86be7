"""A network that carries its derivatives and its Laplacian forward, by a layer with a rule of its own.

Every layer is called once, on a stack of D + 2 positions for each point: the value, its D first derivatives and its
Laplacian (the forward Laplacian of Li et al. 2024). So its rule gives its rows from that call.

Dimensions: N points, D coordinates, P = D + 2 positions, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton import OuterProducts, PerSampleGrads, canonical


class JetLinear(nn.Module):
    """A linear layer on a value and its derivatives: the weight acts on every position, the bias on the value only."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(outputs, inputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x_NPI: Tensor) -> Tensor:
        """Return [N, P, O]."""
        y_NPO = F.linear(x_NPI, self.weight)
        return y_NPO + F.pad(self.bias[None], (0, 0, 0, x_NPI.shape[1] - 1))


@canonical.register
def _(layer: JetLinear, x: Tensor, grad_y: Tensor) -> dict[str, OuterProducts | PerSampleGrads]:
    """The weight as a linear layer over positions; the bias from the first position alone."""
    return {"weight": OuterProducts(x[:, None], grad_y[:, None]), "bias": PerSampleGrads(grad_y[:, 0])}


def jet_of(x_ND: Tensor) -> Tensor:
    """Return [N, P, D]: the coordinates, their first derivatives (0 and 1), and their Laplacian (0)."""
    eye_NDD = torch.eye(x_ND.shape[1]).to(x_ND).expand(len(x_ND), -1, -1)
    return torch.cat([x_ND[:, None], eye_NDD, torch.zeros_like(x_ND)[:, None]], 1)


def jet_tanh(z_NPI: Tensor) -> Tensor:
    """Return tanh z with its derivatives by the chain rule: Δ tanh z = t' Δz + t'' ‖∇z‖², where t = tanh z."""
    value, first, laplacian = z_NPI[:, :1], z_NPI[:, 1:-1], z_NPI[:, -1:]
    t = value.tanh()
    slope = 1 - t.square()
    bend = -2 * t * slope * first.square().sum(1, keepdim=True)
    return torch.cat([t, slope * first, slope * laplacian + bend], 1)


class JetNetwork(nn.Module):
    """An MLP with tanh between its layers, from points [N, D] to the jet of u: [N, P]."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(JetLinear(inputs, outputs) for inputs, outputs in pairwise(widths))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return u, its D first derivatives and its Laplacian, for each point."""
        jet = self.layers[0](jet_of(x_ND))
        for layer in self.layers[1:]:
            jet = layer(jet_tanh(jet))
        return jet[:, :, 0]

"""Rows of J from factors in half precision: the kernels get the factors as they are, and no entry of J is rounded."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD
from tengrad_triton.curvature import choices

N = 6
MODELS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 5)),
    "tokens": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(36, 4), nn.Flatten(), nn.Linear(8, 5)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(36, 5)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, groups=1), nn.Flatten(), nn.Linear(147, 5)),
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(72), nn.Linear(72, 5)),
}


def stepped(model, x, representation, fisher):
    """The J of every parameter after one step, and the dtypes with which ops for rows of J were called."""
    called = set()

    def recorded(op, *args):
        called.update(arg.dtype for arg in args if torch.is_tensor(arg))
        return op(*args)

    def ops_for(overrides=()):
        ops = choices.ops_for("torch", overrides)
        for name in ("sample_grads", "conv_sample_grads"):
            setattr(ops, name, partial(recorded, getattr(ops, name)))
        return ops

    optimizer = TENGraD(model, lr=0.0, fisher=fisher, representation=representation, scaling="none", seed=0)
    optimizer._ops_for = ops_for
    F.cross_entropy(model(x).float(), torch.zeros(N, dtype=torch.long)).backward()
    optimizer.step()
    layers = optimizer._curvature.jacobians
    return {f"{name}.{param_name}": j for name, layer in layers.items() for param_name, j in layer.items()}, called


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("model", MODELS)
def test_rows_are_those_of_the_same_numbers_in_float32(model, fisher, monkeypatch):
    torch.manual_seed(0)
    half, x = MODELS[model]().bfloat16(), torch.randn(N, 2, 6, 6).bfloat16()
    rows, called = stepped(half, x, "per_sample", fisher)
    # The empirical rows are N times the gradients of the mean loss: a product that bfloat16 would round.
    assert called == {torch.bfloat16 if fisher == "sampled" else torch.float32}
    monkeypatch.setattr("tengrad_triton.capture.blocks.only_moves_entries", lambda layer: False)
    wide, called = stepped(half, x, "per_sample", fisher)
    assert called == {torch.float32}
    for name, expected in wide.items():
        assert rows[name].j_NK.dtype == torch.float32
        assert torch.equal(rows[name].j_NK, expected.j_NK)


def test_stored_factors_are_wide():
    """A step multiplies them with float32 numbers: in half precision they would be widened in every step."""
    model, x = MODELS["linear"]().bfloat16(), torch.randn(N, 2, 6, 6).bfloat16()
    factors = stepped(model, x, "factored", "sampled")[0]["1.weight"].factors
    assert factors.a.dtype == factors.g_NGPO.dtype == torch.float32

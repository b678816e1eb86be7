"""Figures 6 to 8: a layer's block of the inverse Fisher matrix, as exact NGD, TENGraD and K-FAC have it.

Each optimizer is asked for its own: with a rate of 1, no momentum and a unit vector as the gradient, its step is a
column of the matrix that it multiplies gradients with.

Key: O outputs and I inputs of the layer; K entries of its weight that are shown.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tengrad_triton.optim.tengrad import TENGraD
from tengrad_triton.recipes.training.loop import Job, closing_hooks, fit

LAYERS = {"figure6": 2, "figure7": 4, "figure8": 8}  # of 3C1F's, as a Sequential counts them
ENTRIES, SIDE = 576, 24  # of a weight at most, and of its outputs
NEVER = 10**9  # the curvature of the first step is kept
STILL: Mapping[str, Any] = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "refresh_every": NEVER, "seed": 0}


def _tengrad(model: nn.Module, damping: float, **settings: Any) -> torch.optim.Optimizer:
    return TENGraD.paper(model, damping=damping, **STILL, **settings)


def _kfac(model: nn.Module, damping: float, **settings: Any) -> torch.optim.Optimizer:
    from tengrad_triton.baselines import KFAC  # noqa: PLC0415

    return KFAC(model, damping=damping, kl_clip=None, **STILL, **settings)


# All but the last use a row for every class of every sample: what differs is the approximation alone.
METHODS: Mapping[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "exact NGD": lambda model, damping: _tengrad(model, damping, blocks="network", fisher="exact"),
    "TENGraD": lambda model, damping: _tengrad(model, damping, fisher="exact"),
    "K-FAC": lambda model, damping: _kfac(model, damping, fisher="exact"),
    "TENGraD, sampled": lambda model, damping: _tengrad(model, damping, fisher="sampled"),
}


def trained(job: Job) -> nn.Module:
    """Return the job's model after its first epoch of SGD."""
    (name,) = job.settings.optimizer
    state = next(fit(job, name, None, lambda *_: None))
    model, _ = job.build(name)
    model.load_state_dict(state["model"])
    return model


def shown_entries(weight: Tensor) -> Tensor:
    """Return which entries of a weight are shown: those of evenly spaced outputs and inputs, at most `ENTRIES`: [K]."""
    outputs, inputs = len(weight), weight[0].numel()
    rows = min(outputs, SIDE)
    columns = min(inputs, ENTRIES // rows)
    o_O, i_I = (torch.linspace(0, n - 1, count).round().long() for n, count in ((outputs, rows), (inputs, columns)))
    return (o_O[:, None] * inputs + i_I).flatten()


def inverse_block(
    make: Callable[[nn.Module, float], torch.optim.Optimizer],
    model: nn.Module,
    layer: int,
    batch: tuple[Tensor, Tensor],
    damping: float,
) -> Tensor:
    """Return α times the block of the inverse that belongs to the shown entries of a layer's weight: [K, K].

    Without curvature it would be the identity.
    """
    copy = deepcopy(model)
    optimizer = make(copy, damping)
    with closing_hooks(optimizer):
        cross_entropy(copy(batch[0]), batch[1]).backward()
        optimizer.step()
        weight = copy.get_parameter(f"{layer}.weight")
        entries_K = shown_entries(weight)
        columns = [_answer(optimizer, copy, weight, int(entry))[entries_K] for entry in entries_K]
    return damping * torch.stack(columns, 1)


def _answer(optimizer: torch.optim.Optimizer, model: nn.Module, weight: nn.Parameter, entry: int) -> Tensor:
    """Return the step for a gradient that is 1 at one entry of a weight and 0 elsewhere, flat."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert weight.grad is not None
    weight.grad.view(-1)[entry] = 1
    with torch.no_grad():
        weight.zero_()
    optimizer.step()
    return -weight.detach().flatten().clone()


def distances(blocks: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Return how far each block X is from exact NGD's X*, in the Frobenius norm, both times α.

    ``relative`` is ‖X - X*‖ / ‖X*‖; ``of curvature`` ‖X - X*‖ / ‖X* - I‖; ``cosine`` is that of the angle between
    X - I and X* - I. The last two are None where there is no curvature.
    """
    exact_KK = blocks["exact NGD"]
    eye_KK = torch.eye(len(exact_KK), dtype=exact_KK.dtype, device=exact_KK.device)
    exact, change = exact_KK.norm().item(), (exact_KK - eye_KK).norm().item()
    found: dict[str, dict[str, float | None]] = {}
    for name, block_KK in blocks.items():
        error, own = (block_KK - exact_KK).norm().item(), (block_KK - eye_KK).norm().item()
        aligned = ((block_KK - eye_KK) * (exact_KK - eye_KK)).sum().item()
        found[name] = {
            "relative": error / exact,
            "of curvature": error / change if change else None,
            "cosine": aligned / (change * own) if change and own else None,
        }
    return found

"""Figures 6 to 8: a layer's block of the inverse Fisher matrix in exact NGD, TENGraD and K-FAC.

The block is read from the optimizer's steps. With a learning rate of 1, no momentum and a unit vector as the gradient,
a step is a column of the matrix that multiplies gradients.

Key: O outputs and I inputs of the layer; K entries of its weight that are shown.
"""

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tengrad_triton.baselines import KFAC
from tengrad_triton.optim.tengrad import TENGraD
from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.recipes.training.job import Job, closing_hooks
from tengrad_triton.recipes.training.loop import fit
from tengrad_triton.recipes.training.warm_up import NEVER

LAYERS = {"figure6": 2, "figure7": 4, "figure8": 8}  # indices in the Sequential of 3C1F
Make = Callable[[nn.Module, float], torch.optim.Optimizer]
Batch = tuple[Tensor, Tensor]
ENTRIES, OUTPUTS = 576, 24  # at most so many entries of a weight are shown, of so many outputs
# All steps use the curvature of the first.
READ: Mapping[str, Any] = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "refresh_every": NEVER, "seed": 0}


def _tengrad(model: nn.Module, damping: float, **settings: Any) -> torch.optim.Optimizer:
    return TENGraD.paper(model, damping=damping, **READ, **settings)


def _kfac(model: nn.Module, damping: float, **settings: Any) -> torch.optim.Optimizer:
    return KFAC(model, damping=damping, kl_clip=None, **READ, **settings)


# All but the last have a row of J for every class of every sample, so that only the approximation differs.
METHODS: Mapping[str, Make] = {
    "exact NGD": lambda model, damping: _tengrad(model, damping, blocks="network", fisher="exact"),
    "TENGraD": lambda model, damping: _tengrad(model, damping, fisher="exact"),
    "K-FAC": lambda model, damping: _kfac(model, damping, fisher="exact"),
    "TENGraD, sampled": lambda model, damping: _tengrad(model, damping, fisher="sampled"),
}


def trained(job: Job) -> nn.Module:
    """Return the job's model after one epoch of its optimizer."""
    (name,) = job.settings.optimizer
    state = next(fit(job, name, None, lambda *_: None))
    model, _ = job.build(name)
    model.load_state_dict(state["model"])
    return model


def shown_entries(weight: Tensor) -> Tensor:
    """Return the flat indices of the entries that are shown, of evenly spaced outputs and inputs: [K]."""
    outputs, inputs = len(weight), weight[0].numel()
    height = min(outputs, OUTPUTS)
    width = min(inputs, ENTRIES // height)
    o_O, i_I = (torch.linspace(0, n - 1, count).round().long() for n, count in ((outputs, height), (inputs, width)))
    return (o_O[:, None] * inputs + i_I).flatten()


def inverse_block(make: Make, model: nn.Module, layer: int, batch: Batch, damping: float) -> Tensor:
    """Return α times the block of the inverse for the shown entries of a layer's weight: [K, K].

    Without curvature it is the identity.
    """
    entries_K = shown_entries(model.get_parameter(f"{layer}.weight"))
    columns = [column[entries_K] for column in _columns(make, model, layer, batch, damping)]
    return damping * torch.stack(columns, 1)


def seconds_of_columns(make: Make, model: nn.Module, batch: Batch, damping: float) -> tuple[float, float]:
    """Return the seconds of the first column, which needs the curvature, and of the second: later ones take as long."""
    device = batch[0].device
    with closing(_columns(make, model, min(LAYERS.values()), batch, damping)) as columns:
        start = now(device)
        next(columns)
        middle = now(device)
        next(columns)
        return middle - start, now(device) - middle


def _columns(make: Make, model: nn.Module, layer: int, batch: Batch, damping: float) -> Generator[Tensor, None, None]:
    """Yield the column of the inverse for each shown entry of a layer's weight: flat."""
    copy = deepcopy(model)
    optimizer = make(copy, damping)
    with closing_hooks(optimizer):
        cross_entropy(copy(batch[0]), batch[1]).backward()
        with warnings.catch_warnings():  # its advice is about settings that the figures fix; an estimate says the time
            warnings.filterwarnings("ignore", r"J has [\d,]+ rows: each refresh will take")
            optimizer.step()
        weight = copy.get_parameter(f"{layer}.weight")
        for entry in shown_entries(weight):
            yield _step_along(optimizer, copy, weight, int(entry))


def _step_along(optimizer: torch.optim.Optimizer, model: nn.Module, weight: nn.Parameter, entry: int) -> Tensor:
    """Return the step of a weight for a gradient that is 1 at one of its entries and 0 elsewhere: flat."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert weight.grad is not None
    weight.grad.view(-1)[entry] = 1
    with torch.no_grad():
        weight.zero_()
    optimizer.step()
    return -weight.detach().flatten().clone()


def distances(blocks: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Return the distances in the Frobenius norm of each block X from that of exact NGD, X*; both are times α.

    ``relative`` is ‖X - X*‖ / ‖X*‖, ``of curvature`` is ‖X - X*‖ / ‖X* - I‖, and ``cosine`` is that of the angle
    between X - I and X* - I. The last two are None if there is no curvature.
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

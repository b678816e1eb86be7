"""Host time of one model's steps, as JSON: `python -m perf.host.measure MODEL ROUNDS`.

The model has the layers of the full-size one, each with J in the form that the full-size one has at N = 128 on a GPU.
Channels, pixels and samples are so few that arithmetic takes almost no time, and kernels do nothing at all. What is
left is the host's time: Python, the dispatch of torch's operations, and launches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from perf.host import stand_in
from perf.loops import SETTINGS, plain_step, tengrad
from perf.models import CLASSES
from perf.models import MODELS as FULL
from perf.timing import Timer, interleaved
from tengrad_triton import TENGraD
from tengrad_triton.curvature import geometry
from tengrad_triton.curvature.choices import ops_for
from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.recipes.models import conv_3c1f, mlp
from tengrad_triton.recipes.models.resnet import resnet18, wide_resnet

SAMPLES = 2
_NEVER = 10**9  # steps from one refresh to the next


@dataclass(frozen=True)
class Narrow:
    """A model with the layers of a model of `perf.models`, and the shape of its samples."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]


MODELS = {
    "3C1F": Narrow(lambda: conv_3c1f((1, 8, 8), CLASSES, 8), (1, 8, 8)),
    "ResNet-18": Narrow(lambda: resnet18(3, CLASSES, width=4), (3, 8, 8)),
    "WRN-28-4": Narrow(lambda: wide_resnet(3, CLASSES, width=2, widen=4), (3, 8, 8)),
    "MLP": Narrow(lambda: mlp((1, 4, 4), CLASSES, 16), (1, 4, 4)),
}


def representations(model: str) -> dict[str, str]:
    """Return how the full-size model keeps the J of its weights on a GPU.

    The choice of the cost model depends on the rates of the device and not on the number of samples.
    """
    made = FULL[model]
    net, (x, y) = made.on(torch.device("cpu")), made.batch(SAMPLES, torch.device("cpu"))
    optimizer = tengrad(net, 1)
    with patch.dict(geometry._FLOPS_PER_BYTE, cpu=geometry._FLOPS_PER_BYTE["cuda"]):
        plain_step(net, optimizer)(x, y)
    weights = {name for name, parameter in net.named_parameters() if parameter.dim() > 1}
    return {name: choice.representation for name, choice in optimizer.choices().items() if name in weights}


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Return spreads of whole steps and of the optimizers' own part, the ratios, and the launches of a reuse step."""
    kept = representations(model)
    library = stand_in.install()
    torch.set_num_threads(1)
    made = MODELS[model]
    x, y = torch.randn(SAMPLES, *made.sample), torch.zeros(SAMPLES, dtype=torch.long)
    nets = {name: made.build() for name in ("sgd", "reuse", "bounded", "scaled")}
    optimizers: dict[str, Any] = {
        "sgd": torch.optim.SGD(nets["sgd"].parameters(), fused=True, **SETTINGS),
        "reuse": _on_stand_in(TENGraD.paper(nets["reuse"], refresh_every=_NEVER, representation=kept, **SETTINGS)),
        "bounded": _on_stand_in(TENGraD.unscaled(nets["bounded"], refresh_every=_NEVER, representation=kept)),
        "scaled": _on_stand_in(TENGraD(nets["scaled"], refresh_every=_NEVER, representation=kept)),
    }
    timers = {name: _timer(name, nets[name], optimizer, x, y) for name, optimizer in optimizers.items()}
    for _ in range(5):  # a refresh, and steps that prepare launches
        for timer in timers.values():
            timer()
    before = library.launch_count()
    timers["reuse"]()
    launches = library.launch_count() - before
    seconds = interleaved(timers, rounds)
    medians = {name: spread["median"] for name, spread in seconds.items()}
    return {
        "seconds": seconds,
        "reuse_over_sgd": medians["reuse"] / medians["sgd"],
        "bounded_over_sgd": medians["bounded"] / medians["sgd"],
        "scaled_over_sgd": medians["scaled"] / medians["sgd"],
        "launches": launches,
        "parameters": len(list(nets["sgd"].parameters())),
    }


def _on_stand_in(optimizer: TENGraD) -> TENGraD:
    """Have an optimizer of tensors on a CPU call the ops as one on a GPU does."""
    optimizer._ops_for = partial(ops_for, "auto")
    optimizer._ops = optimizer._ops_for()
    return optimizer


def _timer(name: str, net: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Timer:
    """Return a timer of a whole step, and of the part of it that is the optimizer's own."""

    def timed() -> dict[str, float]:
        start = now(x.device)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        middle = now(x.device)
        optimizer.step()
        end = now(x.device)
        return {name: end - start, f"{name}, optimizer": end - middle}

    return timed


def main() -> None:
    """Measure one model and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("rounds", type=int)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"ROUNDS must be at least 1, got {options.rounds}")
    try:
        print(json.dumps(measure(options.model, options.rounds)))
    except stand_in.NoStandInError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

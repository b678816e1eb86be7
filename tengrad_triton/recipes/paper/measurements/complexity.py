"""Table 1, measured: what the curvature and a step cost, by batch, width and depth of a perceptron, and the exponents.

A width is the inputs and the outputs of every layer, d = d_i = d_o in the paper's terms, and a batch its m.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tengrad_triton.recipes.measuring.machine import clock
from tengrad_triton.recipes.measuring.power_law import exponent
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.settings import Settings

Quantity = Literal["batch", "width", "depth"]
CLASSES = 10
BASE: Mapping[Quantity, int] = {"batch": 128, "width": 256, "depth": 3}
VALUES: Mapping[Quantity, Sequence[int]] = {
    "batch": (64, 128, 256, 512), "width": (128, 256, 512, 1024), "depth": (2, 4, 8, 16)
}  # fmt: skip
ROUNDS = 5
COSTS = ("curvature", "step")
# The paper's table 1: the powers of m and d that it has, and d's highest.
PUBLISHED: Mapping[OptimizerName, tuple[str, str]] = {
    "tengrad": ("m²d + m³", "md² + md + m²"),
    "kfac": ("md² + d³", "d³"),
    "ekfac": ("md² + d³", "md²"),
    "kbfgs": ("md² + d²", "d³"),
}
Times = dict[str, float]


def perceptron(width: int, depth: int) -> nn.Module:
    """Return `depth` hidden layers of equal width."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def measured(
    names: Sequence[OptimizerName],
    values: Mapping[Quantity, Sequence[int]],
    device: torch.device,
    said: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return a case for every optimizer and quantity: seconds by value, and exponents."""
    cases = []
    for quantity, sizes in values.items():
        times: dict[OptimizerName, list[Times]] = {name: [] for name in names}
        for size in sizes:
            said(f"table1: {quantity} {size}")
            for name, costs in _interleaved(names, {**BASE, quantity: size}, device).items():
                times[name].append(costs)
        for name, each in times.items():
            curves = {cost: [at_size[cost] for at_size in each] for cost in COSTS}
            fits = {cost: exponent(sizes, curve) for cost, curve in curves.items() if min(curve) > 0}
            cases.append(
                {"optimizer": name, "quantity": quantity, "values": list(sizes), "seconds": curves, "exponents": fits}
            )
    return cases


def _interleaved(
    names: Sequence[OptimizerName], sizes: Mapping[Quantity, int], device: torch.device
) -> dict[OptimizerName, Times]:
    """Return the median costs; in each round every optimizer takes its two steps, so that all meet the same noise."""
    timers = {name: _timer(name, sizes, device) for name in names}
    rounds: dict[OptimizerName, list[Times]] = {name: [] for name in names}
    for number in range(ROUNDS + 1):
        for name, timer in timers.items():
            times = timer()
            if number > 0:  # the first warms up
                rounds[name].append(times)
    return {name: {cost: statistics.median(t[cost] for t in each) for cost in COSTS} for name, each in rounds.items()}


def _timer(name: OptimizerName, sizes: Mapping[Quantity, int], device: torch.device) -> Callable[[], Times]:
    torch.manual_seed(0)
    model = perceptron(sizes["width"], sizes["depth"]).to(device)
    x, y = torch.randn(sizes["batch"], sizes["width"]), torch.randint(CLASSES, (sizes["batch"],))
    own = replace(Settings().of(name), lr=1e-6, refresh_every=2)  # type: ignore[type-var]  # nothing moves far
    if hasattr(own, "rescale_every"):
        own = replace(own, rescale_every=2)  # type: ignore[type-var]
    return partial(_two_steps, model, own.build(model), x.to(device), y.to(device), own.closure)


def _two_steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, closure: bool) -> Times:
    """Take a step that refreshes the curvature and one that does not; return what each part costs.

    The curvature is what the first takes longer than the second, captures and further evaluations included.
    """

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    times = [clock(x.device)]
    if closure:
        optimizer.step(evaluate)  # type: ignore[arg-type]
    else:
        evaluate()
        optimizer.step()
    times.append(clock(x.device))
    evaluate()
    times.append(clock(x.device))
    optimizer.step()
    times.append(clock(x.device))
    refresh, evaluation, step = (end - start for start, end in pairwise(times))
    return {"curvature": refresh - evaluation - step, "step": step}

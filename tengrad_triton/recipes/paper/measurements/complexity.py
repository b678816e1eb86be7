"""Table 1, measured: the cost of the curvature and of a step by batch, width and depth of a perceptron.

The width is that of all layers, d = d_i = d_o in the paper's terms; the batch is the paper's m.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tengrad_triton.recipes.measuring.machine import clock
from tengrad_triton.recipes.measuring.power_law import exponent
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.optimizers.settings import OptimizerName

Quantity = Literal["batch", "width", "depth"]
CLASSES = 10
BASE: Mapping[Quantity, int] = {"batch": 128, "width": 256, "depth": 3}
VALUES: Mapping[Quantity, Sequence[int]] = {
    "batch": (64, 128, 256, 512), "width": (128, 256, 512, 1024), "depth": (2, 4, 8, 16)
}  # fmt: skip
ROUNDS = 5
COSTS = ("curvature", "step")
Times = dict[str, float]  # seconds of each of `COSTS`


def perceptron(width: int, depth: int) -> nn.Module:
    """Return a perceptron with ``depth`` hidden layers of equal width."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def measure_costs(
    names: Sequence[OptimizerName],
    values: Mapping[Quantity, Sequence[int]],
    device: torch.device,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return a case for each optimizer and quantity: the seconds at each value, and the fitted exponents.

    ``report`` gets a line before each value.
    """
    cases = []
    for quantity, sizes in values.items():
        times: dict[OptimizerName, list[Times]] = {name: [] for name in names}
        for size in sizes:
            report(f"table1: {quantity} {size}")
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
    """Return the median costs. Every optimizer takes its two steps in each round, so that noise affects all alike."""
    timers = {name: _timer(name, sizes, device) for name in names}
    rounds: dict[OptimizerName, list[Times]] = {name: [] for name in names}
    for number in range(ROUNDS + 1):
        for name, timer in timers.items():
            times = timer()
            if number > 0:  # the first round warms up
                rounds[name].append(times)
    return {name: {cost: statistics.median(t[cost] for t in each) for cost in COSTS} for name, each in rounds.items()}


def _timer(name: OptimizerName, sizes: Mapping[Quantity, int], device: torch.device) -> Callable[[], Times]:
    torch.manual_seed(0)
    model = perceptron(sizes["width"], sizes["depth"]).to(device)
    x, y = torch.randn(sizes["batch"], sizes["width"]), torch.randint(CLASSES, (sizes["batch"],))
    # a small rate, so that the weights hardly move
    own = OPTIMIZERS[name]().changed(lr=1e-6, refresh_every=2, rescale_every=2)
    return partial(_two_steps, model, own.build(model), x.to(device), y.to(device), own.needs_closure)


def _two_steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, closure: bool) -> Times:
    """Take a step that refreshes the curvature and one that does not; return the seconds of both costs.

    The cost of the curvature is the difference of the two, and includes capture and further evaluations.
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

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

from tengrad_triton.recipes.measuring.machine import clock, now
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
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return a case for each optimizer and quantity: the seconds at each value, and the fitted exponents.

    ``tell`` gets the name of each value before it is measured.
    """
    cases = []
    for quantity, sizes in values.items():
        times: dict[OptimizerName, list[Times]] = {name: [] for name in names}
        for size in sizes:
            tell(f"table1, {quantity} {size}")
            for name, costs in _interleaved(names, {**BASE, quantity: size}, device).items():
                times[name].append(costs)
        for name, each in times.items():
            curves = {cost: [at_size[cost] for at_size in each] for cost in COSTS}
            fits = {cost: exponent(sizes, curve) for cost, curve in curves.items() if min(curve) > 0}
            cases.append(
                {"optimizer": name, "quantity": quantity, "values": list(sizes), "seconds": curves, "exponents": fits}
            )
    return cases


# The cells of the table that an estimate measures: the others follow from them.
ANCHORS: Mapping[str, Mapping[Quantity, int]] = {
    "base": BASE,
    "width": {**BASE, "width": 512},
    "batch": {**BASE, "batch": 512},
}


def seconds_of_round(name: OptimizerName, sizes: Mapping[Quantity, int], device: torch.device) -> float:
    """Return the seconds of an optimizer's two steps, after two that warm up."""
    timer = _timer(name, sizes, device)
    timer()
    start = now(device)
    timer()
    return now(device) - start


def seconds_of_cell(anchors: Mapping[str, float], sizes: Mapping[Quantity, int]) -> float:
    """Return the seconds of an optimizer in a cell of the table, from the seconds of its two steps in `ANCHORS`.

    They grow in proportion to the layers, with a straight line in the batch, and with a power of the width. Up to the
    width of the anchor the power is that between the anchors; beyond, it is the third, which table 1 has for most.
    """
    base, wide, batch = (max(anchors[name], 1e-9) for name in ANCHORS)
    layers = (sizes["depth"] + 1) / (BASE["depth"] + 1)
    slope = (batch - base) / (ANCHORS["batch"]["batch"] - BASE["batch"])
    of_batch = max(0.0, 1 + slope * (sizes["batch"] - BASE["batch"]) / base)
    anchor = ANCHORS["width"]["width"]
    power = exponent([BASE["width"], anchor], [base, wide])
    of_width = (min(sizes["width"], anchor) / BASE["width"]) ** power * max(1.0, sizes["width"] / anchor) ** 3
    return (ROUNDS + 1) * base * layers * of_batch * of_width


def cells() -> list[Mapping[Quantity, int]]:
    """Return the sizes of all cells of the table."""
    return [{**BASE, quantity: size} for quantity, sizes in VALUES.items() for size in sizes]


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

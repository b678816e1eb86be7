"""A physics-informed network on a Poisson problem: Gauss-Newton on the residual itself, against Adam and L-BFGS.

−Δu = f on the unit square, u = 0 on its boundary, with f such that u = sin(πx) sin(πy). The model returns the residual,
so that J's rows are residual gradients and `blocks="network", fisher="exact"` is the damped Gauss-Newton step.

Dimensions: N points, D coordinates.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cyclopts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import guide
from examples.laplacian import JetNetwork
from examples.race import Runner, best_of, race
from tengrad_triton import TENGraD
from tengrad_triton.recipes.reports.markdown import block, bullets

WIDTHS = (2, 32, 32, 1)
INSIDE, BOUNDARY = 400, 100  # points of a step
SETTINGS: dict[str, Any] = {
    "lr": 0.5, "damping": "lm", "scaling": "none", "spring": 0.7, "refresh_every": 1,
    "fisher": "exact", "likelihood": "gaussian", "blocks": "network", "representation": "per_sample",
}  # fmt: skip
ADAM_LR = (5e-3, 2e-2, 5e-2)
LBFGS_LR = (1.0, 0.1)


def solution(x_ND: Tensor) -> Tensor:
    """Return u(x): [N]."""
    return (math.pi * x_ND).sin().prod(1)


class Residual(nn.Module):
    """The residual of the equation at points inside of the square, and that of its boundary condition, weighted."""

    def __init__(self, widths: Sequence[int], weight: float = 10.0) -> None:
        super().__init__()
        self.network, self.weight = JetNetwork(widths), weight

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return [N, 1]."""
        jet_NP = self.network(x_ND)
        value, laplacian = jet_NP[:, 0], jet_NP[:, -1]
        source = x_ND.shape[1] * math.pi**2 * solution(x_ND)
        inside = ((x_ND > 0) & (x_ND < 1)).all(1)
        return torch.where(inside, laplacian + source, self.weight * value)[:, None]


class OwnResidual(nn.Module):
    """The residual of −Δu + u³ = f inside of the unit square, and that of u = 0 on its boundary, weighted."""

    def __init__(self, inside: int, boundary: int, weight: float = 10.0) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        total = inside + boundary
        self.factors = (total / inside) ** 0.5, (weight * total / boundary) ** 0.5  # √(w N / N_b) of each term

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return [N, 1]."""
        value_N = self.u(x_ND)[:, 0]
        hessian_NDD = torch.func.vmap(torch.func.hessian(lambda x_D: self.u(x_D)[0]))(x_ND)
        residual_N = value_N**3 - hessian_NDD.diagonal(dim1=1, dim2=2).sum(1) - 1.0  # f = 1
        is_inside_N = ((x_ND > 0) & (x_ND < 1)).all(1)
        return torch.where(is_inside_N, self.factors[0] * residual_N, self.factors[1] * value_N)[:, None]


def points(inside: int, boundary: int, generator: torch.Generator) -> Tensor:
    """Return random points of the square, followed by random points of its boundary."""
    x_ND = torch.rand(inside + boundary, 2, generator=generator, dtype=torch.float64)
    index = torch.arange(inside, inside + boundary)
    x_ND[index, index % 2] = (index // 2 % 2).to(x_ND)
    return x_ND


def relative_error(model: Residual, across: int = 101) -> float:
    """Return ‖u − u*‖ / ‖u*‖ over a grid."""
    axis = torch.linspace(0, 1, across, dtype=torch.float64)
    grid_ND = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        error = model.network(grid_ND)[:, 0] - solution(grid_ND)
    return float(error.norm() / solution(grid_ND).norm())


def loss_of(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a closure that evaluates the loss and its gradients on a batch."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        residual = model(batch())
        loss = F.mse_loss(residual, torch.zeros_like(residual))
        loss.backward()
        return loss

    return closure


def tengrad(model: Residual) -> Runner:
    """Return a runner of TENGraD, with new points at every step."""
    optimizer = TENGraD(model, **SETTINGS)
    drawn = torch.Generator().manual_seed(1)

    def step(share: float) -> None:
        x_ND = points(INSIDE, BOUNDARY, drawn)  # the same batch for both calls of the closure
        optimizer.step(loss_of(model, optimizer, lambda: x_ND))

    return Runner("TENGraD", f"damping lm, SPRING {SETTINGS['spring']}", step, lambda: relative_error(model))


def adam(model: Residual, lr: float) -> Runner:
    """Return a runner of Adam with the same points as TENGraD. The learning rate falls to 0 along a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    drawn = torch.Generator().manual_seed(1)

    def step(share: float) -> None:
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * share)) / 2
        optimizer.step(loss_of(model, optimizer, lambda: points(INSIDE, BOUNDARY, drawn)))

    return Runner("Adam", f"lr {lr:g}, cosine", step, lambda: relative_error(model))


def lbfgs(model: Residual, lr: float) -> Runner:
    """Return a runner of L-BFGS with the strong Wolfe line search, which needs fixed points."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr, max_iter=20, history_size=100, line_search_fn="strong_wolfe", tolerance_grad=0.0,
        tolerance_change=0.0,
    )  # fmt: skip
    fixed = points(INSIDE, BOUNDARY, torch.Generator().manual_seed(1))
    closure = loss_of(model, optimizer, lambda: fixed)
    setting = f"lr {lr:g}, strong Wolfe"
    return Runner("L-BFGS", setting, lambda share: optimizer.step(closure), lambda: relative_error(model))


def runners(seed: int) -> list[Runner]:
    """Return a runner for each setting, all with the same first weights."""
    torch.manual_seed(seed)
    start = Residual(WIDTHS).double()
    return [
        tengrad(copy.deepcopy(start)),
        *(adam(copy.deepcopy(start), lr) for lr in ADAM_LR),
        *(lbfgs(copy.deepcopy(start), lr) for lr in LBFGS_LR),
    ]


INTRODUCTION = """# A physics-informed network on a Poisson problem

The equation is −Δu = f on the unit square, with u = 0 on its boundary. The source f is that whose solution is
u = sin(πx) sin(πy), so that the error is known. The model returns the residual at each point, and a row of J is the
gradient of one residual. With `blocks="network"` and `fisher="exact"` a step is the damped Gauss-Newton step on all
parameters ([M9 and M11](../math.md)).

[A PINN in five lines](pinn.md) has a shorter way, by an optimizer that takes the residuals themselves. This page shows
what `TENGraD` makes of them, and a layer with a rule of its own."""
MODEL = """## The residual is the model

Every layer is called once for each point, on a stack of positions: the value, its first derivatives and its Laplacian,
which the chain rule carries forward (`examples/laplacian.py`). The layer is [a layer of your own](your-own-layer.md).
[Your own equation](#your-own-equation) needs neither: `torch.func` takes its derivatives."""
USE = """The damping adapts to how well the quadratic model predicts the change of the loss. SPRING keeps the part of
the last direction to which the present points give no information ([M8 and M13](../math.md)):"""

OWN = """## Your own equation

Write your equation in the forward, with derivatives by `torch.func`; the layers are those of PyTorch. This module is
for −Δu + u³ = 1:"""
OWN_USE = """One batched pass gives the rows of all points. With one of three things in a forward, they take one
backward pass a sample instead, which is exact but slower; `summary()` says so:

- derivatives by `autograd.grad`: use `torch.func`;
- a batch cut by its values, such as `u(x[inside])`: `torch.where` keeps all terms in one batch;
- numbers of the whole batch, such as `len(x)`: `torch.func` runs the forward on single points.

The loss is the mean over all N points. So the factor √(w N / N_b) on the residuals of a term with N_b points gives the
mean over that term's points the weight w. The settings are those of the problem above:"""


def verdict(runners: Sequence[Runner]) -> str:
    """Return the comparison in a sentence."""
    ours, *others = best_of(runners)
    lower = " and ".join(f"{guide.times(o.best / ours.best)} times lower than {o.name}'s {o.best:.2g}" for o in others)
    return (
        f"**TENGraD's relative L2 error of {ours.best:.2g} is {lower}**, each at the best of its settings and "
        "measurements, within the same wall-clock time on a CPU."
    )


def settings(seconds: float, seed: int) -> dict[str, object]:
    """Return the settings of the run, for the page."""
    parameters = sum(p.numel() for p in Residual(WIDTHS).parameters())
    return {
        "network": f"{' – '.join(map(str, WIDTHS))}, tanh, {parameters} parameters, float64",
        "points of a step": f"{INSIDE} inside and {BOUNDARY} on the boundary, whose residual is weighted by 10; new "
        "points at each step for TENGraD and Adam, fixed points for L-BFGS",
        "error": "over a grid of 101 × 101 points",
        "time": f"{seconds:g} s of steps for each setting",
        "seed": seed,
    }


def page(runners: Sequence[Runner], seconds: float, seed: int) -> list[str]:
    """Return the page's sections."""
    given = "".join(f"    {name}={value!r},\n" for name, value in SETTINGS.items()).replace("'", '"')
    step = "optimizer.step(closure)  # closure() calls backward and returns mse_loss(model(x), 0)"
    loop = f"optimizer = TENGraD(\n    model,\n{given})\n{step}"
    return [
        INTRODUCTION, verdict(runners), guide.outcome(runners, "rel. L2 error", "Adam"), guide.clock(),
        "![Relative L2 error by time and by step, of each optimizer's best setting.](poisson.png)",
        MODEL, block(inspect.getsource(Residual).rstrip(), "python"),
        USE, block(loop, "python"),
        OWN, block(inspect.getsource(OwnResidual).rstrip(), "python"), OWN_USE,
        block(f"model = OwnResidual(inside={INSIDE}, boundary={BOUNDARY}).double()\n{loop}", "python"),
        "## What was run", bullets(settings(seconds, seed)),
    ]  # fmt: skip


def main(*, out: Path = Path("docs/guides"), seconds: float = 20.0, seed: int = 0, threads: int = 1) -> None:
    """Compare the optimizers, and write poisson.md and its figure into the folder `out`.

    Parameters
    ----------
    out
        Folder of the page.
    seconds
        Wall-clock time of each setting.
    seed
        Seed of the network's first weights.
    threads
        CPU threads of torch.
    """
    torch.set_num_threads(threads)
    start, entered = time.perf_counter(), runners(seed)
    with guide.display() as progress:
        race(entered, seconds, 60, progress)
    title = "Poisson problem, relative L2 error of the network"
    guide.curves(out / "poisson.png", entered, "relative L2 error", title)
    sections, wall = page(entered, seconds, seed), time.perf_counter() - start
    command = f"python -m examples.poisson --out docs/guides --seconds {seconds:g} --seed {seed} --threads {threads}"
    guide.write(out / "poisson.md", command, sections, wall)
    print(verdict(entered))


if __name__ == "__main__":
    cyclopts.run(main)

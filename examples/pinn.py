"""A PINN in five lines, and the contract of `GaussNewton`'s loss: every number of the page is computed here.

The equation is that of Burgers, v_t + v v_x = ν v_xx, with a travelling front as its solution,

    v(x, t) = c − a tanh(a (x − c t) / 2ν)

The system is an oscillation, q' = p and p' = −q, as one term with two residuals at each point.

Dimensions: N points, D coordinates (x and t), M residuals at each point.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path

import cyclopts
import torch
from torch import Tensor, nn

from examples import guide
from tengrad_triton import GaussNewton, derivatives
from tengrad_triton.recipes.reports.markdown import block, bullets, table

VISCOSITY, SPEED, HEIGHT = 0.05, 0.5, 0.5
REFUSED = (ValueError, TypeError, RuntimeError)


def front(x_ND: Tensor) -> Tensor:
    """Return the solution: [N, 1]."""
    x_N1, t_N1 = x_ND[:, :1], x_ND[:, 1:]
    return SPEED - HEIGHT * torch.tanh(HEIGHT * (x_N1 - SPEED * t_N1) / (2 * VISCOSITY))


def inside(count: int) -> Tensor:
    """Return points (x, t) [N, 2] in [−1, 1] × [0, 1]."""
    return torch.rand(count, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])


def edge(count: int) -> Tensor:
    """Return points [N, 2] at the start, t = 0, and at the ends, x = ±1, a third each."""
    x_ND = inside(count)
    third = count // 3
    x_ND[:third, 1] = 0
    x_ND[third : 2 * third, 0] = -1
    x_ND[2 * third :, 0] = 1
    return x_ND


def burgers(v: nn.Module, steps: int, points: int) -> GaussNewton:
    """Solve the equation: the five lines."""

    def equation(x_ND: Tensor) -> Tensor:
        d = derivatives(v, x_ND)  # of each coordinate: 0 is x, 1 is t
        return d.first[:, 1] + d.value * d.first[:, 0] - VISCOSITY * d.second[:, 0]

    optimizer = GaussNewton(v, {"inside": equation, "edge": lambda x: v(x) - front(x)}, weights={"edge": 10.0})
    for _ in range(steps):
        optimizer.step(inside=inside(points), edge=edge(points // 4))
    return optimizer


def oscillation(qp: nn.Module, steps: int, points: int) -> GaussNewton:
    """Solve a system: two residuals at each point, q' − p and p' + q, and q = 1, p = 0 at time 0."""

    def system(t_N1: Tensor) -> Tensor:
        d = derivatives(qp, t_N1)
        q_N, p_N = d.value.unbind(1)
        dq_N, dp_N = d.first[:, 0].unbind(1)
        return torch.stack([dq_N - p_N, dp_N + q_N], 1)

    start_11 = torch.zeros(1, 1, dtype=torch.float64)
    first_12 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    optimizer = GaussNewton(qp, {"system": system, "start": lambda t: qp(t) - first_12})
    for _ in range(steps):
        optimizer.step(system=6 * torch.rand(points, 1, dtype=torch.float64), start=start_11)
    return optimizer


def network(inputs: int, outputs: int) -> nn.Module:
    """Return a network with two hidden layers of 24 and tanh, in float64."""
    layers = nn.Linear(inputs, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, outputs)
    return nn.Sequential(*layers).double()


def error_of_front(v: nn.Module) -> float:
    """Return ‖v − exact‖ / ‖exact‖ at new points."""
    x_ND = inside(4000)
    with torch.no_grad():
        return float((v(x_ND) - front(x_ND)).norm() / front(x_ND).norm())


def error_of_oscillation(qp: nn.Module) -> float:
    """Return ‖(q, p) − (cos, −sin)‖ / ‖(cos, −sin)‖ on [0, 6]."""
    t_N1 = torch.linspace(0, 6, 1000, dtype=torch.float64)[:, None]
    exact_N2 = torch.cat([t_N1.cos(), -t_N1.sin()], 1)
    with torch.no_grad():
        return float((qp(t_N1) - exact_N2).norm() / exact_N2.norm())


def contract() -> list[tuple[str, str, str]]:
    """Return what the loss is said to be, the loss, and the same number by hand, for terms of several shapes."""
    u, x_ND = network(2, 2), inside(40)
    terms: dict[str, Callable[[Tensor], Tensor]] = {"one": lambda x: u(x)[:, 0], "two": u}
    points, weights = {"one": x_ND, "two": x_ND[:10]}, {"one": 1.0, "two": 10.0}
    with torch.no_grad():
        means = {"one": u(x_ND)[:, 0].square().mean(), "two": u(x_ND[:10]).square().mean()}
    cases = {
        "[N]: mean over N points": ["one"],
        "[N, M]: mean over all N M entries": ["two"],
        "two terms: Σ w mean, each over its own points": ["one", "two"],
    }
    lines = []
    for what, names in cases.items():
        chosen = {name: weights[name] for name in names}
        optimizer = GaussNewton(u, {name: terms[name] for name in names}, weights=chosen)
        loss = optimizer.loss(**{name: points[name] for name in names})
        by_hand = torch.stack([weights[name] * means[name] for name in names]).sum()
        lines.append((what, f"{float(loss):.12f}", f"{float(by_hand):.12f}"))
    return lines


def bad_residuals(u: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return residual functions that have no Gauss-Newton step."""
    return {
        "the loss in place of the residuals, `u(x).square().mean()`": lambda x: u(x).square().mean(),
        "complex residuals, `torch.complex(u(x), u(x))`": lambda x: torch.complex(u(x), u(x)),
        "residuals without a graph, `u(x).detach()`": lambda x: u(x).detach(),
        "residuals that are not finite, `u(x) / 0`": lambda x: u(x) / 0,
    }


def said_of(residual: Callable[[Tensor], Tensor], u: nn.Module, x_ND: Tensor) -> str:
    """Return what a step on a residual function says, or that it is taken."""
    try:
        GaussNewton(u, {"term": residual}).step(term=x_ND)
    except REFUSED as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


INTRODUCTION = """# A PINN in five lines

A residual is a function of points; it says how far the network is from solving the equation there. `GaussNewton` takes
the names and functions of all terms, and every step takes their points."""
SOLVED = """That is the equation of Burgers, v_t + v v_x = ν v_xx, for a front that travels through [−1, 1]."""
SYSTEM = """## Several equations at once

A residual function may return [N, M]: M equations at each point. The network then has several outputs, too."""
LOSS = """## The loss

    L = Σ_t w_t mean(r_t²)

Each term t has its weight w_t, 1 unless `weights` says otherwise. The mean is over all entries of what its
function returns. So the number of points of a term does not change how much it counts; its weight does."""
UNITS = """`step` returns the loss before the step, at its points. It solves (JᵀJ + α I) δ = Jᵀ r with
all residuals stacked, each times √(w_t / entries of the term): L = ‖r‖². There is no factor ½ and no factor 2: the
gradient of L is 2 Jᵀ r. The damping α has the unit of L over that of a parameter squared. So if you multiply every
weight by 100, you have to multiply a fixed `damping` by 100 as well to take the same step; the default does so itself.
By default (`acceleration=True`) a second solve with the same matrix corrects δ for the curvature of r.

If you come from a loss with sums in place of means, multiply a weight by the number of entries; if from
`torch.nn.MSELoss`, the weight stays."""
PRACTICE = """## In practice

- **Types.** Use float64, for the model and its points. Float32 resolves losses only down to about 1e-9.
- **New points.** Draw them at every step where you can. Fewer residuals than parameters can all vanish at points that
  stay the same while the solution is wrong in between: see convection with and without new points in
  [the study](../pinn.md).
- **Unknowns.** The unknown of an inverse problem is a parameter of the model, such as `u.k = nn.Parameter(...)`, set
  before `GaussNewton(u, ...)`. For several networks give `nn.ModuleList([a, b])`. A parameter that only the residual
  knows is not trained; a warning says so.
- **Hard conditions.** With `f = lambda x: x * (1 - x) * u(x)`, use `laplacian(f, x)`: any function will do.
- **Pairs of points.** Periodic conditions take two tensors: `edge=(left, right)` calls the residual with both.
- **Integrals.** A norm or an integral is one residual: give its points as [1, N, D], and return
  `u(x[0]).mean(0) - 1`, of shape [1].
- **What it does.** `print(optimizer.summary())` says how the rows of each term are found, `optimizer.stats` how the
  last step went. `optimizer.stopped` is true if no step was taken; stop after several of these where points differ
  from step to step.
- **Speed.** The fastest rows are those of networks of `nn.Linear` and elementwise functions, with `laplacian` and
  `derivatives`. With `compiled=True` a step takes 0.7 of the time ([the study](../pinn.md#what-a-step-costs)), after 10
  to 20 s of compilation. Hold a number that changes from step to step in a tensor, or it is compiled anew.
- **Memory on Linux.** Thousands of points take more memory than the C library keeps, so that each step fetches it anew.
  With `MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000` in the environment of glibc a step of the
  study's Poisson 5d took 0.7 of the time; compiled steps need no such thing.
- **Many points.** `max_rows=` or `sketch=` bounds the work of a step. Where J does not fit into `max_bytes`, it is
  computed in chunks, or the step says what it would take.
- **Copies.** Residuals are closures over a model. For a copied model make a new optimizer, and load the state."""
ADAPTERS = """## From PINA or DeepXDE

Their losses are Σ_t w_t mean(r_t²), too. So equations that are written for them stay as they are, and so do the weights
(`pip install tengrad-triton[pinn]`). In PINA a solver takes the place of `PINN`:

    from tengrad_triton.adapters.pina import GaussNewtonPINN

    solver = GaussNewtonPINN(problem, model, weighting=ScalarWeighting({"boundary": 10.0}))
    Trainer(solver, max_epochs=200, accelerator="cpu").train()

In DeepXDE, with its backend PyTorch, a function takes the place of `model.compile`:

    from tengrad_triton.adapters.deepxde import compile_least_squares

    optimizer = compile_least_squares(model, loss_weights=[1, 10])
    model.train(iterations=200)

Both compute in float32 unless told otherwise: by `torch.set_default_dtype(torch.float64)` before PINA's problem is
made, by `dde.config.set_default_float("float64")` before DeepXDE's. Both take derivatives by `torch.autograd.grad`; the
rows are exact all the same, from one backward pass. Unknowns of an inverse problem are trained: PINA's as they are,
DeepXDE's as `external_trainable_variables`. Weights that follow the losses (PINA), regularizers and auxiliary variables
(DeepXDE) are refused."""
REFUSALS = """## What is refused

A residual is real, finite, and differentiable, and there is one for each point or M for each point. Square nothing:
`GaussNewton` squares."""
HEADING = ("", "relative error", "loss at the end", "steps", "seconds")
IMPORTS = """import torch
from torch import Tensor, nn

from tengrad_triton import GaussNewton, derivatives

VISCOSITY, SPEED, HEIGHT = {viscosity}, {speed}, {height}"""


def solved(
    solve: Callable[[nn.Module, int, int], GaussNewton], u: nn.Module, error: Callable[[nn.Module], float],
    steps: int, points: int,
) -> tuple[str, ...]:  # fmt: skip
    """Solve a problem; return a line of the table."""
    began = time.perf_counter()
    optimizer = solve(u, steps, points)
    seconds = time.perf_counter() - began
    return solve.__name__, f"{error(u):.1e}", f"{float(optimizer.stats.loss):.1e}", str(steps), f"{seconds:.1f}"


def page(lines: list[tuple[str, ...]], points: int, seed: int) -> list[str]:
    """Return the page's sections."""
    imports = IMPORTS.format(viscosity=VISCOSITY, speed=SPEED, height=HEIGHT)
    parts = [inspect.getsource(part).rstrip() for part in (front, inside, edge, network, burgers)]
    u, x_ND = network(2, 1), inside(8)
    refused = [(f"{what}", said_of(residual, u, x_ND)) for what, residual in bad_residuals(u).items()]
    what: dict[str, object] = {
        "networks": "two hidden layers of 24, tanh, float64",
        "points": f"{points} new ones at every step, and {points // 4} on the edge",
        "settings": "the defaults",
        "weights": "10 on the edge, 1 otherwise",
        "seed": seed,
    }
    return [
        INTRODUCTION, block("\n\n\n".join([imports, *parts]), "python"),
        block("v = network(2, 1)\nburgers(v, steps=5, points=60)", "python"), SOLVED,
        table(HEADING, lines[:1]), SYSTEM, block(inspect.getsource(oscillation).rstrip(), "python"),
        block("qp = network(1, 2)\noscillation(qp, steps=5, points=20)", "python"), table(HEADING, lines[1:]),
        LOSS, table(("residual", "`optimizer.loss`", "by hand"), contract()), UNITS, PRACTICE, ADAPTERS,
        REFUSALS, table(("what came", "what `step` says"), refused), "## What was run", bullets(what),
    ]  # fmt: skip


def main(
    *, out: Path = Path("docs/guides"), steps: int = 150, points: int = 400, seed: int = 0, threads: int = 1
) -> None:
    """Solve both problems, check the contract, and write pinn.md into the folder `out`.

    Parameters
    ----------
    out
        Folder of the page.
    steps
        Number of steps.
    points
        Points of a step.
    seed
        Seed of the first weights and of the points.
    threads
        CPU threads of torch.
    """
    torch.set_num_threads(threads)
    began = time.perf_counter()
    torch.manual_seed(seed)
    lines = [
        solved(burgers, network(2, 1), error_of_front, steps, points),
        solved(oscillation, network(1, 2), error_of_oscillation, steps, points // 4),
    ]
    command = f"python -m examples.pinn --out docs/guides --steps {steps} --points {points} --seed {seed}"
    guide.write(out / "pinn.md", command, page(lines, points, seed), time.perf_counter() - began)
    print("\n".join(" ".join(line) for line in lines))


if __name__ == "__main__":
    cyclopts.run(main)

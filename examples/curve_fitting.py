"""Curve fitting: `GaussNewton` in place of `scipy.optimize.least_squares`, on the same data, in float64.

Two models are fitted: a damped oscillation with five parameters, and a small network. SciPy gets the Jacobian once by
finite differences, its default, and once exactly. All begin at the same parameters and stop by the same rule: when a
step lowers the sum of squares by less than a share `TOLERANCE` of it.

Dimensions: N data, K parameters.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cyclopts
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from examples import guide
from tengrad_triton import GaussNewton
from tengrad_triton.recipes.reports.markdown import block, bullets, table
from tengrad_triton.residuals.expanded import expanded_rows

TRUE = {"height": 2.0, "decay": 0.5, "frequency": 6.0, "phase": 0.3, "offset": 0.7}
GUESS = {"height": 1.0, "decay": 0.2, "frequency": 5.5, "phase": 0.0, "offset": 0.0}
NOISE = 0.1
TOLERANCE = 1e-10
MOST_STEPS = 200
MOST_EVALUATIONS = 200  # of SciPy's, without those of finite differences


class Oscillation(nn.Module):
    """A damped oscillation with five parameters."""

    def __init__(self, **start: float) -> None:
        super().__init__()
        for name, value in start.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))

    def forward(self, t_N1: Tensor) -> Tensor:
        """Return the curve at times t: [N, 1]."""
        swing = torch.cos(self.frequency * t_N1 + self.phase)
        return self.height * torch.exp(-self.decay * t_N1) * swing + self.offset


def fit(model: nn.Module, t_N1: Tensor, y_N1: Tensor) -> list[float]:
    """Fit a model to data; return the mean of squares before each step."""
    optimizer = GaussNewton(model, {"data": lambda t, y: model(t) - y})
    losses: list[float] = []
    while len(losses) < MOST_STEPS:
        losses.append(float(optimizer.step(data=(t_N1, y_N1))))
        if len(losses) > 1 and losses[-2] - losses[-1] < TOLERANCE * losses[-2]:
            break
    return losses


@dataclass(frozen=True)
class Fit:
    """One fit.

    Attributes:
        norm: ‖r‖, the root of the sum of squares.
        steps: the steps of `GaussNewton`, or the Jacobians of SciPy.
        seconds: the wall-clock time.
    """

    way: str
    model: nn.Module
    norm: float
    steps: int
    seconds: float


def small_network(seed: int) -> nn.Module:
    """Return a network 1 – 8 – 8 – 1 with tanh."""
    torch.manual_seed(seed)
    layers = (nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    return nn.Sequential(*layers).double()


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return times [N, 1] in [0, 4], and the true oscillation there with normal noise [N, 1]."""
    generator = torch.Generator().manual_seed(seed)
    t_N1 = 4 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    noise_N1 = NOISE * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return t_N1, Oscillation(**TRUE)(t_N1) + noise_N1


def norm_of(model: nn.Module, t_N1: Tensor, y_N1: Tensor) -> float:
    """Return ‖r‖."""
    with torch.no_grad():
        return float((model(t_N1) - y_N1).norm())


def by_gauss_newton(model: nn.Module, t_N1: Tensor, y_N1: Tensor) -> Fit:
    """Fit a copy of the model with `GaussNewton`."""
    model, began = copy.deepcopy(model), time.perf_counter()
    steps = len(fit(model, t_N1, y_N1))
    return Fit("`GaussNewton`", model, norm_of(model, t_N1, y_N1), steps, time.perf_counter() - began)


def by_scipy(model: nn.Module, t_N1: Tensor, y_N1: Tensor, exact: bool) -> Fit:
    """Fit a copy of the model with SciPy, with an exact Jacobian or with its default, finite differences."""
    model, began = copy.deepcopy(model), time.perf_counter()

    def residual(theta_K: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            vector_to_parameters(torch.from_numpy(theta_K), model.parameters())
            return (model(t_N1) - y_N1)[:, 0].numpy()

    def jacobian(theta_K: np.ndarray) -> np.ndarray:
        vector_to_parameters(torch.from_numpy(theta_K), model.parameters())
        rows = expanded_rows(model, lambda t: model(t)[:, 0], t_N1, check=False)
        return torch.cat([j.reshape(len(j), -1) for j in rows], 1).numpy()

    first_K = parameters_to_vector(model.parameters()).detach().numpy().copy()
    found = least_squares(
        residual, first_K, jacobian if exact else "2-point",
        ftol=TOLERANCE, xtol=None, gtol=None, max_nfev=MOST_EVALUATIONS,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    residual(found.x)
    name = "SciPy, exact Jacobian" if exact else "SciPy, finite differences"
    return Fit(name, model, norm_of(model, t_N1, y_N1), found.njev, seconds)


def fits(model: nn.Module, t_N1: Tensor, y_N1: Tensor) -> list[Fit]:
    """Fit a model in all ways, each from its present parameters."""
    return [by_gauss_newton(model, t_N1, y_N1), *(by_scipy(model, t_N1, y_N1, exact) for exact in (True, False))]


INTRODUCTION = """# Curve fitting

`GaussNewton` fits any module to data by least squares: a formula whose numbers are `nn.Parameter`s as well as a
network. It stands where `scipy.optimize.least_squares` would stand. The model keeps its own parameters (SciPy wants
them in one vector), derivatives are exact (SciPy's are finite differences unless you write them), and the data may
differ from step to step."""
FORMULA = """## A formula

The model is a module; its parameters begin at a guess."""
NETWORK = """## A network

Nothing else changes: `fit(network, t_N1, y_N1)`. There are {count} parameters now. So SciPy's finite differences
evaluate the network {count} times for each Jacobian. The norms compare solvers, not models: a lower one also fits more
of the noise, and different solvers may end in different minima."""
WHEN = """## When to stay with SciPy

SciPy has bounds, robust losses (`loss="soft_l1"`) and sparse Jacobians; `GaussNewton` has none of these. Bounds come by
other variables (train s, with k = sigmoid(s)), and a robust loss by other residuals: for soft_l1 return
`(2 * ((1 + z).sqrt() - 1) + 1e-16).sqrt()` with z = (r / scale)². It gives no
covariance; from the rows J of the last step it is σ² (Jᵀ J)⁻¹ with σ² = ‖r‖² / (N − K)."""
HEADING = ("way", "‖r‖", "steps", "seconds")
IMPORTS = """import torch
from torch import Tensor, nn

from tengrad_triton import GaussNewton

TOLERANCE, MOST_STEPS = {tolerance:g}, {steps}"""


def lines_of(found: Sequence[Fit]) -> list[tuple[str, ...]]:
    """Return the lines of a table of fits."""
    return [(fit.way, f"{fit.norm:.8f}", str(fit.steps), f"{fit.seconds:.3f}") for fit in found]


def parameters_table(found: Sequence[Fit]) -> str:
    """Return a table of the parameters that each way found, beside those that the data come from."""
    rows = [("the data's", *(f"{value:g}" for value in TRUE.values()))]
    rows += [(fit.way, *(f"{float(p.detach()):.6f}" for p in fit.model.parameters())) for fit in found]
    return table(("", *TRUE), rows)


def draw(path: Path, formula: Fit, network: Fit, t_N1: Tensor, y_N1: Tensor) -> None:
    """Write a PNG file: the data, and the two fits by `GaussNewton`."""
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    panel = figure.subplots()
    times_N1 = torch.linspace(0, 4, 400, dtype=torch.float64)[:, None]
    panel.plot(t_N1[:, 0], y_N1[:, 0], ".", color="0.7", label="data")
    with torch.no_grad():
        panel.plot(times_N1[:, 0], formula.model(times_N1)[:, 0], label="formula")
        panel.plot(times_N1[:, 0], network.model(times_N1)[:, 0], "--", label="network")
    panel.set(xlabel="t", ylabel="y")
    panel.grid(alpha=0.3)
    panel.legend()
    guide.save(figure, path)


def page(formula: Sequence[Fit], network: Sequence[Fit], count: int, seed: int) -> list[str]:
    """Return the page's sections."""
    code = [IMPORTS.format(tolerance=TOLERANCE, steps=MOST_STEPS)]
    code += [inspect.getsource(part).rstrip() for part in (Oscillation, fit)]
    use = f"""t_N1 = 4 * torch.rand({count}, 1, dtype=torch.float64)
y_N1 = 2 * torch.exp(-0.5 * t_N1) * torch.cos(6 * t_N1 + 0.3) + 0.7 + {NOISE} * torch.randn_like(t_N1)
model = Oscillation({", ".join(f"{name}={value}" for name, value in GUESS.items())})
fit(model, t_N1, y_N1)
print(dict(model.named_parameters()))"""
    size = sum(p.numel() for p in network[0].model.parameters())
    what: dict[str, object] = {
        "data": f"{count} times in [0, 4], normal noise of {NOISE}",
        "first parameters of the formula": ", ".join(f"{name} {value:g}" for name, value in GUESS.items()),
        "network": f"1 – 8 – 8 – 1, tanh, {size} parameters",
        "stop": f"a step lowers the sum of squares by less than {TOLERANCE:g} of it, or {MOST_STEPS} steps "
        f"(SciPy: `max_nfev={MOST_EVALUATIONS}`)",
        "SciPy": 'method "trf", its default; a step is a Jacobian',
        "seed": seed,
        "type": "float64",
    }
    return [
        INTRODUCTION, FORMULA, block("\n\n\n".join(code), "python"), block(use, "python"),
        table(HEADING, lines_of(formula)), parameters_table(formula),
        NETWORK.format(count=size), table(HEADING, lines_of(network)),
        "![The data and the two fits.](curve-fitting.png)", WHEN, "## What was run", bullets(what),
    ]  # fmt: skip


def main(*, out: Path = Path("docs/guides"), count: int = 1000, seed: int = 0, threads: int = 1) -> None:
    """Fit both models in all ways, and write curve-fitting.md and its figure into the folder `out`.

    Parameters
    ----------
    out
        Folder of the page.
    count
        Number of data.
    seed
        Seed of the data and of the network's first weights.
    threads
        CPU threads of torch.
    """
    torch.set_num_threads(threads)
    began = time.perf_counter()
    t_N1, y_N1 = data(count, seed)
    fits(Oscillation(**GUESS), t_N1[:8], y_N1[:8])  # what every library does once is not timed
    formula, network = fits(Oscillation(**GUESS), t_N1, y_N1), fits(small_network(seed), t_N1, y_N1)
    draw(out / "curve-fitting.png", formula[0], network[0], t_N1, y_N1)
    command = f"python -m examples.curve_fitting --out docs/guides --count {count} --seed {seed}"
    guide.write(out / "curve-fitting.md", command, page(formula, network, count, seed), time.perf_counter() - began)
    print("\n".join(" ".join(line) for line in (*lines_of(formula), *lines_of(network))))


if __name__ == "__main__":
    cyclopts.run(main)

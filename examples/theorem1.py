"""Theorem 1 of the paper, measured: a wide ReLU network in full batch converges at its rate or faster.

With L layers, n samples, J_l the derivative of the outputs u with respect to layer l, λ₀ the least eigenvalue of all
J_l J_lᵀ at the start, and a network that changes so little that ‖J(W) − J(W₀)‖ ≤ C √λ₀ / 3 within
‖W − W₀‖ ≤ 3 ‖y − u₀‖ / √λ₀ (assumptions 1 and 2), damping α ≤ 4 λ₀ / 9n and a learning rate

    0 < η < (2Lγ − 1 − 2C√L γ) / (L + C√L γ)²        γ = λ₀ / (λ₀ + 9nα / 4)

give ‖u_k − y‖² ≤ (1 − η)ᵏ ‖u₀ − y‖².

Dimensions: N samples, D inputs, K entries of J's rows.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import cyclopts
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from examples import guide
from tengrad_triton import TENGraD, kernels
from tengrad_triton.recipes.reports.markdown import bullets, table
from tengrad_triton.recipes.reports.styles import STYLES

SAMPLES, INPUTS = 8, 32
SHARES = (0.25, 0.5, 0.95)  # of the largest learning rate that the theorem allows
DAMPING = 0.1  # of the largest that it allows


class Wide(nn.Module):
    """Two layers, W₂ relu(W₁ x) / √width with entries of N(0, 1): the neural tangent kernel's scale."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(inputs, width, bias=False), nn.Linear(width, 1, bias=False)
        for layer in (self.inner, self.outer):
            nn.init.normal_(layer.weight)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return u: [N, 1]."""
        return self.outer(self.inner(x_ND).relu()) / math.sqrt(self.outer.in_features)


@dataclass(frozen=True)
class Constants:
    """The constants of the theorem for one network and data; ``c`` is assumed, and compared with its measured value."""

    layers: int
    samples: int
    least: float  # λ₀
    c: float = 0.5

    @property
    def damping(self) -> float:
        """The damping α."""
        return DAMPING * 4 * self.least / (9 * self.samples)

    @property
    def gamma(self) -> float:
        """The constant γ."""
        return self.least / (self.least + 9 * self.samples * self.damping / 4)

    @property
    def largest_lr(self) -> float:
        """The bound of the learning rate η."""
        root = math.sqrt(self.layers) * self.gamma
        return (2 * self.layers * self.gamma - 1 - 2 * self.c * root) / (self.layers + self.c * root) ** 2


@dataclass(frozen=True)
class Run:
    """The steps at one learning rate.

    Attributes:
        residuals: ‖u_k − y‖² at each step.
        cs: the least C that assumption 2 allows at each step.
        distances: ‖W_k − W₀‖ at each step, over the radius of assumption 2.
    """

    lr: float
    constants: Constants
    residuals: Sequence[float]
    cs: Sequence[float]
    distances: Sequence[float]

    @property
    def slowest(self) -> float:
        """The largest ‖u_k − y‖² / ((1 − η)ᵏ ‖u₀ − y‖²) over all steps k > 0, which is at most 1 by the theorem."""
        first = self.residuals[0]
        return max(r / ((1 - self.lr) ** k * first) for k, r in enumerate(self.residuals) if k)


def problem(width: int, seed: int) -> tuple[Wide, Tensor, Tensor]:
    """Return a network, normalized inputs [N, D] and targets ±1 [N, 1], in float64."""
    torch.manual_seed(seed)
    x_ND = F.normalize(torch.randn(SAMPLES, INPUTS, dtype=torch.float64))
    return Wide(INPUTS, width).double(), x_ND, torch.randint(2, (SAMPLES, 1)).double() * 2 - 1


def rows(optimizer: TENGraD) -> Mapping[str, Tensor]:
    """Return the optimizer's rows of each layer, j_NK: they are √2 J, because F is that of the mean square."""
    return {name.removesuffix(".weight"): rows_of(optimizer, name) for name in optimizer.choices()}


def rows_of(optimizer: TENGraD, weight: str) -> Tensor:
    """Return the rows of a weight, each flat: [N, K]."""
    return optimizer.rows(weight.removesuffix(".weight"))[weight].flatten(1)


def least_eigenvalues(j: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the least eigenvalue of J_l J_lᵀ of each layer, from the Gram matrix that the optimizer factors."""
    k_LNN = kernels.gram_rows(list(j.values()), list(range(len(j))), len(j)) / 2
    return dict(zip(j, torch.linalg.eigvalsh(k_LNN)[:, 0].tolist(), strict=True))


def moved(now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Return ‖J − J₀‖, where J has all layers side by side."""
    (k_NN,) = kernels.gram_rows([now[name] - start[name] for name in start], [0] * len(start), 1)
    return math.sqrt(float(torch.linalg.eigvalsh(k_NN / 2)[-1].clamp(min=0)))


def descend(model: Wide, x_ND: Tensor, y_N1: Tensor, share: float, steps: int) -> tuple[Run, dict[str, float]]:
    """Take full-batch steps with ``share`` of the largest η; return the run, and λ_min of each layer at the start."""
    optimizer = TENGraD(
        model, lr=0.0, damping=1.0, momentum=0.0, refresh_every=1, fisher="exact", likelihood="gaussian",
        representation="per_sample", scaling="none",
    )  # fmt: skip
    first = [p.detach().clone() for p in model.parameters()]

    def step() -> float:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x_ND), y_N1)
        loss.backward()
        optimizer.step()
        return float(loss.detach()) * len(x_ND)

    first_residual = step()  # η is 0: the optimizer has J(W₀) after it
    start = {name: j_NK.clone() for name, j_NK in rows(optimizer).items()}
    least = least_eigenvalues(start)
    constants = Constants(len(least), len(x_ND), min(least.values()))
    lr, radius = share * constants.largest_lr, 3 * math.sqrt(first_residual / constants.least)
    residuals, cs, distances = [], [], []
    for k in range(steps + 1):
        optimizer.param_groups[0].update(lr=lr if k < steps else 0.0, damping=2 * constants.damping)
        squares = [(p.detach() - old).square().sum() for p, old in zip(model.parameters(), first, strict=True)]
        distances.append(math.sqrt(float(torch.stack(squares).sum())) / radius)
        residuals.append(step())
        cs.append(3 * moved(rows(optimizer), start) / math.sqrt(constants.least))
    return Run(lr, constants, residuals, cs, distances), least


INTRODUCTION = """# Theorem 1, measured

Theorem 1 of the paper says: in full batch, with exact rows of J and damping α ≤ 4 λ₀ / 9n, a learning rate

    0 < η < (2Lγ − 1 − 2C√L γ) / (L + C√L γ)²        γ = λ₀ / (λ₀ + 9nα / 4)

gives ‖u_k − y‖² ≤ (1 − η)ᵏ ‖u₀ − y‖². L is the number of layers, n that of samples, and λ₀ the least eigenvalue of
the layers' Gram matrices at the start. C bounds the change of J: ‖J(W) − J(W₀)‖ ≤ C √λ₀ / 3
within ‖W − W₀‖ ≤ 3 ‖y − u₀‖ / √λ₀ (assumption 2). Here λ₀ comes from the Gram matrices that the optimizer factors.
C is assumed to be 1/2, the largest value that the theorem allows. Both conditions are checked at every step."""
CHECK = """Slowest is the largest ‖u_k − y‖² / ((1 − η)ᵏ ‖u₀ − y‖²) over all steps k > 0, which is at most 1 by the
theorem. Assumption 2 is about a whole ball around W₀; it is measured at the points of the run, which the proof uses.
The Hessian of the mean squared error is twice the theorem's over n, so that `damping` is 2α."""
RUNS = ("η / its bound", "η", "slowest", "largest C", "allowed", "largest distance / radius")


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Write a PNG file: the squared error beside the theorem's rate, and the change of J in assumption 2."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (color, marker), run in zip(cycle(STYLES), runs, strict=False):
        share = [residual / run.residuals[0] for residual in run.residuals]
        left.plot(share, color=color, marker=marker, markevery=5, markersize=5, label=f"η = {run.lr:.3f}")
        left.plot([(1 - run.lr) ** k for k in range(len(share))], "--", color=color)
        right.plot(run.cs, color=color, marker=marker, markevery=5, markersize=5, label=f"η = {run.lr:.3f}")
    right.axhline(runs[0].constants.c, color="black", linestyle="--")
    left.set(yscale="log", xlabel="step k", ylabel="‖u_k − y‖² / ‖u₀ − y‖²   (dashed: (1 − η)ᵏ)")
    right.set(xlabel="step k", ylabel="3 ‖J(W_k) − J(W₀)‖ / √λ₀   (dashed: C assumed)", ylim=(0, None))
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.suptitle("A wide two-layer ReLU network in full batch, TENGraD with the theorem's settings")
    guide.save(figure, path)


def page(runs: Sequence[Run], least: Mapping[str, float], width: int, seed: int) -> list[str]:
    """Return the page's sections."""
    constants = runs[0].constants
    lines = [
        (
            *(f"{run.lr / constants.largest_lr:.2f}", f"{run.lr:.4f}", f"{run.slowest:.3f}"),
            *(f"{max(run.cs):.3f}", f"{constants.c:g}", f"{max(run.distances):.3f}"),
        )
        for run in runs
    ]
    what: dict[str, object] = {
        "network": f"{INPUTS} – {width} – 1, ReLU, W₂ relu(W₁ x) / √width with entries of N(0, 1), float64",
        "data": f"{SAMPLES} random unit vectors with targets ±1",
        "λ_min of the layers' Gram matrices": ", ".join(f"{name} {value:.4f}" for name, value in least.items()),
        "λ₀": f"{constants.least:.4f}",
        "α": f"{constants.damping:.3g}, a tenth of its bound; γ = {constants.gamma:.3f}",
        "bound of η": f"{constants.largest_lr:.4f}",
        "steps": len(runs[0].residuals) - 1,
        "seed": seed,
    }
    figure = "![Squared error beside the theorem's rate, and the change of J.](theorem1.png)"
    return [INTRODUCTION, table(RUNS, lines), CHECK, figure, "## What was run", bullets(what)]


def main(
    *, out: Path = Path("docs/guides"), width: int = 32768, steps: int = 40, seed: int = 0, threads: int = 1
) -> None:
    """Run, and write theorem1.md and its figure into the folder `out`.

    Parameters
    ----------
    out
        Folder of the page.
    width
        Width of the network.
    steps
        Number of steps at each learning rate.
    seed
        Seed of the weights and the data.
    threads
        CPU threads of torch.
    """
    torch.set_num_threads(threads)
    began = time.perf_counter()
    model, x_ND, y_N1 = problem(width, seed)
    with guide.display() as progress:
        shares = progress.track(SHARES, description="learning rates")
        both = [descend(copy.deepcopy(model), x_ND, y_N1, share, steps) for share in shares]
    runs = [run for run, _ in both]
    draw(out / "theorem1.png", runs)
    command = f"python -m examples.theorem1 --out docs/guides --width {width} --steps {steps} --seed {seed}"
    guide.write(out / "theorem1.md", command, page(runs, both[0][1], width, seed), time.perf_counter() - began)
    print("\n".join(f"η = {run.lr:.3f}: slowest {run.slowest:.3f} of the theorem's rate" for run in runs))


if __name__ == "__main__":
    cyclopts.run(main)

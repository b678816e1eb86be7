"""Variational Monte Carlo: stochastic reconfiguration as a Gauss-Newton step, against an exact energy.

D coupled oscillators, H = −½ Δ + ½ xᵀ C x, have the energy ½ tr √C in the ground state. The logarithm of the wave
function ψ is a network with a Gaussian envelope. A sample x is drawn from |ψ|² by Metropolis steps, and has

    the local energy       e(x) = (Hψ/ψ)(x) = −½ (Δ log ψ + |∇ log ψ|²) + ½ xᵀ C x
    log-derivatives        O(x) = ∂ log ψ(x) / ∂θ

With means over the samples, E the mean of e and Ō that of O, stochastic reconfiguration steps by −η δ with

    (S + α I) δ = ⟨(O − Ō) (e − E)⟩            S = ⟨(O − Ō) (O − Ō)ᵀ⟩

That is the Gauss-Newton step of the residuals

    r(x) = log ψ_θ(x) + s c − log ψ(x) + e(x) − E

where the last three are those of the samples, before the step: the network is to become ψ after one short step of
imaginary time, exp(−(H − E)) ψ to first order. The norm of ψ is free. So a number c is trained beside the network,
whose rows are all s. A step that chooses c best leaves of every row its deviation from the mean, O − Ō: S keeps a
share α / (s² + α) of Ō Ōᵀ, which is small beside α I if ‖Ō‖ is beside s.

Dimensions: N samples, D coordinates, K parameters.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cyclopts
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from examples import guide
from tengrad_triton import GaussNewton, derivatives
from tengrad_triton.recipes.reports.markdown import block, bullets, table

COORDINATES, WIDTH, COUPLING = 4, 16, 0.5
SETTINGS = {"lr": 0.2}
MOVES = 10  # Metropolis steps of every sample before each step of the optimizer
TAIL = 50  # the energy is the mean of this many last steps


class LogPsi(nn.Module):
    """log ψ up to a constant: a network and a Gaussian envelope. `norm` is that constant, which is fitted too."""

    def __init__(self, coordinates: int, width: int) -> None:
        super().__init__()
        layers = nn.Linear(coordinates, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        self.network, self.norm = nn.Sequential(*layers), nn.Parameter(torch.zeros(1))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return log ψ: [N, 1]."""
        return self.network(x_ND) - 0.5 * x_ND.square().sum(1, keepdim=True)


def move(log_psi: nn.Module, x_ND: Tensor, moves: int, width: float = 0.6) -> Tensor:
    """Return samples of |ψ|² after Metropolis steps from ``x_ND``."""
    with torch.no_grad():
        now_N1 = log_psi(x_ND)
        for _ in range(moves):
            tried_ND = x_ND + width * torch.randn_like(x_ND)
            log_N1 = log_psi(tried_ND)
            taken_N1 = torch.rand_like(now_N1).log() < 2 * (log_N1 - now_N1)
            x_ND, now_N1 = torch.where(taken_N1, tried_ND, x_ND), torch.where(taken_N1, log_N1, now_N1)
    return x_ND


def local_energy(log_psi: nn.Module, x_ND: Tensor, c_DD: Tensor) -> Tensor:
    """Return e: [N, 1]."""
    d = derivatives(log_psi, x_ND)
    kinetic_N1 = -0.5 * (d.second + d.first.square()).sum(1)
    return (kinetic_N1 + 0.5 * ((x_ND @ c_DD) * x_ND).sum(1, keepdim=True)).detach()


def reconfiguration(log_psi: LogPsi, scale: float = 1e3, **settings: float) -> GaussNewton:
    """Return an optimizer whose step on (samples, log ψ before the step, e − E) is stochastic reconfiguration."""

    def residual(x_ND: Tensor, before_N1: Tensor, excess_N1: Tensor) -> Tensor:
        return log_psi(x_ND) + scale * log_psi.norm - before_N1 + excess_N1

    return GaussNewton(log_psi, {"evolution": residual}, acceleration=False, spring=0.0, **settings)


def minimize(log_psi: LogPsi, c_DD: Tensor, samples: int, steps: int, **settings: float) -> list[tuple[float, float]]:
    """Minimize the energy; return its mean over the samples before each step, and its variance."""
    optimizer, energies = reconfiguration(log_psi, **settings), []
    x_ND = move(log_psi, torch.randn(samples, len(c_DD), dtype=c_DD.dtype), 100)
    for _ in range(steps):
        x_ND = move(log_psi, x_ND, MOVES)
        e_N1 = local_energy(log_psi, x_ND, c_DD)
        energies.append((float(e_N1.mean()), float(e_N1.var())))
        with torch.no_grad():
            log_psi.norm.zero_()
            before_N1 = log_psi(x_ND)
        optimizer.step(evolution=(x_ND, before_N1, e_N1 - e_N1.mean()))
    return energies


def chain(coordinates: int) -> tuple[Tensor, float]:
    """Return C [D, D] of a chain of oscillators, and the exact energy."""
    off_D = torch.full((coordinates - 1,), -COUPLING, dtype=torch.float64)
    c_DD = torch.diag(torch.full((coordinates,), 1 + 2 * COUPLING, dtype=torch.float64))
    c_DD = c_DD + torch.diag(off_D, 1) + torch.diag(off_D, -1)
    return c_DD, float(torch.linalg.eigvalsh(c_DD).sqrt().sum()) / 2


@dataclass(frozen=True)
class Run:
    """The energies of a run: mean and variance before each step."""

    name: str
    energies: Sequence[tuple[float, float]]
    seconds: float

    @property
    def energy(self) -> float:
        """The mean of the last energies."""
        last = self.energies[-TAIL:]
        return sum(energy for energy, _ in last) / len(last)

    @property
    def variance(self) -> float:
        """The mean of the last variances."""
        last = self.energies[-TAIL:]
        return sum(variance for _, variance in last) / len(last)


def adam(log_psi: LogPsi, c_DD: Tensor, samples: int, steps: int, lr: float) -> list[tuple[float, float]]:
    """Minimize the energy with Adam on the same gradient, 2 ⟨(e − E) O⟩; return what `minimize` returns."""
    optimizer, energies = torch.optim.Adam(log_psi.network.parameters(), lr=lr), []
    x_ND = move(log_psi, torch.randn(samples, len(c_DD), dtype=c_DD.dtype), 100)
    for _ in range(steps):
        x_ND = move(log_psi, x_ND, MOVES)
        e_N1 = local_energy(log_psi, x_ND, c_DD)
        energies.append((float(e_N1.mean()), float(e_N1.var())))
        optimizer.zero_grad()
        (2 * (e_N1 - e_N1.mean()) * log_psi(x_ND)).mean().backward()
        optimizer.step()
    return energies


INTRODUCTION = """# Variational Monte Carlo

Stochastic reconfiguration, the natural gradient of a wave function, is a Gauss-Newton step. Here are D coupled
oscillators, H = −½ Δ + ½ xᵀ C x, whose ground state has the energy ½ tr √C. log ψ is a network with a Gaussian
envelope. With the local energy e(x) = (Hψ/ψ)(x), its mean E over samples of |ψ|², and log-derivatives
O(x) = ∂ log ψ(x)/∂θ, a step of stochastic reconfiguration is −η δ with

    (S + α I) δ = ⟨(O − Ō) (e − E)⟩            S = ⟨(O − Ō) (O − Ō)ᵀ⟩

`GaussNewton` takes it on the residuals r(x) = log ψ_θ(x) + s c − log ψ(x) + e(x) − E, in which all but θ and c are
those of the samples before the step. So the samples carry them, as further inputs of the residual. Least squares
then bring ψ to where one step of imaginary time, exp(−(H − E)), would bring it. The number c stands for the norm of
ψ, which is free; fitting it is what takes the mean off the rows O. Of Ō Ōᵀ, S keeps a share α / (s² + α), which is
small beside α I if ‖Ō‖ is beside s = 1000."""
RESULT = """The energy is the mean of the last {tail} steps; the standard error takes the samples of these for
independent. Adam has as many samples and moves, and the same gradient; its learning rate is that of the lowest energy
among {rates}."""
HEADING = ("", "energy", "minus the exact one", "standard error", "variance of e", "seconds")
IMPORTS = """import torch
from torch import Tensor, nn

from tengrad_triton import GaussNewton, derivatives

MOVES = {moves}"""
ADAM_LR = (1e-2, 3e-2, 1e-1)


def draw(path: Path, runs: Sequence[Run], exact: float) -> None:
    """Write a PNG file: the distance to the exact energy, and the variance, by step."""
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        left.plot([abs(energy - exact) for energy, _ in run.energies], label=run.name)
        right.plot([variance for _, variance in run.energies], label=run.name)
    left.set(yscale="log", xlabel="step", ylabel="|E − exact|")
    right.set(yscale="log", xlabel="step", ylabel="variance of e")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend()
    guide.save(figure, path)


def page(runs: Sequence[Run], exact: float, samples: int, steps: int, seed: int) -> list[str]:
    """Return the page's sections."""
    code = [IMPORTS.format(moves=MOVES)]
    code += [inspect.getsource(part).rstrip() for part in (LogPsi, move, local_energy, reconfiguration, minimize)]
    settings = ", ".join(f"{name}={value:g}" for name, value in SETTINGS.items())
    use = f"""c_DD = torch.tensor([[2.0, -0.5], [-0.5, 2.0]], dtype=torch.float64)  # of two oscillators
log_psi = LogPsi(2, {WIDTH}).double()
energies = minimize(log_psi, c_DD, samples=200, steps=20, {settings})
print(energies[-1], torch.linalg.eigvalsh(c_DD).sqrt().sum() / 2)"""
    tail = min(TAIL, steps)
    lines = [
        (
            *(
                run.name,
                f"{run.energy:.6f}",
                f"{run.energy - exact:.1e}",
                f"{(run.variance / samples / tail) ** 0.5:.1e}",
            ),
            *(f"{run.variance:.1e}", f"{run.seconds:.1f}"),
        )
        for run in runs
    ]
    what: dict[str, object] = {
        "oscillators": f"{COORDINATES} in a chain, coupling {COUPLING}; exact energy {exact:.6f}",
        "network": f"{COORDINATES} – {WIDTH} – {WIDTH} – 1, tanh, float64",
        "samples": f"{samples}, {MOVES} Metropolis moves before each step",
        "steps": steps,
        "settings": f"{settings}, no acceleration; otherwise the defaults: the damping α follows the gain ratio",
        "seed": seed,
    }
    return [
        INTRODUCTION, table(HEADING, [("exact", f"{exact:.6f}", "0", "–", "0", "–"), *lines]),
        RESULT.format(tail=tail, rates=", ".join(f"{lr:g}" for lr in ADAM_LR)),
        "![Distance to the exact energy, and variance of the local energy, by step.](vmc.png)",
        "## The program", block("\n\n\n".join(code), "python"), block(use, "python"),
        "## What was run", bullets(what),
    ]  # fmt: skip


def started(seed: int) -> LogPsi:
    """Return the wave function that all runs begin with."""
    torch.manual_seed(seed)
    return LogPsi(COORDINATES, WIDTH).double()


def main(
    *, out: Path = Path("docs/guides"), samples: int = 500, steps: int = 200, seed: int = 0, threads: int = 1
) -> None:
    """Minimize the energy in both ways, and write vmc.md and its figure into the folder `out`.

    Parameters
    ----------
    out
        Folder of the page.
    samples
        Number of samples of a step.
    steps
        Number of steps.
    seed
        Seed of the first weights and of the samples.
    threads
        CPU threads of torch.
    """
    torch.set_num_threads(threads)
    began = time.perf_counter()
    c_DD, exact = chain(COORDINATES)
    energies = minimize(started(seed), c_DD, samples, steps, **SETTINGS)
    runs = [Run("stochastic reconfiguration", energies, time.perf_counter() - began)]
    tried = []
    for lr in ADAM_LR:
        start = time.perf_counter()
        energies = adam(started(seed), c_DD, samples, steps, lr)
        tried.append(Run(f"Adam, lr={lr:g}", energies, time.perf_counter() - start))
    runs.append(min(tried, key=lambda run: run.energy))
    draw(out / "vmc.png", runs, exact)
    command = f"python -m examples.vmc --out docs/guides --samples {samples} --steps {steps} --seed {seed}"
    guide.write(out / "vmc.md", command, page(runs, exact, samples, steps, seed), time.perf_counter() - began)
    print("\n".join(f"{run.name}: {run.energy:.6f}, exact {exact:.6f}" for run in (*runs, *tried)))


if __name__ == "__main__":
    cyclopts.run(main)

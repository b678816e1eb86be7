#!/usr/bin/env bash
# pina-mathlab 0.3.2: NeuralTangentKernelWeighting gives the term with the larger gradient the larger weight. The paper
# that its documentation names (Wang, Yu and Perdikaris, 2022) does the opposite: the trace of the whole kernel over the
# trace of the term's own block. No kernel is formed; the weights are each term's share of the norms of the gradients.
#
# Seen with torch 2.13.0, Python 3.11, on Linux x86-64 without a GPU, -u'' = 4 pi^2 sin(2 pi x), u(0) = 0, alpha=0,
# first epoch, and again with the equation times 10:
#
#     pina-mathlab 0.3.2
#     norms of the terms' gradients: inside / left 15, with the equation times 10 1.5e+03
#     weights of the paper: inside / left 0.11, with the equation times 10 0.0011
#     NeuralTangentKernelWeighting: inside / left 15, with the equation times 10 1.5e+03
#     SelfAdaptiveWeighting: inside / left 0.068, with the equation times 10 0.00068
#
# The paper's weights balance such a factor exactly; these multiply it once more, so that the equation times 10 counts
# 10^4 times as much and not as before. SelfAdaptiveWeighting, which divides by the norm, falls as it should. Version
# 0.3.2 has the norms themselves right (earlier ones accumulated them: PINA-org/PINA, issue 718).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.3.5 pina-mathlab==0.3.2
cat > "$folder/check.py" <<'PYTHON'
import logging
import math
from importlib.metadata import version

import torch
from pina import Condition, Trainer
from pina.domain import CartesianDomain
from pina.equation import Equation, FixedValue
from pina.operator import laplacian
from pina.problem import SpatialProblem
from pina.solver import PINN
from pina.weighting import NeuralTangentKernelWeighting, SelfAdaptiveWeighting
from torch import nn

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
print("pina-mathlab", version("pina-mathlab"))
grid = torch.linspace(0, 1, 64)[:, None]


def poisson(factor):
    def equation(points, u):
        source = (2 * math.pi) ** 2 * torch.sin(2 * math.pi * points.extract(["x"]))
        return factor * (laplacian(u, points, components=["u"], d=["x"]) + source)

    class Poisson(SpatialProblem):
        output_variables = ["u"]
        spatial_domain = CartesianDomain({"x": [0, 1]})
        domains = {"inside": spatial_domain, "left": CartesianDomain({"x": 0.0})}
        conditions = {
            "inside": Condition(domain="inside", equation=Equation(equation)),
            "left": Condition(domain="left", equation=FixedValue(0.0)),
        }

    problem = Poisson()
    problem.discretise_domain(64, "grid", domains="inside")
    problem.discretise_domain(1, "random", domains="left")
    return problem


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1))


def weights_of(weighting, factor):
    quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    solver = PINN(poisson(factor), network(), weighting=weighting)
    Trainer(solver, max_epochs=1, accelerator="cpu", **quiet).train()
    return {name: float(weight) for name, weight in weighting.last_saved_weights().items()}


def residuals(model, factor):
    """The equation at every point of the grid, and u(0)."""
    x = grid.clone().requires_grad_()
    u = model(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return {"inside": factor * (second + (2 * math.pi) ** 2 * torch.sin(2 * math.pi * x))[:, 0], "left": u[:1, 0]}


def squared_norm(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
    return sum(g.square().sum() for g in gradients if g is not None).item()


def line(title, by_factor):
    ratios = [by_factor[factor]["inside"] / by_factor[factor]["left"] for factor in (1, 10)]
    print(f"{title}: inside / left {ratios[0]:.2g}, with the equation times 10 {ratios[1]:.2g}")
    return ratios[1] / ratios[0]


norms, paper, pina, adaptive = {}, {}, {}, {}
for factor in (1, 10):
    model = network()
    terms = residuals(model, factor)
    norms[factor] = {name: math.sqrt(squared_norm(r.square().mean(), model)) for name, r in terms.items()}
    traces = {name: sum(squared_norm(entry, model) for entry in r) for name, r in terms.items()}
    paper[factor] = {name: sum(traces.values()) / trace for name, trace in traces.items()}
    pina[factor] = weights_of(NeuralTangentKernelWeighting(alpha=0.0), factor)
    adaptive[factor] = weights_of(SelfAdaptiveWeighting(), factor)
line("norms of the terms' gradients", norms)
growth = [
    line("weights of the paper", paper),
    line("NeuralTangentKernelWeighting", pina),
    line("SelfAdaptiveWeighting", adaptive),
]
assert all(math.isclose(a, b, rel_tol=1e-2) for a, b in zip(growth, (0.01, 100, 0.01)))
for factor in (1, 10):
    total = sum(norms[factor].values())
    assert all(math.isclose(pina[factor][name], norm / total, rel_tol=1e-3) for name, norm in norms[factor].items())
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py" 2>/dev/null
echo "as described"

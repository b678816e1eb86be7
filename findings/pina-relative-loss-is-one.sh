#!/usr/bin/env bash
# pina-mathlab 0.3.2: LpLoss(relative=True) and PowerLoss(relative=True) as a solver's loss are 1 whatever the network
# says, so nothing is learned: the weights move by rounding errors only.
#
# Seen with torch 2.13.0, Python 3.11, on Linux x86-64 without a GPU, SupervisedSolver, 300 epochs of Adam, a curve of
# two outputs, the relative error of the network before and after:
#
#     pina-mathlab 0.3.2
#     LpLoss(relative=False): error 1.2e+00, then 2e-01
#     LpLoss(relative=True): error 1.2e+00, then 1e+00; logged loss 1.000000, largest gradient below 1e-6
#     PowerLoss(relative=False): error 1.2e+00, then 2e-01
#     PowerLoss(relative=True): error 1.2e+00, then 1e+00; logged loss 1.000000, largest gradient below 1e-6
#
# The solver hands the loss the residual, prediction - target, and zeros for a target; a relative loss divides by the
# size of its first argument, which is the residual itself. A relative L2 loss is the usual one for neural operators.
# The same class outside a solver, called with the target first, is the relative error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.3.5 pina-mathlab==0.3.2
cat > "$folder/check.py" <<'PYTHON'
import logging
from importlib.metadata import version

import torch
from pina import Condition, Trainer
from pina.loss import LpLoss, PowerLoss
from pina.problem import BaseProblem
from pina.solver import SupervisedSolver
from torch import nn

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
print("pina-mathlab", version("pina-mathlab"))
x = torch.linspace(0, 1, 50)[:, None]
y = torch.cat([torch.sin(3 * x), torch.cos(3 * x)], 1) + 2


class Curve(BaseProblem):
    input_variables, output_variables = ["x"], ["a", "b"]
    conditions = {"data": Condition(input=x, target=y)}


def train(loss):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 2))

    def error():
        with torch.no_grad():
            return ((network(x) - y).norm() / y.norm()).item()

    before = error()
    quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = Trainer(
        SupervisedSolver(Curve(), network, loss=loss, use_lt=False), max_epochs=300, accelerator="cpu", **quiet
    )
    trainer.train()
    gradient = max(p.grad.abs().max().item() for p in network.parameters())
    return before, error(), trainer.callback_metrics["train_loss"].item(), gradient


for kind in (LpLoss, PowerLoss):
    assert kind(relative=True)(y, torch.zeros_like(y)) == 1 and 0 < kind(relative=True)(y, 1.1 * y) < 0.11
    before, after, _, _ = train(kind(relative=False))
    print(f"{kind.__name__}(relative=False): error {before:.1e}, then {after:.0e}")
    assert after < before / 2
    before, after, logged, gradient = train(kind(relative=True))
    small = f"largest gradient {'below 1e-6' if gradient < 1e-6 else gradient}"
    print(f"{kind.__name__}(relative=True): error {before:.1e}, then {after:.0e}; logged loss {logged:.6f}, {small}")
    assert abs(after / before - 1) < 0.1 and abs(logged - 1) < 1e-6 and gradient < 1e-6
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py" 2>/dev/null
echo "as described"

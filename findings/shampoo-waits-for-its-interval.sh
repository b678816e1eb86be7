#!/usr/bin/env bash
# pytorch-optimizer 4.1.0: Shampoo with preconditioning_compute_steps=k leaves the parameters as they are in its first
# k - 1 steps, and with momentum it overwrites the caller's gradients.
#
# Seen with torch 2.13.0, Python 3.11, on Linux x86-64 without a GPU, k = 4:
#
#     pytorch-optimizer 4.1.0
#     no momentum: the steps 1 2 3 move nothing, the steps 4 5 6 do; .grad is kept in 6 of 6 steps
#     momentum 0.9: the steps 1 2 3 move nothing, the steps 4 5 6 do; .grad is kept in 1 of 6 steps
#
# The inverse roots begin as zeros and are first computed at step k, so earlier updates are zero. A comparison that
# gives Shampoo a long interval gives it a late start: with k = 100, an epoch of 100 batches trains for one step. With
# momentum, `.grad` is blended in place with the last preconditioned update: a norm of the gradient that is logged after
# the step is another number. Neither shows with the defaults, k = 1 and no momentum.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.3.5 pytorch-optimizer==4.1.0
cat > "$folder/check.py" <<'PYTHON'
from importlib.metadata import version

import torch
from pytorch_optimizer import Shampoo

print("pytorch-optimizer", version("pytorch-optimizer"))
x, y = torch.randn(8, 4, generator=torch.manual_seed(0)), torch.ones(8, 3)
for title, settings in {"no momentum": {}, "momentum 0.9": {"momentum": 0.9}}.items():
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = Shampoo([weight], lr=0.1, preconditioning_compute_steps=4, **settings)
    still, moved, kept = [], [], 0
    for step in range(1, 7):
        optimizer.zero_grad()
        ((x @ weight.mT - y) ** 2).mean().backward()
        weight_before, grad_before = weight.detach().clone(), weight.grad.clone()
        optimizer.step()
        (still if torch.equal(weight, weight_before) else moved).append(str(step))
        kept += torch.equal(weight.grad, grad_before)
    print(f"{title}: the steps {' '.join(still)} move nothing, the steps {' '.join(moved)} do; .grad is kept in {kept} of 6 steps")
PYTHON
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null | tee "$folder/output"
diff "$folder/output" - <<'OUTPUT'
pytorch-optimizer 4.1.0
no momentum: the steps 1 2 3 move nothing, the steps 4 5 6 do; .grad is kept in 6 of 6 steps
momentum 0.9: the steps 1 2 3 move nothing, the steps 4 5 6 do; .grad is kept in 1 of 6 steps
OUTPUT
echo "as described"

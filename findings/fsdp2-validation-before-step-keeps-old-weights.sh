#!/usr/bin/env bash
# torch 2.13.0: after fully_shard (FSDP2), a validation forward between backward and optimizer.step() leaves the root's
# parameters whole, and the next training forward uses these: it does not see the step. Gradients are then those of
# weights one step old, without an error or a warning.
#
# Seen with Python 3.11, on Linux x86-64 without a GPU, one gloo process, SGD on a linear layer under fully_shard:
#
#     torch 2.13.0
#     whole model                      losses 0.3066 0.1365 0.0800 0.0575
#     whole model, validation          losses 0.3066 0.1365 0.0800 0.0575
#     fully_shard                      losses 0.3066 0.1365 0.0800 0.0575
#     fully_shard, validation          losses 0.3066 0.3066 0.1365 0.0628
#     with model.reshard() after it    losses 0.3066 0.1365 0.0800 0.0575
#     warnings: 0
#
# The root keeps whole parameters after a forward, because a backward would gather them at once. A backward frees them;
# a forward without one does not, and the step changes the parts only. Validation after the step is safe.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/check.py" <<'PYTHON'
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


def losses(is_sharded, validates, frees=False):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(8, 4)
    if is_sharded:
        fully_shard(model)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if validates:
            with torch.no_grad():
                model(x)
            if frees:
                model.reshard()
        optimizer.step()
        found.append(f"{loss.item():.4f}")
    return " ".join(found)


print("torch", torch.__version__.partition("+")[0])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = {
        "whole model": losses(False, False),
        "whole model, validation": losses(False, True),
        "fully_shard": losses(True, False),
        "fully_shard, validation": losses(True, True),
        "with model.reshard() after it": losses(True, True, True),
    }
for name, one in found.items():
    print(f"{name:32} losses {one}")
about = [one for one in caught if "stale" in str(one.message) or "reshard" in str(one.message)]
print("warnings:", len(about))
right, old = found["whole model"], found.pop("fully_shard, validation")
assert set(found.values()) == {right} and old != right and old.split()[0] == old.split()[1], "it has changed"
assert not about, "it warns by now"
dist.destroy_process_group()
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/check.py"

#!/usr/bin/env bash
# torch 2.13.0: after fully_shard (FSDP2), where one rank uses a parameter that another rank does not, the gradients of
# two different parameters are added up. Nothing is said: the one gets their mean, and the other none on that rank.
#
# Seen with Python 3.11, on Linux x86-64 without a GPU, two gloo processes, a body and two heads of one shape, of which
# each rank calls one, in one fully_shard:
#
#     torch 2.13.0
#     gradient of body: right
#     gradient of head a: differs; it is the mean of both heads' gradients
#     gradient of head b: None on rank 0
#     with set_reduce_scatter_unused_params(True): body right, a right, b right; warnings: 0
#
# The gradients of a group are packed into one buffer, in the order of those parameters that have one, and
# reduce-scattered: equal sizes of different parameters meet. DistributedDataParallel has find_unused_parameters for
# this, and raises without it. The default of the switch that helps is off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/check.py" <<'PYTHON'
import copy
import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x, first):
        return (self.a if first else self.b)(self.body(x))


def gradients(model, rank, batches):
    model(batches[rank], rank == 0).square().sum().backward()
    return {n: None if p.grad is None else p.grad.full_tensor() for n, p in model.named_parameters()}


def work(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    alone, batches = TwoHeads(), torch.randn(2, 3, 2)
    models = copy.deepcopy(alone), copy.deepcopy(alone)
    for first, x in zip((True, False), batches, strict=True):
        alone(x, first).square().sum().backward()
    right = {n: p.grad / 2 for n, p in alone.named_parameters()}  # fully_shard takes the mean over the ranks

    def said(found, name):
        grad = found[name]
        return "None" if grad is None else "right" if torch.allclose(grad, right[name]) else "differs"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradients(fully_shard(models[0]), rank, batches)
        model = fully_shard(models[1])
        model.set_reduce_scatter_unused_params(True)
        reduced = gradients(model, rank, batches)
    if rank == 0:
        print("gradient of body:", said(found, "body.weight"))
        both = torch.allclose(found["a.weight"], right["a.weight"] + right["b.weight"])
        print("gradient of head a:", said(found, "a.weight") + ("; it is the mean of both heads' gradients" if both else ""))
        print(f"gradient of head b: {said(found, 'b.weight')} on rank 0")
        line = ", ".join(f"{n} {said(reduced, f'{n}.weight')}" for n in ("body", "a", "b"))
        about = [w for w in caught if "grad" in str(w.message).lower()]
        print(f"with set_reduce_scatter_unused_params(True): {line}; warnings: {len(about)}")
        assert both and found["b.weight"] is None and "differs" not in line and "None" not in line, "it has changed"
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__.partition("+")[0])
    mp.spawn(work, (sys.argv[1],), 2)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/check.py" "$folder/store"

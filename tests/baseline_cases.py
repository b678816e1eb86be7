"""The baselines by name, and their steps, which take closures."""

import torch.nn.functional as F
from small_conv import batch

from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC

# Each optimizer, with settings that make every schedule of its own fall into an interval.
BASELINES = {
    "kfac": (KFAC, {"factors_every": 2}),
    "ekfac": (EKFAC, {"rescale_every": 2, "factors_every": 2}),
    "kbfgs": (KBFGS, {}),
    "kbfgsl": (KBFGSL, {"memory": 2}),
}


def closure_of(model, optimizer, x, y, sign=1):
    def closure():
        optimizer.zero_grad()
        loss = sign * F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return closure


def take_steps(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.step(closure_of(model, optimizer, *batch(step)))

"""The dense solve for models, losses and Fishers that were composed at random.

The rows of a forward are one backward pass a sample through the graph of a forward of a copy, with the derivatives with
respect to the outputs of all other samples set to zero. Batch norms that a rule covers have constant statistics.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

DAMPING, TOLERANCE = 0.1, 1e-9
MOST = 1e5  # of ‖F‖ / α: beyond it, two ways to solve differ by more than the tolerance
LOSSES = {
    "categorical": F.cross_entropy,
    "gaussian": F.mse_loss,
    "bernoulli": F.binary_cross_entropy_with_logits,
}


class InvalidModelError(Exception):
    """The model itself cannot do this, without any optimizer."""


def selected(plan, output):
    """Return what the likelihood sees."""
    if plan.model.output == "dictionary":
        return output["logits"]
    if plan.model.output == "beside a scalar":
        return output[1]
    return output[0] if plan.model.output == "first of two" else output


def total_of(plan, output):
    """Return the sum of what the model returned, to be differentiated for a diagnosis."""
    return sum(x.sum() for x in output) if plan.model.output == "sum of two" else selected(plan, output).sum()


def loss_of(plan, output, target):
    loss = LOSSES[plan.likelihood]
    if plan.model.output == "sum of two":
        return loss(output[0], target) + loss(output[1], target)
    return loss(selected(plan, output), target)


def constant_statistics(norm, x):
    """Compute a batch norm with statistics that are constants of the derivative."""
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.detach(), dims, correction=0)
    y = (x - mean.view(1, -1, 1)) * (var.view(1, -1, 1) + norm.eps).rsqrt()
    return y * norm.weight.view(1, -1, 1) + norm.bias.view(1, -1, 1)


class Oracle:
    """The rows of one refresh after the other, and F from them."""

    def __init__(self, plan):
        self.plan, self.rows, self.fishers = plan, [], {}

    def add(self, twin, x, target, likelihood, scale):
        """Add the rows of one forward, which the twin repeats; ``scale`` makes the loss the samples' own."""
        output = self.forward(twin, x)
        outputs = output if self.plan.model.output == "sum of two" else [selected(self.plan, output)]
        outputs = [x for x in outputs if x.requires_grad]  # all of it may be frozen
        params = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        for row in self.output_grads(output, outputs, target, likelihood, scale):
            for n in range(len(x)):
                grads = torch.autograd.grad(
                    outputs, list(params.values()), [only(n, c) for c in row],
                    retain_graph=True, allow_unused=True, materialize_grads=True,
                )  # fmt: skip
                self.rows.append(dict(zip(params, grads, strict=True)))

    def forward(self, twin, x):
        for m in twin.modules():
            if type(m) is nn.BatchNorm1d:
                mixes = m.training or m.running_mean is None
                m.forward = partial(constant_statistics if mixes else nn.BatchNorm1d.forward, m)
        return twin(x)

    def output_grads(self, output, outputs, target, likelihood, scale):
        """Return, for each row of a sample, derivatives with respect to ``outputs``."""
        if self.plan.fisher == "empirical":
            loss = loss_of(self.plan, output, target) * scale
            return [torch.autograd.grad(loss, outputs, retain_graph=True)]
        own = outputs[0].detach().requires_grad_()
        if self.plan.fisher == "exact":
            factor = likelihood.hessian_factor(own.detach())
            return [[s * len(factor) ** 0.5] for s in factor]
        return [torch.autograd.grad(likelihood.nll(own, likelihood.target), own)]

    def refresh(self, blocks, covered):
        """Compute F of each block's parameters that have rows."""
        self.fishers = {}
        for names in (tuple(name for name in block if name in covered) for block in blocks):
            if names:
                j_NK = torch.stack([torch.cat([row[name].flatten() for name in names]) for row in self.rows])
                self.fishers[names] = j_NK.mT @ j_NK / len(j_NK)
                if self.fishers[names].norm() > MOST * DAMPING:
                    raise InvalidModelError("ill-conditioned")

    def change(self, grads):
        """Return how much each parameter with a gradient changes, by its name."""
        change = dict(grads["present"])
        for names, fisher in self.fishers.items():
            v_K = torch.cat([grads["all"][name].flatten() for name in names])
            solved = torch.linalg.solve(fisher + DAMPING * torch.eye(len(v_K)).to(v_K), v_K)
            parts = solved.split([grads["all"][name].numel() for name in names])
            change |= {name: d.view_as(grads["all"][name]) for name, d in zip(names, parts, strict=True)}
        return {name: change[name] for name in grads["present"]}


def only(n, cotangent):
    masked = torch.zeros_like(cotangent)
    masked[n] = cotangent[n]
    return masked


def close(actual, expected):
    """Whether two dictionaries of tensors agree."""
    size = sum(value.square().sum() for value in expected.values()) ** 0.5
    off = sum((actual[name] - expected[name]).square().sum() for name in expected) ** 0.5
    return bool(off <= TOLERANCE * size + 1e-13)


def count(module, args, output):
    module.seen += 1


def synchronize(copied, model):
    """Give a copy all that has changed since it was made; a new copy would take longer."""
    with torch.no_grad():
        for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad).copy_(theirs)
        for ours, theirs in zip(copied.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
    for ours, theirs in zip(copied.modules(), model.modules(), strict=True):
        ours.training = theirs.training
    copied.forwards, copied.pieces[0].seen = model.forwards, model.pieces[0].seen
    return copied

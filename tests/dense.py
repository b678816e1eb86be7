"""The oracle: the paper's step with dense Fisher blocks from the gradients of one sample at a time, in float64."""

import re
from contextlib import contextmanager

import torch
from torch.nn.modules.batchnorm import _BatchNorm


class Recording:
    """A likelihood that remembers the labels it drew."""

    def __init__(self, likelihood):
        self.likelihood, self.target = likelihood, None

    def sample(self, output, generator):
        self.target = self.likelihood.sample(output, generator)
        return self.target

    def nll(self, output, target):
        return self.likelihood.nll(output, target)


def sample_gradients(model, x, target, nll):
    """Return {name: [N, *shape]}: the gradient of each sample's own loss."""
    rows, params = [], dict(model.named_parameters())
    with batch_statistics(model, x):
        for n in range(len(x)):
            loss = nll(model(x[n : n + 1]), target[n : n + 1])
            grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True, allow_unused=True)
            rows.append(dict(zip(params, grads, strict=True)))
    return {name: torch.stack([row[name] for row in rows]) for name in params}


@contextmanager
def batch_statistics(model, x):
    """Have batch norms that use a batch's statistics use, as constants, those of a forward of ``x``."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)]
    kept = [(m.running_mean, m.running_var, m.training) for m in norms]
    seen = {}

    def note(module, args):
        seen[module] = torch.var_mean(args[0], [d for d in range(args[0].dim()) if d != 1], correction=0)

    hooks = [m.register_forward_pre_hook(note) for m in norms]
    with torch.no_grad():
        copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(x)
        for name, buffer in model.named_buffers():
            buffer.copy_(copies[name])
    for hook in hooks:
        hook.remove()
    for m in norms:
        (m.running_var, m.running_mean), m.training = seen[m], False
    yield
    for m, before in zip(norms, kept, strict=True):
        m.running_mean, m.running_var, m.training = before


class DenseNGD:
    """The update of the paper on every block of parameters, with (F + α I) solved densely.

    ``lr`` is one number, or one for each parameter by name. With ``trust_region`` κ all natural gradients d are scaled
    by min(1, (κ / Σ δᵀ (F + α I) δ)^½), where the sum runs over all blocks and δ is d times each parameter's lr.
    """

    def __init__(self, model, blocks, *, lr, damping, momentum, weight_decay, trust_region=None):
        self.model, self.blocks = model, blocks
        self.damping, self.momentum, self.weight_decay = damping, momentum, weight_decay
        self.lr = lr if isinstance(lr, dict) else {name: lr for name, _ in model.named_parameters()}
        self.trust_region = trust_region
        self.buffers = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.fisher = {}

    def refresh(self, gradients):
        for block in self.blocks:
            j_NK = torch.cat([gradients[name].flatten(1) for name in block], 1)
            self.fisher[tuple(block)] = j_NK.mT @ j_NK / len(j_NK)

    def natural(self, block, grads):
        v_K = torch.cat([grads[name].flatten() for name in block])
        fisher = self.fisher[tuple(block)]
        solved = torch.linalg.solve(fisher + self.damping * torch.eye(len(v_K), dtype=v_K.dtype), v_K)
        return dict(zip(block, solved.split([grads[name].numel() for name in block]), strict=True))

    def scale(self, naturals):
        if self.trust_region is None:
            return 1.0
        steps = [torch.cat([self.lr[name] * naturals[name] for name in block]) for block in self.blocks]
        fishers = [self.fisher[tuple(block)] for block in self.blocks]
        norm = sum(s @ fisher @ s + self.damping * s @ s for s, fisher in zip(steps, fishers, strict=True))
        return min(1.0, (self.trust_region / norm).sqrt().item())

    @torch.no_grad()
    def step(self, grads):
        params = dict(self.model.named_parameters())
        naturals = {name: d for block in self.blocks for name, d in self.natural(block, grads).items()}
        scale = self.scale(naturals)
        for name, natural in naturals.items():
            direction = scale * natural.view_as(params[name]) + self.weight_decay * params[name]
            self.buffers[name].mul_(self.momentum).add_(direction)
            params[name].sub_(self.lr[name] * self.buffers[name])


def blocks_of(model):
    """Return the parameters' names, grouped by the module that owns them."""
    groups = {}
    for name, _ in model.named_parameters():
        groups.setdefault(re.sub(r"(\.parametrizations\..*|\.[^.]*)$", "", f".{name}"), []).append(name)
    return list(groups.values())


def relative_error(actual, expected):
    """Return ‖actual − expected‖ / ‖expected‖ over dictionaries of tensors."""
    difference = sum((actual[name] - expected[name]).square().sum() for name in expected)
    return (difference / sum(value.square().sum() for value in expected.values())).sqrt().item()

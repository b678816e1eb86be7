"""The oracle: the paper's step with dense Fisher blocks from `torch.func` per-sample gradients, in float64."""

import torch
from torch.func import functional_call, grad, vmap


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
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, x, target):
        return nll(functional_call(model, params, (x[None],)), target[None])

    return vmap(grad(loss), in_dims=(None, 0, 0), randomness="error")(params, x, target)


class DenseNGD:
    """The update of the paper on every block of parameters, with (F + α I) solved densely."""

    def __init__(self, model, blocks, *, lr, damping, momentum, weight_decay):
        self.model, self.blocks = model, blocks
        self.lr, self.damping, self.momentum, self.weight_decay = lr, damping, momentum, weight_decay
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

    @torch.no_grad()
    def step(self, grads):
        params = dict(self.model.named_parameters())
        for block in self.blocks:
            for name, natural in self.natural(block, grads).items():
                direction = natural.view_as(params[name]) + self.weight_decay * params[name]
                self.buffers[name].mul_(self.momentum).add_(direction)
                params[name].sub_(self.lr * self.buffers[name])


def blocks_of(model):
    """Return the parameters' names, grouped by the module that owns them."""
    groups = {}
    for name, _ in model.named_parameters():
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return list(groups.values())


def relative_error(actual, expected):
    """Return ‖actual − expected‖ / ‖expected‖ over dictionaries of tensors."""
    difference = sum((actual[name] - expected[name]).square().sum() for name in expected)
    return (difference / sum(value.square().sum() for value in expected.values())).sqrt().item()

"""One step of a small model, and the dense computations to compare it with."""

import copy

import dense
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap

from tengrad_triton import Bernoulli, Categorical, Gaussian, TENGraD

TOLERANCE = 1e-9
N, LR, DAMPING = 6, 0.05, 0.03
PLAIN = {"relative_damping": False, "scaling": "none", "nesterov": False}  # as the formulas of the tests have it
LIKELIHOODS = {"categorical": Categorical(), "gaussian": Gaussian(), "bernoulli": Bernoulli()}
LOSSES = {
    "categorical": F.cross_entropy,
    "gaussian": F.mse_loss,
    "bernoulli": F.binary_cross_entropy_with_logits,
}


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    ).double()


def batch(step, likelihood="categorical", n=N):
    generator = torch.Generator().manual_seed(10 + step)
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (n,), generator=generator)
    return x, labels if likelihood == "categorical" else F.one_hot(labels, 3).double()


def gradients(model, x, y, loss):
    model.zero_grad()
    loss(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def gauss_newton_rows(model, x, loss):
    """Return {name: [N C, K]}: rows whose mean square is F, from the outputs' Jacobian and the loss's Hessian."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    outputs = vmap(lambda params, x: functional_call(model, params, (x[None],))[0], in_dims=(None, 0))(params, x)
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(params)  # [N, C, *shape]

    def own(output):
        targets = torch.zeros((), dtype=torch.long) if loss is F.cross_entropy else torch.full_like(output, 0.5)
        return loss(output[None], targets[None])

    h_NCC = vmap(hessian(own))(outputs.detach())
    root = torch.linalg.eigh(h_NCC)
    s_NCR = root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt()[:, None]
    classes = s_NCR.shape[-1]
    scale = classes**0.5
    return {
        name: scale * torch.einsum("ncr,nck->nrk", s_NCR, j.flatten(2)).flatten(0, 1) for name, j in jacobian.items()
    }


def drawn_rows(model, x, targets, nll):
    """Return the rows of several draws, one after the other."""
    parts = [dense.sample_gradients(model, x, target, nll) for target in targets]
    return {name: torch.cat([part[name].flatten(1) for part in parts]) for name in parts[0]}


def natural(rows, grads, blocks, damping=DAMPING):
    """Return (F + α I)⁻¹ V for every block, densely."""
    found = {}
    for block in blocks:
        j = torch.cat([rows[name] for name in block], 1)
        v = torch.cat([grads[name].flatten() for name in block])
        fisher = j.mT @ j / len(j)
        solved = torch.linalg.solve(fisher + damping * torch.eye(len(v), dtype=v.dtype), v)
        pieces = solved.split([grads[name].numel() for name in block])
        found |= {name: piece.view_as(grads[name]) for name, piece in zip(block, pieces, strict=True)}
    return found


class Recording:
    """Remembers every draw."""

    def __init__(self, likelihood):
        self.likelihood, self.targets = likelihood, []

    def sample(self, output, generator):
        self.targets.append(self.likelihood.sample(output, generator))
        return self.targets[-1]

    def nll(self, output, target):
        return self.likelihood.nll(output, target)


def one_step(likelihood="categorical", **options):
    """Return the direction that one step took, the oracle's model from before it, the gradients and the optimizer."""
    model = small_model()
    before = copy.deepcopy(model)
    optimizer = TENGraD(model, lr=LR, damping=DAMPING, momentum=0.0, **{"likelihood": likelihood, **PLAIN, **options})
    x, y = batch(0, likelihood if isinstance(likelihood, str) else "categorical")
    loss = LOSSES[likelihood] if isinstance(likelihood, str) else F.cross_entropy
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
    taken = {
        name: (old - new) / LR for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    return taken, before, gradients(before, x, y, loss), optimizer, x


NETWORK = [["0.weight", "0.bias", "3.weight", "3.bias", "5.weight", "5.bias"]]
LAYERS = [NETWORK[0][:2], NETWORK[0][2:4], NETWORK[0][4:]]
BLOCKS = {
    "layer": LAYERS,
    "network": NETWORK,
    "lists": [NETWORK[0][:4], NETWORK[0][4:]],
}
CHOICES = {"layer": "layer", "network": "network", "lists": [["0", "3"]]}

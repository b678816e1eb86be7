"""Models and settings whose state is saved and loaded, the ways to do so, and plain training steps."""

import io
import tempfile

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from tengrad_triton import TENGraD


class Tied(nn.Module):
    """Tokens, a weight of two modules, norms, dropout, and a parameter without a module of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.drop = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Dropout(0.3)
        self.mean, self.out = nn.BatchNorm1d(4), nn.Linear(4, 9)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        tokens = self.embed((3 * x).long() % 9)
        return self.out(self.drop(self.mean(self.norm(tokens).sum(1))) * self.scale)


def embedding():
    return nn.Sequential(Tokens(), nn.Embedding(9, 3), nn.Flatten(), nn.Linear(24, 5))


class Tokens(nn.Module):
    def forward(self, x):
        return (8 * x).long()


def convolution():
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(12, 5)),
    )


def perceptron():
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5))


def frozen():
    model = perceptron()
    model[0].requires_grad_(False)
    return model


def two_groups(model):
    parts = [[p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False)]
    return [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1], "lr": 0.01}]


def damping(step):
    return 0.1 / (1 + step)


# The model and the optimizer's settings; all refresh at every fourth step, so that a pause after six is within.
CASES = {
    "convolutions": (convolution, {}),
    "tied": (Tied, {}),
    "embedding": (embedding, {}),
    "empirical convolutions": (convolution, {"fisher": "empirical"}),
    "empirical, tied": (Tied, {"fisher": "empirical"}),
    "exact convolutions": (convolution, {"fisher": "exact"}),
    "exact, tied": (Tied, {"fisher": "exact"}),
    "factored": (convolution, {"representation": "factored"}),
    "factored, tied": (Tied, {"representation": "factored", "scaling": "diagonal"}),
    "per_sample": (convolution, {"representation": "per_sample"}),
    "bfloat16": (perceptron, {"representation": "per_sample_bf16"}),
    "compressed": (perceptron, {"representation": "compressed", "scaling": "none"}),
    "one block, few rows": (convolution, {"blocks": "network", "fisher_rows": 4}),
    "lists of blocks": (perceptron, {"blocks": [["0", "2"], ["4"]], "relative_damping": True}),
    "history": (Tied, {"history": 2, "fisher_samples": 2}),
    "SPRING": (perceptron, {"spring": 0.9, "momentum": 0.0}),
    "groups": (convolution, {"params": two_groups}),
    "schedules": (perceptron, {"damping": damping, "lr": torch.tensor(0.02)}),
    "frozen": (frozen, {}),
}


def made(case, seed=0, **changes):
    """Return a model and its optimizer; another ``seed`` makes other weights and other random numbers."""
    model_of, settings = CASES[case]
    torch.manual_seed(seed)
    model = model_of()
    settings = {"refresh_every": 4, "seed": seed, **settings, **changes}
    params = settings.pop("params", lambda model: None)(model)
    return model, TENGraD(model, params, **settings)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(7, 8, generator=generator), torch.randint(5, (7,), generator=generator)


def backward(model, optimizer, step):
    torch.manual_seed(step)  # dropout's
    x, y = batch(step)
    if optimizer is not None:
        optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model, optimizer, first, last):
    for step in range(first, last):
        backward(model, optimizer, step)
        optimizer.step()


# -- ways to save and load -----------------------------------------------------------------------------------------


def in_memory(state, fresh):
    return state


def by_file(state, fresh):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_dcp(state, fresh):
    """Load into the state of a new optimizer, which has names and sizes."""
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        into = fresh()
        dcp.load(into, checkpoint_id=folder, no_dist=True)
    return into


def of_torch(through, **options):
    """Return a way by the functions of `torch.distributed.checkpoint.state_dict`."""
    chosen = StateDictOptions(**options)

    def states(pair):
        return dict(zip(("model", "optimizer"), get_state_dict(*pair, options=chosen), strict=True))

    def resume(old, new):
        state = through(states(old), lambda: states(new))
        own = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(*new, **own, options=chosen)

    return resume


def by_itself(old, new):
    """Have dcp.save and dcp.load call the optimizer's own methods."""
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(dict(zip("mo", old, strict=True)), checkpoint_id=folder, no_dist=True)
        dcp.load(dict(zip("mo", new, strict=True)), checkpoint_id=folder, no_dist=True)


def plainly(old, new):
    for left, right in zip(old, new, strict=True):
        right.load_state_dict(by_file(left.state_dict(), None))


WAYS = {
    "torch.save": plainly,
    "DCP": of_torch(by_dcp),
    "DCP, flat": of_torch(by_dcp, flatten_optimizer_state_dict=True),
    "DCP, full": of_torch(by_dcp, full_state_dict=True),
    "DCP, offloaded": of_torch(by_dcp, cpu_offload=True),
    "DCP of the optimizer": by_itself,
    "memory": of_torch(in_memory),
    "memory, flat": of_torch(in_memory, flatten_optimizer_state_dict=True),
    "memory, without what is frozen": of_torch(in_memory, ignore_frozen_params=True, strict=False),
    "full file": of_torch(by_file, full_state_dict=True, cpu_offload=True),
}

"""Models, batches and loops for the tests of what a compiled step takes: nested batches, and models that change."""

import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD, compile_train_step

SAMPLES, TOKENS, REFRESH = 8, 5, 3


class Mean(nn.Module):
    """The mean of embeddings over tokens that count; takes {"ids", "mask"} or (ids, mask)."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, batch):
        ids, mask = (batch["ids"], batch["mask"]) if isinstance(batch, dict) else batch
        return self.head((self.embedding(ids) * mask[..., None]).sum(1))


class Pair(nn.Module):
    """A convolution of an image and a linear layer of numbers; takes {"parts": [image, (numbers,)], "mode", "bias"}."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(1, 2, 2), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, batch):
        image, (numbers,) = batch["parts"]
        hidden = self.conv(image).flatten(1) + self.fc(numbers)
        hidden = hidden.tanh() if batch["mode"] == "tanh" else hidden.relu()
        return self.head(hidden if batch["bias"] is None else hidden + batch["bias"])


class Scaled(nn.Module):
    """A scale that no rule covers, beside a layer that two inputs share; takes [left, right]."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, batch):
        left, right = batch
        return self.scale * (self.fc(left) - self.fc(right).tanh())


class Normed(nn.Module):
    """Batch norm, whose rows need a second forward; takes {"x": numbers}."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, batch):
        return self.layers(batch["x"])


def _numbers(draw, samples, *shape):
    return torch.randn(samples, *shape, generator=draw, dtype=torch.float64)


def _labels(draw, samples):
    return torch.randint(3, (samples,), generator=draw)


def _tokens(draw, samples):
    ids = torch.randint(20, (samples, TOKENS), generator=draw)
    return ids, torch.ones(samples, TOKENS, dtype=torch.float64)


def _pair(mode="tanh", bias=None):
    def batch(draw, samples):
        parts = [_numbers(draw, samples, 1, 3, 3), (_numbers(draw, samples, 4),)]
        return {"parts": parts, "mode": mode, "bias": bias}

    return batch


def _of_labels(output, y):
    return F.cross_entropy(output, y["labels"]) * y["weight"]


def _of_many(output, y):
    (labels, smooth), weight = y
    return F.cross_entropy(output, labels, label_smoothing=smooth) + 0 * weight.sum()


def _plain(draw, samples):
    return _labels(draw, samples)


def _labelled(draw, samples):
    return {"labels": _labels(draw, samples), "weight": torch.tensor(1.0, dtype=torch.float64)}


def _smoothed(draw, samples):
    return (_labels(draw, samples), 0.0), torch.ones(2)


INPUTS = {
    "a dictionary": (Mean, lambda d, n: dict(zip(("ids", "mask"), _tokens(d, n), strict=True)), _plain),
    "a tuple": (Mean, _tokens, _plain),
    "nested, with a string and None": (Pair, _pair(), _plain),
    "nested, with a number": (Pair, _pair("relu", 0.5), _plain),
    "a list, a parameter without a rule": (Scaled, lambda d, n: [_numbers(d, n, 4) for _ in range(2)], _plain),
    "batch norm": (Normed, lambda d, n: {"x": _numbers(d, n, 4)}, _plain),
    "labels in a dictionary": (Normed, lambda d, n: {"x": _numbers(d, n, 4)}, _labelled),
    "labels in tuples": (Scaled, lambda d, n: tuple(_numbers(d, n, 4) for _ in range(2)), _smoothed),
}
"""For each kind of batch the model, and functions of a generator and the number of samples that return x and y."""
LOSSES = {_plain: F.cross_entropy, _labelled: _of_labels, _smoothed: _of_many}
"""The loss for each function that returns y."""


def batches(x_of, y_of, sizes):
    """Return a batch (x, y) for each of the sizes."""
    draw = torch.Generator().manual_seed(0)
    return [(x_of(draw, size), y_of(draw, size)) for size in sizes]


def small(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, TENGraD(net, refresh_every=REFRESH, seed=0, **options)


def numbers(sizes):
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 8, generator=draw, dtype=torch.float64), torch.randint(3, (size,), generator=draw))
        for size in sizes
    ]


def plain(net, optimizer, loss_fn=F.cross_entropy):
    def step(x, y):
        optimizer.zero_grad()
        loss = loss_fn(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def compiled(net, optimizer, loss_fn=F.cross_entropy, backend="eager"):
    return compile_train_step(net, loss_fn, optimizer, backend=backend)


def assert_same(net, twin):
    for (name, p), q in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-8), name

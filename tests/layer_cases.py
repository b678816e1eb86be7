"""Models and calls for those entries of the table in exact_cases.py that need more than a layer."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm  # noqa: F401  (the table names them)


def first(layer, *inputs, **options):
    """Return the first tensor that a layer returns."""
    return layer(*inputs, **options)[0]


def attend(layer, x, **options):
    """Self-attention on [N, T, E], with the sequence first or not inside the layer."""
    if layer.batch_first:
        return first(layer, x, x, x, **options)
    x = x.transpose(0, 1)
    return first(layer, x, x, x, **options).transpose(0, 1)


def cross(layer, x, **options):
    """Attention whose queries, keys and values come from different parts of the sequence."""
    query, key = x[:, :3], x[:, 2:]
    value = key.flip(1) * 0.5
    key, value = key[..., : layer.kdim], value[..., : layer.vdim]
    return first(layer, query, key, value, **options)


def causal(layer, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
    return attend(layer, x, attn_mask=mask, need_weights=False, is_causal=True)


def padded(layer, x):
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[:, -2:] = True
    return attend(layer, x, key_padding_mask=mask)


def weights_too(layer, x):
    """Outputs and attention weights, so that the loss depends on both."""
    y, weights = layer(x, x, x)
    return torch.cat([y.flatten(1), weights.flatten(1)], 1)


def recurrent(layer, x):
    """Outputs and final states of a recurrent layer."""
    sequence = x if layer.batch_first else x.transpose(0, 1)
    y, last = layer(sequence)
    states = last if isinstance(last, tuple) else (last,)
    y = y if layer.batch_first else y.transpose(0, 1)
    return torch.cat([y.flatten(1), *(state.transpose(0, 1).flatten(1) for state in states)], 1)


def with_state(layer, x):
    """A recurrent layer whose initial state depends on the input."""
    start = F.pad(x[:, 0], (0, layer.hidden_size - 3), value=0.3).expand(layer.num_layers, -1, -1).contiguous()
    return layer(x, start)[0]


def bags(layer, x):
    """Bags of one to three ids, given as one vector and offsets."""
    sizes = 1 + x[:, 0] % 3
    ids = torch.cat([row[:size] for row, size in zip(x, sizes, strict=True)])
    return layer(ids, sizes.cumsum(0) - sizes)


def weighted_bags(layer, x):
    return layer(x, per_sample_weights=(x.double() + 1).sin())


class Pair(nn.Module):
    """A bilinear layer of two slices of the input."""

    def __init__(self, **options):
        super().__init__()
        self.layer = nn.Bilinear(2, 4, 3, **options)

    def forward(self, x):
        return self.layer(x[..., :2], x[..., 2:]).tanh()


class Language(nn.Module):
    """Embedding and head share one table."""

    def __init__(self, vocabulary, entries):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, entries)
        self.mixing = nn.Linear(entries, entries)
        self.head = nn.Linear(entries, vocabulary)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.mixing(self.embedding(ids)).tanh()).mean(1)[:, :3]


class Tied(nn.Module):
    """Two linear layers with one weight and two biases."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())[:, :3]


class Outside(nn.Module):
    """A layer that is called and whose weight is also used without a call."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.linear(self.fc(x).tanh(), self.fc.weight))


class NeverCalled(nn.Module):
    """A layer that is never called, although its parameters are used."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias).sin()


class Positions(nn.Module):
    """Adds a position table, called or indexed directly, to the token embeddings."""

    def __init__(self, tokens, called):
        super().__init__()
        self.embedding, self.position = nn.Embedding(7, 4), nn.Embedding(tokens, 4)
        self.called, self.head = called, nn.Linear(4, 3)

    def forward(self, ids):
        places = torch.arange(ids.shape[1])
        position = self.position(places) if self.called else self.position.weight[places]
        return self.head((self.embedding(ids) + position).tanh().mean(1))


class OwnTable(nn.Module):
    """A table in a module without a rule."""

    def __init__(self, tokens, entries):
        super().__init__()
        self.table = nn.Parameter(torch.randn(tokens, entries))

    def forward(self, places):
        return self.table[places]


class OwnPositions(Positions):
    """The position table is in a module without a rule."""

    def __init__(self, tokens):
        super().__init__(tokens, called=True)
        self.position = OwnTable(tokens, 4)


class Loose(nn.Module):
    """Parameters that the model itself owns, one of them with four dimensions, between layers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3) + 0.5)
        self.kernel = nn.Parameter(torch.randn(2, 1, 3, 2))
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(F.conv2d(x, self.kernel).tanh().flatten(1)) * self.scale


class OwnForward(nn.Linear):
    """A subclass that computes another function than its base class."""

    def forward(self, x):
        return super().forward(x).square()


class Reshapes(nn.Module):
    """Calls a layer with a batch of other things than samples."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(2, 4), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc(x.reshape(-1, 2)).tanh().reshape(len(x), -1))


class SequenceFirst(nn.Module):
    """Has the sequence first between its layers, as nn.Transformer has by default."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.encoder(self.embedding(ids.T)).mean(0))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, **options)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))


def normalized(norm):
    """Layers before and behind a norm: the rows of the first depend on the norm's derivative."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 9, 3))


def used_norm(layer):
    """A norm in evaluation mode, with running statistics unlike those of any batch."""
    generator = torch.Generator().manual_seed(3)
    layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator))
    layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
    return layer.eval()


def normed(norm):
    """A parametrized layer in evaluation mode, in which the parametrization does not change."""
    return lambda: nn.Sequential(norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)).eval()

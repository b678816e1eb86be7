"""The layers that the exactness tests step with. To cover another layer or option, add a row to LAYERS."""

from collections.abc import Callable
from dataclasses import dataclass

import layer_cases as cases
import torch
from torch import nn

SAMPLES, CLASSES = 5, 3
TOLERANCE = 1e-9  # of the parameters after some steps in float64, relative


class Flat(nn.Module):
    """A layer, then a fixed nonlinear readout to ``CLASSES`` logits, so that the layer alone is trained."""

    def __init__(self, layer, *, between=None, calls=1, call=None):
        super().__init__()
        self.layer, self.between, self.calls, self.call = layer, between or nn.Tanh(), calls, call

    def forward(self, x):
        for _ in range(self.calls):
            x = self.between(self.layer(x) if self.call is None else self.call(self.layer, x))
        flat = x.flatten(1)
        return torch.stack(
            [(flat * (k + 1 + torch.arange(flat.shape[1]).to(flat)).sin()).sum(1) for k in range(CLASSES)], 1
        )


@dataclass
class Case:
    """One row: how to make the model, the shape of one sample, and how many ids there are where samples are ids."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ids: int | None = None


def batches(case, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        if case.ids is None:
            x = torch.randn(SAMPLES, *case.shape, generator=generator, dtype=torch.float64)
        else:
            x = torch.randint(case.ids, (SAMPLES, *case.shape), generator=generator)
        yield x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def conv(*args, **kwargs):
    return Case(lambda: Flat(nn.Conv2d(*args, **kwargs)), (args[0], 7, 6))


class Subclass(nn.Linear):
    """Computes what Linear does."""

    def extra_repr(self):
        return "the same"


LAYERS = {
    "linear": Case(lambda: Flat(nn.Linear(4, 3)), (4,)),
    "linear without bias": Case(lambda: Flat(nn.Linear(4, 3, bias=False)), (4,)),
    "linear over tokens": Case(lambda: Flat(nn.Linear(4, 3)), (6, 4)),
    "linear over 2-d positions": Case(lambda: Flat(nn.Linear(4, 3)), (2, 3, 4)),
    "linear over many tokens": Case(lambda: Flat(nn.Linear(3, 2)), (40, 3)),
    "linear, in-place activation": Case(lambda: Flat(nn.Linear(4, 3), between=nn.ReLU(inplace=True)), (4,)),
    "linear over tokens, in-place activation": Case(
        lambda: Flat(nn.Linear(4, 3), between=nn.ReLU(inplace=True)), (6, 4)
    ),
    "linear called twice": Case(lambda: Flat(nn.Linear(4, 4), calls=2), (4,)),
    "linear over tokens called twice": Case(lambda: Flat(nn.Linear(4, 4), calls=2), (6, 4)),
    "subclass of linear": Case(lambda: Flat(Subclass(4, 3)), (4,)),
    "conv": conv(2, 3, 3),
    "conv without bias": conv(2, 3, 3, bias=False),
    "conv, rectangular kernel": conv(2, 3, (3, 2)),
    "conv, stride": conv(2, 3, 3, stride=2),
    "conv, two strides": conv(2, 3, 3, stride=(2, 3)),
    "conv, padding": conv(2, 3, 3, padding=1),
    "conv, two paddings": conv(2, 3, 3, padding=(2, 1)),
    "conv, padding same": conv(2, 3, (2, 3), padding="same"),
    "conv, padding same, dilated": conv(2, 3, 3, padding="same", dilation=(2, 1)),
    "conv, padding valid": conv(2, 3, 3, padding="valid"),
    "conv, reflect": conv(2, 3, 3, padding=1, padding_mode="reflect"),
    "conv, replicate": conv(2, 3, 3, padding=(2, 1), padding_mode="replicate"),
    "conv, circular": conv(2, 3, 3, padding=1, padding_mode="circular"),
    "conv, circular same": conv(2, 3, 3, padding="same", padding_mode="circular"),
    "conv, dilation": conv(2, 3, 2, dilation=2),
    "conv, two dilations and strides": conv(2, 3, 2, dilation=(2, 3), stride=(1, 2), padding=1),
    "conv, groups": conv(4, 6, 3, groups=2),
    "conv, depthwise": conv(4, 4, 3, groups=4, padding=1),
    "conv, depthwise with multiplier": conv(3, 6, 3, groups=3, stride=2),
    "conv, pointwise": conv(4, 3, 1),
    "conv, fewer positions than channels": Case(lambda: Flat(nn.Conv2d(6, 2, 3)), (6, 4, 4)),
    "conv, fewer positions than channels, every option": Case(
        lambda: Flat(nn.Conv2d(16, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)), (16, 5, 4)
    ),
    "conv, many positions": Case(lambda: Flat(nn.Conv2d(2, 3, 3, padding=1)), (2, 9, 8)),
    "conv, many positions, every option": Case(
        lambda: Flat(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 3), dilation=(1, 2), groups=2)), (4, 14, 13)
    ),
    "conv, many positions, depthwise": Case(lambda: Flat(nn.Conv2d(3, 6, 3, groups=3, padding=1)), (3, 8, 9)),
    "conv, in-place activation": Case(lambda: Flat(nn.Conv2d(2, 3, 3), between=nn.ReLU(inplace=True)), (2, 6, 6)),
    "conv called twice": Case(lambda: Flat(nn.Conv2d(2, 2, 3, padding=1), calls=2), (2, 5, 5)),
    "conv called twice, other sizes": Case(lambda: Flat(nn.Conv2d(2, 2, 3), calls=2), (2, 7, 7)),
    "3c1f": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(3), nn.Flatten(), nn.Linear(12, 7), nn.ReLU(inplace=True), nn.Linear(7, CLASSES)),
        ),
        (2, 6, 6),
    ),
}


def attention(call=cases.attend, shape=(6, 4), **options):
    options = {"batch_first": True, **options}
    return Case(lambda: Flat(nn.MultiheadAttention(4, 2, **options), call=call), shape)


def rnn(kind, call=cases.recurrent, **options):
    return Case(lambda: Flat(kind(3, 4, **{"batch_first": True, **options}), call=call), (4, 3))


def table(layer, shape=(6,), ids=7, **options):
    return Case(lambda: Flat(layer, **options), shape, ids)


LAYERS |= {
    "bilinear": Case(cases.Pair, (6,)),
    "bilinear over tokens, without bias": Case(lambda: Flat(cases.Pair(bias=False)), (5, 6)),
    "conv1d": Case(lambda: Flat(nn.Conv1d(2, 3, 3)), (2, 8)),
    "conv1d, every option": Case(
        lambda: Flat(nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular")), (4, 9)
    ),
    "conv1d, depthwise, same": Case(lambda: Flat(nn.Conv1d(3, 6, 3, groups=3, padding="same")), (3, 7)),
    "conv3d": Case(lambda: Flat(nn.Conv3d(2, 3, 2)), (2, 4, 3, 4)),
    "conv3d, every option": Case(
        lambda: Flat(nn.Conv3d(4, 6, (2, 3, 2), stride=(2, 1, 2), padding=(1, 2, 0), dilation=(1, 2, 1), groups=2)),
        (4, 4, 5, 4),
    ),
    "conv3d, replicate": Case(lambda: Flat(nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate")), (2, 3, 4, 3)),
    "transposed conv1d": Case(lambda: Flat(nn.ConvTranspose1d(2, 3, 3, stride=2)), (2, 5)),
    "transposed conv1d, every option": Case(
        lambda: Flat(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)), (4, 5)
    ),
    "transposed conv2d": Case(lambda: Flat(nn.ConvTranspose2d(2, 3, 3)), (2, 4, 5)),
    "transposed conv2d, every option": Case(
        lambda: Flat(
            nn.ConvTranspose2d(
                4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2, dilation=(2, 1)
            )
        ),
        (4, 4, 3),
    ),
    "transposed conv2d, output padding beyond the stride": Case(
        lambda: Flat(nn.ConvTranspose2d(2, 3, 2, dilation=3, output_padding=2)), (2, 3, 3)
    ),
    "transposed conv3d, every option": Case(
        lambda: Flat(nn.ConvTranspose3d(2, 4, 2, stride=(2, 1, 2), padding=1, output_padding=(1, 0, 1), groups=2)),
        (2, 3, 3, 2),
    ),
    "embedding": table(nn.Embedding(7, 3)),
    "embedding of one id": table(nn.Embedding(7, 3), ()),
    "embedding, padding": table(nn.Embedding(7, 3, padding_idx=2)),
    "embedding of a large vocabulary": table(nn.Embedding(40, 3), (6,), 40),
    "embedding bag, sum": table(nn.EmbeddingBag(7, 3, mode="sum")),
    "embedding bag, mean, padding": table(nn.EmbeddingBag(7, 3, padding_idx=2)),
    "embedding bag, max": table(nn.EmbeddingBag(7, 3, mode="max")),
    "embedding bag, weights": table(nn.EmbeddingBag(7, 3, mode="sum"), call=cases.weighted_bags),
    "embedding bag, bags of several sizes": table(nn.EmbeddingBag(7, 3), call=cases.bags),
    "layer norm": Case(lambda: Flat(nn.LayerNorm(4)), (4,)),
    "layer norm over tokens": Case(lambda: Flat(nn.LayerNorm(4, bias=False)), (6, 4)),
    "layer norm over three dimensions": Case(lambda: Flat(nn.LayerNorm((2, 3, 4))), (2, 3, 4)),
    "rms norm": Case(lambda: Flat(nn.RMSNorm((3, 4))), (5, 3, 4)),
    "group norm": Case(lambda: Flat(nn.GroupNorm(2, 4)), (4, 3, 2)),
    "group norm of vectors": Case(lambda: Flat(nn.GroupNorm(2, 4)), (4,)),
    "instance norm": Case(lambda: Flat(nn.InstanceNorm2d(3, affine=True)), (3, 4, 2)),
    "instance norm 3d": Case(lambda: Flat(nn.InstanceNorm3d(2, affine=True)), (2, 2, 3, 2)),
    "instance norm 1d, kept statistics": Case(
        lambda: Flat(cases.used_norm(nn.InstanceNorm1d(3, affine=True, track_running_stats=True))), (3, 5)
    ),
    "batch norm in evaluation": Case(lambda: Flat(cases.used_norm(nn.BatchNorm2d(3))), (3, 4, 2)),
    "batch norm of vectors in evaluation": Case(lambda: Flat(cases.used_norm(nn.BatchNorm1d(4))), (4,)),
    "batch norm, batch statistics": Case(lambda: cases.normalized(nn.BatchNorm2d(4)), (2, 5, 5)),
    "batch norm, batch statistics, never kept": Case(
        lambda: cases.normalized(nn.BatchNorm2d(4, track_running_stats=False)), (2, 5, 5)
    ),
    "batch norm, batch statistics, no scale": Case(
        lambda: cases.normalized(nn.BatchNorm2d(4, affine=False)), (2, 5, 5)
    ),
    "batch norm 3d, batch statistics": Case(lambda: Flat(nn.BatchNorm3d(2)), (2, 2, 3, 2)),
    "prelu": Case(lambda: Flat(nn.PReLU()), (4, 3)),
    "prelu by channel": Case(lambda: Flat(nn.PReLU(4)), (4, 3, 2)),
    "prelu by channel of vectors": Case(lambda: Flat(nn.PReLU(4)), (4,)),
    "attention": attention(),
    "attention, sequence first": attention(batch_first=False),
    "attention without biases": attention(bias=False),
    "attention, three different inputs": attention(cases.cross),
    "attention, separate projections": attention(cases.cross, kdim=3, vdim=2),
    "attention, bias tokens and a zero token": attention(add_bias_kv=True, add_zero_attn=True),
    "attention, causal": attention(cases.causal),
    "attention, padding mask": attention(cases.padded),
    "attention, padding mask and bias tokens": attention(cases.padded, add_bias_kv=True),
    "attention, weights in the loss": attention(cases.weights_too),
    "encoder layer": Case(cases.encoder, (6, 4)),
    "encoder layer, norm first": Case(lambda: cases.encoder(norm_first=True, activation="gelu"), (6, 4)),
    "encoder layer, evaluation": Case(lambda: cases.encoder().eval(), (6, 4)),
    "encoder layer, sequence first": Case(cases.SequenceFirst, (6,), 7),
    "encoder layer, as many tokens as samples": Case(cases.SequenceFirst, (SAMPLES,), 7),
    "rnn": rnn(nn.RNN),
    "rnn, relu, sequence first": rnn(nn.RNN, nonlinearity="relu", batch_first=False),
    "rnn, first state given": rnn(nn.RNN, cases.with_state, num_layers=2),
    "lstm": rnn(nn.LSTM),
    "lstm, two layers, both directions": rnn(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm, projected, without biases": rnn(nn.LSTM, proj_size=2, num_layers=2, bias=False),
    "gru": rnn(nn.GRU),
    "gru, two layers, both directions, sequence first": rnn(
        nn.GRU, num_layers=2, bidirectional=True, batch_first=False
    ),
    "positions": Case(lambda: cases.Positions(6, called=True), (6,), 7),
    "positions, as many as samples": Case(lambda: cases.Positions(SAMPLES, called=True), (SAMPLES,), 7),
    "positions, as many as samples, not called": Case(lambda: cases.Positions(SAMPLES, called=False), (SAMPLES,), 7),
    "positions of one's own, as many as samples": Case(lambda: cases.OwnPositions(SAMPLES), (SAMPLES,), 7),
    "tied linear layers": Case(cases.Tied, (4,)),
    "tied embedding and head": Case(lambda: cases.Language(9, 4), (6,), 9),
    "a weight used outside of its layer": Case(cases.Outside, (4,)),
    "a layer that is never called": Case(cases.NeverCalled, (4,)),
    "parameters of the model's own": Case(cases.Loose, (1, 5, 3)),
    "a subclass with its own forward": Case(lambda: nn.Sequential(cases.OwnForward(4, 3)), (4,)),
    "rows that are no samples": Case(cases.Reshapes, (4,)),
    "weight norm": Case(cases.normed(cases.weight_norm), (4,)),
    "spectral norm": Case(cases.normed(cases.spectral_norm), (4,)),
}

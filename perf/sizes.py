"""The sizes at which ops are measured, by op. An op that is not in the table is measured at its first example.

Key: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient, L Fisher blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor

from tengrad_triton.kernels.conv_geometry import ConvGeometry
from tengrad_triton.kernels.spec import KernelSpec

Scale = Literal["small", "cpu", "gpu"]
Make = Callable[[torch.device], tuple[Any, ...]]


@dataclass(frozen=True)
class Sized:
    """One op at one size."""

    spec: KernelSpec
    size: str
    make: Make

    @property
    def large(self) -> bool:
        """Whether its share of the machine's limit is meaningful: at small sizes the launch dominates."""
        return self.size.endswith("large")


def _tensor(device: torch.device, *shape: int) -> Tensor:
    """Return normal entries, drawn on the device because some tensors take gigabytes."""
    return torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(0))


def _gram(n: int, g: int, p: int, i: int, o: int, device: torch.device, layers: int = 1) -> tuple[Any, ...]:
    a, g_ = zip(*(_outer(n, g, p, i, o, device) for _ in range(layers)), strict=True)
    return list(a), list(g_), list(range(layers)), layers


def _outer(n: int, g: int, p: int, i: int, o: int, device: torch.device) -> tuple[Any, ...]:
    return _tensor(device, n, g, p, i), _tensor(device, n, g, p, o)


def _project(n: int, g: int, p: int, i: int, o: int, device: torch.device) -> tuple[Any, ...]:
    return *([x] for x in _outer(n, g, p, i, o, device)), [_tensor(device, g * o, 1, i)], [0], [1, n]


def _conv(n: int, c: int, o: int, pixels: int, groups: int, device: torch.device) -> tuple[Any, ...]:
    x_NCHW = _tensor(device, n, c, pixels + 2, pixels + 2)
    return x_NCHW, _tensor(device, n, o, pixels, pixels), [3, 3], [1, 1], [1, 1], groups


def _rows(n: int, k: int, device: torch.device, weights: int = 1) -> tuple[Any, ...]:
    """Return the arguments of `gram_rows` for weights of one size, adjacent in memory as a refresh leaves them."""
    return list(_tensor(device, weights, n, k).unbind()), list(range(weights)), weights


def _rows_and_entries(n: int, k: int, device: torch.device, weights: int = 1) -> tuple[Any, ...]:
    j, rows, _ = _rows(n, k, device, weights)
    return j, [_tensor(device, k, 1, 1) for _ in range(weights)], rows, [weights, n]


def _grams(blocks: int, n: int, device: torch.device) -> tuple[Any, ...]:
    j_LNK = _tensor(device, blocks, n, 2 * n)
    return j_LNK @ j_LNK.mT / n, torch.full((blocks,), 0.1, device=device)


def _factors(blocks: int, n: int, device: torch.device) -> tuple[Any, ...]:
    k_LNN, _ = _grams(blocks, n, device)
    return (torch.linalg.cholesky(k_LNN + torch.eye(n, device=device)),)


def _solve(blocks: int, n: int, device: torch.device) -> tuple[Any, ...]:
    return *_factors(blocks, n, device), _tensor(device, blocks, n)


def _update(
    of: Callable[[int], Iterable[Tensor]], o: int, k: int, i: int, n: int, device: torch.device, weights: int = 1
) -> tuple[Any, ...]:
    """Return the arguments of an update of some weights of one size, where ``of`` returns the J of one."""

    # One tensor for all weights, as for a model with one parameter group; lr = 0 keeps the numbers through repetitions.
    settings = torch.tensor([0.0, 0.5, 0.0, 0.0], device=device)

    def one(t: int) -> tuple[Tensor, ...]:
        numbers = torch.tensor(0.3, device=device), settings
        return *(_tensor(device, o, i, k).mT for _ in range(3)), *of(t), _tensor(device, n), *numbers

    return *map(list, zip(*map(one, range(weights)), strict=True)), False


def _expand_update(n: int, p: int, o: int, k: int, i: int, device: torch.device) -> tuple[Any, ...]:
    return _update(lambda _: _outer(n, 1, p, k * i, o, device), o, k, i, n, device)


def _rows_update(n: int, o: int, k: int, i: int, device: torch.device, weights: int = 1) -> tuple[Any, ...]:
    j, *_ = _rows(n, o * k * i, device, weights)
    return _update(lambda t: j[t : t + 1], o, k, i, n, device, weights)


def _convolution(n: int, channels: int, side: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return input and output derivatives of a 3 × 3 convolution with padding 1."""
    shape = (n, channels, side, side)
    return [_tensor(device, *shape)], [_tensor(device, *shape)]


def _project_conv(n: int, channels: int, side: int, device: torch.device) -> tuple[Any, ...]:
    factors, weight = _convolution(n, channels, side, device), _tensor(device, channels, channels, 3, 3)
    return *factors, [weight], _PADDED, [0], [1, n]


def _unfold_conv(n: int, channels: int, side: int, device: torch.device) -> tuple[Any, ...]:
    return [_tensor(device, n, channels, side, side)], [3, 3], _PADDED, [False]


def _conv_update(n: int, channels: int, side: int, device: torch.device) -> tuple[Any, ...]:
    state = [[_tensor(device, channels, channels, 3, 3)] for _ in range(3)]
    numbers = torch.tensor(0.3, device=device), torch.tensor([0.0, 0.5, 0.0, 0.0], device=device)
    tail = ([_tensor(device, n)], *([x] for x in numbers), False)
    return *state, *_convolution(n, channels, side, device), _PADDED, *tail


_PADDED = ConvGeometry((1, 1), (1, 1), (1, 1), 1).numbers

# Layers of 3C1F at N = 128, and sizes that fill a GPU.
_FC, _CONV = (128, 1, 1, 10368, 500), (128, 128 * 9 * 128)
_BATCHES = ((5, 128), (30, 128), (16, 512))
_LARGE = (512, 1, 4, 8192, 8192)
SIZES: Mapping[str, Mapping[str, Make]] = {
    "gram": {
        "linear 10368 to 500": partial(_gram, *_FC),
        "30 of linear 512 to 512": partial(_gram, 128, 1, 1, 512, 512, layers=30),
        "512 samples, large": partial(_gram, 512, 1, 1, 32768, 8192),
    },
    "gram_rows": {
        "3C1F convolution": partial(_rows, *_CONV),
        "30 biases of 512": partial(_rows, 128, 512, weights=30),
        "512 samples, large": partial(_rows, 512, 512 * 9 * 128),
    },
    "sample_grads": {
        "32 tokens, 256 to 256": partial(_outer, 32, 1, 32, 256, 256),
        "512 tokens, large": partial(_outer, 64, 1, 512, 1024, 1024),
    },
    "conv_sample_grads": {
        "128 to 128 on 14 x 14": partial(_conv, 32, 128, 128, 14, 1),
        "depthwise 96 on 14 x 14": partial(_conv, 32, 96, 96, 14, 96),
        "3C1F convolution, large": partial(_conv, 128, 128, 128, 28, 1),
    },
    "cholesky": {f"{blocks} of {n}": partial(_grams, blocks, n) for blocks, n in _BATCHES},
    "cholesky_inverse": {f"{blocks} of {n}": partial(_factors, blocks, n) for blocks, n in _BATCHES},
    "cholesky_solve": {f"{blocks} of {n}": partial(_solve, blocks, n) for blocks, n in _BATCHES},
    "project": {"linear 10368 to 500": partial(_project, *_FC), "512 samples, large": partial(_project, *_LARGE)},
    "project_conv": {"512 to 512 on 4 x 4": partial(_project_conv, 128, 512, 4)},
    "unfold_conv": {"512 channels of 4 x 4": partial(_unfold_conv, 128, 512, 4)},
    "expand_conv_update_": {"512 to 512 on 4 x 4": partial(_conv_update, 128, 512, 4)},
    "project_rows": {
        "3C1F convolution": partial(_rows_and_entries, *_CONV),
        "30 biases of 512": partial(_rows_and_entries, 128, 512, weights=30),
        "512 samples, large": partial(_rows_and_entries, 512, 512 * 9 * 128),
    },
    "expand_update_": {
        "linear 10368 to 500": partial(_expand_update, 128, 1, 500, 1, 10368),
        "512 samples, large": partial(_expand_update, 512, 4, 8192, 1, 8192),
    },
    "expand_rows_update_": {
        "3C1F convolution": partial(_rows_update, 128, 128, 9, 128),
        "30 biases of 512": partial(_rows_update, 128, 512, 1, 1, weights=30),
        "512 samples, large": partial(_rows_update, 512, 512, 9, 128),
    },
}  # fmt: skip


def sized(specs: tuple[KernelSpec, ...], scale: Scale) -> list[Sized]:
    """Return every op at the sizes of a scale: ``"small"`` its first example, ``"cpu"`` sizes for two cores.

    One size of every op comes first, a large one where there is one, so that a short run covers all ops.
    """
    ranked = []
    for spec in specs:
        made: dict[str, Make] = dict(SIZES.get(spec.name, {}))
        if scale == "small" or not made:
            made = {name: partial(example, torch.float32) for name, example in list(spec.examples.items())[:1]}
        cases = [Sized(spec, name, make) for name, make in made.items()]
        cases = sorted((case for case in cases if scale == "gpu" or not case.large), key=lambda case: not case.large)
        ranked += list(enumerate(cases))
    return [case for _, case in sorted(ranked, key=itemgetter(0))]

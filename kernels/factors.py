# ruff: noqa: ANN001, ANN201  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What the ops on factored per-sample gradients share: shape checks, alignment, and examples.

A layer's factors are a_NGPI, the input of each position, and g_NGPO, the derivative of the loss with respect to the
output of each position: J_n = Σ_p g_np a_npᵀ in every group (docs/math.md, M1).

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group; in a parameter's view O outputs of all
groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import expect
from .pointer_table import is_aligned, strided
from .spec import normal, tl, triton
from .update import example_parameters

UNITS = (4, 1)  # alignments of factors and parameters that kernels know, in entries: 16 bytes in float32, and none


def expect_factors(a_NGPI: Tensor, g_NGPO: Tensor) -> None:
    """Raise ValueError unless both factors have the same samples, groups and positions."""
    expect("g_NGPO", g_NGPO, *a_NGPI.shape[:3], g_NGPO.shape[-1])


def expect_view(name: str, x_OKI: Tensor, a_NGPI: Tensor, g_NGPO: Tensor) -> None:
    """Raise ValueError unless a parameter's view has the shape of J_n."""
    expect_factors(a_NGPI, g_NGPO)
    _, pixels, inputs = x_OKI.shape
    expect("a_NGPI", a_NGPI, *a_NGPI.shape[:3], pixels * inputs)
    expect(name, x_OKI, g_NGPO.shape[1] * g_NGPO.shape[3], pixels, inputs)


class LayerSize(NamedTuple):
    """N, G, P, I and O of a layer."""

    samples: int
    groups: int
    positions: int
    inputs: int
    outputs: int


def sizes_of(a: Sequence[Tensor], g: Sequence[Tensor]) -> list[LayerSize]:
    """Return the size of each layer."""
    return [LayerSize._make((*a_NGPI.shape, g_NGPO.shape[3])) for a_NGPI, g_NGPO in zip(a, g, strict=True)]


def unit_of(a_NGPI: Tensor, g_NGPO: Tensor, *views: Tensor) -> int:
    """Return the alignment of both factors and of the parameters' views; 1 unless the views are dense matrices."""
    unit = next(unit for unit in UNITS if is_aligned(a_NGPI, unit) and is_aligned(g_NGPO, unit))
    return unit if all(_is_matrix(x_OKI, unit) for x_OKI in views) else 1


def _is_matrix(x_OKI: Tensor, unit: int) -> bool:
    """Return whether (K, I) is one contiguous dimension, and each output begins at a multiple of ``unit`` entries."""
    contiguous = x_OKI.stride(2) == 1 and (x_OKI.shape[1] == 1 or x_OKI.stride(1) == x_OKI.shape[2])
    return contiguous and x_OKI.stride(0) % unit == 0 and x_OKI.storage_offset() % unit == 0


@triton.jit
def view_offsets(table_ptr, field, entry, ENTRIES, o, i, CHANNELS, UNIT: tl.constexpr):
    """Return the offsets of [o, i] in a parameter's view, with i over (K, I); a field holds its strides in UNITs."""
    if UNIT == 1:
        at = strided(table_ptr, field, entry, ENTRIES, o[:, None], i[None, :] // CHANNELS, i[None, :] % CHANNELS)
    else:
        at = o.to(tl.int64)[:, None] * (tl.load(table_ptr + ENTRIES * field + entry) * UNIT) + i[None, :]
    return at


def product_flops(a: Sequence[Tensor], g: Sequence[Tensor]) -> int:
    """Return the cost of one product with J."""
    return sum(2 * a_NGPI.numel() * g_NGPO.shape[3] for a_NGPI, g_NGPO in zip(a, g, strict=True))


def example_factors(dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return example factors of a layer for (N, G, P, I, O)."""
    n, groups, p, inputs, outputs = shape
    a_NGPI = normal(n, groups, p, inputs, dtype=dtype, device=device)
    return a_NGPI, normal(n, groups, p, outputs, dtype=dtype, device=device, seed=1)


# (N, G, P, I, O) and the kernel pixels of some layers: aligned, unaligned, with groups and positions.
EXAMPLE_SHAPES = (((150, 1, 1, 532, 72), 1), ((150, 1, 1, 30, 9), 1), ((101, 2, 7, 9 * 10, 70), 9))


def example_layers(
    dtype: torch.dtype, device: torch.device, param_dtype: torch.dtype = torch.float32
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return (a, g), and (parameters, momenta, gradients), of some layers."""
    layers = [example_factors(dtype, device, shape) for shape, _ in EXAMPLE_SHAPES]
    views = [
        example_parameters(groups * outputs, pixels, inputs // pixels, device, param_dtype)
        for (_, groups, _, inputs, outputs), pixels in EXAMPLE_SHAPES
    ]
    return [list(x) for x in zip(*layers, strict=True)], [list(x) for x in zip(*views, strict=True)]

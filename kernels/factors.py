# ruff: noqa: ANN001, ANN201  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What the ops on factored rows share: shape checks, alignment, and examples.

A layer's factors are its inputs a_NGPI and its output gradients g_NGPO: J_n = Σ_p g_np a_npᵀ in every group
(docs/math.md, M1).

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group; in a parameter's view O outputs of all
groups, T taps of a convolution's kernel (1 for other layers) and I inputs of a tap.
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

# The kernels are compiled for factors and parameters that are aligned to 4 elements (16 bytes in float32), or to 1.
FACTOR_UNITS = (4, 1)


def expect_factors(a_NGPI: Tensor, g_NGPO: Tensor) -> None:
    """Raise ValueError unless both factors have the same samples, groups and positions."""
    expect("g_NGPO", g_NGPO, *a_NGPI.shape[:3], g_NGPO.shape[-1])


def expect_view(name: str, x_OTI: Tensor, a_NGPI: Tensor, g_NGPO: Tensor) -> None:
    """Raise ValueError unless a parameter's view has the shape of J_n."""
    expect_factors(a_NGPI, g_NGPO)
    _, taps, inputs = x_OTI.shape
    expect("a_NGPI", a_NGPI, *a_NGPI.shape[:3], taps * inputs)
    expect(name, x_OTI, g_NGPO.shape[1] * g_NGPO.shape[3], taps, inputs)


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
    unit = next(unit for unit in FACTOR_UNITS if is_aligned(a_NGPI, unit) and is_aligned(g_NGPO, unit))
    return unit if all(_is_dense(x_OTI, unit) for x_OTI in views) else 1


def _is_dense(x_OTI: Tensor, unit: int) -> bool:
    """Return whether (T, I) is one contiguous dimension, and each output begins at a multiple of ``unit`` elements."""
    contiguous = x_OTI.stride(2) == 1 and (x_OTI.shape[1] == 1 or x_OTI.stride(1) == x_OTI.shape[2])
    return contiguous and x_OTI.stride(0) % unit == 0 and x_OTI.data_ptr() // x_OTI.itemsize % unit == 0


@triton.jit
def view_offsets(table_ptr, field, entry, ENTRIES, o, i, CHANNELS, UNIT: tl.constexpr):
    """Return the offsets of [o, i] in a parameter's view, with i over (T, I).

    ``field`` holds the view's three strides in units of UNIT elements.
    """
    if UNIT == 1:
        at = strided(table_ptr, field, entry, ENTRIES, o[:, None], i[None, :] // CHANNELS, i[None, :] % CHANNELS)
    else:
        at = o.to(tl.int64)[:, None] * (tl.load(table_ptr + ENTRIES * field + entry) * UNIT) + i[None, :]
    return at


def product_flops(a: Sequence[Tensor], g: Sequence[Tensor]) -> int:
    """Return the arithmetic operations of one product with J."""
    return sum(2 * a_NGPI.numel() * g_NGPO.shape[3] for a_NGPI, g_NGPO in zip(a, g, strict=True))


def example_factors(dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return example factors of a layer for (N, G, P, I, O)."""
    n, groups, p, inputs, outputs = shape
    a_NGPI = normal(n, groups, p, inputs, dtype=dtype, device=device)
    return a_NGPI, normal(n, groups, p, outputs, dtype=dtype, device=device, seed=1)


# (N, G, P, I, O) and T of some layers: aligned, unaligned, with groups and positions.
EXAMPLE_SHAPES = (((150, 1, 1, 532, 72), 1), ((150, 1, 1, 30, 9), 1), ((53, 2, 5, 9 * 10, 70), 9))


def example_layers(
    dtype: torch.dtype, device: torch.device, param_dtype: torch.dtype = torch.float32
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return (a, g), and (parameters, momenta, gradients), of some layers."""
    layers = [example_factors(dtype, device, shape) for shape, _ in EXAMPLE_SHAPES]
    views = [
        example_parameters(groups * outputs, taps, inputs // taps, device, param_dtype)
        for (_, groups, _, inputs, outputs), taps in EXAMPLE_SHAPES
    ]
    return [list(x) for x in zip(*layers, strict=True)], [list(x) for x in zip(*views, strict=True)]

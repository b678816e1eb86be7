"""Gram matrices K[n, m] = ⟨J_n, J_m⟩ of per-sample gradients, without forming them where that is cheaper.

The factors of all layers are ranges of columns of some matrices, whose products `products` takes in one launch.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient, L
systems.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

from .pointer_table import MAX_GROUP, aligned, batches
from .gram_ranges import PRODUCT_CONFIGS, WIDTH, Product, add_products
from .project_factored import expect_factors, factors
from .spec import KernelSpec, contiguous, expect, nbytes, normal, runs_kernel, widen

_SLAB_ELEMENTS = 1 << 26  # how many entries of the covariance factors the definition holds at a time
_SLABS, _LEAST_ROWS, _LEAST_COLUMNS = 4, 64, 4096  # of X in X Xᵀ on a CPU; thinner ones take longer (measured)


@custom_op("tengrad_triton::gram", mutates_args=())
def gram(a: list[Tensor], g: list[Tensor], rows: list[int], count: int, config: str = "default") -> Tensor:
    """Return k_LNN: K[rows[t]] is the sum over its layers' Gram matrices, from inputs and output derivatives.

    The work grows with the square of P: from some dozens of positions on, `gram_rows` of explicit gradients is cheaper.
    """
    if not a:
        raise ValueError("gram needs the factors of at least one layer, got none")
    for a_NGPI, g_NGPO in zip(a, g, strict=True):
        expect("a_NGPI", a_NGPI, a[0].shape[0], *a_NGPI.shape[1:])
        expect_factors(a_NGPI, g_NGPO)
    return (partial(_gram, config=config) if runs_kernel(*a, *g) else gram_torch)(a, g, rows, count)


def gram_torch(a: list[Tensor], g: list[Tensor], rows: list[int], count: int) -> Tensor:
    """K[n, m] = Σ_γpq ⟨a_nγp, a_mγq⟩ ⟨g_nγp, g_mγq⟩ (paper, equations 5 and 11), a slab of rows n at a time."""
    k_LNN = _zeros(a, count)
    k = k_LNN.unbind()
    for row, a_NGPI, g_NGPO in zip(rows, a, g, strict=True):
        k[row].add_(_layer_gram(widen(a_NGPI), widen(g_NGPO)))
    return k_LNN


def _zeros(x: Sequence[Tensor], count: int) -> Tensor:
    n = x[0].shape[0]
    return x[0].new_zeros(count, n, n, dtype=torch.promote_types(x[0].dtype, torch.float32))


@gram.register_fake
def _(a: list[Tensor], g: list[Tensor], rows: list[int], count: int, config: str = "default") -> Tensor:
    return _zeros(a, count)


def _layer_gram(a_NGPI: Tensor, g_NGPO: Tensor) -> Tensor:
    n, groups, positions, _ = a_NGPI.shape
    if groups == positions == 1:
        a_NI, g_NO = a_NGPI.flatten(0, 2), g_NGPO.flatten(0, 2)
        return _squared(a_NI).mul_(_squared(g_NO))
    a_GRI, g_GRO = (x.transpose(0, 1).flatten(1, 2) for x in (a_NGPI, g_NGPO))  # R samples and their positions
    slab = positions * max(1, _SLAB_ELEMENTS // (groups * positions * n * positions))
    rows = []
    for a_GSI, g_GSO in zip(a_GRI.split(slab, 1), g_GRO.split(slab, 1), strict=True):
        pairs_GSR = (a_GSI @ a_GRI.mT) * (g_GSO @ g_GRO.mT)
        rows.append(pairs_GSR.view(groups, -1, positions, n, positions).sum((0, 2, 4)))
    return torch.cat(rows)


def _gram(a: list[Tensor], g: list[Tensor], rows: list[int], count: int, config: str = "default") -> Tensor:
    k_LNN = torch.zeros(count, a[0].shape[0], a[0].shape[0], dtype=torch.float32, device=a[0].device)
    for _, alike in batches([x.dtype for x in a], order=rows, most=MAX_GROUP // 2):
        matrices: list[Tensor] = []
        products: list[Product] = []
        for t in alike:
            a_NGPI, g_NGPO = _padded(a[t]), _padded(g[t].to(a[t].dtype))
            _, groups, positions, inputs = a_NGPI.shape
            at, outputs = len(matrices), g_NGPO.shape[3]
            for i, j in _pairs(groups, positions):
                aa, gg = (at, i * inputs, j * inputs, inputs), (at + 1, i * outputs, j * outputs, outputs)
                products.append((rows[t], aa, gg))
            matrices += [a_NGPI.flatten(1), g_NGPO.flatten(1)]
        add_products(matrices, products, k_LNN, config)
    return k_LNN


def _padded(x: Tensor) -> Tensor:
    """Return the tensor with entries that can be copied 16 bytes at a time; itself, where they can."""
    x = contiguous(x) if x.shape[-1] % WIDTH == 0 else pad(x, (0, -x.shape[-1] % WIDTH))
    return x if x.storage_offset() % WIDTH == 0 else x.clone()


def _pairs(groups: int, positions: int) -> Iterator[tuple[int, int]]:
    """Yield every pair of positions that share a group, once, counting positions through all groups."""
    for first in range(0, groups * positions, positions):
        yield from combinations_with_replacement(range(first, first + positions), 2)


@custom_op("tengrad_triton::gram_rows", mutates_args=())
def gram_rows(j: list[Tensor], rows: list[int], count: int, config: str = "default") -> Tensor:
    """Return k_LNN with K[rows[t]] = Σ_t J_t J_tᵀ over a system's explicit per-sample gradients."""
    for j_NK in j:
        expect("j_NK", j_NK, j[0].shape[0], j_NK.shape[1])
    return (partial(_gram_rows, config=config) if runs_kernel(*j) else gram_rows_torch)(j, rows, count)


@gram_rows.register_fake
def _(j: list[Tensor], rows: list[int], count: int, config: str = "default") -> Tensor:
    return _zeros(j, count)


def gram_rows_torch(j: list[Tensor], rows: list[int], count: int) -> Tensor:
    """K = J Jᵀ, added up over the weights of a system."""
    k_LNN = _zeros(j, count)
    k = k_LNN.unbind()
    for row, j_NK in zip(rows, j, strict=True):
        _add_squared_(k[row], widen(j_NK))
    return k_LNN


def _squared(x_NK: Tensor) -> Tensor:
    """X Xᵀ."""
    return _add_squared_(x_NK.new_zeros(len(x_NK), len(x_NK)), x_NK)


def _add_squared_(k_NN: Tensor, x_NK: Tensor) -> Tensor:
    """K += X Xᵀ, on a CPU in slabs of rows up to the diagonal: BLAS would compute what lies above as well."""
    n, k = x_NK.shape
    slabs = min(_SLABS, n // _LEAST_ROWS)
    if slabs < 2 or k < _LEAST_COLUMNS or not x_NK.is_cpu or torch.compiler.is_compiling():
        return k_NN.addmm_(x_NK, x_NK.mT)
    step = -(-n // slabs)
    for start in range(0, n, step):
        end = min(n, start + step)
        k_NN[start:end, :end].addmm_(x_NK[start:end], x_NK[:end].mT)
        k_NN[:start, start:end] = k_NN[start:end, :start].mT
    return k_NN


def _gram_rows(j: list[Tensor], rows: list[int], count: int, config: str = "default") -> Tensor:
    k_LNN = torch.zeros(count, j[0].shape[0], j[0].shape[0], dtype=torch.float32, device=j[0].device)
    for _, alike in batches([j_NK.dtype for j_NK in j], order=rows):
        matrices = [j[t] if aligned(j[t], WIDTH) else _padded(j[t]) for t in alike]
        widths = (int(x.shape[1]) for x in matrices)
        ranges = [(index, 0, 0, width) for index, width in enumerate(widths)]
        products = [(rows[t], part, None) for t, part in zip(alike, ranges, strict=True)]
        add_products(matrices, products, k_LNN, config)
    return k_LNN


def _layers(
    dtype: torch.dtype, device: torch.device, *shapes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[int], int]:
    layers = [factors(dtype, device, shape) for shape in shapes]
    return [a_NGPI for a_NGPI, _ in layers], [g_NGPO for _, g_NGPO in layers], [1, *range(1, len(layers))], len(layers)


def _rows(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[int], int]:
    j = [normal(70, k, dtype=dtype, device=device, seed=k) for k in (1000, 2001, 8)]
    return j, [1, 0, 1], 3


def _gram_flops(a: list[Tensor], g: list[Tensor], *_: object) -> int:
    n = a[0].shape[0]
    return sum(2 * n * x.shape[2] * (x.numel() + y.numel()) for x, y in zip(a, g, strict=True))


SPECS = (
    KernelSpec(
        name="gram",
        triton_impl=_gram,
        torch_impl=gram_torch,
        examples={
            "one position": lambda dtype, device: _layers(
                dtype, device, (150, 1, 1, 700, 11), (150, 1, 1, 9, 70), (150, 1, 1, 8, 16)
            ),
            "groups and positions": lambda dtype, device: _layers(dtype, device, (17, 2, 3, 20, 9), (17, 1, 4, 5, 13)),
        },
        flops=_gram_flops,
        bytes=lambda a, g, rows, count: nbytes(*a, *g) + 4 * count * a[0].shape[0] ** 2,
        configs=PRODUCT_CONFIGS,
    ),
    KernelSpec(
        name="gram_rows",
        triton_impl=_gram_rows,
        torch_impl=gram_rows_torch,
        examples={"aligned and unaligned": _rows},
        flops=lambda j, *_: sum(2 * x.shape[0] * x.numel() for x in j),
        bytes=lambda j, rows, count: nbytes(*j) + 4 * count * j[0].shape[0] ** 2,
        configs=PRODUCT_CONFIGS,
    ),
)

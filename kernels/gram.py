# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Gram matrices K[n, m] = ⟨J_n, J_m⟩ of per-sample gradients, without forming them where that is cheaper.

The factors of all layers are ranges of columns of some matrices. A dot product over any range of columns is a Gram or
cross-Gram matrix of some factor at some positions, so one launch makes them all, each range in chunks that fill the
device, and a second one multiplies and adds them up in a fixed order. The matrices are read where they lie (see
`groups`), but for those whose rows have to be padded.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient, L
systems, W work items, M samples rounded up, Q products of two Gram matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, combinations_with_replacement

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

from .groups import MOST, TABLE, Member, address, aligned, batches, number, table_of
from .reuse import expect_factors, factors
from .spec import (
    TRITON_TYPES,
    Config,
    KernelSpec,
    cdiv,
    contiguous,
    expect,
    nbytes,
    normal,
    runs_kernel,
    tl,
    triton,
    widen,
)
from .tiles import load_tile

Range = tuple[int, int, int, int]  # of columns: the matrix, where left and right factor begin, and how many they have
Product = tuple[int, Range, Range | None]  # system, range of inputs, range of output derivatives

_SLAB_ELEMENTS = 1 << 26  # how many entries of the covariance factors the definition holds at a time
_PARTIAL_BYTES = 1 << 28  # how much memory partial sums may take at a time
_PROGRAMS = 512  # how many programs fill a device
_LEAST_CHUNK = 256  # columns of a work item, below which partial sums cost more than they buy
_WIDTH = 8  # what every range of columns is a multiple of, for copies of 16 bytes in half precision


@custom_op("tengrad_triton::gram", mutates_args=())
def gram(a: list[Tensor], g: list[Tensor], rows: list[int], count: int) -> Tensor:
    """Return k_LNN: K[rows[t]] is the sum over its layers' Gram matrices, from inputs and output derivatives.

    The work grows with the square of P: from some dozens of positions on, `gram_rows` of explicit gradients is cheaper.
    """
    if not a:
        raise ValueError("gram needs the factors of at least one layer, got none")
    for a_NGPI, g_NGPO in zip(a, g, strict=True):
        expect("a_NGPI", a_NGPI, a[0].shape[0], *a_NGPI.shape[1:])
        expect_factors(a_NGPI, g_NGPO)
    return (_gram if runs_kernel(*a, *g) else gram_reference)(a, g, rows, count)


def gram_reference(a: list[Tensor], g: list[Tensor], rows: list[int], count: int) -> Tensor:
    """K[n, m] = Σ_γpq ⟨a_nγp, a_mγq⟩ ⟨g_nγp, g_mγq⟩ (paper, equations 5 and 11), a slab of rows n at a time."""
    k_LNN = _zeros(a, count)
    for row, a_NGPI, g_NGPO in zip(rows, a, g, strict=True):
        k_LNN[row] += _layer_gram(widen(a_NGPI), widen(g_NGPO))
    return k_LNN


def _zeros(x: Sequence[Tensor], count: int) -> Tensor:
    n = x[0].shape[0]
    return x[0].new_zeros(count, n, n, dtype=torch.promote_types(x[0].dtype, torch.float32))


@gram.register_fake
def _(a: list[Tensor], g: list[Tensor], rows: list[int], count: int) -> Tensor:
    return _zeros(a, count)


def _layer_gram(a_NGPI: Tensor, g_NGPO: Tensor) -> Tensor:
    n, groups, positions, _ = a_NGPI.shape
    slab = max(1, _SLAB_ELEMENTS // (groups * positions * n * positions))
    rows = []
    for a_SGPI, g_SGPO in zip(torch.split(a_NGPI, slab), torch.split(g_NGPO, slab), strict=True):
        aa = torch.einsum("ngpi,mgqi->gnpmq", a_SGPI, a_NGPI)
        gg = torch.einsum("ngpo,mgqo->gnpmq", g_SGPO, g_NGPO)
        rows.append((aa * gg).sum((0, 2, 4)))
    return torch.cat(rows)


@triton.jit
def _range_gram_kernel(
    table_ptr, like_ptr, work_ptr, part_ptr, MEMBERS, N, stride_pn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """part[w] = X[:, left range] X[:, right range]ᵀ of one work item w = (matrix, left column, right column, length).

    The table holds each matrix's address, and its row stride in units of eight entries.
    """
    item = tl.program_id(0).to(tl.int64)
    matrix = tl.load(work_ptr + item * 4)
    left = tl.load(work_ptr + item * 4 + 1)
    right = tl.load(work_ptr + item * 4 + 2)
    length = tl.load(work_ptr + item * 4 + 3).to(tl.int32)
    if (left == right) & (tl.program_id(1) < tl.program_id(2)):
        return  # a symmetric product: the finalizing kernel reads its lower tiles only
    # The divisibility that the work list promises; without it every load is a scalar one.
    left, right, length = tl.multiple_of(left, 8), tl.multiple_of(right, 8), tl.multiple_of(length, 8)
    x_ptr = address(table_ptr, 0, matrix, MEMBERS, like_ptr, 8)
    stride_xn = number(table_ptr, 2, matrix, MEMBERS) * 8
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for start in range(0, length, BLOCK_K):
        x = load_tile(x_ptr + left, n, start + tl.arange(0, BLOCK_K), stride_xn, N, length)
        y = load_tile(x_ptr + right, m, start + tl.arange(0, BLOCK_K), stride_xn, N, length)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    at = (item * N + n)[:, None] * stride_pn + m[None, :]
    # Whole rows, of which the end is zero: N says nothing about alignment, their length does.
    tl.store(part_ptr + at, total, mask=(n < N)[:, None] & (m < stride_pn)[None, :])


@triton.jit
def _hadamard(part_ptr, product_ptr, n, m, N, stride_pn, BLOCK_N: tl.constexpr):
    """(Σ partial input Grams) ∘ (Σ partial output Grams) of one product, whose row in the table is given."""
    at = n.to(tl.int64)[:, None] * stride_pn + m[None, :]
    inside = (n < N)[:, None] & (m < stride_pn)[None, :]
    first, middle, last = tl.load(product_ptr), tl.load(product_ptr + 1), tl.load(product_ptr + 2)
    aa = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for item in range(first, middle):
        aa += tl.load(part_ptr + item * N * stride_pn + at, mask=inside, other=0.0)
    gg = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for item in range(middle, last):
        gg += tl.load(part_ptr + item * N * stride_pn + at, mask=inside, other=0.0)
    return aa * tl.where(middle == last, 1.0, gg)


@triton.jit
def _sum_products_kernel(part_ptr, product_ptr, start_ptr, k_ptr, N, stride_pn, BLOCK_N: tl.constexpr):
    """Add a layer's products to one tile of K and to its mirror image; a product of two positions counts both ways."""
    layer = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) < tl.program_id(2):
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < N)[:, None] & (m < N)[None, :]
    at = (layer * N + n)[:, None] * N + m[None, :]
    total = tl.load(k_ptr + at, mask=inside, other=0.0)
    for product in range(tl.load(start_ptr + layer), tl.load(start_ptr + layer + 1)):
        row_ptr = product_ptr + product * 4
        total += _hadamard(part_ptr, row_ptr, n, m, N, stride_pn, BLOCK_N)
        if tl.load(row_ptr + 3) != 0:
            total += tl.trans(_hadamard(part_ptr, row_ptr, m, n, N, stride_pn, BLOCK_N))
    if tl.program_id(1) == tl.program_id(2):
        total = 0.5 * (total + tl.trans(total))
    tl.store(k_ptr + at, total, mask=inside)
    mirrored = (layer * N + m)[:, None] * N + n[None, :]
    tl.store(k_ptr + mirrored, tl.trans(total), mask=(m < N)[:, None] & (n < N)[None, :])


def _range_config(entries: str, rows: int, columns: int, num_warps: int, num_stages: int) -> Config:
    return Config(
        kernel=_range_gram_kernel,
        types=f"*i64 {entries} *i64 *fp32 i32 i32 i32",
        constants={"BLOCK_N": rows, "BLOCK_K": columns},
        unaligned=("MEMBERS", "N"),
        num_warps=num_warps,
        num_stages=num_stages,
        async_copies=True,
    )


_RANGE_GRAM = {
    dtype: _range_config(entries, 64, 32, 4, 3) if dtype == torch.float32 else _range_config(entries, 128, 64, 8, 3)
    for dtype, entries in TRITON_TYPES.items()
}
_SUM_PRODUCTS = Config(
    kernel=_sum_products_kernel, types="*fp32 *i64 *i64 *fp32 i32 i32", constants={"BLOCK_N": 32}, unaligned=("N",)
)


def _gram(a: list[Tensor], g: list[Tensor], rows: list[int], count: int) -> Tensor:
    k_LNN = torch.zeros(count, a[0].shape[0], a[0].shape[0], dtype=torch.float32, device=a[0].device)
    for _, alike in batches([x.dtype for x in a], order=rows, most=MOST // 2):
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
        _add_products(matrices, products, k_LNN)
    return k_LNN


def _padded(x: Tensor) -> Tensor:
    """Return the tensor with entries that can be copied 16 bytes at a time; itself, where they can."""
    x = contiguous(x) if x.shape[-1] % _WIDTH == 0 else pad(x, (0, -x.shape[-1] % _WIDTH))
    return x if x.storage_offset() % _WIDTH == 0 else x.clone()


def _pairs(groups: int, positions: int) -> Iterator[tuple[int, int]]:
    """Yield every pair of positions that share a group, once, counting positions through all groups."""
    for first in range(0, groups * positions, positions):
        yield from combinations_with_replacement(range(first, first + positions), 2)


def _add_products(matrices: Sequence[Tensor], products: Sequence[Product], k_LNN: Tensor) -> None:
    """Add the products, which are in the order of their systems, as many at a time as the memory for partials allows.

    The lists of work are copied to the device each time, so a CUDA graph must not capture this in eager mode.
    """
    (layers, n, _), device = k_LNN.shape, k_LNN.device
    config = _RANGE_GRAM[matrices[0].dtype]
    table = table_of([Member([x], [x.stride(0) // _WIDTH], 0) for x in matrices])
    tiles, blocks = cdiv(n, config.block("N")), cdiv(n, _SUM_PRODUCTS.block("N"))
    row = cdiv(n, 16) * 16  # of partial sums, so that they are stored and loaded 16 bytes at a time for any N
    total = sum(length for _, *ranges in products for *_, length in filter(None, ranges))
    chunk = cdiv(max(_LEAST_CHUNK, n, total * tiles**2 // _PROGRAMS), config.block("K")) * config.block("K")
    for work, terms, starts in _rounds(products, layers, chunk, max(1, _PARTIAL_BYTES // (4 * n * row))):
        work_W4, terms_Q4, starts_L = (torch.tensor(x, device=device) for x in (work, terms, starts))
        part_WNM = torch.empty(len(work), n, row, dtype=torch.float32, device=device)
        config.start((len(work), tiles, tiles), table, matrices[0], work_W4, part_WNM, len(matrices), n, row)
        _SUM_PRODUCTS.start((layers, blocks, blocks), part_WNM, terms_Q4, starts_L, k_LNN, n, row)


def _rounds(
    products: Iterable[Product], layers: int, chunk: int, slots: int
) -> Iterator[tuple[list[Range], list[tuple[int, int, int, bool]], list[int]]]:
    """Yield lists of work items with at most `slots` entries each (or one product), what to multiply, and for whom.

    A row of the second list is (first item of the inputs, first of the derivatives, end, whether it counts both ways);
    the third list holds where each layer's rows begin.
    """
    work: list[Range] = []
    table: list[tuple[int, int, int, bool]] = []
    counts = [0] * layers
    for layer, aa, gg in products:
        left, right = _chunks(aa, chunk), _chunks(gg, chunk)
        if work and len(work) + len(left) + len(right) > slots:
            yield work, table, list(accumulate(counts, initial=0))
            work, table, counts = [], [], [0] * layers
        first = len(work)
        work += left + right
        table.append((first, first + len(left), len(work), aa[1] != aa[2]))
        counts[layer] += 1
    yield work, table, list(accumulate(counts, initial=0))


def _chunks(columns: Range | None, chunk: int) -> list[Range]:
    if columns is None:
        return []
    matrix, left, right, length = columns
    return [(matrix, left + at, right + at, min(chunk, length - at)) for at in range(0, length, chunk)]


@custom_op("tengrad_triton::gram_rows", mutates_args=())
def gram_rows(j: list[Tensor], rows: list[int], count: int) -> Tensor:
    """Return k_LNN with K[rows[t]] = Σ_t J_t J_tᵀ over a system's explicit per-sample gradients."""
    for j_NK in j:
        expect("j_NK", j_NK, j[0].shape[0], j_NK.shape[1])
    return (_gram_rows if runs_kernel(*j) else gram_rows_reference)(j, rows, count)


@gram_rows.register_fake
def _(j: list[Tensor], rows: list[int], count: int) -> Tensor:
    return _zeros(j, count)


def gram_rows_reference(j: list[Tensor], rows: list[int], count: int) -> Tensor:
    """K = J Jᵀ, added up over the weights of a system."""
    k_LNN = _zeros(j, count)
    for row, j_NK in zip(rows, j, strict=True):
        k_LNN[row].addmm_(widen(j_NK), widen(j_NK).mT)
    return k_LNN


def _gram_rows(j: list[Tensor], rows: list[int], count: int) -> Tensor:
    k_LNN = torch.zeros(count, j[0].shape[0], j[0].shape[0], dtype=torch.float32, device=j[0].device)
    for _, alike in batches([j_NK.dtype for j_NK in j], order=rows):
        matrices = [j[t] if aligned(j[t], _WIDTH) else _padded(j[t]) for t in alike]
        widths = (int(x.shape[1]) for x in matrices)
        ranges = [(index, 0, 0, width) for index, width in enumerate(widths)]
        _add_products(matrices, [(rows[t], part, None) for t, part in zip(alike, ranges, strict=True)], k_LNN)
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
        fast=_gram,
        reference=gram_reference,
        examples={
            "one position": lambda dtype, device: _layers(
                dtype, device, (150, 1, 1, 700, 11), (150, 1, 1, 9, 70), (150, 1, 1, 8, 16)
            ),
            "groups and positions": lambda dtype, device: _layers(dtype, device, (17, 2, 3, 20, 9), (17, 1, 4, 5, 13)),
        },
        flops=_gram_flops,
        bytes=lambda a, g, rows, count: nbytes(*a, *g) + 4 * count * a[0].shape[0] ** 2,
        configs=(*_RANGE_GRAM.values(), _SUM_PRODUCTS, TABLE),
    ),
    KernelSpec(
        name="gram_rows",
        fast=_gram_rows,
        reference=gram_rows_reference,
        examples={"aligned and unaligned": _rows},
        flops=lambda j, *_: sum(2 * x.shape[0] * x.numel() for x in j),
        bytes=lambda j, rows, count: nbytes(*j) + 4 * count * j[0].shape[0] ** 2,
        configs=(*_RANGE_GRAM.values(), _SUM_PRODUCTS, TABLE),
    ),
)

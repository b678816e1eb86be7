# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Sums of products of Gram matrices of ranges of columns, for the ops of `gram`.

One launch makes the Gram and cross-Gram matrices of all ranges, each in chunks that fill the device, and a second one
multiplies and adds them up in a fixed order. The matrices are read where they lie (see `groups`).

Dimensions: N samples, L systems, W work items, M samples rounded up, Q products of two Gram matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .pointer_table import TABLE, GroupEntry, address, number, table_of, to_device
from .spec import TRITON_TYPES, Config, cdiv, tl, triton
from .primitives import load_tile

Range = tuple[int, int, int, int]  # of columns: the matrix, where left and right factor begin, and how many they have
Product = tuple[int, Range, Range | None]  # system, range of inputs, range of output derivatives

_PARTIAL_BYTES = 1 << 28  # how much memory partial sums may take at a time
_PROGRAMS = 512  # how many programs fill a device
_LEAST_CHUNK = 256  # columns of a work item, below which partial sums cost more than they buy
WIDTH = 8  # what every range of columns is a multiple of, for copies of 16 bytes in half precision


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


# Rows, columns, warps and stages, for float32, which no tensor cores multiply, and for half precision.
_TILES = {
    "default": ((64, 32, 4, 3), (128, 64, 8, 3)),
    "small": ((32, 64, 4, 3), (64, 64, 4, 4)),  # few samples leave most of a larger one empty
    "deep": ((128, 16, 8, 4), (128, 32, 8, 5)),  # many samples: shorter steps, of which more are under way
}


def _range_config(name: str, dtype: torch.dtype) -> Config:
    rows, columns, num_warps, num_stages = _TILES[name][dtype != torch.float32]
    return Config(
        kernel=_range_gram_kernel,
        types=f"*i64 {TRITON_TYPES[dtype]} *i64 *fp32 i32 i32 i32",
        constants={"BLOCK_N": rows, "BLOCK_K": columns},
        unaligned=("MEMBERS", "N"),
        num_warps=num_warps,
        num_stages=num_stages,
        async_copies=True,
        name=name,
    )


_RANGE_GRAM = {(tile, dtype): _range_config(tile, dtype) for tile in _TILES for dtype in TRITON_TYPES}
_SUM_PRODUCTS = Config(
    kernel=_sum_products_kernel, types="*fp32 *i64 *i64 *fp32 i32 i32", constants={"BLOCK_N": 32}, unaligned=("N",)
)


def add_products(matrices: Sequence[Tensor], products: Sequence[Product], k_LNN: Tensor, config: str) -> None:
    """Add the products, in the order of their systems, as many at a time as the memory for partial sums allows."""
    (layers, n, _), device = k_LNN.shape, k_LNN.device
    launch = _RANGE_GRAM[config, matrices[0].dtype]
    table = table_of([GroupEntry([x], [x.stride(0) // WIDTH], 0) for x in matrices])
    tiles, blocks = cdiv(n, launch.block("N")), cdiv(n, _SUM_PRODUCTS.block("N"))
    row = cdiv(n, 16) * 16  # of partial sums, so that they are stored and loaded 16 bytes at a time for any N
    total = sum(length for _, *ranges in products for *_, length in filter(None, ranges))
    chunk = cdiv(max(_LEAST_CHUNK, n, total * tiles**2 // _PROGRAMS), launch.block("K")) * launch.block("K")
    for work, terms, starts in _rounds(products, layers, chunk, max(1, _PARTIAL_BYTES // (4 * n * row))):
        work_W4, terms_Q4 = (to_device([x for row in rows for x in row], device).view(-1, 4) for rows in (work, terms))
        starts_L = to_device(starts, device)
        part_WNM = torch.empty(len(work), n, row, dtype=torch.float32, device=device)
        launch.start((len(work), tiles, tiles), table, matrices[0], work_W4, part_WNM, len(matrices), n, row)
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


PRODUCT_CONFIGS = (*_RANGE_GRAM.values(), _SUM_PRODUCTS, TABLE)

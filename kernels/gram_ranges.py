# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Sums of (X₁ X₁ᵀ) ∘ (X₂ X₂ᵀ) over ranges of columns of some matrices, for the ops of `gram`.

The first kernel computes the Gram (or cross-Gram) matrices of all ranges, in chunks that fill the device; the second
one multiplies and adds them in a fixed order. A pointer table locates the matrices (see `pointer_table`).

Dimensions: N samples, L Fisher blocks, W work items, M samples rounded up, Q products of two Gram matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .pointer_table import TABLE, address, addresses, fields, number, table_of, to_device
from .primitives import load_tile
from .spec import TRITON_TYPES, Config, all_configs, cdiv, configs_of, tiling, tl, triton

WIDTH = 8  # entries that every range is a multiple of: in half precision they are one copy of 16 bytes
_PARTIAL_BYTES = 1 << 28  # memory that partial sums take at a time
_PROGRAMS = 512  # programs that fill a device
_LEAST_CHUNK = 256  # columns of a work item below which its partial sum costs more than it gains


class Range(NamedTuple):
    """Columns of a matrix: the first ones of the left and the right factor, and how many."""

    matrix: int
    left: int
    right: int
    length: int


class Product(NamedTuple):
    """A term of a block's sum: the Gram matrix of a range of inputs, times that of a range of output derivatives."""

    block: int
    inputs: Range
    derivatives: Range | None


# The fields of a matrix: its address, and the stride of its samples in units of WIDTH entries.
_ADDRESS, _STRIDE = fields(2)


@triton.jit
def _range_gram_kernel(
    table_ptr, like_ptr, work_ptr, part_ptr, ENTRIES, N, stride_pn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """part[w] = X[:, left range] X[:, right range]ᵀ of one work item w, a `Range`."""
    item = tl.program_id(0).to(tl.int64)
    matrix = tl.load(work_ptr + item * 4)
    left = tl.load(work_ptr + item * 4 + 1)
    right = tl.load(work_ptr + item * 4 + 2)
    length = tl.load(work_ptr + item * 4 + 3).to(tl.int32)
    if (left == right) & (tl.program_id(1) < tl.program_id(2)):
        return  # a symmetric product: the second kernel reads its lower tiles only
    # The divisibility that the work list guarantees; without it every load is a scalar one.
    left, right, length = tl.multiple_of(left, 8), tl.multiple_of(right, 8), tl.multiple_of(length, 8)
    x_ptr = address(table_ptr, _ADDRESS, matrix, ENTRIES, like_ptr, 8)
    stride_xn = number(table_ptr, _STRIDE, matrix, ENTRIES) * 8
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for start in range(0, length, BLOCK_K):
        x = load_tile(x_ptr + left, n, start + tl.arange(0, BLOCK_K), stride_xn, N, length)
        y = load_tile(x_ptr + right, m, start + tl.arange(0, BLOCK_K), stride_xn, N, length)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    at = (item * N + n)[:, None] * stride_pn + m[None, :]
    # Stores cover the padding too: their length is then a multiple of 16, whatever N is.
    tl.store(part_ptr + at, total, mask=(n < N)[:, None] & (m < stride_pn)[None, :])


@triton.jit
def _hadamard(part_ptr, product_ptr, n, m, N, stride_pn, BLOCK_N: tl.constexpr):
    """Return (Σ partial Grams of inputs) ∘ (Σ partial Grams of derivatives) of one product, given its terms."""
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
    """Add a block's products to one tile of K and to its mirror image; a cross-Gram counts with its transpose."""
    block = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) < tl.program_id(2):
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < N)[:, None] & (m < N)[None, :]
    at = (block * N + n)[:, None] * N + m[None, :]
    total = tl.load(k_ptr + at, mask=inside, other=0.0)
    for product in range(tl.load(start_ptr + block), tl.load(start_ptr + block + 1)):
        terms_ptr = product_ptr + product * 4
        total += _hadamard(part_ptr, terms_ptr, n, m, N, stride_pn, BLOCK_N)
        if tl.load(terms_ptr + 3) != 0:
            total += tl.trans(_hadamard(part_ptr, terms_ptr, m, n, N, stride_pn, BLOCK_N))
    if tl.program_id(1) == tl.program_id(2):
        total = 0.5 * (total + tl.trans(total))
    tl.store(k_ptr + at, total, mask=inside)
    mirrored = (block * N + m)[:, None] * N + n[None, :]
    tl.store(k_ptr + mirrored, tl.trans(total), mask=(m < N)[:, None] & (n < N)[None, :])


# For float32, which no tensor cores multiply, and for half precision.
_FLOAT32 = {
    "default": tiling(BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),
    "small": tiling(BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=3),  # few samples would leave most of a tile empty
    "deep": tiling(BLOCK_N=128, BLOCK_K=16, num_warps=8, num_stages=4),  # many samples: more, shorter steps in flight
}
_HALF = {
    "default": tiling(BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    "small": tiling(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
    "deep": tiling(BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=5),
}
_RANGE_GRAM = {
    dtype: configs_of(
        _FLOAT32 if dtype == torch.float32 else _HALF,
        kernel=_range_gram_kernel,
        types=f"*i64 {entries} *i64 *fp32 i32 i32 i32",
        unaligned=("ENTRIES", "N"),
        async_copies=True,
    )
    for dtype, entries in TRITON_TYPES.items()
}
_SUM_PRODUCTS = Config(
    kernel=_sum_products_kernel, types="*fp32 *i64 *i64 *fp32 i32 i32", constants={"BLOCK_N": 32}, unaligned=("N",)
)
PRODUCT_CONFIGS = (*all_configs(_RANGE_GRAM), _SUM_PRODUCTS, TABLE)


def add_products(matrices: Sequence[Tensor], products: Sequence[Product], k_LNN: Tensor, config: str) -> None:
    """Add products to their blocks' Gram matrices k_LNN in place.

    Args:
        matrices: [N, columns] each, of one dtype, with strides of samples that are multiples of WIDTH.
        products: in ascending order of their blocks. As many go at a time as the memory for partial sums allows.
        k_LNN: the sums, in float32.
        config: the name of the launch configuration.
    """
    (blocks, n, _), device = k_LNN.shape, k_LNN.device
    range_gram = _RANGE_GRAM[matrices[0].dtype][config]
    columns = {_ADDRESS: addresses(matrices), _STRIDE: [x.stride(0) // WIDTH for x in matrices]}
    table = table_of(columns, device)
    tiles, sum_tiles = cdiv(n, range_gram.block("N")), cdiv(n, _SUM_PRODUCTS.block("N"))
    padded_n = cdiv(n, 16) * 16  # so that partial sums are stored and loaded 16 bytes at a time for any N
    chunk = _chunk_size(products, n, tiles, range_gram.block("K"))
    for work, terms, begins in _rounds(products, blocks, chunk, max(1, _PARTIAL_BYTES // (4 * n * padded_n))):
        work_W4, terms_Q4 = (to_device([x for row in rows for x in row], device).view(-1, 4) for rows in (work, terms))
        begins_L = to_device(begins, device)
        part_WNM = torch.empty(len(work), n, padded_n, dtype=torch.float32, device=device)
        grid = (len(work), tiles, tiles)
        range_gram.start(grid, table, matrices[0], work_W4, part_WNM, len(matrices), n, padded_n)
        _SUM_PRODUCTS.start((blocks, sum_tiles, sum_tiles), part_WNM, terms_Q4, begins_L, k_LNN, n, padded_n)


def _chunk_size(products: Sequence[Product], n: int, tiles: int, step: int) -> int:
    """Return how many columns a work item has: enough items to fill the device, of whole steps of the kernel."""
    ranges = [one for product in products for one in (product.inputs, product.derivatives) if one is not None]
    total = sum(one.length for one in ranges)
    return cdiv(max(_LEAST_CHUNK, n, total * tiles**2 // _PROGRAMS), step) * step


def _rounds(
    products: Iterable[Product], blocks: int, chunk: int, slots: int
) -> Iterator[tuple[list[Range], list[tuple[int, int, int, bool]], list[int]]]:
    """Yield at most ``slots`` work items (or one product's), the terms of the sums, and each block's first term.

    A term is (first item of the inputs, first item of the derivatives, end, whether its transpose counts too).
    """
    work: list[Range] = []
    terms: list[tuple[int, int, int, bool]] = []
    counts = [0] * blocks
    for block, inputs, derivatives in products:
        left, right = _chunks(inputs, chunk), _chunks(derivatives, chunk)
        if work and len(work) + len(left) + len(right) > slots:
            yield work, terms, list(accumulate(counts, initial=0))
            work, terms, counts = [], [], [0] * blocks
        first = len(work)
        work += left + right
        terms.append((first, first + len(left), len(work), inputs.left != inputs.right))
        counts[block] += 1
    yield work, terms, list(accumulate(counts, initial=0))


def _chunks(columns: Range | None, chunk: int) -> list[Range]:
    if columns is None:
        return []
    matrix, left, right, length = columns
    return [Range(matrix, left + at, right + at, min(chunk, length - at)) for at in range(0, length, chunk)]

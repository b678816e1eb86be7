# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Sums of (X Xᵀ) ∘ (Y Yᵀ), where X and Y are ranges of columns of some matrices, for the ops of `gram`.

The first kernel computes the Gram matrix of each range, or the product X X'ᵀ of two ranges. It divides long ranges into
chunks, each of which is a work item, so that the device is full. The second kernel multiplies and adds the results in a
fixed order. A table of addresses locates the matrices (see `pointer_table`).

Dimensions: N samples, L Fisher blocks, W work items, M samples rounded up, Q products of two Gram matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from .pointer_table import TABLE, address, addresses, fields, number, table_of, to_device
from .primitives import add_exactly, add_product, load_tile
from .spec import (
    TRITON_TYPES,
    all_configs,
    cdiv,
    config_named,
    configs_of,
    in_tf32x3,
    single_config,
    tiling,
    tl,
    triton,
)

WIDTH = 8  # the length of every range is a multiple of this: 8 entries are 16 bytes in half precision, one copy
_PARTIAL_BYTES = 1 << 28  # the most memory that partial sums take at a time
_PROGRAMS = 512  # this many programs fill a device
_SUM_TILE = 32  # the second kernel adds tiles of this many samples squared
_LEAST_CHUNK = 256  # with fewer columns, storing a work item's partial sum costs more than the parallelism saves
_MOST_CHUNK = 4096  # with more columns, the sums of a work item lose digits; storing them costs a hundredth of these


class Range(NamedTuple):
    """Two ranges of columns of a matrix X; their product is X[:, left range] X[:, right range]ᵀ.

    Attributes:
        matrix: the index of the matrix.
        left: the first column of the left range.
        right: the first column of the right range; equal to ``left`` for a Gram matrix.
        length: the number of columns of each range.
    """

    matrix: int
    left: int
    right: int
    length: int


class Product(NamedTuple):
    """A term of the sum of a Fisher block: the Gram matrix of a range of inputs, times that of output gradients.

    Attributes:
        block: the index of the Fisher block.
        inputs: the range of inputs, or of columns of J.
        output_grads: the range of output gradients; None for explicit rows, which have no second factor.
    """

    block: int
    inputs: Range
    output_grads: Range | None


# The fields of the table: each matrix's address, and the stride between its samples in units of WIDTH entries.
_ADDRESS, _STRIDE = fields(2)


@triton.jit
def _range_gram_kernel(
    table_ptr, like_ptr, work_ptr, part_ptr, ENTRIES, N, stride_pn,
    SUM_TILE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part[w] = X[:, left range] X[:, right range]ᵀ for one tile of the work item w, which is a `Range`."""
    item = tl.program_id(0).to(tl.int64)
    matrix = tl.load(work_ptr + item * 4)
    left = tl.load(work_ptr + item * 4 + 1)
    right = tl.load(work_ptr + item * 4 + 2)
    length = tl.load(work_ptr + item * 4 + 3).to(tl.int32)
    if (left == right) & (tl.program_id(1) * BLOCK_N // SUM_TILE < tl.program_id(2) * BLOCK_N // SUM_TILE):
        return  # the product is symmetric, and the second kernel reads only its lower tiles
    # All ranges are multiples of WIDTH. Without this hint the compiler would load one entry at a time.
    left, right, length = tl.multiple_of(left, 8), tl.multiple_of(right, 8), tl.multiple_of(length, 8)
    x_ptr = address(table_ptr, _ADDRESS, matrix, ENTRIES, like_ptr, 8)
    stride_xn = number(table_ptr, _STRIDE, matrix, ENTRIES) * 8
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for start in range(0, length, BLOCK_K):
        x = load_tile(x_ptr + left, n, start + tl.arange(0, BLOCK_K), stride_xn, N, length)
        y = load_tile(x_ptr + right, m, start + tl.arange(0, BLOCK_K), stride_xn, N, length)
        total = add_product(total, x, tl.trans(y), PRECISION)
    at = (item * N + n)[:, None] * stride_pn + m[None, :]
    # The padding is stored too, so that the length of every store is a multiple of 16 for any N.
    tl.store(part_ptr + at, total, mask=(n < N)[:, None] & (m < stride_pn)[None, :])


@triton.jit
def _hadamard(part_ptr, product_ptr, n, m, N, stride_pn, BLOCK_N: tl.constexpr):
    """Return (Σ partial Gram matrices of inputs) ∘ (Σ partial Gram matrices of output gradients) of one product."""
    at = n.to(tl.int64)[:, None] * stride_pn + m[None, :]
    inside = (n < N)[:, None] & (m < stride_pn)[None, :]
    first, middle, last = tl.load(product_ptr), tl.load(product_ptr + 1), tl.load(product_ptr + 2)
    aa = _sum_items(part_ptr + at, first, middle, N * stride_pn, inside, BLOCK_N)
    gg = _sum_items(part_ptr + at, middle, last, N * stride_pn, inside, BLOCK_N)
    return aa * tl.where(middle == last, 1.0, gg)


@triton.jit
def _sum_items(ptr, first, last, stride, inside, BLOCK_N: tl.constexpr):
    total = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    rest = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    # Few samples have up to 512 items: the next five are on their way while one is added.
    for item in tl.range(first, last, num_stages=6):
        total, rest = add_exactly(total, rest, tl.load(ptr + item * stride, mask=inside, other=0.0))
    return total + rest


@triton.jit
def _sum_products_kernel(part_ptr, product_ptr, start_ptr, k_ptr, N, stride_pn, BLOCK_N: tl.constexpr):
    """Add a block's products to one tile of K and to its mirror image.

    A product of two different ranges is not symmetric; its transpose is added as well.
    """
    block = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) < tl.program_id(2):
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < N)[:, None] & (m < N)[None, :]
    at = (block * N + n)[:, None] * N + m[None, :]
    total = tl.load(k_ptr + at, mask=inside, other=0.0)
    rest = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for product in range(tl.load(start_ptr + block), tl.load(start_ptr + block + 1)):
        terms_ptr = product_ptr + product * 4
        total, rest = add_exactly(total, rest, _hadamard(part_ptr, terms_ptr, n, m, N, stride_pn, BLOCK_N))
        if tl.load(terms_ptr + 3) != 0:
            term = tl.trans(_hadamard(part_ptr, terms_ptr, m, n, N, stride_pn, BLOCK_N))
            total, rest = add_exactly(total, rest, term)
    total += rest
    if tl.program_id(1) == tl.program_id(2):
        total = 0.5 * (total + tl.trans(total))
    tl.store(k_ptr + at, total, mask=inside)
    mirrored = (block * N + m)[:, None] * N + n[None, :]
    tl.store(k_ptr + mirrored, tl.trans(total), mask=(m < N)[:, None] & (n < N)[None, :])


# For float32, which no tensor cores multiply, and for half precision. The smaller tiles are for few samples.
_FLOAT32 = {
    # With twice the columns in a step, Triton 3.8 and 3.9 spill on sm_80.
    "default": tiling(BLOCK_N=64, BLOCK_K=16, num_warps=4, num_stages=4),
    "small": tiling(BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=4),
    "smallest": tiling(BLOCK_N=16, BLOCK_K=64, num_warps=2, num_stages=4),
    "deep": tiling(BLOCK_N=128, BLOCK_K=16, num_warps=8, num_stages=4),  # for many samples: a deeper pipeline
    **in_tf32x3(BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3),
}
_HALF = {
    "default": tiling(BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    "small": tiling(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
    "smallest": tiling(BLOCK_N=16, BLOCK_K=128, num_warps=2, num_stages=4),
    "deep": tiling(BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=5),
}
_RANGE_GRAM = {
    dtype: configs_of(
        _FLOAT32 if dtype == torch.float32 else _HALF,
        kernel=_range_gram_kernel,
        types=f"*i64 {entries} *i64 *fp32 i32 i32 i32",
        constants={"SUM_TILE": _SUM_TILE, "PRECISION": "ieee"},
        unaligned=("ENTRIES", "N"),
        async_copies=True,
    )
    for dtype, entries in TRITON_TYPES.items()
}
# Every thread loads 16 bytes of a tile at a time; with fewer threads some versions of Triton spill.
_SUM_PRODUCTS = single_config(
    _sum_products_kernel,
    "*fp32 *i64 *i64 *fp32 i32 i32",
    tiling(BLOCK_N=_SUM_TILE, num_warps=8),
    unaligned=("N",),
    async_copies=True,
)
# The default for at most this many samples: a tile takes its whole time, however few samples fill it.
_AT_MOST = {16: "smallest", 32: "small", 128: "default"}
# The default for more: with 512 samples in float32, an H200 needs half the time with the largest tile.
_FOR_MORE = {torch.float32: "deep"}
PRODUCT_CONFIGS = (*all_configs(_RANGE_GRAM), _SUM_PRODUCTS, *TABLE)


def add_products(matrices: Sequence[Tensor], products: Sequence[Product], k_LNN: Tensor, config: str) -> None:
    """Add products to their blocks' Gram matrices k_LNN in place.

    Args:
        matrices: tensors [N, columns] of one dtype; the strides between samples are multiples of WIDTH.
        products: the products, in ascending order of their blocks. They are computed in as many rounds as the memory
            for partial sums requires.
        k_LNN: the sums, in float32.
        config: the name of the launch configuration.
    """
    (blocks, n, _), device = k_LNN.shape, k_LNN.device
    if config == "default":
        more = _FOR_MORE.get(matrices[0].dtype, config)
        config = next((name for most, name in _AT_MOST.items() if n <= most), more)
    range_gram = config_named(_RANGE_GRAM[matrices[0].dtype], config)
    columns = {_ADDRESS: addresses(matrices), _STRIDE: [x.stride(0) // WIDTH for x in matrices]}
    table = table_of(columns, device)
    tiles, sum_tiles = cdiv(n, range_gram.block("N")), cdiv(n, _SUM_PRODUCTS.block("N"))
    padded_n = cdiv(n, 16) * 16  # partial sums are then stored and loaded 16 bytes at a time for any N
    chunk = _chunk_size(products, n, tiles, range_gram.block("K"))
    for work, terms, begins in _rounds(products, blocks, chunk, max(1, _PARTIAL_BYTES // (4 * n * padded_n))):
        work_W4, terms_Q4 = (to_device([*chain(*items)], device).view(-1, 4) for items in (work, terms))
        begins_L = to_device(begins, device)
        part_WNM = torch.empty(len(work), n, padded_n, dtype=torch.float32, device=device)
        grid = (len(work), tiles, tiles)
        range_gram.start(grid, table, matrices[0], work_W4, part_WNM, len(matrices), n, padded_n)
        _SUM_PRODUCTS.start((blocks, sum_tiles, sum_tiles), part_WNM, terms_Q4, begins_L, k_LNN, n, padded_n)


def _chunk_size(products: Sequence[Product], n: int, tiles: int, step: int) -> int:
    """Return how many columns a work item has: few enough to fill the device, and a multiple of the kernel's step."""
    ranges = [columns for _, *both in products for columns in both if columns is not None]
    total = sum(columns.length for columns in ranges)
    return cdiv(min(max(_LEAST_CHUNK, n, total * tiles**2 // _PROGRAMS), _MOST_CHUNK), step) * step


def _rounds(
    products: Iterable[Product], blocks: int, chunk: int, slots: int
) -> Iterator[tuple[list[Range], list[tuple[int, int, int, bool]], list[int]]]:
    """Yield the work items of each round, the terms of its sums, and each block's first term.

    A round has at most ``slots`` work items, or those of a single product. A term is (first item of the inputs, first
    item of the output gradients, end of the items, whether its transpose is added too).
    """
    work: list[Range] = []
    terms: list[tuple[int, int, int, bool]] = []
    counts = [0] * blocks
    for block, inputs, output_grads in products:
        input_items, grad_items = _chunks(inputs, chunk), _chunks(output_grads, chunk)
        if work and len(work) + len(input_items) + len(grad_items) > slots:
            yield work, terms, list(accumulate(counts, initial=0))
            work, terms, counts = [], [], [0] * blocks
        first = len(work)
        work += input_items + grad_items
        terms.append((first, first + len(input_items), len(work), inputs.left != inputs.right))
        counts[block] += 1
    yield work, terms, list(accumulate(counts, initial=0))


def _chunks(columns: Range | None, chunk: int) -> list[Range]:
    if columns is None:
        return []
    matrix, left, right, length = columns
    return [Range(matrix, left + at, right + at, min(chunk, length - at)) for at in range(0, length, chunk)]

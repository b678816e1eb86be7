"""Gram matrices K[n, m] = ⟨J_n, J_m⟩, from the factors of J (`gram`) or from its rows (`gram_rows`).

A layer's inputs are one matrix with a range of columns for each position, and so are its output gradients.
`gram_ranges` multiplies the ranges of all layers in one launch.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient, L Fisher
blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import cpu, reference
from .dispatch import contiguous, define_op, dispatch, expect, zeros
from .factors import example_factors, expect_factors
from .gram_ranges import PRODUCT_CONFIGS, WIDTH, Product, Range, add_products
from .pointer_table import MAX_ENTRIES, is_aligned, launches_of
from .spec import FLOATING, KernelSpec, nbytes, normal


@define_op(fake=lambda a, g, blocks, count, *_: zeros(a[0], count, len(a[0]), len(a[0])))
def gram(a: list[Tensor], g: list[Tensor], blocks: list[int], count: int, config: str = "default") -> Tensor:
    """Return the Gram matrices k_LNN, K[n, m] = Σ_γpq ⟨a_nγp, a_mγq⟩ ⟨g_nγp, g_mγq⟩ (equations 5 and 11; M3).

    The work grows with the square of P. With more than some dozens of positions, `sample_grads` followed by `gram_rows`
    is cheaper.

    Args:
        a: inputs [N, G, P, I] of each layer, with one N for all.
        g: output gradients [N, G, P, O] of each layer.
        blocks: the index of each layer's Fisher block; the Gram matrices of the layers of a block are added.
        count: L, the number of blocks.
        config: the launch configuration of the kernels.

    Returns:
        k_LNN, in the dtype of ``a``, but in float32 for half precision.

    Raises:
        ValueError: there is no layer, the shapes do not belong together, or there is no such launch configuration.
    """
    if not a:
        raise ValueError("gram needs the factors of at least one layer, got none")
    for a_NGPI, g_NGPO in zip(a, g, strict=True):
        expect("a_NGPI", a_NGPI, a[0].shape[0], *a_NGPI.shape[1:])
        expect_factors(a_NGPI, g_NGPO)
    return dispatch(_gram, cpu.gram, PRODUCT_CONFIGS, config, a, g, blocks, count)


def _gram(a: list[Tensor], g: list[Tensor], blocks: list[int], count: int, config: str = "default") -> Tensor:
    k_LNN = zeros(a[0], count, len(a[0]), len(a[0]))
    for _, indices in launches_of([x.dtype for x in a], order=blocks, most=MAX_ENTRIES // 2):
        matrices: list[Tensor] = []
        products: list[Product] = []
        for t in indices:
            a_NGPI, g_NGPO = _padded(a[t]), _padded(g[t].to(a[t].dtype))
            _, groups, positions, inputs = a_NGPI.shape
            at, outputs = len(matrices), g_NGPO.shape[3]
            for i, j in _pairs(groups, positions):
                of_inputs = Range(at, i * inputs, j * inputs, inputs)
                products.append(Product(blocks[t], of_inputs, Range(at + 1, i * outputs, j * outputs, outputs)))
            matrices += [a_NGPI.flatten(1), g_NGPO.flatten(1)]
        add_products(matrices, products, k_LNN, config)
    return k_LNN


def _padded(x: Tensor) -> Tensor:
    """Return the tensor, aligned and with zeros up to a multiple of WIDTH in its last dimension; copy if necessary."""
    x = contiguous(x) if x.shape[-1] % WIDTH == 0 else pad(x, (0, -x.shape[-1] % WIDTH))
    return x if x.storage_offset() % WIDTH == 0 else x.clone()


def _pairs(groups: int, positions: int) -> Iterator[tuple[int, int]]:
    """Yield each unordered pair of positions of a group once, counting positions through all groups."""
    for first in range(0, groups * positions, positions):
        yield from combinations_with_replacement(range(first, first + positions), 2)


@define_op(fake=lambda j, blocks, count, *_: zeros(j[0], count, len(j[0]), len(j[0])))
def gram_rows(j: list[Tensor], blocks: list[int], count: int, config: str = "default") -> Tensor:
    """Return the Gram matrices k_LNN, K = J Jᵀ, summed over the weights of a block (equation 5; M3).

    With one position, or a few, `gram` is faster: it takes the factors, which are smaller than the rows.

    Args:
        j: rows [N, K] of each weight, with one N for all.
        blocks: the index of each weight's Fisher block.
        count: L, the number of blocks.
        config: the launch configuration of the kernels.

    Returns:
        k_LNN, in the dtype of ``j``, but in float32 for half precision.

    Raises:
        ValueError: the weights have different numbers of rows, or there is no such launch configuration.
    """
    for j_NK in j:
        expect("j_NK", j_NK, j[0].shape[0], j_NK.shape[1])
    return dispatch(_gram_rows, cpu.gram_rows, PRODUCT_CONFIGS, config, j, blocks, count)


def _gram_rows(j: list[Tensor], blocks: list[int], count: int, config: str = "default") -> Tensor:
    k_LNN = zeros(j[0], count, len(j[0]), len(j[0]))
    for _, indices in launches_of([j_NK.dtype for j_NK in j], order=blocks):
        matrices = [j[t] if is_aligned(j[t], WIDTH) else _padded(j[t]) for t in indices]
        ranges = [Range(index, 0, 0, x.shape[1]) for index, x in enumerate(matrices)]
        products = [Product(blocks[t], columns, None) for t, columns in zip(indices, ranges, strict=True)]
        add_products(matrices, products, k_LNN, config)
    return k_LNN


def _gram_example(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[int], int]:
    a, g = zip(*(example_factors(dtype, device, shape) for shape in shapes), strict=True)
    return list(a), list(g), [1, *range(1, len(shapes))], len(shapes)


def _rows_example(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[int], int]:
    return [normal(70, k, dtype=dtype, device=device, seed=k) for k in (1000, 2001, 8)], [1, 0, 1], 3


def _gram_flops(a: list[Tensor], g: list[Tensor], *_: object) -> int:
    n = a[0].shape[0]
    return sum(2 * n * x.shape[2] * (x.numel() + y.numel()) for x, y in zip(a, g, strict=True))


_SHAPES = {
    "one position": ((150, 1, 1, 700, 11), (150, 1, 1, 9, 70), (150, 1, 1, 8, 16)),
    "groups and positions": ((41, 2, 3, 20, 9), (41, 1, 4, 5, 13)),
}
SPECS = (
    KernelSpec(
        name="gram",
        triton_impl=_gram,
        torch_impl=cpu.gram,
        reference=reference.gram,
        examples={name: partial(_gram_example, shapes) for name, shapes in _SHAPES.items()},
        flops=_gram_flops,
        bytes=lambda a, g, blocks, count: nbytes(*a, *g) + 4 * count * a[0].shape[0] ** 2,
        configs=PRODUCT_CONFIGS,
        dtypes=FLOATING,
        mutates=0,
    ),
    KernelSpec(
        name="gram_rows",
        triton_impl=_gram_rows,
        torch_impl=cpu.gram_rows,
        reference=reference.gram_rows,
        examples={"aligned and unaligned": _rows_example},
        flops=lambda j, *_: sum(2 * x.shape[0] * x.numel() for x in j),
        bytes=lambda j, blocks, count: nbytes(*j) + 4 * count * j[0].shape[0] ** 2,
        configs=PRODUCT_CONFIGS,
        dtypes=FLOATING,
        mutates=0,
    ),
)

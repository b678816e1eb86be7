"""One Fisher block as the optimizer holds it now, as dense tensors (docs/math.md, M5, M7 and M17).

Dimensions: R stored rows of J; K entries of all parameters of the block, k of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams, full_name
from tengrad_triton.curvature.jacobians.base import Jacobian
from tengrad_triton.curvature.scaling import Multiplier
from tengrad_triton.curvature.woodbury import Curvature, FisherBlocks
from tengrad_triton.layers import flatten_rows, unflatten_rows
from tengrad_triton.misspellings import did_you_mean


@dataclass(frozen=True)
class HeldParameter:
    """One parameter of a block. All tensors that it returns are in float64.

    Attributes:
        name: its name in the model.
        shape: its shape.
        jacobian: its J, of which the rows of J D⁻¹ are stored.
    """

    name: str
    shape: torch.Size
    jacobian: Jacobian

    def rows(self) -> Tensor:
        """Return the rows of J, [R, *shape]."""
        j_Rk, scale = self.jacobian.explicit_rows().double(), self.jacobian.scale
        return unflatten_rows(j_Rk if scale is None else _in_float64(scale.itself()).of_rows(j_Rk), self.shape)

    def scaled_rows(self) -> Tensor:
        """Return the rows of J D⁻¹, [R, k]."""
        return unflatten_rows(self.jacobian.explicit_rows().double(), self.shape).flatten(1)

    def scale(self, of_inverse: bool, device: torch.device) -> Tensor:
        """Return D, or D⁻¹, as a matrix [k, k]; the identity without scaling."""
        units_kk, scale = torch.eye(self.shape.numel(), dtype=torch.float64, device=device), self.jacobian.scale
        if scale is None:
            return units_kk
        by = _in_float64(scale.inverse if of_inverse else scale.itself())
        rows_kk = by.of_rows(flatten_rows(units_kk.view(-1, *self.shape)))
        return unflatten_rows(rows_kk, self.shape).flatten(1)


def _in_float64(by: Multiplier) -> Multiplier:
    return Multiplier(by.left.double(), by.right.double())


@dataclass(frozen=True)
class HeldBlock:
    """One block of the present curvature.

    Attributes:
        name: as `TENGraD.summary` shows it.
        parameters: those with J, in the order of the block's layers.
        curvature: the present one.
        index: the block's place in it.
    """

    name: str
    parameters: tuple[HeldParameter, ...]
    curvature: Curvature
    index: int

    @property
    def entries(self) -> int:
        """Return K."""
        return sum(one.shape.numel() for one in self.parameters)

    @property
    def stored_rows(self) -> int:
        """Return R: fewer than the refresh's rows after M7 or M12."""
        return self.parameters[0].jacobian.rows

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of what the optimizer computes with: float64, or else float32."""
        return self.inverse_RR().dtype

    def inverse_RR(self) -> Tensor:
        """Return W with (K + N α I)⁻¹ = Wᵀ W, without the columns of rows that a compression dropped."""
        name = list(self.curvature.blocks)[self.index]
        held = next(one for one in self.curvature.inverses if name in one.blocks)
        return held.inverse_BNN[held.blocks.index(name)][:, : self.stored_rows]

    def places(self) -> dict[str, slice]:
        """Return where each parameter's entries are among the K."""
        found, start = {}, 0
        for one in self.parameters:
            found[one.name] = slice(start, start + one.shape.numel())
            start += one.shape.numel()
        return found

    def fisher(self) -> Tensor:
        """Return F = Jᵀ J / N, [K, K]."""
        j_RK = torch.cat([one.rows().flatten(1) for one in self.parameters], 1)
        return j_RK.mT @ j_RK / self.curvature.rows

    def inverse(self) -> Tensor:
        """Return (D⁻¹ − J̃ᵀ Wᵀ W J̃) / c with J̃ = J D⁻¹, [K, K]: what a step multiplies V by.

        c is the number that the step divides by: α without scaling, and 1 with it, unless the factorization failed.
        """
        j_RK = torch.cat([one.scaled_rows() for one in self.parameters], 1)
        half_RK = self.inverse_RR().double() @ j_RK
        return (self.scale(of_inverse=True) - half_RK.mT @ half_RK) / self.curvature.divisor_L[self.index].double()

    def scale(self, of_inverse: bool = False) -> Tensor:
        """Return D, or D⁻¹, of all parameters as a matrix [K, K]; the identity without scaling."""
        device = self.curvature.damping_L.device
        return torch.block_diag(*(one.scale(of_inverse, device) for one in self.parameters))

    @property
    def has_failed(self) -> bool:
        """Whether rounding made the factorization of K + N α I impossible: W is 0 then."""
        return self.stored_rows > 0 and not bool(self.inverse_RR().any())

    def check_size(self, numbers: int, what: str, max_bytes: float, instead: str) -> None:
        """Raise `ValueError` if so many numbers in float64 are more than ``max_bytes``, `TypeError` for no number."""
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, (int, float)):
            raise TypeError(f"max_bytes must be a number of bytes, got {max_bytes!r}")
        size = 8 * numbers
        if not size <= max_bytes:
            raise ValueError(
                f"block {self.name!r} has {self.entries:,} parameters and {self.stored_rows:,} rows: {what} take "
                f"{size:,} bytes, more than max_bytes={max_bytes:g}: {instead}, or raise "
                "max_bytes"
            )


def find_block(
    name: str, layers: Sequence[LayerParams], curvature: Curvature | None, planned: FisherBlocks
) -> HeldBlock:
    """Return a block of the present curvature by its name in `TENGraD.summary`.

    Args:
        name: of the block; ``"."`` for the model itself.
        layers: of the optimizer.
        curvature: the present one, or None before the first refresh.
        planned: the blocks that all layers with rows form.

    Raises:
        RuntimeError: there is no curvature at present.
        ValueError: the block is unknown, or has no rows.
    """
    key = "" if name == "." and "." not in planned else name
    _check_name(name, key, layers, planned)
    if curvature is None:
        raise RuntimeError(
            f"block {name!r} has no curvature yet: take a step first (the first one refreshes the curvature)"
        )
    if curvature.is_released:
        raise RuntimeError(
            f"the curvature of block {name!r} is released: its memory was freed for the refresh that is due, after the "
            "forward; look at it before that forward, or after optimizer.step()"
        )
    if key not in curvature.blocks:
        raise ValueError(
            f"block {name!r} had no part in the last refresh (frozen, not called, or without a gradient): its "
            "parameters take the SGD step until a refresh has rows of them"
        )
    own = [(layer, param_name) for layer in curvature.blocks[key] for param_name in curvature.jacobians[layer]]
    by_name = {layer.name: layer.parameters for layer in layers}
    parameters = tuple(
        HeldParameter(full_name(layer, param), by_name[layer][param].shape, curvature.jacobians[layer][param])
        for layer, param in own
    )
    return HeldBlock(name, parameters, curvature, list(curvature.blocks).index(key))


def _check_name(name: str, key: str, layers: Sequence[LayerParams], planned: FisherBlocks) -> None:
    """Raise `ValueError` unless a block of this name can exist; say which one is probably meant."""
    if key in planned:
        return
    without = {layer.name: layer.why_sgd for layer in layers if layer.why_sgd is not None}
    if key in without:
        raise ValueError(f"the parameters of {name!r} take the SGD step ({without[key]}): they have no Fisher block")
    blocks = {block or ".": names for block, names in planned.items()}
    inside = _blocks_with(name, key, layers, blocks)
    if inside is not None:
        raise ValueError(f"no Fisher block is named {name!r}: {name!r} is a part of block {inside!r}")
    listed = ", ".join(map(repr, list(blocks)[:20])) + (", …" if len(blocks) > 20 else "")
    raise ValueError(f"no Fisher block is named {name!r}{did_you_mean(name, blocks)}: the blocks are {listed}")


def _blocks_with(name: str, key: str, layers: Sequence[LayerParams], blocks: Mapping[str, Sequence[str]]) -> str | None:
    """Return the block that has a layer or a parameter of this name."""
    for layer in layers:
        if key == layer.name or any(layer.full_name_of(param_name) == name for param_name in layer.parameters):
            return next((block for block, names in blocks.items() if layer.name in names), None)
    return None

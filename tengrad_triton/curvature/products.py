"""The base class of per-sample gradients whose products are computed for many parameters in one kernel launch.

Dimensions: L Fisher blocks, N rows of J.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from tengrad_triton.curvature.choices import Ops, Product, ProductKernels, implementation_names
from tengrad_triton.curvature.target import Target


def implementations(ops: Ops, kernels: Sequence[str]) -> Hashable:
    """Return the implementations that ``ops`` has for these kernels, where they are not the default ones.

    Jacobians that agree on them can share a launch; overrides of other kernels do not matter.
    """
    if not ops.kernel_overrides:  # nearly always so, and every step asks several times for every weight
        return ()
    names = implementation_names(ops.kernel_overrides)
    return tuple(names[kernel] for kernel in kernels if kernel in names)


class Grouped(ABC):
    """A `Jacobian` that shares kernel launches with others of the same `group_key` (see `grouped`).

    The ``*_grouped`` functions take one entry a Jacobian; ``blocks`` says to which line of the result each one adds.
    """

    ops: Ops

    @property
    @abstractmethod
    def rows(self) -> int:
        """Return N."""

    @property
    @abstractmethod
    def product_kernels(self) -> ProductKernels:
        """Return the kernels that each product consists of."""

    @abstractmethod
    def _layout(self) -> Hashable:
        """Return what a kernel's launch takes for granted of the stored tensors, beside their sizes."""

    def group_key(self, product: Product) -> Hashable:
        """Return the key of a product's launch: Jacobians with equal keys share it."""
        return self._layout(), implementations(self.ops, self.product_kernels[product])

    @staticmethod
    @abstractmethod
    def gram_grouped(jacobians: Sequence[Any], blocks: list[int], count: int) -> Tensor:
        """Return k_LNN, the sum of `Jacobian.gram` over the Jacobians of each of ``count`` blocks."""

    @staticmethod
    @abstractmethod
    def project_grouped(jacobians: Sequence[Any], v: Sequence[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
        """Return y_LN of this shape, the sum of `Jacobian.project` over the Jacobians of each block."""

    @staticmethod
    @abstractmethod
    def expand_update_grouped_(
        jacobians: Sequence[Any], targets: Sequence[Target], w: Sequence[Tensor], dampings: Sequence[Tensor]
    ) -> None:
        """Apply each Jacobian's `Jacobian.expand_update_`; all targets agree on ``nesterov``."""

    def gram(self) -> Tensor:
        """Return k_NN (see `Jacobian.gram`)."""
        return self.gram_grouped([self], [0], 1)[0]

    def project(self, v: Tensor) -> Tensor:
        """Return y_N (see `Jacobian.project`)."""
        return self.project_grouped([self], [v], [0], [1, self.rows])[0]

    def expand_update_(self, target: Target, w_N: Tensor, damping: Tensor) -> None:
        """Step one target (see `Jacobian.expand_update_`)."""
        self.expand_update_grouped_([self], [target], [w_N], [damping])

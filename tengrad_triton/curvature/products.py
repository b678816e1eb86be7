"""The three products with J of which refreshes and steps consist, for what shares a launch.

Dimensions: L systems, N rows of J.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from tengrad_triton.curvature.choices import Product, ProductKernels, implementation_names
from tengrad_triton.curvature.target import Target

__all__ = ["Grouped", "Product", "implementations"]


def implementations(ops: Any, kernels: Sequence[str]) -> Hashable:
    """Return who serves these kernels: whatever a plan says of others splits no launch of theirs."""
    if not ops.kernel_overrides:  # as good as always, and this is asked several times for every weight and step
        return ()
    by = implementation_names(ops.kernel_overrides)
    return tuple(by[kernel] for kernel in kernels if kernel in by)


class Grouped(ABC):
    """A Jacobian that is served together with those of the same ``team`` (see `teams`).

    The functions take an entry for each member; ``systems`` says which row of the result it adds to.
    """

    @property
    @abstractmethod
    def rows(self) -> int:
        """Return N."""

    @abstractmethod
    def team(self, product: Product) -> Hashable:
        """Return what members have in common: those that say the same can share this product's launch."""

    @property
    @abstractmethod
    def kernels(self) -> ProductKernels:
        """Return what each product is made of."""

    @staticmethod
    @abstractmethod
    def gram_grouped(members: Sequence[Any], systems: list[int], count: int) -> Tensor:
        """Return k_LNN, each system's sum of its members' `Jacobian.gram`."""

    @staticmethod
    @abstractmethod
    def project_grouped(members: Sequence[Any], v: Sequence[Tensor], systems: list[int], shape: list[int]) -> Tensor:
        """Return y_LN of this shape, each system's sum of its members' `Jacobian.project`."""

    @staticmethod
    @abstractmethod
    def expand_update_grouped_(
        members: Sequence[Any], targets: Sequence[Target], w: Sequence[Tensor], divisors: Sequence[Tensor]
    ) -> None:
        """Do each member's `Jacobian.expand_update_`; the targets agree on ``nesterov``."""

    def gram(self) -> Tensor:  # noqa: D102
        return self.gram_grouped([self], [0], 1)[0]

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        return self.project_grouped([self], [v], [0], [1, self.rows])[0]

    def expand_update_(self, target: Target, w_N: Tensor, divisor: Tensor) -> None:  # noqa: D102
        self.expand_update_grouped_([self], [target], [w_N], [divisor])

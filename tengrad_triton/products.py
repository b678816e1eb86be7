"""The three products with J of which refreshes and steps consist, for what shares a launch.

Dimensions: L systems, N rows of J.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from tengrad_triton.plan import Kernels, Product, served_by
from tengrad_triton.update import Target

__all__ = ["Product", "Team", "servers"]


def servers(ops: Any, kernels: Sequence[str]) -> Hashable:
    """Return who serves these kernels: whatever a plan says of others splits no launch of theirs."""
    if not ops.torch_for:  # as good as always, and this is asked several times for every weight and step
        return ()
    by = served_by(ops.torch_for)
    return tuple(by[kernel] for kernel in kernels if kernel in by)


class Team(ABC):
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
    def kernels(self) -> Kernels:
        """Return what each product is made of."""

    @staticmethod
    @abstractmethod
    def gram_all(members: Sequence[Any], systems: list[int], count: int) -> Tensor:
        """Return k_LNN, each system's sum of its members' `Jacobian.gram`."""

    @staticmethod
    @abstractmethod
    def project_all(members: Sequence[Any], v: Sequence[Tensor], systems: list[int], shape: list[int]) -> Tensor:
        """Return y_LN of this shape, each system's sum of its members' `Jacobian.project`."""

    @staticmethod
    @abstractmethod
    def expand_update_all_(
        members: Sequence[Any], targets: Sequence[Target], w: Sequence[Tensor], divisors: Sequence[Tensor]
    ) -> None:
        """Do each member's `Jacobian.expand_update_`; the targets agree on ``nesterov``."""

    def gram(self) -> Tensor:  # noqa: D102
        return self.gram_all([self], [0], 1)[0]

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        return self.project_all([self], [v], [0], [1, self.rows])[0]

    def expand_update_(self, target: Target, w_N: Tensor, divisor: Tensor) -> None:  # noqa: D102
        self.expand_update_all_([self], [target], [w_N], [divisor])

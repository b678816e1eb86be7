"""The three products with J of which refreshes and steps consist: which kernels each takes, and who shares a launch.

Dimensions: L systems, N rows of J.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from tengrad_triton.plan import served_by
from tengrad_triton.update import Target

Product = Literal["gram", "project", "expand"]
Kernels = Mapping[Product, Sequence[str]]
"""What each product is made of, the usual one first."""
ROW_KERNELS: Kernels = {"gram": ("gram_rows",), "project": ("project_rows",), "expand": ("expand_rows_update_",)}
FACTOR_KERNELS: Kernels = {
    "gram": ("gram", "gram_rows", "sample_grads", "conv_sample_grads"),
    "project": ("project",),
    "expand": ("expand_update_",),
}
WINDOW_KERNELS: Kernels = {
    **FACTOR_KERNELS,
    "project": ("project_windows",),
    "expand": ("expand_windows_update_",),
}


def servers(ops: Any, kernels: Sequence[str]) -> Hashable:
    """Return who serves these kernels: whatever a plan says of others splits no launch of theirs."""
    return tuple(map(served_by(ops.torch_for).get, kernels))


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

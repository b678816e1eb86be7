"""Projections in sample space: J D⁻¹ V of dense weights from the factors of V, without V itself (docs/math.md, M19)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from tengrad_triton.compiled.static_buffers import mark_static
from tengrad_triton.curvature.jacobians.factored import Factored
from tengrad_triton.curvature.woodbury import Curvature

Weight = tuple[str, str]
"""A weight by the names of its layer and of the parameter within it."""


def dense_jacobians(curvature: Curvature, layers: Collection[str]) -> dict[Weight, Factored]:
    """Return those J, of the weights of some layers, that are dense (`Factored.is_dense`)."""
    return {
        (name, param_name): one
        for name in layers
        for param_name, one in curvature.jacobians.get(name, {}).items()
        if isinstance(one, Factored) and one.is_dense
    }


def projected_means(curvature: Curvature, momenta: Mapping[Weight, Tensor]) -> dict[Weight, Tensor]:
    """Return J D⁻¹ m of the running mean m of each dense weight."""
    jacobians = dense_jacobians(curvature, {name for name, _ in momenta})
    return {weight: jacobians[weight].project(m) for weight, m in momenta.items()}


class ProjectedMeans:
    """J D⁻¹ m of dense weights, where m are the running means of their gradients.

    A compiled step updates them as it updates m. They are computed from m where another step was taken in between.

    Args:
        are_static: whether they keep their addresses, for CUDA graphs.
    """

    def __init__(self, are_static: bool) -> None:
        self._are_static = are_static
        self._means: dict[Weight, Tensor] = {}
        self._key: tuple[Any, ...] | None = None

    def of(self, curvature: Curvature, momenta: Mapping[Weight, Tensor], steps: int) -> dict[Weight, Tensor]:
        """Return J D⁻¹ m of each m after so many steps. The step updates them in place; `keep` must follow it."""
        key, self._key = self._key, None  # a step that fails leaves them in no known state
        if key is None or key[0] is not curvature or key[1:] != _state(momenta, steps):
            self._replace(projected_means(curvature, momenta))
        return self._means

    def keep(
        self,
        curvature: Curvature,
        momenta: Mapping[Weight, Tensor],
        steps: int,
        new: Mapping[Weight, Tensor] | None = None,
    ) -> None:
        """Note that they, or the ``new`` ones in their place, belong to the present m, after so many steps."""
        if new is not None:
            self._replace(new)
        self._key = curvature, *_state(momenta, steps)

    def _replace(self, new: Mapping[Weight, Tensor]) -> None:
        for weight, y_N in new.items():
            old = self._means.get(weight)
            if old is not None and (old.shape, old.dtype, old.device) == (y_N.shape, y_N.dtype, y_N.device):
                old.copy_(y_N)
                continue
            self._means[weight] = y_N.clone()
            if self._are_static:
                mark_static(self._means[weight])
        self._means = {weight: self._means[weight] for weight in new}


def _state(momenta: Mapping[Weight, Tensor], steps: int) -> tuple[int, list[tuple[Weight, int, int]]]:
    """Return what changes with every change of m: its version counts writes in place."""
    return steps, [(weight, m.data_ptr(), m._version) for weight, m in momenta.items()]

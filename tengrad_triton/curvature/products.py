"""The three products with J, for many parameters at once: one kernel launch for all Jacobians that can share it.

Apart from M7 and M12, refreshes and steps compute nothing else with J: gram (K = J Jᵀ), project (J V) and expand
(Jᵀ w, with the update).

Dimensions: L Fisher blocks, N rows of J, R directions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from tengrad_triton.curvature.choices import Ops, Product, ProductKernels, Representation, implementation_names
from tengrad_triton.curvature.target import Target
from tengrad_triton.kernels import TensorList

Operands = tuple[Any, ...]
"""Arguments of an op that stand for J: its lists of rows or of factors."""


class UpdateState(NamedTuple):
    """What an update of several parameters reads and writes: lists with one tensor for each of them.

    Attributes:
        params: updated in place.
        momenta: updated in place.
        grads: the gradients of what is minimized.
        settings: [lr, momentum, weight_decay, shrink] of each.
        nesterov: whether the steps look ahead along the momenta.
    """

    params: list[Tensor]
    momenta: list[Tensor]
    grads: list[Tensor]
    settings: list[Tensor]
    nesterov: bool


class Jacobian(ABC):
    """Rows J_n of one parameter, N of them.

    Jacobians of the same `group_key` share kernel launches. `PerSample` calls the ops `gram_rows`, `project_rows` and
    `expand_rows_update_`. `Factored` calls `gram`, or `gram_rows` of rows that it forms, `project` and
    `expand_update_`, or the last two for convolutions (`jacobian.py`). A `SingleJacobian` shares no launch.

    The ``*_grouped`` functions take one list entry for each Jacobian. Where the result has ``count`` blocks, Jacobian t
    adds to index ``blocks[t]``.

    Attributes:
        ops: the kernels that compute the products (see `choices.ops_for`).
    """

    ops: Ops

    @property
    @abstractmethod
    def rows(self) -> int:
        """Return N, the number of stored rows: fewer than the refresh's after M7 or M12."""

    @property
    @abstractmethod
    def product_kernels(self) -> ProductKernels:
        """Return the kernels that each product consists of."""

    @property
    @abstractmethod
    def representation(self) -> Representation:
        """Return the name of this representation."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes stored."""

    @abstractmethod
    def combine(self, directions_RN: Tensor) -> Jacobian:
        """Return R linear combinations of the rows, as explicit rows."""

    @abstractmethod
    def append_history(self, older: Jacobian, rows: int) -> Jacobian | None:
        """Return these rows, followed by the first ``rows`` rows of ``older``; None where the two do not fit."""

    @abstractmethod
    def pack(self) -> dict[str, Any]:
        """Return tensors and plain numbers from which `checkpoint.unpack` makes the same object."""

    @abstractmethod
    def _layout(self) -> Hashable:
        """Return what has to be equal for Jacobians to share a launch, apart from sizes: types, dtypes, device."""

    def group_key(self, product: Product) -> Hashable:
        """Return the key of a product's launch: Jacobians with equal keys share it."""
        names = implementation_names(self.ops.kernel_overrides)
        own = tuple(names[kernel] for kernel in self.product_kernels[product] if kernel in names)
        return self._layout(), own

    @abstractmethod
    def view(self, x: Tensor) -> Tensor:
        """Return a view of a parameter-shaped tensor in the shape that `project_grouped` and the update take."""

    @staticmethod
    @abstractmethod
    def gram_grouped(jacobians: Sequence[Any], blocks: list[int], count: int) -> Tensor:
        """Return k_LNN, the sum of `gram` over the Jacobians of each of ``count`` blocks."""

    @staticmethod
    @abstractmethod
    def operands_of(jacobians: Sequence[Any]) -> Operands:
        """Return what the two functions below take of the Jacobians: lists, as the ops take them."""

    @abstractmethod
    def project_grouped(self, operands: Operands, v: list[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
        """Return y_LN of this shape, the sum of `project` over the Jacobians of each block; ``v`` are views.

        Any of the Jacobians can do it for all.
        """

    @abstractmethod
    def expand_update_grouped_(
        self, operands: Operands, state: UpdateState, w: list[Tensor], dampings: list[Tensor]
    ) -> None:
        """Apply each Jacobian's `expand_update_`; the parameters, momenta and gradients of ``state`` are views.

        Any of the Jacobians can do it for all. Each w has as many entries as its J has rows.
        """

    def gram(self) -> Tensor:
        """Return k_NN with K[n, m] = ⟨J_n, J_m⟩."""
        return self.gram_grouped([self], [0], 1)[0]

    def project(self, v: Tensor) -> Tensor:
        """Return y_N with y_n = ⟨J_n, v⟩ for a tensor ``v`` of the parameter's shape."""
        return self.project_grouped(self.operands_of([self]), [self.view(v)], [0], [1, self.rows])[0]

    def expand_update_(self, target: Target, grad: Tensor, w_N: Tensor, damping: Tensor) -> None:
        """Step the target's parameter in place along (grad − Σ_n w_n J_n) / damping, by the rule of `kernels.update_`.

        Entries of ``w_N`` beyond N are not read.
        """
        params, momenta, grads = ([self.view(x)] for x in (target.parameter, target.momentum, grad))
        state = UpdateState(params, momenta, grads, [target.settings], target.nesterov)
        self.expand_update_grouped_(self.operands_of([self]), state, [w_N[: self.rows]], [damping])


class SingleJacobian(Jacobian):
    """A `Jacobian` that shares no launch: it defines gram, project and expand for itself."""

    @override
    def _layout(self) -> Hashable:
        return id(self)

    @override
    def view(self, x: Tensor) -> Tensor:
        return x

    @staticmethod
    @override
    def gram_grouped(jacobians: Sequence[SingleJacobian], blocks: list[int], count: int) -> Tensor:
        return _placed(jacobians[0].gram(), blocks[0], count)

    @staticmethod
    @override
    def operands_of(jacobians: Sequence[SingleJacobian]) -> Operands:
        return ()

    @override
    def project_grouped(self, operands: Operands, v: list[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
        y_N, (count, rows) = self.project(v[0]), shape
        return _placed(torch.nn.functional.pad(y_N, (0, rows - len(y_N))), blocks[0], count)

    @override
    def expand_update_grouped_(
        self, operands: Operands, state: UpdateState, w: list[Tensor], dampings: list[Tensor]
    ) -> None:
        tensors = (state.params[0], state.momenta[0], state.settings[0])
        target = Target("", "", *tensors, nesterov=state.nesterov, spring=0.0, group=0)
        self.expand_update_(target, state.grads[0], w[0], dampings[0])


def _placed(one: Tensor, block: int, count: int) -> Tensor:
    whole = one.new_zeros(count, *one.shape)
    whole[block] = one
    return whole


LayerJacobian = Mapping[str, Jacobian]
"""The J of every parameter of a layer, by the parameter's name within it."""
Jacobians = Mapping[str, LayerJacobian]
"""The J of every layer, by the layer's name."""


def grams(jacobians: Sequence[Jacobian], blocks: Sequence[int], count: int) -> Tensor:
    """Return k_LNN, the Gram matrix of every block: the sum of its parameters', which lie side by side in J."""
    parts = []
    for places in _groups([one.group_key("gram") for one in jacobians]):
        own, of_block = [jacobians[place] for place in places], [blocks[place] for place in places]
        parts.append(own[0].gram_grouped(own, of_block, count))
    return sum(parts[1:], start=parts[0])


class BlockEntry(NamedTuple):
    """One parameter of a Fisher block: its J, the index of its block, and the target of its update."""

    jacobian: Jacobian
    block: int
    target: Target


class ProductPlan:
    """The products with J that a step takes, planned once for all steps with the same J and the same parameters.

    The plan knows which entries share launches, and has views of their parameters and momenta. The steps differ only in
    the gradients, the coefficients w and the dampings.
    """

    def __init__(self, entries: Sequence[BlockEntry]) -> None:
        keys = [
            (one.jacobian.group_key("project"), one.jacobian.group_key("expand"), one.target.nesterov)
            for one in entries
        ]
        self._launches = [_Launch(entries, places) for places in _groups(keys)]

    def views(self, grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the gradients of the entries as the launches take them."""
        return [launch.views(grads) for launch in self._launches]

    def project(self, views: Sequence[list[Tensor]], count: int, rows: int) -> Tensor:
        """Return y_LN = J V, summed over the parameters of every block; zeros follow where a block has fewer rows."""
        parts = [launch.project(own, [count, rows]) for launch, own in zip(self._launches, views, strict=True)]
        return sum(parts[1:], start=parts[0])

    def expand_update_(self, views: Sequence[list[Tensor]], w: Sequence[Tensor], dampings: Sequence[Tensor]) -> None:
        """Step every target along (grad − Jᵀ w) / damping; ``w`` and ``dampings`` have an entry for every block."""
        for launch, own in zip(self._launches, views, strict=True):
            launch.expand_update_(own, w, dampings)


class _Launch:
    """Entries whose products share a launch; ``places`` are their indices in the plan."""

    def __init__(self, entries: Sequence[BlockEntry], places: list[int]) -> None:
        own = [entries[place] for place in places]
        self._jacobians, self._blocks, self._places = [one.jacobian for one in own], [one.block for one in own], places
        self._rows = [one.rows for one in self._jacobians]
        self._operands = tuple(map(_remembering, self._jacobians[0].operands_of(self._jacobians)))
        self._state = UpdateState(
            # A view of the parameter itself would refer to it, and torch swaps no tensor that others refer to.
            params=_remembering([one.jacobian.view(one.target.parameter.detach()) for one in own]),
            momenta=_remembering([one.jacobian.view(one.target.momentum) for one in own]),
            grads=[],
            settings=_remembering([one.target.settings for one in own]),
            nesterov=own[0].target.nesterov,
        )

    def views(self, grads: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(self._jacobians, self._places, strict=True)
        return _remembering([jacobian.view(grads[place]) for jacobian, place in pairs])

    def project(self, views: list[Tensor], shape: list[int]) -> Tensor:
        return self._jacobians[0].project_grouped(self._operands, views, self._blocks, shape)

    def expand_update_(self, views: list[Tensor], w: Sequence[Tensor], dampings: Sequence[Tensor]) -> None:
        own_w = [w[block] for block in self._blocks]
        own_w = [w_N if w_N.shape[0] == n else w_N[:n] for w_N, n in zip(own_w, self._rows, strict=True)]
        state = self._state._replace(grads=views)
        own_dampings = [dampings[block] for block in self._blocks]
        self._jacobians[0].expand_update_grouped_(self._operands, state, own_w, own_dampings)


def _remembering(tensors: list[Any]) -> list[Any]:
    """Return a list that the ops get in every step as one that remembers layouts; traced code takes no such list."""
    plain = torch.compiler.is_compiling() or not isinstance(tensors[0], Tensor)
    return tensors if plain else TensorList(tensors)


def _groups(keys: Sequence[Hashable]) -> Iterable[list[int]]:
    """Return the indices of the entries that each of the distinct keys has."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups.values()

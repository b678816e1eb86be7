"""Both products with J for the weights of a whole step, launched again in every step with its gradients.

Each op alone prepares its launches for its own arguments, allocates its result and writes its own tables. Here one
write follows the gradients of all weights to their addresses, one kernel adds the partial sums of all weights, and what
has to be converted is converted once for both products. A step then takes the host little more than its launches.

Dimensions: L Fisher blocks, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .dispatch import runs_kernel
from .launches import Launch, Updates, has_copies, may_keep, slots_of
from .partial_sums import PartialSums, Parts
from .pointer_table import Addresses


class Temporaries(NamedTuple):
    """Tensors in float32 that launches read in place of a list of factors: made in every step, and freed after it.

    Attributes:
        shapes: of the tensors.
        fill: fills them.
        argument: the index of their list among the lists of project; among those of the update it is 3 more.
        slots: for each tensor, where tables that ``fill`` reads have its address.
    """

    shapes: Sequence[Sequence[int]]
    fill: Callable[[list[Tensor]], object]
    argument: int
    slots: Sequence[Sequence[int]]


class ProductLaunches(NamedTuple):
    """The launches of both products for some weights whose J have the same form.

    Attributes:
        parts: those of project.
        updates: those of the update; its gradients are argument 2.
        v_argument: the argument of project that the gradients are.
        params: the parameters.
        momenta: the momenta.
        temporaries: what both read in place of the factors of J.
    """

    parts: Sequence[Parts]
    updates: Updates
    v_argument: int
    params: Sequence[Tensor]
    momenta: Sequence[Tensor]
    temporaries: Sequence[Temporaries]

    def reads_no_copy(self) -> bool:
        """Return whether no launch reads a copy in place of an argument: it would be that of the first step."""
        return not has_copies(self.updates.launches) and not any(part.entries.copies for part in self.parts)


class RepeatedProducts:
    """The launches of both products of a step.

    All steps must be on one stream (see `launch_place`): only that orders the writes of their tables.
    """

    def __init__(
        self,
        groups: Sequence[ProductLaunches],
        places: Sequence[int],
        grads: Sequence[Tensor],
        w_LN: Tensor,
        damping_L: Tensor,
        has_scaled: bool = False,
    ) -> None:
        """Prepare the launches.

        Args:
            groups: those of weights that share launches.
            places: the indices of their gradients, in the order of the groups.
            grads: the gradients of a step, with which the launches were prepared.
            w_LN: memory for the coefficients; the updates were prepared with its rows.
            damping_L: memory for the dampings; the updates were prepared with its entries.
            has_scaled: whether the updates take other tensors than project, of the same layouts, as momenta too.
        """
        self._places, self._w_LN, self._damping_L = places, w_LN, damping_L
        self._dampings: tuple[Tensor, int] | None = None  # what the dampings were copied from, and its version
        self._sums = PartialSums([part for one in groups for part in one.parts], w_LN.shape)
        self._updates = [launch for one in groups for launch in one.updates.launches]
        self._temporaries = [made for one in groups for made in one.temporaries]
        self._changed = [x for one in groups for x in (one.params if has_scaled else (*one.params, *one.momenta))]
        of_v, of_updates, of_temporaries = _slots(groups, self._sums.launches, (1, 2) if has_scaled else (2,))
        of_grads = [*of_v, *of_updates] if has_scaled else _joined(of_v, of_updates)
        present = [grads[place].data_ptr() for place in places] * (1 + has_scaled) + [0] * len(of_temporaries)
        self._addresses = Addresses([*of_grads, *of_temporaries], present, self._sums.launches[0].table)

    def follow(self, grads: Sequence[Tensor], scaled: Sequence[Tensor] | None = None) -> list[list[Tensor]]:
        """Take the gradients of a step, and what the updates take in their place where that differs.

        They have the layouts of the gradients that the launches were prepared with.

        Returns:
            tensors that the caller has to keep until the end of the step.
        """
        new = partial(torch.empty, dtype=torch.float32, device=self._w_LN.device)
        read = [[new(shape) for shape in made.shapes] for made in self._temporaries]
        present = [grads[place].data_ptr() for place in self._places]
        if scaled is not None:
            present += [scaled[place].data_ptr() for place in self._places]
        self._addresses.become(present + [x.data_ptr() for tensors in read for x in tensors])
        for made, tensors in zip(self._temporaries, read, strict=True):
            made.fill(tensors)
        return read

    def project(self) -> Tensor:
        """Return y_LN = J V."""
        return self._sums.start()

    def expand_update_(self, w_LN: Tensor, damping_L: Tensor) -> None:
        """Apply the updates."""
        self._w_LN.copy_(w_LN)
        if self._dampings is None or self._dampings[0] is not damping_L or self._dampings[1] != damping_L._version:
            self._damping_L.copy_(damping_L)
            self._dampings = (damping_L, damping_L._version)
        increment_version(self._changed)  # so that autograd refuses a backward that needs the old values
        for launch in self._updates:
            launch.start()


def may_repeat(x: Tensor) -> bool:
    """Return whether launches for a tensor such as ``x`` can be repeated now: none that a tracer has to see."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    return runs_kernel(x) and may_keep(x.device)


def _slots(
    groups: Sequence[ProductLaunches], projections: Sequence[Launch], of_update: Sequence[int]
) -> tuple[list[list[int]], ...]:
    """Return where tables have the address of each tensor, in the order of the groups.

    Args:
        groups: the launches.
        projections: the launches of all groups' parts.
        of_update: the arguments of the updates that follow the gradients of each step.

    Returns:
        the slots of the gradients of project, those of the arguments of the updates, and those of temporary tensors.
    """
    of_v: list[list[int]] = []
    of_updates: list[list[int]] = []
    of_temporaries: list[list[int]] = []
    rest = iter(projections)
    for one in groups:
        project, update, count = [next(rest) for _ in one.parts], one.updates.launches, len(one.params)
        of_v += slots_of(project, one.v_argument, count)
        of_updates += _joined(*(slots_of(update, argument, count) for argument in of_update))
        for made in one.temporaries:
            readers = slots_of(project, made.argument, count), slots_of(update, made.argument + 3, count)
            of_temporaries += _joined(*readers, made.slots)
    return of_v, of_updates, of_temporaries


def _joined(*slots: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the slots of each tensor, given those in some launches and those in others."""
    return [[at for own in of_tensor for at in own] for of_tensor in zip(*slots, strict=True)]

"""The state of an optimizer: what `state_dict` returns, and what `load_state_dict` checks before it changes anything.

Beside torch's entries there is one of the optimizer's own. It stands with the momentum of the first trained parameter,
because `torch.distributed.checkpoint` keeps nothing but parameters' entries and groups. That library also asks a new
optimizer for the names and sizes of what it is about to load, so the names are always the same, and what has no size
yet is one `Packed`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Generic, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import override

from tengrad_triton.capture.blocks import wide_dtype
from tengrad_triton.curvature.checkpoint import without_rows
from tengrad_triton.curvature.moments import Scaling
from tengrad_triton.distributed.processes import OneProcess
from tengrad_triton.optim.options import check_scaling
from tengrad_triton.optim.reports import Reports
from tengrad_triton.optim.state.copies import CopiedOptimizer
from tengrad_triton.optim.state.packed import Packed, packed_of, unpacked_of
from tengrad_triton.optim.state.parts import fitted_entries
from tengrad_triton.optim.state.wide import Kept, fill, kept, restore
from tengrad_triton.optim.validation import check_bool, check_layout, check_saved_groups, names_of

C = TypeVar("C")
_SCALINGS = get_args(Scaling)
_NUMBERS = ("steps", "age", "refresh_every", "seed", "scaling")


@dataclass(frozen=True)
class _Checked(Generic[C]):
    """A state that fits: the optimizer's own numbers, the state of the generator, and the curvature."""

    numbers: Mapping[str, int]
    generator_state: Tensor | None
    curvature: C | None


class StatefulOptimizer(CopiedOptimizer[C], Generic[C]):
    """What a `state_dict` has beside torch's entries, and how it is loaded. A subclass defines the curvature C."""

    state_key: ClassVar[str]
    """The key of the optimizer's own entry in the state of its first trained parameter."""

    refresh_every: Any
    _steps: int
    _age: int
    _seed: int
    _scaling: str
    _reports: Reports
    _processes: OneProcess
    _include_curvature = True

    @abstractmethod
    def _rearm(self) -> None:
        """Attach the hooks if the next step refreshes, or else remove them."""

    @property
    def _can_include_curvature(self) -> bool:
        return not self._processes.averages and not self._shards.is_cut

    @property
    def include_curvature(self) -> bool:
        """Whether `state_dict` has the curvature, not only D's running means: without it the next step refreshes.

        It is False where each process has a curvature of its own: a part (`fully_shard`), or with ``gram="local"``.
        """
        return self._include_curvature and self._can_include_curvature

    @include_curvature.setter
    def include_curvature(self, value: bool) -> None:
        check_bool("include_curvature", value)
        self._include_curvature = value

    def _parameters(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _holder(self) -> Tensor:
        """Return the parameter whose state has the optimizer's own entry."""
        parameters = self._parameters()
        return next((p for p in parameters if p.requires_grad), parameters[0])

    def _fill_state(self) -> None:
        """Give every trained parameter its entries, as a step does.

        `torch.distributed.checkpoint` takes a step of an optimizer without entries, with gradients of zero, and reads
        their names from ``state``.
        """
        dtype = wide_dtype(self._layers)
        for parameter in self._parameters():
            self.state.get(parameter, {}).pop(self.state_key, None)
            if parameter.requires_grad and not is_lazy(parameter) and parameter.numel():
                fill(parameter, self.state[parameter], dtype)
        self.state[self._holder()][self.state_key] = {}

    @override
    def state_dict(self, include_curvature: bool | None = None) -> dict[str, Any]:
        """Return torch's entries, and the optimizer's own one in the state of the first trained parameter.

        That entry, under `state_key`, has the numbers ``steps``, ``age``, ``refresh_every`` (0 for a function),
        ``seed`` and ``scaling``, and two tensors of bytes: the generator's state, and the curvature. All are plain
        tensors and numbers, which ``torch.load(weights_only=True)`` reads. With `fully_shard` the momenta are those of
        the process's own parts, as `DTensor`s: nothing is gathered, and there is no curvature.

        Args:
            include_curvature: whether to include J and its factors; by default the optimizer's setting.

        Raises:
            ValueError: it is to be included, but each process has a curvature of its own.
        """
        includes = self.include_curvature if include_curvature is None else include_curvature
        check_bool("include_curvature", includes)
        if includes and not self._can_include_curvature:
            raise ValueError(
                "include_curvature=True cannot be: each process has a curvature of its own, a part of it with "
                'fully_shard or that of its samples with gram="local"; leave it out, and the next step refreshes'
            )
        self._fill_state()
        handle = self.register_state_dict_post_hook(partial(_add_own, includes), prepend=True)  # users' hooks see it
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _own_entry(self, includes: bool, device: torch.device) -> dict[str, Any]:
        kept = self._curvature if includes else getattr(self._curvature, "released", lambda: None)()
        return {
            "steps": self._steps,
            "age": self._age,
            "refresh_every": 0 if callable(self.refresh_every) else self.refresh_every,
            "seed": self._seed,
            "scaling": _SCALINGS.index(self._scaling),
            "generator": self._generator.get_state().to(device).as_subclass(Packed),
            "curvature": packed_of(None if kept is None else self._packed(kept), device),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the step at which `state_dict` was called, also between two refreshes.

        Without a curvature in the state, the next step refreshes it. So it does after `fully_shard`: a curvature in the
        state is dropped, because it is that of whole parameters, and whole momenta are cut. Every rank must load one
        then, all of the same step.

        Raises:
            ValueError: the state belongs to another model or optimizer, or is damaged, or is that of another rank;
                nothing has changed then. After `fully_shard` every rank raises if one does.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"expected a state_dict of {type(self).__name__}, got {type(state_dict).__name__}")
        found: list[_Checked[C]] = []
        loaded: list[dict[str, Any]] = []

        def check(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            with self._processes.loading() as said:
                check_layout(state)
                whole = {**state, "state": _entries_of(state)}
                found.append(self._checked(whole))
                entries = fitted_entries(whole, self.param_groups, names_of(self._module))
                said.update(found[0].numbers)
            for entry in entries.values():
                entry.pop(self.state_key, None)
            loaded.append({**state, "state": entries})
            return loaded[0]

        before = kept(self.state)
        # Between the hooks of users: they see all of the state before it is checked, and all of it is loaded after.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._restore(found[0], loaded[0], before), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        if found[0].generator_state is None:
            self._reports.draws_anew(self._generator.device)

    def _checked(self, state_dict: Mapping[str, Any]) -> _Checked[C]:
        """Return the optimizer's own part of a state; raises `ValueError` if anything of it does not fit."""
        entries = state_dict["state"].values()
        own = next((entry[self.state_key] for entry in entries if self.state_key in entry), None)
        if not isinstance(own, Mapping):
            got = ", ".join(sorted({str(key) for entry in entries for key in entry})) or "none"
            raise ValueError(
                f"expected a state_dict of {type(self).__name__}, with an entry {self.state_key!r} in the state of one "
                f"parameter; got the entries {got}"
            )
        check_saved_groups(state_dict, self.param_groups, self._module, self.defaults.keys())
        numbers = {name: _whole_number(name, own.get(name)) for name in _NUMBERS}
        saved = numbers["scaling"]
        check_scaling(_SCALINGS[saved] if saved < len(_SCALINGS) else str(saved), self._scaling)
        return _Checked(numbers, self._checked_generator(own.get("generator")), self._checked_curvature(own))

    def _checked_generator(self, state: Any) -> Tensor | None:
        """Return the state of the generator; None if it is one of another type of device, which this one cannot take.

        Raises `ValueError` if it is none at all.
        """
        device, size = self._generator.device, self._generator.get_state().numel()
        try:
            own: Tensor = state.as_subclass(Tensor).cpu()
            if own.numel() != size:
                return None
            torch.Generator(device).set_state(own)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"the state's generator is none of {device} ({error}): it is damaged") from error
        return own

    def _checked_curvature(self, own: Mapping[str, Any]) -> C | None:
        advice = f"remove 'curvature' from the state's entry {self.state_key!r} to have the next step compute it anew"
        try:
            packed = unpacked_of(own["curvature"]) if own.get("curvature") is not None else None
            if packed is not None and self._shards.is_cut:
                packed = without_rows(packed)
            return None if packed is None else self._unpacked(packed)
        except ValueError as error:
            raise ValueError(f"the state's curvature does not fit: {error}; {advice}") from error
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"the state's curvature is damaged ({type(error).__name__}: {error}); {advice}") from error

    def _restore(self, saved: _Checked[C], loaded: Mapping[str, Any], before: Sequence[Kept]) -> None:
        """Take over a state after torch has loaded its part; ``before`` is what was kept of parameters."""
        restore(self.state, before, self.param_groups, loaded)
        self._fill_state()
        numbers, self._curvature = saved.numbers, saved.curvature
        self._steps, self._age, self._seed = numbers["steps"], numbers["age"], numbers["seed"]
        if numbers["refresh_every"] and not callable(self.refresh_every):
            self.refresh_every = numbers["refresh_every"]
        self._reports.bounds = self._reports.changes = None
        if saved.generator_state is not None:
            self._generator.set_state(saved.generator_state)
        else:
            self._generator.manual_seed(self._seed + self._steps)
        self._rearm()


def _entries_of(state_dict: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """Return copies of the parameters' entries; those under "0" belong to parameter 0.

    Where `torch.distributed.checkpoint.load` is given the optimizer itself, it puts what is no tensor under such keys.
    """
    entries = {key: {**entry} for key, entry in state_dict["state"].items()}
    known = {key for group in state_dict["param_groups"] for key in group.get("params", [])}
    for key in [key for key in entries if isinstance(key, str) and key.isdecimal() and key not in known]:
        entries.setdefault(int(key), {}).update(entries.pop(key))
    return entries


def _whole_number(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or (value < 0 and name != "seed"):
        raise ValueError(f"the state's {name} must be a whole number, got {value!r}: it is damaged")
    return value


def _add_own(includes: bool, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Add the optimizer's own entry to what torch has packed, in a copy: torch gives the live dictionaries away."""
    holder = optimizer._holder()
    place = next(index for index, p in enumerate(optimizer._parameters()) if p is holder)
    entry = {**state_dict["state"][place], optimizer.state_key: optimizer._own_entry(includes, holder.device)}
    return {**state_dict, "state": {**state_dict["state"], place: entry}}

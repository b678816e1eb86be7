"""Modules of `fully_shard` during a refresh: whole parameters for the backward passes that compute rows.

Such a module has whole parameters from its forward, or its backward, until the end of that, and sends the gradients off
as soon as they are there. The passes of a refresh begin after the forward. They must leave all of this as it was: no
message may depend on how many passes a rank runs, because a rank without samples runs none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from tengrad_triton.sharding.tensors import is_sharded

_FLAGS = ("reshard_after_backward", "reduce_grads")
_kept: ContextVar[bool] = ContextVar("kept", default=False)


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was called for."""
    package = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(package, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def reshard(model: nn.Module) -> None:
    """Give all modules their parts of parameters: those that a forward left whole are no longer the model's own."""
    for module in sharded_modules(model):
        module.reshard()


def plain_type(module: nn.Module) -> type:
    """Return the type of a module, that which it had before `fully_shard` made another one of it."""
    package = sys.modules.get("torch.distributed.fsdp")
    made = package is not None and isinstance(module, package.FSDPModule)
    return type(module).__mro__[2] if made else type(module)


def _check_modules(modules: Iterable[Any]) -> None:
    for module in modules:
        if any(type(group.offload_policy).__name__ == "CPUOffloadPolicy" for group in _groups_of(module)):
            raise ValueError(
                "fully_shard(offload_policy=CPUOffloadPolicy()) is not served: J is where the model computes, and the "
                "step needs the parameters there too; leave the policy out"
            )


class WholeParameters:
    """The whole parameters of a model, which takes part in forwards, and of which the optimizer has parts.

    Args:
        model: the model, whose parameters are at present those that the optimizer has.

    Raises:
        ValueError: modules of `fully_shard` keep their parameters elsewhere than where they compute.

    Attributes:
        is_needed: whether the model's parameters are sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = sharded_modules(model)
        self.is_needed = bool(self._modules)
        _check_modules(self._modules)
        owned = (
            (module, name, p)
            for module in (model.modules() if self.is_needed else ())
            for name, p in module._parameters.items()
        )
        self._sharded = [(module, name, p) for module, name, p in owned if is_sharded(p)]
        self._gathered: list[Any] = []
        self._left: list[tuple[Any, Any]] = []  # groups that this forward leaves whole, and their meshes after others
        self._whole: dict[int, Tensor] = {}
        self._parts: dict[int, Tensor] = {}

    def gather(self) -> bool:
        """Give every module whole parameters; return whether they are others than the last time.

        Every rank must call this. The modules' own backward then sends nothing for it.
        """
        self._gathered = [one for one in self._modules if not all(group.is_unsharded for group in _groups_of(one))]
        for module in self._gathered:
            module.unshard()
        found = [(p, module._parameters[name]) for module, name, p in self._sharded]
        whole: dict[int, Tensor] = {id(part): one for part, one in found if one is not None}
        is_new = {key: id(one) for key, one in whole.items()} != {key: id(one) for key, one in self._whole.items()}
        self._whole = whole
        self._parts = {id(one): part for part, one in found if one is not None and part is not None}
        return is_new

    def free(self) -> None:
        """Give all modules their parts; nothing is sent."""
        for module in self._modules:
            module.reshard()

    def before_forward(self) -> None:
        """Have a forward leave parameters whole, so that `outside` need not gather them again; every rank must call it.

        The first forward of all says what the modules do after forwards: it is left alone.
        """
        if self._left:  # by a forward that has raised an error
            return
        known = [module for module in self._modules if module._get_fsdp_state()._is_root is not None]
        groups = [group for module in known for group in _groups_of(module)]
        self._left = [(group, mesh) for group in groups if (mesh := group.post_forward_mesh_info) is not None]
        for group, _ in self._left:
            group.post_forward_mesh_info = None

    @contextmanager
    def outside(self, needed: bool = True) -> Iterator[bool]:
        """Return a context outside of forward and backward, in which modules have whole parameters if ``needed``.

        At its end they have what they would have without it: parameters that stay whole are not those that a step
        changes, and the model's own ones are what its caller asks it for. Every rank must enter it. It has what
        `gather` returned.
        """
        left, self._left = self._left, []
        for group, mesh in left:
            group.post_forward_mesh_info = mesh
        to_free = {id(group) for group, _ in left}
        is_new = needed and self.gather()
        freed = [
            one for one in self._modules if one in self._gathered or any(id(g) in to_free for g in _groups_of(one))
        ]
        try:
            yield is_new
        finally:
            for module in freed if needed else ():
                module.reshard()

    def of(self, parameter: Tensor) -> Tensor:
        """Return the whole parameter that takes part in a forward, of one that the optimizer has."""
        return self._whole.get(id(parameter), parameter)

    @property
    def parts(self) -> Mapping[int, Tensor]:
        """Return the parameters that the optimizer has, by the ids of the whole ones."""
        return self._parts

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Return a context for backward passes that neither free the parameters nor send gradients."""
        groups = [group for module in self._modules for group in _groups_of(module)]
        before = [[getattr(group, flag) for flag in _FLAGS] for group in groups]
        for group in groups:
            for flag in _FLAGS:
                setattr(group, flag, False)
        token = _kept.set(bool(groups))
        try:
            yield
        finally:
            _kept.reset(token)
            for group, values in zip(groups, before, strict=True):
                for flag, value in zip(_FLAGS, values, strict=True):
                    setattr(group, flag, value)


def takes_single_passes() -> bool:
    """Whether backward passes cannot be batched now: `fully_shard`'s nodes of the graph would stop one half-way."""
    return _kept.get()


def reduces_unused(model: nn.Module) -> bool:
    """Whether gradients of parameters that a rank did not use count as zeros (`set_reduce_scatter_unused_params`)."""
    groups = [group for module in sharded_modules(model) for group in _groups_of(module)]
    return all(getattr(group, "reduce_scatter_unused_params", False) for group in groups)


def gradient_divisor(model: nn.Module, count: int) -> float:
    """Return what the sum of the gradients of ``count`` ranks is divided by (`set_gradient_divide_factor`).

    Raises:
        ValueError: it is not the same for all modules.
    """
    groups = [group for module in sharded_modules(model) for group in _groups_of(module)]
    factors = {count if group.gradient_divide_factor is None else group.gradient_divide_factor for group in groups}
    if len(factors) > 1:
        raise ValueError(
            f"fully_shard divides the gradients of different modules by {' and '.join(map(str, sorted(factors)))}: "
            "call set_gradient_divide_factor for every module that fully_shard was called for, not only for the model"
        )
    return next(iter(factors), count)


def _groups_of(module: Any) -> list[Any]:
    """Return the groups of parameters that a module sends together; `FSDPModule` can set their flags, but not read."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # since torch 2.12 or so there may be several
    return list(groups) if groups is not None else [g for g in (state._fsdp_param_group,) if g is not None]

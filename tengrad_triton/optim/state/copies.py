"""Copies of an optimizer, by `copy.deepcopy`, `pickle` and `torch.save`: they train on as the original would.

A copy has the curvature, its age, the momenta, the schedules, the state of the generator, and the warnings that were
given. What belongs to the original's hooks and to its memory of addresses is made anew. As in `torch.optim`, gradients
and the hooks on the optimizer are not copied. So a batch whose forward or backward was already run belongs to the
original: the copy needs a forward and a backward of its own before its next step.
"""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.capture.hook import Hook
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.target import GroupSettings, RememberedTargets, Trained
from tengrad_triton.layers import tensors_in
from tengrad_triton.optim.state.wide import WideCopies
from tengrad_triton.optim.validation import check_trained
from tengrad_triton.sharding.shards import Whole

C = TypeVar("C")
_COMPLETED = ("_capture", "_generator", "_curvature", "_group_settings", "_remembered", "_wide")
_HOOKS_OF_OPTIMIZERS = tuple(
    f"_optimizer_{of}_{when}_hooks" for of in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")
)


class CopiedOptimizer(torch.optim.Optimizer, ABC, Generic[C]):
    """What a copy of an optimizer takes over, and what it makes anew. A subclass defines the curvature C."""

    made_anew: ClassVar[tuple[str, ...]] = ()
    """The attributes that a copy does not take over: each is computed again when it is first read."""

    model: nn.Module
    _module: nn.Module
    _layers: list[LayerParams]
    _capture: Capture
    _generator: torch.Generator
    _curvature: C | None
    _shards: Whole

    @abstractmethod
    def _new_capture(self, layers: Sequence[LayerParams]) -> Capture:
        """Return the capture for these layers; raises `ValueError` if the settings of their groups contradict."""

    @abstractmethod
    def _packed(self, curvature: C) -> dict[str, Any]:
        """Return a curvature as nested dictionaries of tensors and numbers."""

    @abstractmethod
    def _unpacked(self, packed: Mapping[str, Any]) -> C:
        """Return the curvature that `_packed` stored; raises `ValueError` if it belongs to another model."""

    def _forget_addresses(self) -> None:
        """Forget what steps remember of the parameters' addresses."""
        self._group_settings: dict[int, GroupSettings] = {}
        self._wide = WideCopies()
        self._remembered = RememberedTargets(Hook(self._targets_have_changed))

    def _targets_have_changed(self, trained: Sequence[Trained]) -> None:
        """Check the parameters to be updated, and convert the curvature if they have another type than before."""
        check_trained(trained)
        if self._curvature is None or not trained or self._shards.is_cut:
            return
        dtype = torch.float64 if trained[0][2][0].dtype == torch.float64 else torch.float32
        packed = self._packed(self._curvature)
        if any(x.dtype not in (dtype, torch.float16, torch.bfloat16) for x in _rows_in(packed)):
            self._curvature = self._unpacked(_converted(packed, dtype))

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over, its model included. The optimizer itself stays as it is."""
        left_out = {
            *_COMPLETED,
            *self.made_anew,
            *_HOOKS_OF_OPTIMIZERS,
            "step",
        }  # schedulers put a `step` on the object
        copied = {
            "armed": self._capture.armed,
            "device": str(self._device_of_parameters()),
            "generator": (str(self._generator.device), self._generator.get_state()),
            "curvature": None if self._curvature is None else without_sharing(self._packed(self._curvature)),
        }
        return {**{name: x for name, x in vars(self).items() if name not in left_out}, "_copied": copied}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become the copy that `__getstate__` described; torch's `load_state_dict` gives only groups and momenta.

        A model that contains its optimizer is not whole yet when its optimizer is copied. Then the copy is completed
        when something of it is first used, such as `zero_grad`.

        Raises:
            RuntimeError: the copy is loaded onto another type of device.
        """
        super().__setstate__(state)
        if "_copied" in state and _is_whole(self._module):
            self._complete()

    if not TYPE_CHECKING:  # it would hide misspelt attributes

        def __getattr__(self, name: str) -> Any:
            if name in _COMPLETED and "_copied" in vars(self):
                self._complete()
                return getattr(self, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _complete(self) -> None:
        """Make anew what `__getstate__` has left out."""
        copied, device = vars(self).pop("_copied"), self._device_of_parameters()
        if device.type != torch.device(copied["device"]).type:
            raise RuntimeError(
                f"an optimizer that was copied on {copied['device']} cannot go on on {device}, which has other random "
                "numbers and kernels: make a new optimizer, or load it without map_location"
            )
        _remove_inert_hooks(self.model)
        self._forget_addresses()
        name, generator_state = copied["generator"]
        self._generator = torch.Generator(name)
        self._generator.set_state(generator_state.cpu())
        self._curvature = None if copied["curvature"] is None else self._unpacked(copied["curvature"])
        self._capture = self._new_capture(self._layers)
        if copied["armed"]:
            self._capture.arm()

    def _device_of_parameters(self) -> torch.device:
        return next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))


def without_sharing(packed: Any) -> Any:
    """Return nested values of which no two are one object by chance; tensors have storages of their own.

    Files and pickle keep the whole storage of a view, and their bytes depend on which equal values are one object.
    """
    if isinstance(packed, Mapping):
        return {without_sharing(key): without_sharing(value) for key, value in packed.items()}
    if isinstance(packed, (list, tuple)):
        return [without_sharing(value) for value in packed]
    is_part = isinstance(packed, Tensor) and packed.untyped_storage().nbytes() > packed.nbytes
    return _alone(packed) if is_part else sys.intern(packed) if type(packed) is str else packed


def _alone(x: Tensor) -> Tensor:
    """Return a copy with the same strides: in another layout, products round differently."""
    if not x.numel() or any(stride == 0 for stride in x.stride()):
        return x.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.new_zeros(extent).as_strided(x.shape, x.stride()).copy_(x)


def _rows_in(packed: Any) -> list[Tensor]:
    """Return the floating-point tensors that have at least two dimensions: not the numbers of each block."""
    return [x for x in tensors_in(packed) if x.is_floating_point() and x.dim() > 1]


def _converted(packed: Any, dtype: torch.dtype) -> Any:
    """Return nested tensors with `_rows_in` them in another type, except for those in half precision."""
    rows = {id(x) for x in _rows_in(packed) if x.dtype in (torch.float32, torch.float64)}
    return tree_map_only(Tensor, lambda x: x.to(dtype) if id(x) in rows else x, packed)


def _is_whole(model: nn.Module) -> bool:
    """Whether all modules of a model are copied already."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if "_modules" not in vars(module):
            return False
        waiting += [child for child in vars(module)["_modules"].values() if child is not None]
    return True


def _hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    for name, hooks in vars(module).items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            yield hooks


def _remove_inert_hooks(model: nn.Module) -> None:
    """Remove what the hooks of `Capture` became in a copy of the model, so that copies of copies do not gather them.

    The next hook that is added gets a number above those of the hooks that came with the model. Without that, torch
    could give it the number of such a hook, and drop that one, where the model was unpickled in another process.
    """
    most = -1
    for hooks in (hooks for module in model.modules() for hooks in _hooks_of(module)):
        for number, hook in list(hooks.items()):
            most = max(most, number)
            if isinstance(getattr(hook, "__self__", None), contextlib.nullcontext):
                del hooks[number]
    RemovableHandle.next_id = max(RemovableHandle.next_id, most + 1)

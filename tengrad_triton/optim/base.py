"""The base class of all optimizers in this package: parameter groups, schedules, capture, targets and state.

Its subclasses, `TENGraD` and the baselines' `KroneckerOptimizer`, define the curvature and the step along it.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from tengrad_triton.capture.blocks import LayerParams, find_captured_layers, find_layer_params, structure_of, wide_dtype
from tengrad_triton.curvature.target import GroupSettings, Target, grads_of, trained_of
from tengrad_triton.distributed.processes import OneProcess
from tengrad_triton.distributed.ranks import unwrapped
from tengrad_triton.optim import validation
from tengrad_triton.optim.damping import DampingSchedule, schedule_of
from tengrad_triton.optim.interval import interval_at
from tengrad_triton.optim.loss_scale import NOT_SCALED, LossScale, loss_scale
from tengrad_triton.optim.options import Unsupported
from tengrad_triton.optim.reports import Reports
from tengrad_triton.optim.state.saved import StatefulOptimizer
from tengrad_triton.optim.summary import Summary
from tengrad_triton.optim.whole_step import WholeStep
from tengrad_triton.sharding.modules import reshard
from tengrad_triton.sharding.shards import check_still_served, shards_of
from tengrad_triton.sharding.tensors import local

logger = logging.getLogger(__name__)
T = TypeVar("T")
C = TypeVar("C")


class CurvatureOptimizer(StatefulOptimizer[C], Generic[C]):
    """An optimizer that computes a curvature C from the batches of some steps, and uses it in the steps between.

    A subclass defines when a capture is due, how the curvature is computed, how a step uses it, and how it is packed.

    Args:
        model: the module that the training loop calls.
        params: parameters or groups of them; all of the model's by default.
        defaults: the settings of a group that has none of its own.
        refresh_every: steps from one refresh to the next, or a function of the step.
        unsupported: how parameters without a rule are treated.
        seed: the seed of the generator that draws labels; torch's initial seed by default.
    """

    takes_shards: ClassVar[bool] = False
    """Whether each process may have a part of every parameter."""
    _step_supports_amp_scaling = True  # a `GradScaler` leaves the scale to the step (`loss_scale.py`)

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: Mapping[str, Any],
        *,
        refresh_every: int | Callable[[int], int],
        unsupported: Unsupported,
        seed: int | None,
    ) -> None:
        device = validation.check_model(model, takes_shards=self.takes_shards)
        model = unwrapped(model)
        if not callable(refresh_every):
            validation.check_interval(refresh_every)
        self.model, self.refresh_every = model, refresh_every
        self._module = getattr(model, "_orig_mod", model)  # the module that torch.compile wrapped
        self._unsupported, self._processes = unsupported, OneProcess()
        self._shards = shards_of(model.parameters())
        self._seed = validation.seed_of(seed)
        self._steps = self._age = 0  # the numbers of steps taken so far, and with the present curvature
        self._curvature: C | None = None
        self._scaling = "none"  # D of scaled damping; with another one momentum is no part of the update (M17)
        self._damping_schedules: list[DampingSchedule | None] = []  # one for each group
        self._forget_addresses()
        self._reports = Reports(unsupported)
        self._layers: list[LayerParams] = []
        self._built = False
        super().__init__(model.parameters() if params is None else params, dict(defaults))
        self._generator = torch.Generator(device)
        self._generator.manual_seed(self._seed)
        self._rebuild()
        self._fill_state()

    def _join(self, processes: OneProcess, settings: Mapping[str, Any]) -> None:
        """Train together with other processes from now on, which have the same model and settings."""
        self._processes, self._seed = processes, processes.agree(self._module, settings, self._seed)
        processes.seed(self._generator, self._seed, self._steps)

    def _check_group(self, group: Mapping[str, Any], schedule: DampingSchedule | None) -> None:
        """Raise if this optimizer does not support a group's settings; ``schedule`` is the one of its damping."""
        validation.check_keys(group, self.defaults, type(self))

    @abstractmethod
    def _why_closure(self) -> str | None:
        """Return why the next step needs a closure, or None if it needs none."""

    @abstractmethod
    def _refresh_is_due(self) -> bool:
        """Whether the next step needs the capture of a forward and a backward."""

    @abstractmethod
    def _take_step(
        self, targets: Sequence[Target], grads: Sequence[Tensor], closure: Callable[[], Any] | None, loss: Any
    ) -> tuple[C, int]:
        """Update the targets; return the curvature used, and the number of steps taken with it before this one."""

    @abstractmethod
    def summary(self) -> Summary:
        """Return an entry for every parameter: its block, representation, kernels and bytes; printable as a table."""

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its parameters take part from the next step on, which refreshes the curvature.

        Raises:
            ValueError: a setting is out of range, or does not fit the others of a block; nothing has changed then.
            TypeError: a setting has the wrong type; nothing has changed then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        schedule, group["damping"] = schedule_of(group["damping"])
        self._damping_schedules.append(schedule)
        try:
            validation.check_parameters(self.param_groups, self._shards.is_cut)
            self._check_group(group, schedule)
            if callable(schedule):
                group["damping"] = schedule(self._steps)
            validation.check_group(group)
            if self._built:
                self._rebuild()
                self._fill_state()
        except Exception:
            self.param_groups.pop()
            self._damping_schedules.pop()
            raise

    def _rebuild(self) -> None:
        """Find the layers of all parameters, and arm a capture for them: the next step refreshes the curvature."""
        reshard(self._module)
        layers = self._find_layers()
        capture = self._new_capture(layers)
        if self._built:
            self.close()
        self._capture = capture
        self._layers, self._curvature, self._built = layers, None, True
        self._capture.arm()

    def _find_layers(self) -> list[LayerParams]:
        self._structure = structure_of(self._module)
        layers = find_layer_params(self._module, self.param_groups, rows_without_rule=self._unsupported == "explicit")
        self._reports.uncovered({layer.name: layer.why_sgd for layer in layers if layer.why_sgd})
        return layers

    def _before_forward(self) -> None:
        """Prepare for a forward that is recorded: follow changes of the model, and free memory."""
        if structure_of(self._module) != self._structure:
            check_still_served(self._module, self._shards)
            self._layers = self._find_layers()
            self._capture.follow(find_captured_layers(self._module, self._layers))
        self._release()

    def _release(self) -> None:
        """Free what no further step uses; called before a forward that is recorded."""

    def close(self) -> None:
        """Remove all hooks from the model. From then on, a step that is due for a refresh raises `RuntimeError`."""
        self._capture.disarm()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop the captured tensors of their batches."""
        self._capture.forget()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Take one step, after a refresh of the curvature if one is due. Without any gradient, nothing changes.

        Args:
            closure: zeroes the gradients, evaluates the model, calls backward and returns the loss.

        Returns:
            the closure's result, or None without a closure.

        Raises:
            RuntimeError: a refresh is due, but there was no forward and backward of the model since the last step; or
                the step needs a closure, and there is none. After this or any other error, parameters and momenta
                have the values that they had before the call.
        """
        return closure.take() if isinstance(closure, WholeStep) else self._step(closure)

    def _step(self, closure: Callable[[], T] | None) -> T | None:
        """Do what `step` does between its hooks."""
        if closure is None and (why := self._why_closure()) is not None:
            raise RuntimeError(why)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with loss_scale(self, self._capture) as scale:
            targets, grads = ([], []) if scale.skips else self._targets(scale)
            if targets:
                try:
                    taken = self._take_step(targets, grads, closure, loss)
                finally:
                    self._wide.write_back()
                self._capture.used.free()
                self._advance(*taken)
            elif not scale.skips:
                check_still_served(self._module, self._shards)
        return loss

    def _advance(self, curvature: C, age: int) -> None:
        """Count a step that was taken with ``curvature``; attach the hooks if the next step refreshes."""
        if age == 0:
            logger.debug("step %d refreshed the curvature", self._steps)
        self._curvature, self._age, self._steps = curvature, age + 1, self._steps + 1
        self._rearm()

    def _curvature_is_outdated(self, every: int | Callable[[int], int]) -> bool:
        """Whether there is no curvature, or the present interval of steps was taken with it."""
        return self._curvature is None or self._age >= interval_at(every, self._steps)

    @override
    def _rearm(self) -> None:
        """Drop the captured tensors, and attach the hooks if the next step refreshes, or else remove them."""
        self._capture.forget()
        try:
            due = self._refresh_is_due()
        except Exception:
            due = True  # this step is taken: the next one calls `refresh_every` again and raises, before it begins
        if due:
            self._processes.seed(self._generator, self._seed, self._steps)
            self._capture.arm()
        else:
            self._capture.disarm()

    def _follow_schedules(self) -> None:
        """Set every group's damping to what its schedule returns at this step."""
        for group, schedule in zip(self.param_groups, self._damping_schedules, strict=True):
            if callable(schedule):
                group["damping"] = schedule(self._steps)
                validation.check_group(group)

    def _targets(self, scale: LossScale = NOT_SCALED) -> tuple[list[Target], list[Tensor]]:
        """Return a target for each parameter that has a gradient, and the gradients of what is minimized."""

        def tensors_of(layer: LayerParams, param_name: str) -> tuple[Tensor, Tensor, Tensor] | None:
            parameter = layer.parameters[param_name]
            grad = parameter.grad
            if grad is None:
                return None
            if parameter.dtype != dtype:
                validation.check_dtypes((parameter,))
            updated, momentum = self._wide.of(parameter, self.state[parameter], dtype)
            return local(updated), local(momentum), scale.unscaled(local(grad), dtype)

        self._wide.forget()
        dtype = wide_dtype(self._layers)
        trained, groups = trained_of(self._layers, tensors_of), self.param_groups
        targets = self._remembered.of(trained, groups, self._settings(dtype))
        for layer, param_name, (_, _, grad) in trained:
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"the gradient of {layer.full_name_of(param_name)!r} is sparse, but a step needs dense ones: "
                    "replace it by grad.to_dense()"
                )
        return targets, grads_of(trained, groups)

    def _settings(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the present [lr, momentum, weight_decay, shrink] of each group, as one tensor of this type."""
        known = self._group_settings
        groups, averages = enumerate(self.param_groups), self._scaling != "none"
        return [known.setdefault(index, GroupSettings()).of(group, dtype, averages) for index, group in groups]

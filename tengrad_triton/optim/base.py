"""What all optimizers with a captured curvature share: groups, schedules, capture, targets and state.

The kind of curvature and the step along it are a subclass's: `TENGraD`, or the baselines' `KroneckerOptimizer`.
"""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from tengrad_triton.capture.blocks import LayerParams, find_layer_params
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.target import GroupSettings, Target, targets_of
from tengrad_triton.optim.damping import LevenbergMarquardt, Schedule, rule_of
from tengrad_triton.optim.options import Unsupported
from tengrad_triton.optim.summary import Summary
from tengrad_triton.optim.validation import check_group, check_model, check_refresh_every

logger = logging.getLogger(__name__)
T = TypeVar("T")
C = TypeVar("C")


class CurvatureOptimizer(torch.optim.Optimizer, ABC, Generic[C]):
    """An optimizer with a curvature C that the batches of some steps give, and that serves the steps in between.

    A subclass says when a capture is due, which curvature it makes, how a step goes along it, and how it is packed.

    Args:
        model: the module that the training loop calls.
        params: parameters or groups of them; all of the model's by default.
        defaults: the settings of a group that has none of its own.
        refresh_every: steps from one refresh to the next, or a function of the step.
        unsupported: what parameters get that no rule covers.
        seed: of the generator that draws labels; torch's initial seed by default.
    """

    state_key: ClassVar[str]
    """The key under which `state_dict` keeps the curvature."""

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
        check_model(model)
        if not callable(refresh_every):
            check_refresh_every(refresh_every)
        self.model, self.refresh_every = model, refresh_every
        self._module = getattr(model, "_orig_mod", model)  # the module that torch.compile wrapped
        self._unsupported = unsupported
        self._seed = torch.initial_seed() if seed is None else seed
        self._generator = torch.Generator(next(model.parameters()).device)
        self._generator.manual_seed(self._seed)
        self._steps = 0  # taken so far
        self._age = 0  # steps taken with the present curvature
        self._curvature: C | None = None
        self._damping_rules: list[Schedule | LevenbergMarquardt | None] = []  # by group
        self._group_settings: dict[int, GroupSettings] = {}
        self._warned: set[str] = set()
        self._layers: list[LayerParams] = []
        self._capture: Capture
        self._built = False
        super().__init__(model.parameters() if params is None else params, dict(defaults))
        self._rebuild()

    @abstractmethod
    def _new_capture(self, layers: Sequence[LayerParams]) -> Capture:
        """Return the capture of what these layers need; raises `ValueError` where their groups do not fit together."""

    @abstractmethod
    def _check_group(self, group: Mapping[str, Any], rule: Schedule | LevenbergMarquardt | None) -> None:
        """Reject a group that `check_group` accepts and this optimizer cannot honour; ``rule`` is the damping's."""

    @abstractmethod
    def _why_closure(self) -> str | None:
        """Return why the next step needs a closure, or None where it does not."""

    @abstractmethod
    def _refresh_is_due(self) -> bool:
        """Whether the next step reads what a forward and a backward leave in the capture."""

    @abstractmethod
    def _take_step(self, targets: Sequence[Target], closure: Callable[[], Any] | None, loss: Any) -> tuple[C, int]:
        """Update the targets; return the curvature used, and how many steps were taken with it before this one."""

    @abstractmethod
    def _packed(self, curvature: C) -> dict[str, Any]:
        """Return a curvature as nested dictionaries of tensors and numbers."""

    @abstractmethod
    def _unpacked(self, packed: Mapping[str, Any]) -> C:
        """Return the curvature that `_packed` described; raises `ValueError` if it is another model's."""

    @abstractmethod
    def summary(self) -> Summary:
        """Return an entry for every parameter: its block, representation, kernels and bytes; printable as a table."""

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its parameters take part from the next step on, which refreshes the curvature.

        Raises:
            ValueError: a setting is out of range, or the group splits a layer's parameters; nothing has changed then.
            TypeError: a setting has the wrong type; nothing has changed then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        rule, group["damping"] = rule_of(group["damping"])
        try:
            self._check_group(group, rule)
            if callable(rule):
                group["damping"] = rule(self._steps)
            check_group(group)
            if self._built:
                self._rebuild()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._damping_rules.append(rule)

    def _rebuild(self) -> None:
        """Find the layers of all parameters, and have the next step refresh."""
        layers = find_layer_params(self._module, self.param_groups, rows_without_rule=self._unsupported == "explicit")
        self._report_uncovered({layer.name: layer.why_sgd for layer in layers if layer.why_sgd})
        if self._built:
            self.close()
        self._capture = self._new_capture(layers)
        self._layers, self._curvature, self._built = layers, None, True
        self._capture.arm()

    def _report_uncovered(self, uncovered: Mapping[str, str]) -> None:
        """Warn once of every layer without rows, given by name with the reason; an error if ``unsupported`` says so."""
        news = {name: why for name, why in uncovered.items() if name not in self._warned}
        if not news:
            return
        listed = "; ".join(f"{name or 'the model'} ({why})" for name, why in news.items())
        if self._unsupported == "error":
            raise ValueError(f"no exact rule covers {listed}; with unsupported='sgd' they take the plain SGD step")
        self._warned.update(news)
        warnings.warn(f"no exact rule covers {listed}: their parameters take the plain SGD step", stacklevel=3)

    def close(self) -> None:
        """Take all hooks off the model. A step that is due for a refresh raises `RuntimeError` from then on."""
        self._capture.disarm()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop what was captured of the batches that they came from."""
        self._capture.forget()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Take one step; refresh the curvature first where that is due. Without any gradient nothing happens.

        Args:
            closure: zeroes the gradients, evaluates the model, calls backward and returns the loss.

        Returns:
            what the closure returned.

        Raises:
            RuntimeError: a refresh is due, but there was no forward and backward of the model since the last step; or
                the step needs a closure, and there is none. Parameters and state are as before the call, as after any
                other error.
        """
        if closure is None and (why := self._why_closure()) is not None:
            raise RuntimeError(why)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        targets = self._targets()
        if targets:
            self._advance(*self._take_step(targets, closure, loss))
        return loss

    def _advance(self, curvature: C, age: int) -> None:
        """Count a step that was taken with ``curvature``; leave the hooks only where the next one refreshes."""
        if age == 0:
            logger.debug("step %d refreshed the curvature", self._steps)
        self._curvature, self._age, self._steps = curvature, age + 1, self._steps + 1
        self._rearm()

    def _interval(self) -> int:
        """Return how many steps the present curvature serves."""
        every = self.refresh_every
        if callable(every):
            check_refresh_every(every := every(self._steps))
        return every

    def _rearm(self) -> None:
        self._capture.forget()
        if self._refresh_is_due():
            self._capture.arm()
        else:
            self._capture.disarm()

    def _follow_schedules(self) -> None:
        """Set every group's damping to what its schedule returns at this step."""
        for group, rule in zip(self.param_groups, self._damping_rules, strict=True):
            if callable(rule):
                group["damping"] = rule(self._steps)
                check_group(group)

    def _targets(self) -> list[Target]:
        """Return every parameter that has a gradient."""

        def tensors_of(layer: LayerParams, label: str) -> tuple[Tensor, Tensor, Tensor] | None:
            parameter = layer.parameters[label]
            return None if parameter.grad is None else (parameter, self._momentum_of(parameter), parameter.grad)

        return targets_of(self._layers, self.param_groups, self._settings(), tensors_of)

    def _settings(self) -> list[Tensor]:
        """Return the groups' present [lr, momentum, weight_decay, shrink], a tensor each."""
        known = self._group_settings
        return [known.setdefault(index, GroupSettings()).of(group) for index, group in enumerate(self.param_groups)]

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return torch's entries, and under `state_key` the curvature, its age and the state of the generator."""
        own = {
            "steps": self._steps,
            "age": self._age,
            "refresh_every": None if callable(self.refresh_every) else self.refresh_every,
            "generator": self._generator.get_state(),
            "curvature": None if self._curvature is None else self._packed(self._curvature),
        }
        return {**super().state_dict(), self.state_key: own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, also between two refreshes.

        Raises:
            ValueError: the state is of another model or another optimizer; nothing has changed then.
        """
        if self.state_key not in state_dict:
            expected = f"a state_dict of {type(self).__name__}, with the key {self.state_key!r}"
            raise ValueError(f"expected {expected}; got {sorted(state_dict)}")
        saved = state_dict[self.state_key]
        packed = saved["curvature"]
        restored = None if packed is None else self._unpacked(packed)
        momenta = {p: state["momentum_buffer"] for p, state in self.state.items() if "momentum_buffer" in state}
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for parameter, buffer in momenta.items():  # a captured graph writes to the present addresses
            buffer.copy_(self.state[parameter].get("momentum_buffer", torch.zeros_like(buffer)))
            self.state[parameter]["momentum_buffer"] = buffer
        self._curvature, self._steps, self._age = restored, saved["steps"], saved["age"]
        if saved["refresh_every"] is not None and not callable(self.refresh_every):
            self.refresh_every = saved["refresh_every"]
        self._generator.set_state(saved["generator"].cpu())
        self._rearm()

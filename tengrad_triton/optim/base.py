"""What optimizers with a captured curvature share: groups, schedule, capture, targets, state; not the curvature."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from tengrad_triton.capture.blocks import LayerParams, find_layer_params
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.target import Settings, Target
from tengrad_triton.optim.damping import LevenbergMarquardt, Schedule, rule_of
from tengrad_triton.optim.options import Unsupported
from tengrad_triton.optim.summary import Summary
from tengrad_triton.optim.validation import check_group, check_model, check_refresh_every

T = TypeVar("T")
C = TypeVar("C")


class CurvatureOptimizer(torch.optim.Optimizer, ABC, Generic[C]):
    """An optimizer whose curvature C comes from the captured batches of some steps and serves those in between.

    A subclass says when a capture is due, what curvature it makes, how a step is take_rows along it, and how it is packed.

    Args:
        model: the module that the training loop calls.
        params: parameters or groups of them; all of the model's by default.
        defaults: the settings of a group that has none of its own.
        refresh_every: steps from one refresh to the next, or a function of the step.
        unsupported: what parameters get that no rule covers.
        seed: of the generator that draws labels; torch's initial seed by default.
    """

    key: ClassVar[str]
    """Under which `state_dict` keeps the curvature."""

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
        self._module = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
        self._unsupported = unsupported
        self._seed = torch.initial_seed() if seed is None else seed
        self._generator = torch.Generator(next(model.parameters()).device)
        self._generator.manual_seed(self._seed)
        self._steps = 0  # take_rows so far
        self._age = 0  # steps take_rows with the present curvature
        self._curvature: C | None = None
        self._rules: list[Schedule | LevenbergMarquardt | None] = []  # of the damping, by group
        self._settings: dict[int, Settings] = {}
        self._warned: set[str] = set()
        self._blocks: list[LayerParams] = []
        self._capture: Capture
        self._built = False
        super().__init__(model.parameters() if params is None else params, dict(defaults))
        self._rebuild()

    @abstractmethod
    def _captures(self, blocks: Sequence[LayerParams]) -> Capture:
        """Return the capture of what these blocks need; raises `ValueError` where their groups do not fit together."""

    @abstractmethod
    def _check_own(self, group: Mapping[str, Any], rule: Schedule | LevenbergMarquardt | None) -> None:
        """Reject what `check_group` lets pass and this optimizer cannot honour; ``rule`` is that of the damping."""

    @abstractmethod
    def _why_closure(self) -> str | None:
        """Return why the step to come needs a closure, or None where it does not."""

    @abstractmethod
    def _refresh_is_due(self) -> bool:
        """Whether the step to come reads what a forward and a backward leave in the capture."""

    @abstractmethod
    def _taken(self, targets: Sequence[Target], closure: Callable[[], Any] | None, loss: Any) -> tuple[C, int]:
        """Take a step; return the curvature that it was take_rows with, and the steps take_rows with that before this one."""

    @abstractmethod
    def _packed(self, curvature: C) -> dict[str, Any]:
        """Return a curvature as nested dictionaries of tensors and numbers."""

    @abstractmethod
    def _unpacked(self, packed: Mapping[str, Any]) -> C:
        """Return the curvature that `_packed` described; raises `ValueError` if it is another model's."""

    @abstractmethod
    def summary(self) -> Summary:
        """Return a row for every parameter: its block, representation, kernels and bytes; printable."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its parameters take part from the next step on, which refreshes the curvature."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        rule, group["damping"] = rule_of(group["damping"])
        try:
            self._check_own(group, rule)
            if callable(rule):
                group["damping"] = rule(self._steps)
            check_group(group)
            if self._built:
                self._rebuild()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._rules.append(rule)

    def _rebuild(self) -> None:
        """Find the blocks, and have the next step refresh."""
        blocks = find_layer_params(self._module, self.param_groups, self._unsupported == "explicit")
        self._report({block.name: block.why_sgd for block in blocks if block.why_sgd})
        if self._built:
            self.close()
        self._capture = self._captures(blocks)
        self._blocks, self._curvature, self._built = blocks, None, True
        self._capture.arm()

    def _report(self, uncovered: Mapping[str, str]) -> None:
        """Say once which blocks no rule covers."""
        news = {name: why for name, why in uncovered.items() if name not in self._warned}
        if not news:
            return
        listed = "; ".join(f"{name or 'the model'} ({why})" for name, why in news.items())
        if self._unsupported == "error":
            raise ValueError(f"no exact rule covers {listed}; with unsupported='sgd' they take the plain SGD step")
        self._warned.update(news)
        warnings.warn(f"no exact rule covers {listed}: their parameters take the plain SGD step", stacklevel=3)

    def close(self) -> None:
        """Take all hooks off the model. A step that is due for a refresh is an error from then on."""
        self._capture.disarm()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget the batches that they came from."""
        self._capture.forget()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Take one step; refresh the curvature first where that is due. Without any gradient it does nothing.

        Raises:
            RuntimeError: a refresh is due, and no forward and backward of the model was seen since the last step; or
                the step needs a closure, and there is none. Parameters and state are as before then, as after any
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
            self._advance(*self._taken(targets, closure, loss))
        return loss

    def _advance(self, curvature: C, age: int) -> None:
        """Count a step that was take_rows with ``curvature``, and leave the hooks only where the next one refreshes."""
        self._curvature, self._age, self._steps = curvature, age + 1, self._steps + 1
        self._rearm()

    def _interval(self) -> int:
        """Return how many steps the curvature serves, as of this step."""
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
        """Have every group's damping be what its schedule says at this step."""
        for group, rule in zip(self.param_groups, self._rules, strict=True):
            if callable(rule):
                group["damping"] = rule(self._steps)
                check_group(group)

    def _targets(self) -> list[Target]:
        """Return every parameter that has a gradient."""
        settings, targets = self._settings_now(), []
        for block in self._blocks:
            group = self.param_groups[block.group]
            for label, parameter in block.parameters.items():
                if parameter.grad is not None:
                    grad = -parameter.grad if group["maximize"] else parameter.grad
                    state = (parameter, self._momentum_of(parameter), grad, settings[block.group])
                    targets.append(Target(block.name, label, *state, group["nesterov"], group.get("spring", 0.0)))
        return targets

    def _settings_now(self) -> list[Tensor]:
        """Return the groups' numbers as tensors."""
        return [self._settings.setdefault(index, Settings()).of(group) for index, group in enumerate(self.param_groups)]

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def state_dict(self) -> dict[str, Any]:
        """Return all that `step` reads: torch's entries, and the curvature with its age and the generator of labels."""
        own = {
            "steps": self._steps,
            "age": self._age,
            "refresh_every": None if callable(self.refresh_every) else self.refresh_every,
            "generator": self._generator.get_state(),
            "curvature": None if self._curvature is None else self._packed(self._curvature),
        }
        return {**super().state_dict(), self.key: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was take_rows, in mid-interval too.

        Raises:
            ValueError: the state is of another model or another optimizer; nothing has changed then.
        """
        if self.key not in state_dict:
            name = type(self).__name__
            raise ValueError(f"expected a state_dict of {name} with {self.key!r} in it, got {sorted(state_dict)}")
        saved = state_dict[self.key]
        packed = saved["curvature"]
        restored = None if packed is None else self._unpacked(packed)
        momenta = {p: state["momentum_buffer"] for p, state in self.state.items() if "momentum_buffer" in state}
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for parameter, buffer in momenta.items():  # a captured graph writes where they are
            buffer.copy_(self.state[parameter].get("momentum_buffer", torch.zeros_like(buffer)))
            self.state[parameter]["momentum_buffer"] = buffer
        self._curvature, self._steps, self._age = restored, saved["steps"], saved["age"]
        if saved["refresh_every"] is not None and not callable(self.refresh_every):
            self.refresh_every = saved["refresh_every"]
        self._generator.set_state(saved["generator"].cpu())
        self._rearm()

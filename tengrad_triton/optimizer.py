"""TENGraD as a torch optimizer: groups, schedule, refresh and step, state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from tengrad_triton.backend import kernels_of
from tengrad_triton.blocks import Block, find_blocks
from tengrad_triton.capture import Capture
from tengrad_triton.fisher import Fisher, Likelihood, likelihood_of
from tengrad_triton.plan import MAX_BYTES, Choice, Plan, Representation
from tengrad_triton.plan_file import load
from tengrad_triton.refresh import compressed_blocks, gather, geometries_of, jacobians_of
from tengrad_triton.state import pack_curvature, unpack_curvature
from tengrad_triton.summary import Summary, choices_of, summarize
from tengrad_triton.update import Settings, Target, on_device
from tengrad_triton.validation import check_group, check_refresh_every, check_settings
from tengrad_triton.woodbury import Curvature, curvature, failures_of

Schedule = Callable[[int], float]
T = TypeVar("T")


class TENGraD(torch.optim.Optimizer):
    """Natural gradient descent with exact Fisher blocks (Soori et al. 2021), at close to the cost of SGD.

    Every layer's block F = Jᵀ J / N of the Fisher matrix is inverted exactly, by the Woodbury identity, from the
    per-sample gradients J of the N samples of one batch:

        d = (F + α I)⁻¹ ∇L + weight_decay θ;   m ← momentum m + d;   θ ← θ − lr m

    J and the factored N×N system are refreshed every ``refresh_every`` steps and reused in between (docs/math.md).

    Args:
        model: the module that the training loop calls, wrapped in `torch.compile` or not. Samples are the first
            dimension of its inputs and its output.
        params: parameters or groups of them; all of the model's by default. Groups may have their own ``lr``,
            ``damping``, ``momentum``, ``nesterov``, ``weight_decay`` and ``decoupled_weight_decay``; a layer's
            parameters must share a group.
        lr: the learning rate, a number or a 0-dim tensor.
        damping: α > 0, or a function of the step. Read when the curvature is refreshed.
        momentum: of the momentum buffer, in [0, 1).
        nesterov: whether to look ahead along the momentum.
        weight_decay: λ ≥ 0; added to the natural gradient as λ θ.
        decoupled_weight_decay: shrink θ by 1 − lr λ instead.
        refresh_every: steps from one refresh of the curvature to the next, or a function of the step.
        fisher: ``"sampled"`` (labels drawn from the model's own distribution: the Fisher matrix) or ``"empirical"``
            (the loss's own derivatives; the loss must be a mean over the samples).
        likelihood: ``"categorical"``, ``"gaussian"``, ``"bernoulli"``, or an object with ``sample(output, generator)``
            and ``nll(output, target)``; only the sampled Fisher reads it.
        blocks: ``"layer"``, a block for what each module owns directly.
        representation: ``"auto"`` (per weight, by the analytic rule), ``"factored"``, ``"per_sample"``,
            ``"per_sample_bf16"``, ``"compressed"``, or a mapping from the names of weights to one of these four.
        unsupported: what parameters get that no rule covers: ``"sgd"``, the plain step and one warning, or ``"error"``.
        backend: ``"auto"`` (Triton on CUDA tensors, PyTorch elsewhere) or ``"torch"``.
        plan: what `autotune` returned, or the file that it wrote; the analytic rule serves what it does not know.
        max_bytes: how much the stored J may take, where the representation is chosen automatically.
        tol: of ``"compressed"``: the relative error α ‖Δd‖ / ‖∇L‖ that dropping directions of J may cause in a step.
        seed: of the generator that draws labels; torch's initial seed by default.

    Raises:
        ValueError: a setting is out of range or unknown; the message says which, and what was expected.
        TypeError: a setting has the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 1e-2,
        *,
        damping: float | Schedule = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        refresh_every: int | Callable[[int], int] = 100,
        fisher: Fisher = "sampled",
        likelihood: str | Likelihood = "categorical",
        blocks: Literal["layer"] = "layer",
        representation: Literal["auto"] | Representation | Mapping[str, Representation] = "auto",
        unsupported: Literal["sgd", "error"] = "sgd",
        backend: Literal["auto", "torch"] = "auto",
        plan: Plan | Path | str | None = None,
        max_bytes: int = MAX_BYTES,
        tol: float = 0.01,
        seed: int | None = None,
    ) -> None:
        words = {"fisher": fisher, "blocks": blocks, "unsupported": unsupported, "backend": backend}
        check_settings(model, refresh_every, max_bytes, tol, representation, **words)
        self.model, self.refresh_every = model, refresh_every
        self._module = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
        self._fisher, self._likelihood = fisher, likelihood_of(likelihood)
        self._by_hand = None if representation == "auto" else representation
        self._max_bytes, self._tol = max_bytes, tol
        self._unsupported, self._backend = unsupported, backend
        self._kernels_for = partial(kernels_of, backend)
        self._ops = self._kernels_for()
        device = next(model.parameters()).device
        self._plan = plan if isinstance(plan, Plan) else load(Path(plan), device) if plan is not None else Plan({})
        self._generator = torch.Generator(device)
        self._generator.manual_seed(torch.initial_seed() if seed is None else seed)
        self._steps = 0  # taken so far
        self._age = 0  # steps taken with the present curvature
        self._curvature: Curvature | None = None
        self._schedules: list[Schedule | None] = []  # of the damping, by group
        self._settings: dict[int, Settings] = {}
        self._warned: set[str] = set()
        self._blocks: list[Block] = []
        self._capture = Capture(model, {}, self._fisher, self._likelihood, self._generator)
        self._built = False
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(model.parameters() if params is None else params, defaults)
        self._rebuild()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its parameters take part from the next step on, which refreshes the curvature."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        schedule = group["damping"] if callable(group["damping"]) else None
        try:
            if schedule is not None:
                group["damping"] = schedule(self._steps)
            check_group(group)
            if self._built:
                self._rebuild()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._schedules.append(schedule)

    def _rebuild(self) -> None:
        """Find the blocks, and have the next step refresh."""
        blocks = find_blocks(self._module, self.param_groups)
        self._report({block.name: block.why_sgd for block in blocks if block.why_sgd})
        self.close()
        covered = {block.name: block.layer for block in blocks if block.why_sgd is None}
        self._blocks, self._curvature, self._built = blocks, None, True
        self._capture = Capture(self.model, covered, self._fisher, self._likelihood, self._generator, self._release)
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
            RuntimeError: a refresh is due, and no forward and backward of the model was seen since the last step.
                Parameters and state are as before then, as after any other error.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        targets = self._targets()
        if not targets:
            return loss
        curvature, age = self._curvature, self._age
        if curvature is None or self._refresh_is_due():
            curvature, age = self._refreshed(), 0
        curvature.step_(targets, self._ops)
        self._advance(curvature, age)
        return loss

    def _advance(self, curvature: Curvature, age: int) -> None:
        """Count a step that was taken with ``curvature``, and leave the hooks only where the next one refreshes."""
        self._curvature, self._age, self._steps = curvature, age + 1, self._steps + 1
        self._rearm()

    def _release(self) -> None:
        """Let go of J before a refresh's forward: no step will use it, and the new one needs the memory."""
        if self._curvature is not None:
            self._curvature = self._curvature.spent()

    def _refresh_is_due(self) -> bool:
        return self._curvature is None or self._curvature.is_spent or self._age >= self._interval()

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

    def _refreshed(self) -> Curvature:
        """Return the curvature of the batches since the last step."""
        uses, missing = gather(self._blocks, self._capture)
        self._report(missing)
        chosen = self._plan.choose(geometries_of(uses), self._by_hand, self._interval(), self._max_bytes)
        tol = dict.fromkeys(compressed_blocks(uses, chosen), self._tol)
        jacobians = jacobians_of(uses, chosen, self._kernels_for)
        return curvature(jacobians, *self._damping_of(list(jacobians)), self._ops, tol)

    def _damping_of(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the dampings that hold at this step, and the failures so far, of the blocks named."""
        for group, schedule in zip(self.param_groups, self._schedules, strict=True):
            if schedule is not None:
                group["damping"] = schedule(self._steps)
                check_group(group)
        dampings = {block.name: self.param_groups[block.group]["damping"] for block in self._blocks}
        return on_device([dampings[name] for name in names], self._generator.device), failures_of(
            names, self._curvature
        )

    def _targets(self) -> list[Target]:
        """Return every parameter that has a gradient."""
        settings = self._settings_now()
        return [
            Target(
                block.name, label, parameter, self._momentum_of(parameter), parameter.grad,
                settings[block.group], self.param_groups[block.group]["nesterov"],
            )
            for block in self._blocks
            for label, parameter in block.parameters.items()
            if parameter.grad is not None
        ]  # fmt: skip

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
        tengrad = {
            "steps": self._steps,
            "age": self._age,
            "refresh_every": None if callable(self.refresh_every) else self.refresh_every,
            "generator": self._generator.get_state(),
            "curvature": None if self._curvature is None else pack_curvature(self._curvature),
        }
        return {**super().state_dict(), "tengrad": tengrad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, in mid-interval too.

        Raises:
            ValueError: the state is of another model or another optimizer; nothing has changed then.
        """
        if "tengrad" not in state_dict:
            raise ValueError(f"expected a state_dict of TENGraD with 'tengrad' in it, got {sorted(state_dict)}")
        saved = state_dict["tengrad"]
        packed = saved["curvature"]
        restored = None if packed is None else unpack_curvature(packed, self._blocks, self._kernels_for)
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._curvature, self._steps, self._age = restored, saved["steps"], saved["age"]
        if saved["refresh_every"] is not None and not callable(self.refresh_every):
            self.refresh_every = saved["refresh_every"]
        self._generator.set_state(saved["generator"].cpu())
        self._rearm()

    def choices(self) -> dict[str, Choice]:
        """Return how J of every preconditioned parameter is stored at present, by the parameter's name."""
        return choices_of(self._curvature)

    def summary(self) -> Summary:
        """Return a row for every parameter: its block, representation, kernels and bytes; printable."""
        return summarize(self._blocks, self._curvature)

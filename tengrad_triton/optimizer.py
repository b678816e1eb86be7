"""TENGraD as a torch optimizer: groups, schedule, refresh and step, state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tengrad_triton.backend import Backend, kernels_of
from tengrad_triton.blocks import Block, BlocksChoice, find_blocks, systems_of
from tengrad_triton.capture import Capture
from tengrad_triton.damping import Damping, LevenbergMarquardt, Schedule, rule_of
from tengrad_triton.fisher import Fisher, Likelihood
from tengrad_triton.options import RepresentationChoice, Unsupported, checked
from tengrad_triton.plan import MAX_BYTES, Choice, Plan
from tengrad_triton.refresh import (
    compressed_blocks,
    extended,
    gather,
    geometries_of,
    jacobians_of,
    rows_of,
    sampled_rows,
)
from tengrad_triton.state import pack_curvature, unpack_curvature
from tengrad_triton.summary import Summary, choices_of, summarize
from tengrad_triton.update import Settings, Target, on_device
from tengrad_triton.validation import check_group, check_model, check_refresh_every
from tengrad_triton.woodbury import Curvature, Systems, curvature, failures_of

T = TypeVar("T")
PAPER: Mapping[str, Any] = {
    "lr": 3e-3, "damping": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "refresh_every": 100, "fisher": "sampled",
    "history": 1, "trust_region": None,
}  # fmt: skip
"""The paper's settings for 3C1F on Fashion-MNIST (appendix, table 6)."""


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
            ``damping``, ``momentum``, ``nesterov``, ``spring``, ``weight_decay``, ``decoupled_weight_decay`` and
            ``maximize``; a layer's parameters must share a group.
        lr: the learning rate, a number or a 0-dim tensor.
        damping: α > 0, a function of the step, or ``"lm"`` (or a `LevenbergMarquardt`): adapted by how well the
            quadratic model foretold each refreshing step, which needs ``step(closure)`` and evaluates the closure once
            more then. Read when the curvature is refreshed.
        momentum: of the momentum buffer, in [0, 1).
        nesterov: whether to look ahead along the momentum.
        spring: μ of SPRING (Goldshlager, Abrahamsen, Lin 2024) in [0, 1), in place of momentum: the part of the last
            direction that the present rows do not see is kept.
        weight_decay: λ ≥ 0; added to the natural gradient as λ θ.
        decoupled_weight_decay: shrink θ by 1 − lr λ instead.
        maximize: ascend.
        trust_region: κ > 0: the natural gradient is shortened where the step's squared Fisher norm,
            Σ lr² dᵀ (F + α I) d over all blocks, would be beyond it. None for no bound.
        refresh_every: steps from one refresh of the curvature to the next, or a function of the step.
        fisher: ``"sampled"`` (labels drawn from the model's own distribution: the Fisher matrix), ``"exact"`` (a row
            for every output of every sample: the Fisher matrix without chance) or ``"empirical"`` (the loss's own
            derivatives; the loss must be a mean over the samples).
        likelihood: ``"categorical"``, ``"gaussian"``, ``"bernoulli"``, or an object with ``sample(output, generator)``
            and ``nll(output, target)``, and ``factor(output)`` for the exact Fisher; the empirical one needs none.
        fisher_samples: labels drawn for each sample.
        fisher_rows: the most rows that a refresh uses: a random part of them, which leaves F unbiased.
        history: of how many refreshes the rows are kept: F is the mean over all of them.
        blocks: ``"layer"``, a block for what each module owns directly; ``"network"``, one for all parameters; or lists
            of modules' names, a block each.
        representation: ``"auto"`` (per weight, by the analytic rule), ``"factored"``, ``"per_sample"``,
            ``"per_sample_bf16"``, ``"compressed"``, or a mapping from the names of weights to one of these four.
        unsupported: what parameters get that no rule covers: ``"sgd"``, the plain step and one warning, or ``"error"``.
        backend: ``"auto"`` (Triton on CUDA tensors, PyTorch elsewhere) or ``"torch"``.
        plan: what `autotune` returned, or the file that it wrote; the analytic rule serves what it does not know.
        max_bytes: how much the stored J may take, where the representation is chosen automatically; and how much the
            exact Fisher's derivatives by the outputs may.
        tol: of ``"compressed"``: the relative error α ‖Δd‖ / ‖∇L‖ that dropping directions of J may cause in a step.
        seed: of the generators that draw labels and rows; torch's initial seed by default.

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
        damping: Damping = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        spring: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        trust_region: float | None = None,
        refresh_every: int | Callable[[int], int] = 100,
        fisher: Fisher = "sampled",
        likelihood: str | Likelihood = "categorical",
        fisher_samples: int = 1,
        fisher_rows: int | None = None,
        history: int = 1,
        blocks: BlocksChoice = "layer",
        representation: RepresentationChoice = "auto",
        unsupported: Unsupported = "sgd",
        backend: Backend = "auto",
        plan: Plan | Path | str | None = None,
        max_bytes: int = MAX_BYTES,
        tol: float = 0.01,
        seed: int | None = None,
    ) -> None:
        check_model(model)
        if not callable(refresh_every):
            check_refresh_every(refresh_every)
        device = next(model.parameters()).device
        self._options = checked(
            device, fisher=fisher, likelihood=likelihood, fisher_samples=fisher_samples, fisher_rows=fisher_rows,
            history=history, blocks=blocks, representation=representation, unsupported=unsupported, backend=backend,
            plan=plan, max_bytes=max_bytes, tol=tol, trust_region=trust_region,
        )  # fmt: skip
        self.model, self.refresh_every = model, refresh_every
        self._module = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
        self._kernels_for = partial(kernels_of, backend)
        self._ops = self._kernels_for()
        self._seed = torch.initial_seed() if seed is None else seed
        self._generator = torch.Generator(device)
        self._generator.manual_seed(self._seed)
        self._steps = 0  # taken so far
        self._age = 0  # steps taken with the present curvature
        self._curvature: Curvature | None = None
        self._rules: list[Schedule | LevenbergMarquardt | None] = []  # of the damping, by group
        self._settings: dict[int, Settings] = {}
        self._warned: set[str] = set()
        self._blocks: list[Block] = []
        self._capture = self._captures({})
        self._built = False
        defaults = {
            "lr": lr, "damping": damping, "momentum": momentum, "nesterov": nesterov, "spring": spring,
            "weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize,
        }  # fmt: skip
        super().__init__(model.parameters() if params is None else params, defaults)
        self._rebuild()

    @classmethod
    def paper(cls, model: nn.Module, params: Iterable[Any] | None = None, **settings: Any) -> TENGraD:
        """Return the optimizer with the paper's settings for 3C1F on Fashion-MNIST, but for those given."""
        return cls(model, params, **{**PAPER, **settings})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its parameters take part from the next step on, which refreshes the curvature."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        rule, group["damping"] = rule_of(group["damping"])
        try:
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
        blocks = find_blocks(self._module, self.param_groups)
        self._report({block.name: block.why_sgd for block in blocks if block.why_sgd})
        self.close()
        covered = {block.name: block.layer for block in blocks if block.why_sgd is None}
        self._check_dampings(systems_of(self._options.blocks, blocks, list(covered)), blocks)
        self._blocks, self._curvature, self._built = blocks, None, True
        self._capture = self._captures(covered)
        self._capture.arm()

    def _captures(self, covered: Mapping[str, nn.Module]) -> Capture:
        o = self._options
        rows = (o.fisher, o.likelihood, self._generator)
        release = self._release if o.history == 1 else None
        return Capture(self.model, covered, *rows, release, o.fisher_samples, o.max_bytes)

    def _check_dampings(self, systems: Systems, blocks: Sequence[Block]) -> None:
        """Reject a system with several dampings."""
        group_of = {block.name: block.group for block in blocks}
        for system, names in systems.items():
            dampings = {self.param_groups[group_of[name]]["damping"] for name in names}
            if len(dampings) > 1:
                raise ValueError(
                    f"the blocks of {system!r} are solved together and need one damping, got "
                    f"{', '.join(map(str, sorted(dampings)))}: give their parameter groups the same"
                )

    def _report(self, uncovered: Mapping[str, str]) -> None:
        """Say once which blocks no rule covers."""
        news = {name: why for name, why in uncovered.items() if name not in self._warned}
        if not news:
            return
        listed = "; ".join(f"{name or 'the model'} ({why})" for name, why in news.items())
        if self._options.unsupported == "error":
            raise ValueError(f"no exact rule covers {listed}; with unsupported='sgd' they take the plain SGD step")
        self._warned.update(news)
        warnings.warn(f"no exact rule covers {listed}: their parameters take the plain SGD step", stacklevel=3)

    @property
    def adapts(self) -> bool:
        """Whether a damping adapts itself, and steps need a closure."""
        return any(isinstance(rule, LevenbergMarquardt) for rule in self._rules)

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
                the damping adapts itself, and there is no closure. Parameters and state are as before then, as after
                any other error.
        """
        if self.adapts and closure is None:
            raise RuntimeError("damping='lm' compares losses: call step(closure), which returns the loss of the batch")
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
        before = [target.parameter.clone() for target in targets] if self.adapts and age == 0 else []
        curvature.step_(targets, self._ops, self._options.trust_region)
        if closure is not None and before:
            self._adapt(curvature, targets, before, closure, loss)
        self._advance(curvature, age)
        return loss

    def _adapt(
        self,
        curvature: Curvature,
        targets: Sequence[Target],
        before: Sequence[Tensor],
        closure: Callable[[], Any],
        loss: Any,
    ) -> None:
        """Adapt the damping to how well the quadratic model ⟨V, δ⟩ + δᵀ F δ / 2 foretold the loss after the step δ."""
        steps = [replace(t, grad=t.parameter - old) for t, old in zip(targets, before, strict=True)]
        linear = torch.stack([(t.grad * step.grad).sum() for t, step in zip(targets, steps, strict=True)]).sum()
        predicted = float(linear + curvature.curvature_along(steps) / 2)
        self._capture.disarm()
        with torch.enable_grad():
            actual = _number(closure()) - _number(loss)
        for group, rule in zip(self.param_groups, self._rules, strict=True):
            if isinstance(rule, LevenbergMarquardt):
                sign = -1 if group["maximize"] else 1
                group["damping"] = rule.adapted(group["damping"], sign * actual, predicted)

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
        o = self._options
        uses, missing = gather(self._blocks, self._capture)
        self._report(missing)
        if o.fisher_rows is not None:
            drawing = torch.Generator().manual_seed(self._seed + self._steps)
            uses = sampled_rows(uses, o.fisher_rows, drawing)
        chosen = o.plan.choose(geometries_of(uses), o.by_hand, self._interval(), o.max_bytes)
        systems, rows = systems_of(o.blocks, self._blocks, list(uses)), rows_of(uses)
        few = set(compressed_blocks(uses, chosen))
        tol = {system: o.tol for system, names in systems.items() if few.intersection(names)}
        jacobians, window = extended(jacobians_of(uses, chosen, self._kernels_for), rows, self._curvature, o.history)
        return curvature(jacobians, systems, window, *self._damping_of(systems), self._ops, tol)

    def _damping_of(self, systems: Systems) -> tuple[Tensor, Tensor]:
        """Return the dampings that hold at this step, and the failures so far, of some systems."""
        for group, rule in zip(self.param_groups, self._rules, strict=True):
            if callable(rule):
                group["damping"] = rule(self._steps)
                check_group(group)
        self._check_dampings(systems, self._blocks)
        group_of = {block.name: block.group for block in self._blocks}
        dampings = [self.param_groups[group_of[names[0]]]["damping"] for names in systems.values()]
        return on_device(dampings, self._generator.device), failures_of(list(systems), self._curvature)

    def _targets(self) -> list[Target]:
        """Return every parameter that has a gradient."""
        settings, targets = self._settings_now(), []
        for block in self._blocks:
            group = self.param_groups[block.group]
            for label, parameter in block.parameters.items():
                if parameter.grad is not None:
                    grad = -parameter.grad if group["maximize"] else parameter.grad
                    state = (parameter, self._momentum_of(parameter), grad, settings[block.group])
                    targets.append(Target(block.name, label, *state, group["nesterov"], group["spring"], block.group))
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


def _number(loss: Any) -> float:
    """Return what a closure returned, which may still carry its graph."""
    return float(loss.detach() if isinstance(loss, Tensor) else loss)

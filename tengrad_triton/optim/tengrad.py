"""TENGraD as a torch optimizer: its settings, its refresh and its step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton.capture.blocks import LayerParams, BlocksChoice, find_captured_layers, fisher_blocks_of
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.checkpoint import pack_curvature, unpack_curvature
from tengrad_triton.curvature.choices import Backend, Choice, ops_for
from tengrad_triton.curvature.refresh import (
    append_history,
    compressed_blocks,
    gather,
    geometries_of,
    jacobians_of,
    rows_of,
    sampled_rows,
)
from tengrad_triton.curvature.target import Target, on_device
from tengrad_triton.curvature.woodbury import Curvature, FisherBlocks, curvature, failures_of
from tengrad_triton.likelihoods import Fisher, Likelihood
from tengrad_triton.optim.base import CurvatureOptimizer
from tengrad_triton.optim.damping import Damping, LevenbergMarquardt, Schedule
from tengrad_triton.optim.interval import Growing
from tengrad_triton.optim.options import RepresentationChoice, Unsupported, checked
from tengrad_triton.optim.summary import Summary, choices_of, summarize
from tengrad_triton.optim.validation import check_model
from tengrad_triton.profiling import phase
from tengrad_triton.tuning.plan import MAX_BYTES, Plan

PAPER: Mapping[str, Any] = {
    "lr": 3e-3, "damping": 0.1, "relative_damping": False, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-3,
    "refresh_every": 100, "fisher": "sampled", "history": 1, "trust_region": None,
}  # fmt: skip
"""The paper's settings for 3C1F on Fashion-MNIST (appendix, table 6)."""


class TENGraD(CurvatureOptimizer[Curvature]):
    """Natural gradient descent with exact Fisher blocks (Soori et al. 2021), at close to the cost of SGD.

    Every layer's block F = Jᵀ J / N of the Fisher matrix is inverted exactly, by the Woodbury identity, from the
    per-sample gradients J of the N samples of one batch:

        d = (F + α I)⁻¹ ∇L + weight_decay θ;   m ← momentum m + d;   θ ← θ − lr m

    J and the factored N×N system are refreshed every ``refresh_every`` steps and reused in between (docs/math.md). The
    defaults are those that docs/defaults.md found to train without tuning; `TENGraD.paper` has the paper's.

    Args:
        model: the module that the training loop calls, wrapped in `torch.compile` or not. Samples are the first
            dimension of its inputs and its output.
        params: parameters or groups of them; all of the model's by default. Groups may have their own ``lr``,
            ``damping``, ``momentum``, ``nesterov``, ``spring``, ``weight_decay``, ``decoupled_weight_decay`` and
            ``maximize``; a layer's parameters must share a group.
        lr: the learning rate, a number or a 0-dim tensor.
        damping: ε > 0, a function of the step, or ``"lm"`` (or a `LevenbergMarquardt`): adapted by how well the
            quadratic model foretold each refreshing step, which needs ``step(closure)`` and evaluates the closure once
            more then (with ``trust_region=None``: a step that a region shortens looks foretold at any damping). Read
            when the curvature is refreshed.
        relative_damping: whether α = ε max(1, trace(F)), by block, so that one ε suits every layer, loss and model;
            otherwise α = ε.
        momentum: of the momentum buffer, in [0, 1).
        nesterov: whether to look ahead along the momentum; by default where there is one, and no SPRING.
        spring: μ of SPRING (Goldshlager, Abrahamsen, Lin 2024) in [0, 1), in place of momentum: the part of the last
            direction that the present rows do not see is kept.
        weight_decay: λ ≥ 0; added to the natural gradient as λ θ.
        decoupled_weight_decay: shrink θ by 1 − lr λ instead.
        maximize: ascend.
        trust_region: κ > 0: the natural gradient is shortened where the step's squared Fisher norm,
            Σ lr² dᵀ (F + α I) d over all blocks, would be beyond it, in units of the loss. None for no bound.
        refresh_every: steps from one refresh of the curvature to the next, or a function of the step; by default more
            often at first, `Growing`.
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
        unsupported: what parameters get that no rule covers, or that are used outside of their layers: ``"explicit"``,
            rows by `torch.func` or by a backward pass a sample; ``"sgd"``, the plain step and one warning; ``"error"``.
        backend: ``"auto"`` (Triton on CUDA tensors, PyTorch elsewhere) or ``"torch"``.
        plan: what `autotune` returned, or the file that it wrote; the analytic rule serves what it does not know.
        max_bytes: how much the stored J may take, where the representation is chosen automatically; and how much the
            exact Fisher's derivatives by the outputs may. With less than the default, and on a GPU, a refresh uses up
            what it has seen of the batch as it goes: should it fail, it needs the forward and backward again.
        tol: of ``"compressed"``: the relative error α ‖Δd‖ / ‖∇L‖ that dropping directions of J may cause in a step.
        seed: of the generators that draw labels and rows; torch's initial seed by default.

    Raises:
        ValueError: a setting is out of range or unknown; the message says which, and what was expected.
        TypeError: a setting has the wrong type.
    """

    key = "tengrad"

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 3e-2,
        *,
        damping: Damping = 3e-3,
        relative_damping: bool = True,
        momentum: float = 0.9,
        nesterov: bool | None = None,
        spring: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        trust_region: float | None = 3e-4,
        refresh_every: int | Callable[[int], int] = Growing(10),  # noqa: B008 - it is frozen
        fisher: Fisher = "sampled",
        likelihood: str | Likelihood = "categorical",
        fisher_samples: int = 1,
        fisher_rows: int | None = None,
        history: int = 1,
        blocks: BlocksChoice = "layer",
        representation: RepresentationChoice = "auto",
        unsupported: Unsupported = "explicit",
        backend: Backend = "auto",
        plan: Plan | Path | str | None = None,
        max_bytes: int = MAX_BYTES,
        tol: float = 0.01,
        seed: int | None = None,
    ) -> None:
        check_model(model)
        device = next(model.parameters()).device
        self._options = checked(
            device, fisher=fisher, likelihood=likelihood, fisher_samples=fisher_samples, fisher_rows=fisher_rows,
            history=history, blocks=blocks, representation=representation, unsupported=unsupported, backend=backend,
            plan=plan, max_bytes=max_bytes, tol=tol, trust_region=trust_region, relative_damping=relative_damping,
        )  # fmt: skip
        # On a CPU the ops would call the definitions too, at a price: as much again as a small layer's arithmetic.
        self._ops_for = partial(ops_for, "torch" if device.type == "cpu" else backend)
        self._ops = self._ops_for()
        self._frugal = device.type != "cpu" or max_bytes < MAX_BYTES
        defaults = {
            "lr": lr, "damping": damping, "momentum": momentum, "nesterov": nesterov, "spring": spring,
            "weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize,
        }  # fmt: skip
        super().__init__(model, params, defaults, refresh_every=refresh_every, unsupported=unsupported, seed=seed)

    @classmethod
    def paper(cls, model: nn.Module, params: Iterable[Any] | None = None, **settings: Any) -> TENGraD:
        """Return the optimizer with the paper's settings for 3C1F on Fashion-MNIST, but for those given."""
        return cls(model, params, **{**PAPER, **settings})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its parameters take part from the next step on, which refreshes the curvature."""
        group = {**self.defaults, **param_group}
        if group["nesterov"] is None:
            param_group = {**param_group, "nesterov": bool(group["momentum"]) and not group["spring"]}
        super().add_param_group(param_group)

    def _captures(self, blocks: Sequence[LayerParams]) -> Capture:
        o = self._options
        covered = [block.name for block in blocks if block.why_sgd is None]
        self._check_dampings(fisher_blocks_of(o.blocks, blocks, covered), blocks)
        sources = find_captured_layers(self._module, blocks)
        rows = (o.fisher, o.likelihood, self._generator)
        release = self._release if o.history == 1 else None
        explicit = o.unsupported == "explicit"
        return Capture(self.model, sources, *rows, release, o.fisher_samples, o.max_bytes, explicit)

    def _check_dampings(self, systems: FisherBlocks, blocks: Sequence[LayerParams]) -> None:
        """Reject a system with several dampings."""
        group_of = {block.name: block.group for block in blocks}
        for system, names in systems.items():
            dampings = {self.param_groups[group_of[name]]["damping"] for name in names}
            if len(dampings) > 1:
                raise ValueError(
                    f"the blocks of {system!r} are solved together and need one damping, got "
                    f"{', '.join(map(str, sorted(dampings)))}: give their parameter groups the same"
                )

    @property
    def adapts(self) -> bool:
        """Whether a damping adapts itself, and steps need a closure."""
        return any(isinstance(rule, LevenbergMarquardt) for rule in self._rules)

    def _check_own(self, group: Mapping[str, Any], rule: Schedule | LevenbergMarquardt | None) -> None:
        """Accept every rule of the damping."""

    def _why_closure(self) -> str | None:
        why = "damping='lm' compares losses: call step(closure), which returns the loss of the batch"
        return why if self.adapts else None

    def _taken(self, targets: Sequence[Target], closure: Callable[[], Any] | None, loss: Any) -> tuple[Curvature, int]:
        curvature, age = self._curvature, self._age
        if curvature is None or self._refresh_is_due():
            curvature, age = self._refreshed(), 0
        before = [target.parameter.clone() for target in targets] if self.adapts and age == 0 else []
        curvature.step_(targets, self._ops, self._options.trust_region)
        if closure is not None and before:
            self._adapt(curvature, targets, before, closure, loss)
        return curvature, age

    def _adapt(
        self,
        curvature: Curvature,
        targets: Sequence[Target],
        before: Sequence[Tensor],
        closure: Callable[[], Any],
        loss: Any,
    ) -> None:
        """Adapt the damping to how well the quadratic model ⟨V, δ⟩ + δᵀ F δ / 2 foretold the loss after the step δ."""
        steps = [t._replace(grad=t.parameter - old) for t, old in zip(targets, before, strict=True)]
        linear = torch.stack([(t.grad * step.grad).sum() for t, step in zip(targets, steps, strict=True)]).sum()
        predicted = float(linear + curvature.curvature_along(steps) / 2)
        self._capture.disarm()
        with torch.enable_grad():
            actual = _number(closure()) - _number(loss)
        for group, rule in zip(self.param_groups, self._rules, strict=True):
            if isinstance(rule, LevenbergMarquardt):
                sign = -1 if group["maximize"] else 1
                group["damping"] = rule.adapted(group["damping"], sign * actual, predicted)

    def _release(self) -> None:
        """Let go of J before a refresh's forward: no step will use it, and the new one needs the memory."""
        if self._curvature is not None:
            self._curvature = self._curvature.spent()

    def _refresh_is_due(self) -> bool:
        return self._curvature is None or self._curvature.is_released or self._age >= self._interval()

    def _refreshed(self) -> Curvature:
        """Return the curvature of the batches since the last step."""
        o = self._options
        with phase("capture"):
            uses, missing = gather(self._blocks, self._capture, self._frugal)
        self._report(missing)
        if o.fisher_rows is not None:
            drawing = torch.Generator().manual_seed(self._seed + self._steps)
            uses = sampled_rows(uses, o.fisher_rows, drawing)
        every = self.refresh_every
        steps = every.most if isinstance(every, Growing) else self._interval()
        chosen = o.plan.choose(geometries_of(uses), o.by_hand, steps, o.max_bytes)
        if o.history > 1:  # a plan may know the compressed form, which keeps no rows
            kept = Choice("per_sample")
            chosen = {name: kept if c.representation == "compressed" else c for name, c in chosen.items()}
        systems, rows = fisher_blocks_of(o.blocks, self._blocks, list(uses)), rows_of(uses)
        few = set(compressed_blocks(uses, chosen))
        tol = {system: o.tol for system, names in systems.items() if few.intersection(names)}
        with phase("curvature"):
            own = jacobians_of(uses, chosen, self._ops_for)
            jacobians, window = append_history(own, rows, self._curvature, o.history)
            return curvature(jacobians, systems, window, *self._damping_of(systems), self._ops, tol, o.relative_damping)

    def _damping_of(self, systems: FisherBlocks) -> tuple[Tensor, Tensor]:
        """Return the dampings that hold at this step, and the failures so far, of some systems."""
        self._follow_schedules()
        self._check_dampings(systems, self._blocks)
        group_of = {block.name: block.group for block in self._blocks}
        dampings = [self.param_groups[group_of[names[0]]]["damping"] for names in systems.values()]
        return on_device(dampings, self._generator.device), failures_of(list(systems), self._curvature)

    def _packed(self, curvature: Curvature) -> dict[str, Any]:
        return pack_curvature(curvature)

    def _unpacked(self, packed: Mapping[str, Any]) -> Curvature:
        return unpack_curvature(packed, self._blocks, self._ops_for)

    def choices(self) -> dict[str, Choice]:
        """Return how J of every preconditioned parameter is stored at present, by the parameter's name."""
        return choices_of(self._curvature)

    def summary(self) -> Summary:
        """Return a row for every parameter: its block, representation, kernels and bytes; printable."""
        return summarize(self._blocks, self._curvature)


def _number(loss: Any) -> float:
    """Return what a closure returned, which may still carry its graph."""
    return float(loss.detach() if isinstance(loss, Tensor) else loss)

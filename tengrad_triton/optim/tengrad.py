"""The optimizer `TENGraD`: its settings, its refresh and its step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tengrad_triton.capture.blocks import BlocksChoice, LayerParams, find_captured_layers, fisher_blocks_of
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.capture.options import CaptureOptions
from tengrad_triton.capture.outputs import Select
from tengrad_triton.capture.rows.attribution import Verify
from tengrad_triton.curvature.checkpoint import checked_curvature, pack_curvature
from tengrad_triton.curvature.choices import Backend, Choice, Ops, ops_for
from tengrad_triton.curvature.moments import Scaling
from tengrad_triton.curvature.refresh import refresh
from tengrad_triton.curvature.step import predicted_change, step_
from tengrad_triton.curvature.target import Average, Target
from tengrad_triton.curvature.woodbury import Curvature, FisherBlocks
from tengrad_triton.distributed.processes import processes_of
from tengrad_triton.distributed.ranks import Gram
from tengrad_triton.inspection.views import CurvatureViews
from tengrad_triton.likelihoods import Fisher, Likelihood
from tengrad_triton.optim.base import CurvatureOptimizer
from tengrad_triton.optim.damping import Damping, adapt_dampings, adapts, check_dampings, damping_of, restored_on_error
from tengrad_triton.optim.interval import Growing, interval_at, paid_interval
from tengrad_triton.optim.options import PAPER, UNSCALED, RepresentationChoice, Unsupported, settings_of, validate
from tengrad_triton.optim.reports import Stats
from tengrad_triton.optim.summary import Summary, choices_of, summarize
from tengrad_triton.optim.validation import check_model
from tengrad_triton.sharding.shards import check_served
from tengrad_triton.tuning.plan import MAX_BYTES, Plan


class TENGraD(CurvatureViews, CurvatureOptimizer[Curvature]):
    """Natural gradient descent with exact Fisher blocks (Soori et al. 2021).

    Each layer's block F = Jᵀ J / N of the Fisher matrix is inverted exactly, by the Woodbury identity. The rows of J
    are the gradients of the N samples of one batch. With V̂ the running mean of ∇L, a step is

        d = α (F + α D)⁻¹ V̂ + weight_decay θ;   θ ← θ − lr d

    D has the gradient's size in every direction, so that a learning rate means the same on every model (M17). J, D and
    the factored N×N matrices are computed at refreshes and reused in between (docs/math.md). The defaults train the
    models of docs/defaults.md without tuning; `TENGraD.paper` has the paper's settings, with I in place of D.

    Args:
        model: the module that the training loop calls, wrapped in `torch.compile` or not. Samples are the first
            dimension of its inputs and its output.
        params: parameters or groups of them; all of the model's by default. Groups may have their own ``lr``,
            ``damping``, ``momentum``, ``nesterov``, ``spring``, ``weight_decay``, ``decoupled_weight_decay`` and
            ``maximize``. A layer's parameters may be in different groups; those of one block need one ``damping``.
        lr: the learning rate, a number or a 0-dim tensor.
        damping: ε > 0, a function of the step, or ``"lm"`` (or a `LevenbergMarquardt`), which adapts ε to how well the
            quadratic model predicted each refreshing step. ``"lm"`` needs ``step(closure)``, and evaluates the closure
            once more at each refresh. It also needs ``trust_region=None``, because steps that a trust region has
            shortened are predicted well at any damping. So are the small steps of a falling rate with scaling: take it
            with ``scaling="none"`` (docs/tuning.md). The damping is read when the curvature is refreshed.
        relative_damping: whether α = ε max(1, trace(F)) with the F of each block; otherwise α = ε. It gives one ε to
            all layers without scaling.
        scaling: D in F + α D (M17): ``"kronecker"`` (matrices on its sides where they are small), ``"diagonal"`` (of
            rank one on every weight) or ``"none"``, the identity: then d = (F + α I)⁻¹ ∇L + weight_decay θ,
            m ← momentum m + d and θ ← θ − lr (d + momentum m if nesterov, else m). That needs another learning rate and
            damping, and a trust region: `TENGraD.unscaled` has them.
        clip_threshold: with scaling, the bound on the root mean square over each block of D⁻¹ V̂, where V̂ is the
            averaged gradient and a weight's entries count in units of 8 n^-½ for n inputs (M17); None for no bound.
        momentum: the momentum μ, in [0, 1).
        nesterov: whether to look ahead along the momentum; by default True with momentum and without SPRING.
        spring: μ of SPRING (Goldshlager, Abrahamsen, Lin 2024) in [0, 1), in place of momentum: it keeps the part of
            the last direction that is orthogonal to the present rows (docs/math.md, M13).
        weight_decay: λ ≥ 0; added to the natural gradient as λ θ.
        decoupled_weight_decay: whether to multiply θ by 1 − lr λ instead.
        maximize: whether to maximize the loss instead of minimizing it.
        trust_region: κ > 0, in units of the loss, a bound on the step's squared Fisher norm, Σ lr² dᵀ (F + α I) d over
            all blocks: natural gradients beyond it are multiplied by one number below 1 (M14). None for no bound.
        refresh_every: steps from one refresh of the curvature to the next, or a function of the step; by default
            `Growing`, which refreshes more often at first.
        fisher: ``"sampled"`` (labels drawn from the model's own distribution: the Fisher matrix), ``"exact"`` (a row
            for every output of every sample: the Fisher matrix without sampling noise) or ``"empirical"`` (the
            gradients of the loss itself, which must be a mean over the samples).
        likelihood: ``"categorical"``, ``"gaussian"``, ``"bernoulli"``, or an object with ``sample(output, generator)``
            and ``nll(output, target)``, and ``hessian_factor(output)`` for the exact Fisher matrix; the empirical one
            needs none.
        fisher_samples: the number of labels drawn for each sample.
        fisher_rows: the most rows that a refresh uses, drawn at random: F is unbiased.
        history: the number of refreshes whose rows are kept; F is the mean over all of them.
        blocks: ``"layer"``, a block for the parameters that each module owns directly; ``"network"``, one for all
            parameters; or lists of modules' names, a block for each list, and for each layer that none of them names.
        representation: how J is stored: ``"auto"`` (for each weight, by the plan or the cost model), ``"factored"``,
            ``"per_sample"``, ``"per_sample_bf16"``, ``"compressed"``, or a mapping from the names of weights to one of
            these four. A parameter without factors, such as a bias, has no ``"factored"`` J: it stays ``"per_sample"``.
            ``"compressed"`` for one weight compresses its whole block.
        unsupported: for parameters without a rule, or used outside of their layers: ``"explicit"`` computes their rows
            by `torch.func` or by one backward pass for each sample; ``"sgd"`` gives them the SGD step, with scaling
            over the size of their gradient, and one warning; ``"error"`` raises `ValueError`.
        backend: ``"auto"`` (Triton on CUDA tensors, PyTorch elsewhere) or ``"torch"``.
        plan: what `autotune` returned, or the path of the file that it wrote. The cost model decides for weights that
            it does not contain; for all, with a warning, if it was measured on another device or with other versions.
        step_share: what the optimizer may add to SGD's step in the mean, as a share of its time by the cost model: 0.2
            for 1.2 times SGD's step. It bounds the rows, drawn at random, the matrices in D, and `Growing` from below
            (M18). None for no bound. `summary` says what that comes to.
        max_bytes: the memory, in bytes, for those J whose representation is chosen automatically: first they are stored
            in less memory, then fewer rows are used, with one warning. It also bounds the output gradients of the exact
            Fisher matrix, and the rows of each parameter without a rule. 4 GiB by default.
        tol: the largest relative error α ‖Δd‖ / ‖∇L‖ of a ``"compressed"`` J (M7).
        seed: the seed of the generators that draw labels and rows; torch's initial seed by default.
        output: the part of the model's output that the likelihood sees: a function of it, a key or an index. By default
            ``logits``, or the only tensor with a batch.
        gram: with several processes, whose rows the curvature has: ``"global"``, those of all, so that the step is that
            of one process with the whole batch, or ``"local"``, each its own; the steps are averaged then (M21).
        process_group: the processes; by default those that wrap or shard the model, or those of the default group.
        verify: when a further backward pass compares rows with autograd: ``"change"`` (at the first refresh, at some
            later ones and whenever the model has changed), ``"always"`` or ``"never"``.
        include_curvature: whether a state has the curvature (never with `fully_shard`); without it, resuming refreshes.

    Raises:
        ValueError: a setting is out of range or unknown, or a file is no plan; the message says what was expected.
        TypeError: a setting has the wrong type.

    Note:
        A refresh on a GPU, or with ``max_bytes`` below the default, frees what was captured before it ends: if it
        raises, repeat the forward and backward before the next step.
    """

    state_key, takes_shards, made_anew = "tengrad", True, ("_ops",)

    def __init__(
        self, model: nn.Module, params: Iterable[Any] | None = None, lr: float | Tensor = 1e-2, *,
        damping: Damping = 10.0, relative_damping: bool = False, scaling: Scaling = "kronecker",
        clip_threshold: float | None = 1.0, momentum: float = 0.9, nesterov: bool | None = None, spring: float = 0.0,
        weight_decay: float = 0.0, decoupled_weight_decay: bool = False, maximize: bool = False,
        trust_region: float | None = None, refresh_every: int | Callable[[int], int] = Growing(20),  # noqa: B008
        fisher: Fisher = "sampled", likelihood: str | Likelihood = "categorical", fisher_samples: int = 1,
        fisher_rows: int | None = None, history: int = 1, blocks: BlocksChoice = "layer",
        representation: RepresentationChoice = "auto", unsupported: Unsupported = "explicit",
        backend: Backend = "auto", plan: Plan | Path | str | None = None, step_share: float | None = None,
        max_bytes: int = MAX_BYTES, tol: float = 0.01, seed: int | None = None, output: Select = None,
        verify: Verify = "change", include_curvature: bool = True, gram: Gram = "global", process_group: Any = None,
    ) -> None:  # fmt: skip
        device = check_model(model, takes_shards=self.takes_shards)
        self._options = validate(
            model, device, fisher=fisher, likelihood=likelihood, fisher_samples=fisher_samples, fisher_rows=fisher_rows,
            history=history, blocks=blocks, representation=representation, unsupported=unsupported, backend=backend,
            plan=plan, step_share=step_share, max_bytes=max_bytes, tol=tol, trust_region=trust_region,
            relative_damping=relative_damping, output=output, verify=verify, scaling=scaling,
            clip_threshold=clip_threshold, gram=gram,
        )  # fmt: skip
        # On a CPU the ops run the same PyTorch code, but an op's call costs as much as a small layer's arithmetic.
        self._ops_for = partial(ops_for, "torch" if device.type == "cpu" else backend)
        self._release_calls = device.type != "cpu" or max_bytes < MAX_BYTES
        defaults = {
            "lr": lr, "damping": damping, "momentum": momentum, "nesterov": nesterov, "spring": spring,
            "weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize,
        }  # fmt: skip
        super().__init__(model, params, defaults, refresh_every=refresh_every, unsupported=unsupported, seed=seed)
        self._scaling, self.include_curvature = scaling, include_curvature
        check_served(self._shards, history=history, gram=gram)
        self._join(processes_of(model, gram, process_group), settings_of(self._options, self))

    @classmethod
    def paper(cls, model: nn.Module, params: Iterable[Any] | None = None, **settings: Any) -> TENGraD:
        """Return the optimizer with the paper's settings for 3C1F on Fashion-MNIST, except for those given."""
        return cls(model, params, **{**PAPER, **settings})

    @classmethod
    def unscaled(cls, model: nn.Module, params: Iterable[Any] | None = None, **settings: Any) -> TENGraD:
        """Return the optimizer with F + α I and a trust region (M14), which suits it, except for the settings given."""
        return cls(model, params, **{**UNSCALED, **settings})

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        if group["nesterov"] is None:
            param_group = {**param_group, "nesterov": bool(group["momentum"]) and not group["spring"]}
        super().add_param_group(param_group)

    @override
    def _new_capture(self, layers: Sequence[LayerParams]) -> Capture:
        o = self._options
        check_dampings(self._blocks_of(layers), layers, self.param_groups, self._damping_schedules)
        captured = find_captured_layers(self._module, layers)
        options = CaptureOptions(
            o.fisher, o.likelihood, o.fisher_samples, o.output, o.verify, o.max_bytes, o.unsupported == "explicit"
        )
        return Capture(self.model, captured, options, self._generator, self._before_forward)

    @override
    def _blocks_of(self, layers: Sequence[LayerParams]) -> FisherBlocks:
        return fisher_blocks_of(self._options.blocks, layers, [one.name for one in layers if one.why_sgd is None])

    @cached_property
    def _ops(self) -> Ops:
        return self._ops_for()

    @property
    def adapts(self) -> bool:
        """Whether some group's damping is adapted by `LevenbergMarquardt`, which needs a closure."""
        return adapts(self._damping_schedules)

    @override
    def _why_closure(self) -> str | None:
        why = "damping='lm' compares losses before and after a step: call step(closure), where closure returns the loss"
        return why if self.adapts else None

    @override
    def _take_step(
        self, targets: Sequence[Target], grads: Sequence[Tensor], closure: Callable[[], Any] | None, loss: Any
    ) -> tuple[Curvature, int]:
        curvature, age = self._curvature, self._age
        if curvature is None or self._refresh_is_due():
            with self._processes.announced():
                groups = self.param_groups
                samples = self._processes.begin(self._module, self._capture, self._steps, targets, grads, groups)
                with self._capture.used.for_rules():
                    curvature, age = self._refreshed(samples, targets, grads), 0
        self._reports.idle(self._layers, targets, curvature, curvature.jacobians)
        averages = [Average.of_group(group, self._steps) for group in self.param_groups if self._scaling != "none"]
        bounds = self._options.trust_region, averages, self._options.clip_threshold
        adapts = age == 0 and self.adapts  # to how well the change of the loss was predicted (M8)
        before = [target.parameter.clone() for target in targets] if adapts else []
        with restored_on_error(targets) if adapts or self._processes.averages else nullcontext():
            self._reports.bounds = self._steps, step_(curvature, targets, grads, self._ops, *bounds)
            self._processes.end(targets)
            if adapts and closure is not None:
                self._wide.write_back()
                steps = [target.parameter - old for target, old in zip(targets, before, strict=True)]
                predicted = self._processes.mean(float(predicted_change(curvature, targets, grads, steps)))
                how, of_groups = (self._capture, self._processes.mean), (self.param_groups, self._damping_schedules)
                self._reports.changes = adapt_dampings(*of_groups, predicted, loss, closure, *how), predicted
        return curvature, age

    @override
    def _release(self) -> None:
        """Free J before the forward of a refresh: no further step uses it, and the new J needs the memory."""
        if self._curvature is not None and self._options.history == 1:
            self._curvature = self._curvature.released()

    @override
    def _refresh_is_due(self) -> bool:
        c = self._curvature
        return c is None or c.is_released or self._curvature_is_outdated(self._paid_interval())

    def _paid_interval(self) -> int | Callable[[int], int]:
        return paid_interval(self.refresh_every, None if self._curvature is None else self._curvature.spending)

    def _refreshed(self, samples: int, targets: Sequence[Target], grads: Sequence[Tensor]) -> Curvature:
        """Return the curvature of the batches since the last step, which have so many samples in all processes."""
        o, every = self._options, self.refresh_every
        steps = every.most if isinstance(every, Growing) else interval_at(every, self._steps)
        self._follow_schedules()
        foresee = partial(self._reports.foresees, self._ops, self._generator.device)
        options = o.of_refresh(
            o.spender(steps, samples, foresee), steps, min(group["damping"] for group in self.param_groups),
            blocks_of=partial(fisher_blocks_of, o.blocks, self._layers), damping_of=self._damping_of,
            ops_for=self._ops_for, release_calls=self._release_calls, report=self._reports.uncovered,
            gather=self._processes.gather, shards=self._shards,
        )  # fmt: skip
        self._reports.refreshes(self._capture, self._module)
        row_generator = torch.Generator().manual_seed(self._seed + self._steps)
        named = {(target.layer, target.param_name): grad for target, grad in zip(targets, grads, strict=True)}
        curvature = refresh(self._capture, self._layers, options, self._curvature, named, row_generator)
        self._reports.refreshed(curvature)
        return curvature

    def _damping_of(self, blocks: FisherBlocks) -> Tensor:
        """Return the damping ε of each block at this step, on the model's device."""
        self._follow_schedules()
        return damping_of(blocks, self._layers, self.param_groups, self._damping_schedules, self._generator.device)

    @override
    def _packed(self, curvature: Curvature) -> dict[str, Any]:
        return {**pack_curvature(curvature), "fisher": self._options.fisher}

    @override
    def _unpacked(self, packed: Mapping[str, Any]) -> Curvature:
        blocks_of = partial(fisher_blocks_of, self._options.blocks, self._layers)
        return checked_curvature(packed, self._layers, self._ops_for, blocks_of, self._options.fisher)

    def choices(self) -> dict[str, Choice]:
        """Return how the J of each preconditioned parameter is stored at present, by the parameter's name."""
        return choices_of(self._curvature)

    @property
    def stats(self) -> Stats:
        """Return numbers of the last step, for a log. Only reading them waits for the device."""
        interval = interval_at(self._paid_interval(), self._steps)
        return self._reports.stats(self._curvature, self._steps, self._age, interval)

    @override
    def summary(self) -> Summary:
        return summarize(self._layers, self._module, self._curvature, self._reports.apart)

"""The base class of all baselines: the choice of layers, the step along the curvature, the state and the summary."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from tengrad_triton.baselines.kronecker import KroneckerLayer, LayerBatch, layer_batches
from tengrad_triton.baselines.kronecker_curvature import (
    KroneckerCurvature,
    LayerState,
    nbytes_of,
    pack_curvature,
    step_,
    unpack_curvature,
)
from tengrad_triton.baselines.settings import Common, FisherOptions, with_defaults
from tengrad_triton.capture.blocks import LayerParams, find_captured_layers, full_name
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.capture.options import CaptureOptions
from tengrad_triton.curvature.contributions import gather
from tengrad_triton.curvature.target import Target
from tengrad_triton.distributed.ranks import check_alone
from tengrad_triton.optim.base import CurvatureOptimizer
from tengrad_triton.optim.damping import DampingSchedule, LevenbergMarquardt, check_dampings
from tengrad_triton.optim.summary import Stored, Summary, entries_of, others_of
from tengrad_triton.profiling import phase
from tengrad_triton.tuning.plan import MAX_BYTES

S = TypeVar("S", bound=LayerState)


class KroneckerOptimizer(CurvatureOptimizer[KroneckerCurvature[S]]):
    """An optimizer that keeps a Kronecker-factored state for each layer. Other parameters take the SGD step.

    A subclass defines which layers it supports, when a capture is due, and how a refresh computes the states.

    Args:
        model: the module that the training loop calls.
        params: parameters or groups of them; all of the model's by default.
        lr: the learning rate, a number or a 0-dim tensor.
        refresh_every: steps from one refresh to the next, or a function of the step.
        fisher: which derivatives the factors are computed from.
        common: the settings that all baselines have.
    """

    made_anew = ("_compiled_step",)
    kernels: ClassVar[str]
    """The names of the routines that a refresh calls, for the summary."""

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        lr: float | Tensor,
        refresh_every: int | Callable[[int], int],
        fisher: FisherOptions,
        /,
        **common: Unpack[Common],
    ) -> None:
        settings = with_defaults(type(self), common)
        unsupported, seed = settings.pop("unsupported"), settings.pop("seed")
        self._fisher = fisher
        self._compile_options: dict[str, Any] | None = None
        defaults = {"lr": lr, **settings}
        check_alone(model, type(self).__name__)
        super().__init__(model, params, defaults, refresh_every=refresh_every, unsupported=unsupported, seed=seed)

    @abstractmethod
    def _supports(self, layer: KroneckerLayer) -> bool:
        """Whether this optimizer can precondition a layer that has Kronecker factors."""

    @abstractmethod
    def _state_of(self, tensors: dict[str, Any]) -> S:
        """Return a layer's state from its fields."""

    @override
    def _new_capture(self, layers: Sequence[LayerParams]) -> Capture:
        own, captured = self._fisher, find_captured_layers(self._module, layers)
        alone = {layer.name: [layer.name] for layer in layers if layer.why_sgd is None}
        check_dampings(alone, layers, self.param_groups, self._damping_schedules)
        options = CaptureOptions(own.fisher, own.likelihood, own.fisher_samples, max_bytes=MAX_BYTES)
        return Capture(self.model, captured, options, self._generator, self._before_forward)

    @override
    def _check_group(self, group: Mapping[str, Any], schedule: DampingSchedule | None) -> None:
        name = type(self).__name__
        if isinstance(schedule, LevenbergMarquardt):
            raise ValueError(f"damping must be a number or a function of the step for {name}; only TENGraD takes 'lm'")
        if "spring" in group:
            raise ValueError(f"{name} has no spring, which is a setting of TENGraD: use momentum")
        super()._check_group(group, schedule)

    def compile_step(self, *, mode: str | None = None, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the directions and the update, which every step computes, as one graph.

        If the model is wrapped in `torch.compile` too, everything except the refreshes is compiled.

        Args:
            mode: the mode of `torch.compile`.
            backend: the backend of `torch.compile`.
        """
        self._compile_options = {"mode": mode, "backend": backend}
        vars(self).pop("_compiled_step", None)

    @cached_property
    def _compiled_step(self) -> Callable[..., None] | None:
        """Return what `compile_step` compiled, or None; a copy of the optimizer compiles it again."""
        options = self._compile_options
        return None if options is None else torch.compile(step_, fullgraph=True, dynamic=False, **options)

    def _update_targets(
        self,
        curvature: KroneckerCurvature[S],
        targets: Sequence[Target],
        grads: Sequence[Tensor],
        kl_clip: float | None,
    ) -> None:
        """Update the targets along their preconditioned gradients."""
        layers = list(curvature.layers.items())
        if self._compiled_step is None:
            step_(layers, targets, grads, kl_clip)
        else:
            with phase("solve"):  # phases within compiled code are not visible to a profiler
                self._compiled_step(layers, targets, grads, kl_clip)

    def _gather(self) -> list[LayerBatch]:
        """Return the contributions of the batches since the last step, for each layer that is preconditioned.

        One warning names all other parameters that have gradients.
        """
        self._reports.refreshes(self._capture, self._module)
        with phase("capture"):
            contributions, missing = gather(self._layers, self._capture, release_calls=False)
        known = [] if self._curvature is None else list(self._curvature.layers)
        batches = [batch for batch in layer_batches(contributions, known) if self._supports(batch.layer)]
        factored = {
            full_name(batch.layer.module, param_name) for batch in batches for param_name in batch.layer.param_names
        }
        names = [
            full_name(name, param_name)
            for name, param_names in contributions.by_layer.items()
            for param_name in param_names
        ]
        without = {name: "no Kronecker factors" for name in names if name not in factored}
        self._reports.uncovered({**missing, **without})
        return batches

    def _previous(self, batches: Sequence[LayerBatch]) -> dict[KroneckerLayer, S]:
        """Return the present state of each layer, without the layers that have none yet."""
        kept = {} if self._curvature is None else self._curvature.layers
        return {batch.layer: kept[batch.layer] for batch in batches if batch.layer in kept}

    def _failures_with(self, failures: Tensor) -> Tensor:
        """Return how many factorizations have failed so far, including ``failures`` in the present refresh."""
        return failures.to(self._generator.device) + (0 if self._curvature is None else self._curvature.failures)

    def _batch_count(self) -> int:
        """Return how many batches the running factors contain once the present one is added."""
        return 1 if self._curvature is None else self._curvature.batches + 1

    def _params_of(self, layer: KroneckerLayer) -> LayerParams:
        return next(params for params in self._layers if params.name == layer.module)

    def _setting_of(self, layer: KroneckerLayer, name: str) -> Any:
        """Return a setting that weight and bias share, because they are preconditioned together.

        Raises:
            ValueError: their parameter groups have different ones.
        """
        groups = self._params_of(layer).groups
        values = {self.param_groups[groups[param_name]][name] for param_name in layer.param_names}
        if len(values) > 1:
            raise ValueError(
                f"{' and '.join(layer.param_names)} of {layer.module or 'the model'!r} are preconditioned together and "
                f"need one {name}, got {', '.join(map(str, sorted(values)))}: give their parameter groups the same"
            )
        return values.pop()

    @override
    def _packed(self, curvature: KroneckerCurvature[S]) -> dict[str, Any]:
        return pack_curvature(curvature)

    @override
    def _unpacked(self, packed: Mapping[str, Any]) -> KroneckerCurvature[S]:
        return unpack_curvature(packed, self._layers, self._state_of, self._generator.device)

    @override
    def summary(self) -> Summary:
        """Return an entry for every parameter: its layer, its state, the state's bytes, and the refresh's routines."""
        failures = 0 if self._curvature is None else int(self._curvature.failures)
        entries = entries_of(self._layers, self._module, self._stored)
        return Summary(entries, failures, others_of(self._layers, self._module))

    def _stored(self, params: LayerParams, param_name: str) -> Stored | str:
        """Return the state of a parameter's layer, or why there is none."""
        if self._curvature is None:
            return Stored(params.name or ".", "made at the next refresh")
        for layer, state in self._curvature.layers.items():
            if layer.module == params.name and param_name in layer.param_names:
                is_weight = param_name == layer.weight
                form = state.representation if is_weight else f"with {layer.weight}"
                return Stored(params.name or ".", form, self.kernels, nbytes_of(state) if is_weight else 0)
        return "no Kronecker factors"

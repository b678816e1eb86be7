"""What all baselines share: which layers they precondition, the step along the curvature, state and summary."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from tengrad_triton.baselines.curvature import (
    Curvature,
    LayerState,
    nbytes_of,
    pack_curvature,
    step_,
    unpack_curvature,
)
from tengrad_triton.baselines.kronecker import KroneckerLayer, LayerBatch, layer_batches
from tengrad_triton.baselines.settings import Common, FisherOptions, with_defaults
from tengrad_triton.capture.blocks import LayerParams, find_captured_layers, full_name
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.contributions import gather
from tengrad_triton.curvature.target import Target
from tengrad_triton.optim.base import CurvatureOptimizer
from tengrad_triton.optim.damping import LevenbergMarquardt, Schedule
from tengrad_triton.optim.summary import ParameterSummary, Summary
from tengrad_triton.profiling import phase

S = TypeVar("S", bound=LayerState)
_MAX_BYTES = 4 * 2**30  # of an exact Hessian factor, and of the rows of one parameter without a rule


class KroneckerOptimizer(CurvatureOptimizer[Curvature[S]]):
    """An optimizer that keeps a Kronecker-factored state of every layer; other parameters take the plain SGD step.

    A subclass says which layers it supports, when a capture is due, and how a refresh makes their states.

    Args:
        model: the module that the training loop calls.
        params: parameters or groups of them; all of the model's by default.
        lr: the learning rate, a number or a 0-dim tensor.
        refresh_every: steps from one refresh to the next, or a function of the step.
        fisher: which derivatives the factors are made of.
        common: the arguments that every baseline takes.
    """

    kernels: ClassVar[str]
    """The routines that a refresh calls, for the summary."""

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        lr: float | Tensor,
        *,
        refresh_every: int | Callable[[int], int],
        fisher: FisherOptions,
        **common: Unpack[Common],
    ) -> None:
        settings = with_defaults(type(self).__name__, common)
        unsupported, seed = settings.pop("unsupported"), settings.pop("seed")
        self._fisher = fisher
        self._compiled_step: Callable[..., None] | None = None
        defaults = {"lr": lr, **settings}
        super().__init__(model, params, defaults, refresh_every=refresh_every, unsupported=unsupported, seed=seed)

    @abstractmethod
    def _supports(self, layer: KroneckerLayer) -> bool:
        """Whether this optimizer can precondition a layer that has Kronecker factors."""

    @abstractmethod
    def _state_of(self, tensors: dict[str, Any]) -> S:
        """Return a layer's state from its fields."""

    @override
    def _new_capture(self, layers: Sequence[LayerParams]) -> Capture:
        options = self._fisher
        return Capture(
            self.model, find_captured_layers(self._module, layers), options.fisher, options.likelihood, self._generator,
            draws=options.fisher_samples, max_hessian_factor_bytes=_MAX_BYTES, max_parameter_bytes=_MAX_BYTES,
        )  # fmt: skip

    @override
    def _check_group(self, group: Mapping[str, Any], rule: Schedule | LevenbergMarquardt | None) -> None:
        name = type(self).__name__
        if isinstance(rule, LevenbergMarquardt):
            raise ValueError(f"damping must be a number or a function of the step for {name}; only TENGraD takes 'lm'")
        if "spring" in group:
            raise ValueError(f"{name} has no spring, which is a setting of TENGraD: use momentum")

    def compile_step(self, *, mode: str | None = None, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile what every step does, the directions and the update, as one graph.

        With the model in `torch.compile` too, all but the refreshes is compiled.

        Args:
            mode: as of `torch.compile`.
            backend: as of `torch.compile`.
        """
        self._compiled_step = torch.compile(step_, fullgraph=True, dynamic=False, mode=mode, backend=backend)

    def _update_targets(self, curvature: Curvature[S], targets: Sequence[Target], kl_clip: float | None) -> None:
        """Update the targets along their preconditioned gradients."""
        layers = list(curvature.layers.items())
        if self._compiled_step is None:
            step_(layers, targets, kl_clip)
        else:
            with phase("solve"):  # compiled code shows no phases of its own
                self._compiled_step(layers, targets, kl_clip)

    def _gather(self) -> list[LayerBatch]:
        """Return what the batches since the last step contribute to the layers that this optimizer preconditions.

        All other parameters that have gradients are reported.
        """
        with phase("capture"):
            contributions, missing = gather(self._layers, self._capture, release_calls=False)
        known = [] if self._curvature is None else list(self._curvature.layers)
        batches = [batch for batch in layer_batches(contributions, known) if self._supports(batch.layer)]
        factored = {full_name(batch.layer.module, label) for batch in batches for label in batch.layer.labels}
        names = [full_name(name, label) for name, labels in contributions.by_layer.items() for label in labels]
        without = {name: "no Kronecker factors" for name in names if name not in factored}
        self._report_uncovered({**missing, **without})
        return batches

    def _previous(self, batches: Sequence[LayerBatch]) -> dict[KroneckerLayer, S]:
        """Return the present states of those layers that have one."""
        kept = {} if self._curvature is None else self._curvature.layers
        return {batch.layer: kept[batch.layer] for batch in batches if batch.layer in kept}

    def _failures_with(self, failures: Tensor) -> Tensor:
        """Return how many factorizations have failed so far, those of a refresh included."""
        return failures.to(self._generator.device) + (0 if self._curvature is None else self._curvature.failures)

    def _params_of(self, layer: KroneckerLayer) -> LayerParams:
        return next(params for params in self._layers if params.name == layer.module)

    def _group_of(self, layer: KroneckerLayer) -> dict[str, Any]:
        return self.param_groups[self._params_of(layer).group]

    @override
    def _packed(self, curvature: Curvature[S]) -> dict[str, Any]:
        return pack_curvature(curvature)

    @override
    def _unpacked(self, packed: Mapping[str, Any]) -> Curvature[S]:
        return unpack_curvature(packed, self._layers, self._state_of, self._generator.device)

    @override
    def summary(self) -> Summary:
        """Return an entry for every parameter: its layer, what is kept of it, the routines of a refresh, and bytes."""
        entries = tuple(self._entry(layer, label) for layer in self._layers for label in layer.parameters)
        return Summary(entries, 0 if self._curvature is None else int(self._curvature.failures))

    def _entry(self, params: LayerParams, label: str) -> ParameterSummary:
        name, shape = params.full_name_of(label), tuple(params.parameters[label].shape)
        if params.why_sgd is not None:
            return ParameterSummary(name, shape, "-", f"sgd ({params.why_sgd})", "update_", 0)
        if self._curvature is None:
            return ParameterSummary(name, shape, params.name or ".", "made at the next refresh", "-", 0)
        for layer, state in self._curvature.layers.items():
            if layer.module == params.name and label in layer.labels:
                is_weight = label == layer.weight
                form = state.representation if is_weight else f"with {layer.weight}"
                size = nbytes_of(state) if is_weight else 0
                return ParameterSummary(name, shape, params.name or ".", form, self.kernels, size)
        return ParameterSummary(name, shape, "-", "sgd (no Kronecker factors)", "update_", 0)

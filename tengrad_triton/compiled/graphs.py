"""The two functions that a compiled step is traced from. They update parameters, buffers and momenta in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import grad, grad_and_value, vjp
from torch.utils._pytree import tree_map_only

from tengrad_triton.capture.blocks import CapturedLayer, LayerParams, wide_dtype
from tengrad_triton.capture.record import LayerCall
from tengrad_triton.capture.rows.rerun import rerun_rows
from tengrad_triton.capture.rows.rule import Pairs, contributions_of
from tengrad_triton.compiled import sample_space
from tengrad_triton.compiled.functional_capture import CallTensors, FunctionalCapture
from tengrad_triton.compiled.sample_space import Weight
from tengrad_triton.compiled.trace_spec import TraceSpec
from tengrad_triton.curvature.checkpoint import pack_curvature, unpack_curvature, unpack_moments
from tengrad_triton.curvature.choices import Choices, Ops
from tengrad_triton.curvature.contributions import Contributions
from tengrad_triton.curvature.moments import Scaling, scales_of, updated_moments
from tengrad_triton.curvature.refresh import jacobians_of
from tengrad_triton.curvature.step import step_
from tengrad_triton.curvature.target import Average, Trained, grads_of, targets_of, trained_of
from tengrad_triton.curvature.woodbury import Curvature, FisherBlocks, factor
from tengrad_triton.layers import Call, mixes_samples
from tengrad_triton.layers.stateless import Places, call_with
from tengrad_triton.likelihoods import Reparametrized

Named = Mapping[str, Tensor]
"""Tensors by the names of parameters or buffers in the model."""
STATIC_SETTINGS = ("nesterov", "spring", "maximize")
"""The settings of a parameter group that are constants in a compiled function."""
LossFn = Callable[[Any, Any], Tensor]
ForwardPass = tuple[Tensor, Callable[..., Any], CallTensors]
"""A forward's output; the function from the derivative with respect to the output to those with respect to (parameters,
perturbations); and the recorded tensors."""


class StepState(NamedTuple):
    """The tensors that a step reads and updates in place; ``settings`` has one for each parameter group.

    ``averages`` has [share, correction] of each group's `Average`, or is empty. ``rates`` has the `rate_indices` of the
    groups: a step is compiled again where other groups have one learning rate. ``copies`` has those in float32 of
    parameters in half precision: a step updates them in place of the parameters.
    """

    parameters: Named
    buffers: Named
    momenta: Named
    settings: Sequence[Tensor]
    averages: Sequence[Tensor]
    rates: tuple[int, ...]
    copies: Named


@dataclass(frozen=True)
class StepFunctions:
    """The functions `reuse` and `refresh`, and the constants on which the compiled code is specialized.

    Attributes:
        model: the module, called with its parameters replaced.
        places: where its tensors are replaced.
        loss_fn: returns a scalar mean over the samples, from the model's output and the target.
        layers: the optimizer's layers.
        captured: the layers whose calls contribute rows.
        names: each parameter's name in the model, by its layer's name and its own name within that layer.
        trained: the names of the parameters that get a gradient.
        likelihood: draws the labels of the Fisher matrix; None for the empirical Fisher matrix.
        choices: every weight's representation and kernels.
        groups: the `STATIC_SETTINGS` of each parameter group.
        blocks: the names of each Fisher block's layers.
        trust_region: the bound on a step's squared Fisher norm; None for no bound.
        clip_threshold: the bound on each block's step with scaled damping; None for no bound.
        relative_damping: whether dampings are in units of the blocks' mean squared row norms.
        scaling: what D is in F + α D.
        ops: the ops for each combination of kernel overrides in ``choices``, and for no overrides.
        capture: records and perturbs the captured layers.
        spec: which calls `refresh` perturbs and records.
        linear: the layers whose gradients may be projected in sample space (M19), if their J is dense.
    """

    model: nn.Module
    places: Places
    loss_fn: LossFn
    layers: Sequence[LayerParams]
    captured: Mapping[str, CapturedLayer]
    names: Mapping[tuple[str, str], str]
    trained: frozenset[str]
    likelihood: Reparametrized | None
    choices: Choices
    groups: Sequence[Mapping[str, Any]]
    blocks: FisherBlocks
    trust_region: float | None
    clip_threshold: float | None
    relative_damping: bool
    scaling: Scaling
    ops: Mapping[tuple[str, ...], Ops]
    capture: FunctionalCapture
    spec: TraceSpec
    linear: Sequence[str]

    def reuse(
        self, state: StepState, packed: Mapping[str, Any], perturbations: CallTensors, means: Mapping[Weight, Tensor],
        x: Any, y: Any,
    ) -> Tensor:  # fmt: skip
        """Take a step with the present curvature ``packed``; return the loss.

        Layers with ``perturbations`` have dense J. ``means`` are the projections of their running means (M19), which
        the step updates in place.
        """
        output, pull, tensors = self.forward(state, perturbations, x, detach_statistics=False)
        grad_output, loss = grad_and_value(self.loss_fn)(output, y)
        grads, by_perturbation = pull(grad_output)
        curvature = unpack_curvature(packed, self.layers, self.ops.__getitem__)
        dense = sample_space.dense_jacobians(curvature, perturbations, self.spec.samples)
        projected = sample_space.project(dense, self.capture, tensors, by_perturbation)
        self._step(curvature, state, grads, projected, means)
        return loss

    def dense_layers(self, curvature: Curvature, linear: Sequence[str]) -> CallTensors:
        """Return the perturbations of those linear layers whose J are dense."""
        dense = sample_space.dense_jacobians(curvature, linear, self.spec.samples)
        return {name: self.spec.perturbations[name] for name, _ in dense}

    def refresh(
        self,
        state: StepState,
        perturbations: CallTensors,
        damping_L: Tensor,
        failures_L: Tensor,
        moments: Mapping[str, Any],
        linear: Sequence[str],
        noise: Tensor | None,
        x: Any,
        y: Any,
    ) -> tuple[Tensor, dict[str, Any], dict[Weight, Tensor]]:
        """Take a step with the curvature of this batch; return the loss, the packed curvature, and ``means``.

        The gradients of those ``linear`` layers whose J are dense are projected in sample space (M19).
        """
        # The curvature may keep x, and the training loop may write its next batch into the same tensors.
        x, samples = tree_map_only(Tensor, Tensor.clone, x), self.spec.samples
        forward = self.forward(state, perturbations, x, detach_statistics=False)
        grad_output, loss = grad_and_value(self.loss_fn)(forward[0], y)
        grads, by_perturbation = forward[1](grad_output)
        of_loss = by_perturbation
        # If the model mixes samples, the rows come from a second forward, in which batch statistics are constants.
        mixes = any(mixes_samples(module) for module in self.model.modules())
        of_rows = self.forward(state, perturbations, x, detach_statistics=True) if mixes else forward
        scale = samples  # the loss is a mean, but a row is the gradient of one sample's own loss
        if self.likelihood is not None and noise is not None:
            target = self.likelihood.from_noise(of_rows[0], noise)
            grad_output, scale = grad(self.likelihood.nll)(of_rows[0], target), 1
        if mixes or noise is not None:
            _, by_perturbation = of_rows[1](grad_output)
        contributions = self._contributions(of_rows[2], by_perturbation, grad_output, scale, x)
        before = unpack_moments(moments, damping_L.device)
        by_name = {key: grads[name] for key, name in self.names.items() if name in grads}
        kept = updated_moments(before, contributions, self.layers, by_name, self.scaling)
        scales = scales_of(kept, self.layers)
        jacobians = jacobians_of(contributions, self.choices, self.ops.__getitem__, scales)
        curvature = factor(
            jacobians, self.blocks, (samples,), damping_L, failures_L, self.ops[()], {}, self.relative_damping,
            kept, scales,
        )  # fmt: skip
        dense = sample_space.dense_jacobians(curvature, linear, samples)
        projected = sample_space.project(dense, self.capture, forward[2], of_loss)
        means = sample_space.projected_means(curvature, self.averages_of(curvature, linear, state.momenta))
        self._step(curvature, state, grads, projected, means)
        return loss, pack_curvature(curvature), means

    def averages_of(self, curvature: Curvature, layers: Collection[str], momenta: Named) -> dict[Weight, Tensor]:
        """Return the running means m of the dense weights; none where D is the identity."""
        if self.scaling == "none":
            return {}
        dense = sample_space.dense_jacobians(curvature, layers, self.spec.samples)
        return {one: momenta[self.names[one]] for one in dense if self.names[one] in momenta}

    def _contributions(
        self, tensors: CallTensors, by_perturbation: CallTensors, grad_output: Tensor, scale: int, x: Any
    ) -> Contributions:
        """Return the contributions of the recorded calls, for each layer of a Fisher block."""

        def pairs_of(name: str) -> Pairs:
            if name in self.capture.tapped_names:
                scaled = [{linear: scale * g for linear, g in by.items()} for by in by_perturbation[name]]
                return [pair for pair in zip(tensors[name], scaled, strict=True) if pair[1]]
            calls = self._calls(name, tensors, by_perturbation)
            return [(call.inputs(name), call.scaled_grads(scale)) for call in calls]

        with_rule = {name: self.captured[name] for name in tensors if self.captured[name].has_rule}
        explicit = self._rows_of_reruns(tensors, by_perturbation, scale)
        explicit |= self._rows_of_model(x, grad_output, scale)
        by_id = contributions_of(with_rule, pairs_of, explicit, self.spec.unattributed, self.spec.samples)
        in_blocks = {name for names in self.blocks.values() for name in names}
        return Contributions(
            {
                layer.name: {param_name: [by_id[id(layer.parameters[param_name])]] for param_name in layer.trained()}
                for layer in self.layers
                if layer.name in in_blocks
            }
        ).of_type(wide_dtype(self.layers))

    def _calls(self, name: str, tensors: CallTensors, by_perturbation: CallTensors) -> list[LayerCall]:
        return [call for call in self.capture.layer_calls(name, tensors, by_perturbation) if call.has_grads]

    def _rows_of_reruns(self, tensors: CallTensors, by_perturbation: CallTensors, scale: int) -> dict[int, Tensor]:
        """Return the rows of layers without a rule, by the parameter's id: each layer is run again in `torch.func`."""
        rows: dict[int, Tensor] = {}
        for name in tensors:
            layer = self.captured[name]
            if not layer.has_rule:
                wanted = {
                    param_name: p
                    for param_name, p in layer.parameters.items()
                    if p.requires_grad and id(p) not in self.spec.unattributed
                }
                calls = self._calls(name, tensors, by_perturbation)
                for param_name, own in rerun_rows(layer.layer, wanted, calls, self.spec.samples, scale).items():
                    key = id(wanted[param_name])
                    rows[key] = rows[key] + own if key in rows else own
        return rows

    def _rows_of_model(self, x: Any, grad_output: Tensor, scale: int) -> dict[int, Tensor]:
        """Return the rows of `TraceSpec.from_model`, by the parameter's id. The whole model is run again."""
        parameters = self.spec.from_model
        if not parameters:
            return {}
        call = LayerCall.with_grads(Call((x,)), [grad_output], returns_tensor=True, samples_second=False)
        rows = rerun_rows(self.model, parameters, [call], self.spec.samples, scale)
        return {id(parameters[name]): own for name, own in rows.items()}

    def forward(self, state: StepState, perturbations: CallTensors, x: Any, detach_statistics: bool) -> ForwardPass:
        """Call the model. A forward with detached statistics is a second one, so it does not update buffers."""
        trained = {name: state.parameters[name].detach() for name in self.trained}
        frozen = {name: p.detach() for name, p in state.parameters.items() if name not in self.trained}

        def forward(trained: Named, perturbations: CallTensors) -> tuple[Tensor, Any]:
            # A function under a transform cannot write into tensors from outside, such as BatchNorm's running means.
            buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
            self.capture.start(perturbations, detach_statistics)
            output = call_with(self.model, self.places, {**frozen, **trained, **buffers}, (x,))
            return output, (self.capture.stop(), buffers)

        transformed: Any = vjp(forward, trained, perturbations, has_aux=True)
        output, pull, (tensors, buffers) = transformed
        if not detach_statistics:
            for name, buffer in state.buffers.items():
                buffer.copy_(buffers[name])
        return output, pull, tensors

    def _step(
        self,
        curvature: Curvature,
        state: StepState,
        by_name: Named,
        projected: Mapping[Weight, Tensor] | None = None,
        means: Mapping[Weight, Tensor] | None = None,
    ) -> None:
        """Step along the gradients; ``projected`` has J D⁻¹ V of some weights, ``means`` what precedes it (M19)."""
        trained = self._trained(state, by_name)
        targets = targets_of(trained, self.groups, state.settings, state.rates)
        averages = [
            None if group["spring"] else Average(numbers[0], numbers[1], group["nesterov"])
            for group, numbers in zip(self.groups, state.averages, strict=False)
        ]
        grads, known, projected, means = grads_of(trained, self.groups), {}, projected or {}, means or {}
        for place, target in enumerate(targets):
            weight = target.layer, target.param_name
            if weight in projected:
                y_N = -projected[weight] if self.groups[target.group]["maximize"] else projected[weight]
                average = averages[target.group] if averages else None
                known[place] = y_N if average is None else average.of([means[weight]], [y_N])[0]
                if average is not None:
                    average.remember_([means[weight]], [y_N])
        step_(curvature, targets, grads, self.ops[()], self.trust_region, averages, self.clip_threshold, known)

    def _trained(self, state: StepState, grads: Named) -> list[Trained]:
        def tensors_of(layer: LayerParams, param_name: str) -> tuple[Tensor, Tensor, Tensor] | None:
            name = self.names[layer.name, param_name]
            if name not in self.trained:
                return None
            momentum = state.momenta[name]
            return state.copies.get(name, state.parameters[name]), momentum, grads[name].to(momentum.dtype)

        return trained_of(self.layers, tensors_of)

"""The two graphs of a compiled step, as pure functions of tensors but for the parameters that they update in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vjp

from tengrad_triton.capture.blocks import LayerParams, CapturedLayer
from tengrad_triton.capture.record import LayerCall
from tengrad_triton.capture.rerun import rerun_rows
from tengrad_triton.compiled.functional_capture import Calls, FunctionalCapture
from tengrad_triton.compiled.trace_spec import TraceSpec
from tengrad_triton.curvature.checkpoint import pack_curvature, unpack_curvature
from tengrad_triton.curvature.choices import Choices
from tengrad_triton.curvature.refresh import BlockUses, forms_of, jacobians_of
from tengrad_triton.curvature.target import Target
from tengrad_triton.curvature.woodbury import FisherBlocks, curvature
from tengrad_triton.layers import Call, Contribution, PerSampleGrads, mixes_samples
from tengrad_triton.likelihoods import Reparametrized

Named = Mapping[str, Tensor]
GROUP_WORDS = ("nesterov", "spring", "maximize")
LossFn = Callable[[Any, Any], Tensor]
Pass = tuple[Tensor, Callable[..., Any], Calls]
"""A forward's output, its pullback to (gradients, derivatives by the zeros), and what every call of a layer got."""


class State(NamedTuple):
    """What a step reads and writes in place, by the parameters' names in the model; ``settings`` by group."""

    parameters: Named
    buffers: Named
    momenta: Named
    settings: Sequence[Tensor]


@dataclass(frozen=True)
class Graphs:
    """Everything about a step that is no tensor of it.

    Attributes:
        model: the module, called with its parameters replaced.
        loss_fn: a scalar mean over the samples, of the model's output and the target.
        blocks: of the optimizer, and under which name the model knows each of their parameters.
        sources: the layers whose calls make rows.
        names: maps (block, label) to that name.
        trained: the names of those that get a gradient.
        likelihood: draws the Fisher's labels; None for the empirical Fisher.
        chosen: every weight's representation and kernels.
        groups: the settings of each group that are no numbers of the update.
        systems: which blocks are solved together.
        trust_region: bound of a step's Fisher norm, if there is one.
        relative: whether the dampings are in units of the blocks' traces.
        kernels: by what PyTorch does better.
        tape: captures the covered layers.
        lesson: what there is to capture.
    """

    model: nn.Module
    loss_fn: LossFn
    blocks: Sequence[LayerParams]
    sources: Mapping[str, CapturedLayer]
    names: Mapping[tuple[str, str], str]
    trained: frozenset[str]
    likelihood: Reparametrized | None
    chosen: Choices
    groups: Sequence[Mapping[str, Any]]
    systems: FisherBlocks
    trust_region: float | None
    relative: bool
    kernels: Mapping[tuple[str, ...], Any]
    tape: FunctionalCapture
    lesson: TraceSpec

    def reuse(self, state: State, packed: Mapping[str, Any], x: Tensor, y: Tensor) -> Tensor:
        """Take a step with the curvature at hand; return the loss."""
        output, pull, _ = self._forward(state, {}, x)
        grad_output, loss = grad_and_value(self.loss_fn)(output, y)
        grads, _ = pull(grad_output)
        reused = unpack_curvature(packed, self.blocks, self.kernels.__getitem__)
        reused.step_(self._targets(state, grads), self.kernels[()], self.trust_region)
        return loss

    def refresh(
        self,
        state: State,
        zeros: Calls,
        damping_L: Tensor,
        failures_L: Tensor,
        noise: Tensor | None,
        x: Tensor,
        y: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Take a step with the curvature of this batch; return the loss and the curvature."""
        x = x.clone()  # the curvature may keep it, and the training loop may write its next batch there
        output, pull, seen = self._forward(state, zeros, x)
        grad_output, loss = grad_and_value(self.loss_fn)(output, y)
        grads, by_zeros = pull(grad_output)
        # Where samples mix, the rows come from a forward of their own, with the batch's statistics as constants.
        mixes = any(mixes_samples(module) for module in self.model.modules())
        passed = self._forward(state, zeros, x, constants=True) if mixes else (output, pull, seen)
        scale = len(x)  # the loss is a mean, the rows are each sample's own
        if self.likelihood is not None and noise is not None:
            grad_output = grad(self.likelihood.nll)(passed[0], self.likelihood.from_noise(passed[0], noise))
            scale = 1
        if mixes or scale == 1:
            _, by_zeros = passed[1](grad_output)
        forms = self._forms(passed[2], by_zeros, scale, len(x))
        for name, rows in self._rows_of_model(x, grad_output, scale).items():
            forms[id(self.lesson.by_model[name])] = [PerSampleGrads(rows)]
        jacobians = jacobians_of(self._uses(forms), self.chosen, self.kernels.__getitem__)
        fresh = curvature(
            jacobians, self.systems, (len(x),), damping_L, failures_L, self.kernels[()], relative=self.relative
        )
        fresh.step_(self._targets(state, grads), self.kernels[()], self.trust_region)
        return loss, pack_curvature(fresh)

    def _forms(self, seen: Calls, by_zeros: Calls, scale: int, samples: int) -> dict[int, list[Contribution]]:
        """Return what the calls contribute to each parameter, by the parameter's id."""
        forms: dict[int, list[Contribution]] = {}
        for name in seen:
            source = self.sources[name]
            own = {
                k: p for k, p in source.parameters.items() if p.requires_grad and id(p) not in self.lesson.unattributed
            }
            if name in self.tape.within:
                scaled = [{linear: scale * g for linear, g in by.items()} for by in by_zeros[name]]
                pairs: list[Any] = [pair for pair in zip(seen[name], scaled, strict=True) if pair[1]]
            else:
                uses = [use for use in self.tape.uses(name, seen, by_zeros) if use.has_grads]
                if source.rerun:
                    rows = rerun_rows(source.layer, own, uses, samples, scale)
                    for label, p in own.items():
                        forms.setdefault(id(p), []).append(PerSampleGrads(rows[label]))
                    continue
                pairs = [(use.inputs(name), use.scaled_grads(scale)) for use in uses]
            wanted = {id(p) for p in own.values()}
            for key, found in forms_of(name, source, pairs, samples).items():
                if key in wanted:
                    forms.setdefault(key, []).extend(found)
        return forms

    def _rows_of_model(self, x: Tensor, grad_output: Tensor, scale: int) -> Named:
        """Return the rows of parameters that are used in other ways than by calls of their layers."""
        if not self.lesson.by_model:
            return {}
        use = LayerCall(Call((x,)), [None], returns_tensor=True, output_grads=[grad_output])
        return rerun_rows(self.model, self.lesson.by_model, [use], len(x), scale)

    def _uses(self, forms: Mapping[int, list[Contribution]]) -> dict[str, BlockUses]:
        """Return them by block and label, for the blocks with rows."""
        rowed = [name for names in self.systems.values() for name in names]
        blocks = {block.name: block for block in self.blocks}
        return {
            name: {label: [forms[id(blocks[name].parameters[label])]] for label in blocks[name].trained()}
            for name in rowed
        }

    def _forward(self, state: State, zeros: Calls, x: Tensor, constants: bool = False) -> Pass:
        """Call the model; with ``constants`` a second time, which leaves no trace in its buffers."""
        trained = {name: state.parameters[name].detach() for name in self.trained}
        frozen = {name: p.detach() for name, p in state.parameters.items() if name not in self.trained}

        def forward(trained: Named, zeros: Calls) -> tuple[Tensor, Any]:
            # A transform cannot write into a tensor from outside (BatchNorm's averages): it gets copies.
            buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
            self.tape.start(zeros, constants)
            output = functional_call(self.model, {**frozen, **trained, **buffers}, (x,))
            return output, (self.tape.stop(), buffers)

        transformed: Any = vjp(forward, trained, zeros, has_aux=True)
        output, pull, (seen, buffers) = transformed
        if not constants:
            for name, buffer in state.buffers.items():
                buffer.copy_(buffers[name])
        return output, pull, seen

    def _targets(self, state: State, grads: Named) -> list[Target]:
        targets = []
        for block in self.blocks:
            settings, words = state.settings[block.group], self.groups[block.group]
            for label in block.parameters:
                name = self.names[block.name, label]
                if name in self.trained:
                    grad = -grads[name] if words["maximize"] else grads[name]
                    tensors = (state.parameters[name], state.momenta[name], grad)
                    words_of = (words["nesterov"], words["spring"], block.group)
                    targets.append(Target(block.name, label, *tensors, settings, *words_of))
        return targets

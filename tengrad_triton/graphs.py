"""The two graphs of a compiled step, as pure functions of tensors but for the parameters that they update in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vjp

from tengrad_triton.blocks import Block, Source
from tengrad_triton.fisher import Noisy
from tengrad_triton.layers import Form, mixes_samples
from tengrad_triton.plan import Chosen
from tengrad_triton.refresh import BlockUses, forms_of, jacobians_of
from tengrad_triton.state import pack_curvature, unpack_curvature
from tengrad_triton.tape import Tape
from tengrad_triton.update import Target
from tengrad_triton.woodbury import Systems, curvature

Named = Mapping[str, Tensor]
Calls = Mapping[str, Sequence[Tensor]]
GROUP_WORDS = ("nesterov", "spring", "maximize")
LossFn = Callable[[Any, Any], Tensor]
Pass = tuple[Tensor, Callable[..., Any], Calls]
"""A forward's output, its pullback to (gradients, derivatives by layers' outputs), and the layers' inputs."""


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
    """

    model: nn.Module
    loss_fn: LossFn
    blocks: Sequence[Block]
    sources: Mapping[str, Source]
    names: Mapping[tuple[str, str], str]
    trained: frozenset[str]
    likelihood: Noisy | None
    chosen: Chosen
    groups: Sequence[Mapping[str, Any]]
    systems: Systems
    trust_region: float | None
    relative: bool
    kernels: Mapping[tuple[str, ...], Any]
    tape: Tape

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
        outputs: Calls,
        damping_L: Tensor,
        failures_L: Tensor,
        noise: Tensor | None,
        x: Tensor,
        y: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Take a step with the curvature of this batch; return the loss and the curvature."""
        x = x.clone()  # the curvature may keep it, and the training loop may write its next batch there
        zeros = {name: [torch.zeros_like(call) for call in calls] for name, calls in outputs.items()}
        output, pull, inputs = self._forward(state, zeros, x)
        grad_output, loss = grad_and_value(self.loss_fn)(output, y)
        grads, g = pull(grad_output)
        # Where samples mix, the rows come from a forward of their own, with the batch's statistics as constants.
        mixes = any(mixes_samples(module) for module in self.model.modules())
        passed = self._forward(state, zeros, x, constants=True) if mixes else (output, pull, inputs)
        scale = len(x)  # the loss is a mean, the rows are each sample's own
        if self.likelihood is not None and noise is not None:
            grad_output = grad(self.likelihood.nll)(passed[0], self.likelihood.pick(passed[0], noise))
            scale = 1
        if mixes or scale == 1:
            _, g = passed[1](grad_output)
        calls = {k: [(a, scale * b) for a, b in zip(passed[2][k], g[k], strict=True)] for k in outputs}
        uses = self._uses(calls, len(x))
        jacobians = jacobians_of(uses, self.chosen, self.kernels.__getitem__)
        fresh = curvature(
            jacobians, self.systems, (len(x),), damping_L, failures_L, self.kernels[()], relative=self.relative
        )
        fresh.step_(self._targets(state, grads), self.kernels[()], self.trust_region)
        return loss, pack_curvature(fresh)

    def _uses(self, calls: Mapping[str, Sequence[tuple[Any, Any]]], samples: int) -> dict[str, BlockUses]:
        """Return what the calls contribute to each parameter of each block with rows."""
        forms: dict[int, list[Form]] = {}
        for name, pairs in calls.items():
            for key, use in forms_of(name, self.sources[name], pairs, samples).items():
                forms.setdefault(key, []).extend(use)
        rowed = [name for names in self.systems.values() for name in names]
        blocks = {block.name: block for block in self.blocks}
        return {
            name: {label: [forms[id(blocks[name].parameters[label])]] for label in blocks[name].trained()}
            for name in rowed
        }

    def _forward(self, state: State, perturbations: Calls, x: Tensor, constants: bool = False) -> Pass:
        """Call the model; with ``constants`` a second time, which leaves no trace in its buffers."""
        trained = {name: state.parameters[name].detach() for name in self.trained}
        frozen = {name: p.detach() for name, p in state.parameters.items() if name not in self.trained}

        def forward(trained: Named, perturbations: Calls) -> tuple[Tensor, Any]:
            # A transform cannot write into a tensor from outside (BatchNorm's averages): it gets copies.
            buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
            self.tape.start(perturbations, constants)
            output = functional_call(self.model, {**frozen, **trained, **buffers}, (x,))
            return output, (self.tape.stop(), buffers)

        transformed: Any = vjp(forward, trained, perturbations, has_aux=True)
        output, pull, (inputs, buffers) = transformed
        if not constants:
            for name, buffer in state.buffers.items():
                buffer.copy_(buffers[name])
        return output, pull, inputs

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

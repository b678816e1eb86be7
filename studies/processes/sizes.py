"""The sizes of a model's refresh, from its modules on the meta device: no number is typed in, and nothing is computed.

The rules, the message and the second moments are those of the optimizer itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from perf.models import MODELS
from tengrad_triton.capture.blocks import LayerParams, find_captured_layers, find_layer_params, full_name
from tengrad_triton.capture.rows.rule import Pairs, contributions_of
from tengrad_triton.curvature.concat import MicroBatches
from tengrad_triton.curvature.contributions import Contributions
from tengrad_triton.curvature.moments.running import SIDE_SHARE
from tengrad_triton.curvature.moments.second import LARGEST, Form, form_of
from tengrad_triton.distributed.exchange import packed
from tengrad_triton.layers import PerSampleGrads
from tengrad_triton.recipes.models.transformer import gpt
from tengrad_triton.tuning.budget import Work

META = torch.device("meta")


@dataclass(frozen=True)
class Network:
    """How to build a model, and the shape of one input sample; ``tokens`` are integers."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    tokens: bool


GPT = "GPT-2 small"
COUNTED = ("small 3C1F", "transformer", "ResNet-18")
"""The models whose bytes are counted."""
NETWORKS: Mapping[str, Network] = {
    **{name: Network(MODELS[name].build, MODELS[name].sample, MODELS[name].tokens) for name in (*COUNTED, "WRN-28-4")},
    GPT: Network(lambda: gpt(50257, 1024), (1024,), tokens=True),
}


class Sizes:
    """What the samples of one process contribute to J, by the rules of a model's layers.

    Args:
        network: the model.
        samples: of the process.

    Attributes:
        layers: of the optimizer.
        contributions: of the process, on the meta device.
        parameters: the entries of all parameters.
        shapes: those of all parameters, by their names.
        forms: returns the form of D for each parameter, with the rows of R such processes.
        work: returns what a refresh of R such processes could use, with the rows of all of them.
    """

    def __init__(self, network: Network, samples: int) -> None:
        with META:
            model = network.build()
        self.forms, self.work = cache(self._forms), cache(self._work)
        self.samples, self.parameters = samples, sum(p.numel() for p in model.parameters())
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.layers = find_layer_params(model, [{"params": [*model.parameters()]}], rows_without_rule=False)
        self.contributions = Contributions(_by_layer(model, self.layers, network, samples))

    @cached_property
    def message_bytes(self) -> int:
        """The bytes of the tensors that a process sends to each other one: what several layers share counts once."""
        return packed(self.contributions.by_layer, META)[1].numel()

    def _work(self, count: int) -> Work:
        weights = {**self.contributions.geometries(), **self.contributions.explicit()}
        rows = count * self.samples
        work = Work(weights, rows, 1, 1, self.sides(count), len(self.layers))
        return replace(work, weights=work.of_rows(rows))

    def sides(self, count: int) -> dict[str, tuple[int, ...]]:
        """Return the sides of D that are matrices, by their entries, for each parameter."""
        forms = self.forms(count)
        return {
            name: ((form.outputs,) if form.rows_are_matrices else ())
            + ((form.inputs,) if form.columns_are_matrices else ())
            for name, form in forms.items()
        }

    def _forms(self, count: int) -> dict[str, Form]:
        # With as many positions as samples, and no weight has fewer, more batches than these change no form.
        count = min(count, math.ceil(LARGEST / (3 * SIDE_SHARE) / self.samples))
        return {
            full_name(layer.name, name): form_of([*batches] * count, layer.parameters[name], SIDE_SHARE)
            for layer in self.layers
            for name, batches in self.contributions.by_layer[layer.name].items()
        }


def _by_layer(
    model: nn.Module, layers: list[LayerParams], network: Network, samples: int
) -> dict[str, Mapping[str, MicroBatches]]:
    """Return what the calls of one forward contribute; outputs stand for their derivatives, which have their shapes."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    captured = find_captured_layers(model, layers)

    def record(name: str, args: tuple[Tensor, ...], y: Tensor) -> None:
        calls.setdefault(name, []).append((args[0].detach(), y))  # the optimizer's hooks detach inputs too

    for name, layer in captured.items():
        layer.layer.register_forward_hook(lambda _, args, y, name=name: record(name, args, y))
    dtype = torch.int64 if network.tokens else torch.float32
    with torch.no_grad():
        model(torch.empty(samples, *network.sample, dtype=dtype, device=META))

    def pairs_of(name: str) -> Pairs:
        return calls.get(name, [])

    found = contributions_of(captured, pairs_of, {}, (), samples)
    for parameter in (p for layer in layers for p in layer.parameters.values() if id(p) not in found):
        # A table that no layer looks up: its rows come from running the model again, and are sent as they are.
        found[id(parameter)] = [PerSampleGrads(parameter.new_empty(samples, *parameter.shape))]
    return {layer.name: {name: [found[id(p)]] for name, p in layer.parameters.items()} for layer in layers}


@cache
def sizes_of(name: str, samples: int) -> Sizes:
    """Return the sizes of a named model with the samples of one process."""
    return Sizes(NETWORKS[name], samples)

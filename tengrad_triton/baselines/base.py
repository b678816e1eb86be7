"""What the rivals share beyond the shell: layers with a Kronecker state each, the step along them, state, summary.

Dimensions: G groups, O outputs and I inputs of a group (see `kronecker`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tengrad_triton.baselines.kronecker import Layer, concat, layers_of, parted
from tengrad_triton.capture.blocks import LayerParams, find_captured_layers, full_name
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.refresh import BlockUses, gather
from tengrad_triton.curvature.target import Target
from tengrad_triton.kernels import update_
from tengrad_triton.likelihoods import FISHERS, Fisher, Likelihood, likelihood_of
from tengrad_triton.optim.base import CurvatureOptimizer
from tengrad_triton.optim.damping import LevenbergMarquardt, Schedule
from tengrad_triton.optim.options import Unsupported, check_rows
from tengrad_triton.optim.summary import Row, Summary
from tengrad_triton.profiling import phase
from tengrad_triton.tuning.plan import MAX_BYTES

Gathered = Mapping[str, BlockUses]


class State(Protocol):
    """A layer's curvature: a frozen dataclass of tensors, and of further such."""

    @property
    def running(self) -> Tensor:
        """Return the running factor a_GII, which every rival keeps."""

    def solve(self, v_GOI: Tensor) -> Tensor:
        """Return the preconditioned gradient."""

    @property
    def form(self) -> str:
        """Return what is kept, for the summary."""


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Curvature(Generic[S]):
    """Every layer's state, by its weight's name; how many batches it has seen; how many factorizations failed."""

    layers: Mapping[str, tuple[Layer, S]]
    updates: int
    failures: Tensor


@dataclass(frozen=True)
class Rows:
    """Whose derivatives the factors are made of; `TENGraD` says what each means."""

    fisher: Fisher = "sampled"
    likelihood: str | Likelihood = "categorical"
    draws: int = 1

    def __post_init__(self) -> None:
        if self.fisher not in FISHERS:
            raise ValueError(f"fisher must be one of {', '.join(map(repr, FISHERS))}, got {self.fisher!r}")
        check_rows(self.fisher, likelihood_of(self.likelihood), self.draws, 1, "auto")


class KroneckerOptimizer(CurvatureOptimizer[Curvature[S]]):
    """An optimizer that keeps a Kronecker-factored state a layer; what none covers takes the plain SGD step."""

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: Mapping[str, Any],
        *,
        rows: Rows,
        refresh_every: int | Callable[[int], int],
        unsupported: Unsupported,
        seed: int | None,
    ) -> None:
        if unsupported not in ("sgd", "error"):
            raise ValueError(f"unsupported must be one of 'sgd', 'error', got {unsupported!r}")
        self._rows = rows
        self._compiled: Callable[..., None] | None = None
        super().__init__(model, params, defaults, refresh_every=refresh_every, unsupported=unsupported, seed=seed)

    @abstractmethod
    def _restored(self, tensors: dict[str, Any]) -> S:
        """Return a layer's state from its fields."""

    @abstractmethod
    def _factors(self, layer: Layer) -> bool:
        """Whether this optimizer can take the layer."""

    @abstractmethod
    def _factorization(self) -> str:
        """Return what a refresh does, for the summary."""

    def _captures(self, blocks: Sequence[LayerParams]) -> Capture:
        sources = find_captured_layers(self._module, blocks)
        rows, likelihood = self._rows, likelihood_of(self._rows.likelihood)
        return Capture(
            self.model, sources, rows.fisher, likelihood, self._generator, draws=rows.draws,
            max_factor_bytes=MAX_BYTES, max_parameter_bytes=MAX_BYTES,
        )  # fmt: skip

    def _check_own(self, group: Mapping[str, Any], rule: Schedule | LevenbergMarquardt | None) -> None:
        name = type(self).__name__
        if isinstance(rule, LevenbergMarquardt):
            raise ValueError(f"damping must be a number or a function of the step for {name}; 'lm' is TENGraD's alone")
        if "spring" in group:
            raise ValueError(f"spring is TENGraD's alone: {name} has momentum")

    def _gathered(self) -> tuple[Gathered, list[Layer]]:
        """Return what the batches since the last step contribute, and the layers that have Kronecker factors."""
        with phase("capture"):
            uses, missing = gather(self._blocks, self._capture)
        known = {} if self._curvature is None else {name: layer for name, (layer, _) in self._curvature.layers.items()}
        layers = [layer for layer in layers_of(uses, known) if self._factors(layer)]
        factored = {(layer.block, label) for layer in layers for label in layer.labels}
        rest = [
            full_name(name, label) for name, block in uses.items() for label in block if (name, label) not in factored
        ]
        self._report({**missing, **dict.fromkeys(rest, "no Kronecker factors")})
        return uses, layers

    def _past(self, layers: Sequence[Layer]) -> dict[str, S]:
        """Return the states that there are of these layers."""
        kept = {} if self._curvature is None else self._curvature.layers
        return {layer.name: kept[layer.name][1] for layer in layers if kept.get(layer.name, (None,))[0] == layer}

    def _group_of(self, layer: Layer) -> int:
        return next(block.group for block in self._blocks if block.name == layer.block)

    def _damping_of(self, layer: Layer) -> float:
        return float(self.param_groups[self._group_of(layer)]["damping"])

    def compile_step(self, *, mode: str | None = None, backend: str = "inductor") -> None:
        """Compile what every step does, the direction and the update, as one graph; arguments as of `torch.compile`.

        With the model in `torch.compile` too, all but the refreshes is compiled.
        """
        self._compiled = torch.compile(along_, fullgraph=True, dynamic=False, mode=mode, backend=backend)

    def _move(self, curvature: Curvature[S], targets: Sequence[Target], kl_clip: float | None = None) -> None:
        layers = list(curvature.layers.values())
        if self._compiled is None:
            along_(layers, targets, kl_clip)
        else:
            with phase("solve"):
                self._compiled(layers, targets, kl_clip)

    def _matrix_of(self, layer: Layer, state: S) -> Tensor:
        """Return the layer's parameters as w_GOI."""
        block = next(block for block in self._blocks if block.name == layer.block)
        return concat(layer, {label: p.detach() for label, p in block.parameters.items()}, _kind(state))

    def _packed(self, curvature: Curvature[S]) -> dict[str, Any]:
        layers = {
            name: {"layer": [layer.block, layer.weight, layer.bias], "state": _fields(state)}
            for name, (layer, state) in curvature.layers.items()
        }
        return {"layers": layers, "updates": curvature.updates, "failures": curvature.failures}

    def _unpacked(self, packed: Mapping[str, Any]) -> Curvature[S]:
        known = {block.name: block.parameters for block in self._blocks}
        layers = {}
        for name, entry in packed["layers"].items():
            layer = Layer(*entry["layer"])
            if layer.block not in known or not set(layer.labels) <= set(known[layer.block]):
                raise ValueError(
                    f"the state holds curvature of {name}, and this optimizer's blocks are "
                    f"{', '.join(known) or 'none'}: it was saved for another model"
                )
            device = known[layer.block][layer.weight].device
            layers[name] = (layer, self._restored(_moved(entry["state"], device)))
        return Curvature(layers, packed["updates"], packed["failures"].to(self._generator.device))

    def summary(self) -> Summary:
        """Return a row for every parameter: its block, what is kept of it, how that is made, and bytes; printable."""
        rows = tuple(self._row(block, label) for block in self._blocks for label in block.parameters)
        return Summary(rows, 0 if self._curvature is None else int(self._curvature.failures))

    def _row(self, block: LayerParams, label: str) -> Row:
        name, shape = block.label(label), tuple(block.parameters[label].shape)
        if block.why_sgd is not None:
            return Row(name, shape, "-", f"sgd ({block.why_sgd})", "update_", 0)
        if self._curvature is None:
            return Row(name, shape, block.name or ".", "made at the next refresh", "-", 0)
        for layer, state in self._curvature.layers.values():
            if layer.block == block.name and label in layer.labels:
                size = _bytes(_fields(state)) if label == layer.weight else 0
                form = state.form if label == layer.weight else f"with {layer.weight}"
                return Row(name, shape, block.name or ".", form, self._factorization(), size)
        return Row(name, shape, "-", "sgd (no Kronecker factors)", "update_", 0)


def along_(layers: Sequence[tuple[Layer, Any]], targets: Sequence[Target], kl_clip: float | None) -> None:
    """Update every target along its layer's preconditioned gradient, or along its gradient where there is none.

    With ``kl_clip`` κ the former are scaled by min(1, (κ / Σ lr² ⟨d, ∇L⟩)^½) (Ba, Grosse, Martens 2017, section 5).
    """
    with phase("solve"):
        directions = _directions(layers, targets)
        if kl_clip is not None and directions:
            inner = [
                t.settings[0].square() * (directions[t.block, t.label] * t.grad).sum()
                for t in targets
                if (t.block, t.label) in directions
            ]
            total = torch.stack(inner).sum()
            scale = (kl_clip / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt().clamp(max=1.0)
            torch._foreach_mul_(list(directions.values()), scale)
    with phase("update"):
        for t in targets:
            update_(t.parameter, t.momentum, directions.get((t.block, t.label), t.grad), t.settings, t.nesterov)


def _directions(layers: Sequence[tuple[Layer, Any]], targets: Sequence[Target]) -> dict[tuple[str, str], Tensor]:
    grads: dict[str, dict[str, Tensor]] = {}
    for target in targets:
        grads.setdefault(target.block, {})[target.label] = target.grad
    directions = {}
    for layer, state in layers:
        own = grads.get(layer.block, {})
        if all(label in own for label in layer.labels):
            solved_GOI = state.solve(concat(layer, own, _kind(state)))
            for label, part in parted(layer, solved_GOI, own).items():
                directions[layer.block, label] = part
    return directions


def _kind(state: State) -> tuple[int, torch.dtype]:
    return len(state.running), state.running.dtype


def _fields(state: Any) -> dict[str, Any]:
    """Return a dataclass of tensors as a dictionary of them."""
    named = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: _fields(value) if is_dataclass(value) else value for name, value in named.items()}


def _moved(tensors: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: _moved(v, device) if isinstance(v, Mapping) else move(v) for name, v in tensors.items()}


def _bytes(tensors: Mapping[str, Any]) -> int:
    nested = sum(_bytes(value) for value in tensors.values() if isinstance(value, Mapping))
    return nested + sum(value.nbytes for value in tensors.values() if isinstance(value, Tensor))

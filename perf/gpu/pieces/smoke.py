"""Does a model train on this device as the definitions say? Kernels, options and compiled steps beside torch's code."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from perf.limits import allowing_tf32
from perf.loops import TORCH_MODES, Mode, plain_step
from perf.models import CLASSES, Model
from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.recipes.models import conv_3c1f, mlp
from tengrad_triton.recipes.models.resnet import resnet18

REFRESH_EVERY = 4
UNITS = 100  # of rounding in the inputs, whose effect a right implementation's own rounding does not exceed
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """What a training leaves: its parameters, losses and seconds by step, and why its steps were plain."""

    weights: Tensor
    losses: list[float]
    seconds: list[float]
    why_plain: str | None


@dataclass(frozen=True)
class SmokeCase:
    """A model trained for a few steps with some of TENGraD's options, in one kind of loop.

    Attributes:
        dtype: of parameters and inputs.
        compiler: what compiles the steps; "eager" only traces them, and has no CUDA graphs.
    """

    name: str
    model: Model
    samples: int
    steps: int
    mode: Mode = "plain"
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    compiler: str = "inductor"

    def __str__(self) -> str:
        said = [f"{name}={value}" for name, value in self.options.items()]
        dtype = [] if self.dtype == torch.float32 else [str(self.dtype).removeprefix("torch.")]
        return ", ".join([self.name, self.mode, *dtype, *said])

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the difference between this training and the definitions', and how much of it is rounding.

        Both are relative to the distance that the definitions' parameters moved. ``rounding`` is the difference that
        one unit of rounding in the inputs makes to the definitions: a right implementation differs by some such units.
        """
        batches = [self._batch(seed, device) for seed in range(self.steps)]
        nudged = [(x * (1 + torch.finfo(self.dtype).eps), y) for x, y in batches]
        with warnings.catch_warnings(record=True) as said, allowing_tf32(convolutions=False, products=False):
            warnings.simplefilter("always")
            run = self._train(batches, self.mode, self.options)
        with warnings.catch_warnings(), allowing_tf32(convolutions=False, products=False):
            warnings.simplefilter("ignore")
            truth, beside = (self._train(x, "plain", {**self.options, "backend": "torch"}) for x in (batches, nudged))
        moved = (truth.weights - _flat(self.model.on(device).to(self.dtype))).norm()
        error, rounding = (float((x.weights - truth.weights).norm() / moved) for x in (run, beside))
        return {
            "error": error,
            "rounding": rounding,
            "is_rounding": error <= min(UNITS * rounding, 1.0),
            "losses": run.losses,
            "expected": truth.losses,
            "first_seconds": run.seconds[0],
            "last_seconds": run.seconds[-1],  # of a reuse step
            "why_plain": run.why_plain,
            "warned": sorted({str(warning.message).partition("\n")[0][:150] for warning in said}),
        }

    def _batch(self, seed: int, device: torch.device) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.samples, *self.model.sample, generator=generator)
        return x.to(device, self.dtype), torch.randint(CLASSES, (self.samples,), generator=generator).to(device)

    def _train(self, batches: Sequence[Batch], mode: Mode, options: Mapping[str, Any]) -> Run:
        device = batches[0][0].device
        model = self.model.on(device).to(self.dtype)
        optimizer = TENGraD(model, lr=1e-2, refresh_every=REFRESH_EVERY, seed=0, **options)
        compiled = None if mode == "plain" else self._compiled(model, optimizer, mode)
        step = compiled or plain_step(model, optimizer)
        losses, seconds = [], []
        for x, y in batches:
            start = time.perf_counter()
            losses.append(step(x, y).item())
            seconds.append(time.perf_counter() - start)
        return Run(_flat(model), losses, seconds, compiled and compiled.why_plain)

    def _compiled(self, model: nn.Module, optimizer: TENGraD, mode: Mode) -> Any:
        torch_mode = TORCH_MODES[mode] if self.compiler == "inductor" else None
        return compile_train_step(model, cross_entropy, optimizer, mode=torch_mode, backend=self.compiler)


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def cases(quick: bool) -> Iterator[SmokeCase]:
    """Yield the cases: plain steps of each model first, then options, then compiled steps and CUDA graphs."""
    width, samples, steps = (4, 8, 6) if quick else (64, 64, 12)
    conv = Model(lambda: conv_3c1f((1, 28, 28), CLASSES, width), (1, 28, 28))
    residual = Model(lambda: resnet18(3, CLASSES, width=width // 2), (3, 32, 32))
    perceptron = Model(lambda: mlp((1, 28, 28), CLASSES, 8 * width), (1, 28, 28))
    for name, model in (("3C1F", conv), ("MLP", perceptron), ("ResNet-18", residual)):
        yield SmokeCase(name, model, samples, steps)
    yield SmokeCase("3C1F", conv, samples, steps, options={"representation": "per_sample_bf16"})
    yield SmokeCase("3C1F", conv, samples, steps, options={"representation": "factored"})
    yield SmokeCase("MLP", perceptron, samples, steps, options={"blocks": "network"})
    yield SmokeCase("MLP", perceptron, samples, steps, dtype=torch.bfloat16)
    if quick:  # tracing larger models takes longer than everything else here
        yield SmokeCase("MLP", perceptron, samples, steps, "compiled", compiler="eager")
    else:
        yield SmokeCase("MLP", perceptron, samples, steps, "cuda graphs")
        yield SmokeCase("3C1F", conv, samples, steps, "compiled")
        yield SmokeCase("3C1F", conv, samples, steps, "cuda graphs")
        yield SmokeCase("ResNet-18", residual, samples, steps, "cuda graphs")

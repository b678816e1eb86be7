"""The training steps that are timed: SGD and TENGraD, in the plain loop and as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy
from typing_extensions import override

from perf.baseline import PaperNGD
from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.capture.rows.attribution import Verify
from tengrad_triton.compiled.static_buffers import mark_static
from tengrad_triton.kernels import update_
from tengrad_triton.optim.interval import Growing
from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.tuning.plan import MAX_BYTES

Mode = Literal["plain", "compiled", "cuda graphs"]
TORCH_MODES: dict[Mode, str | None] = {"compiled": None, "cuda graphs": "reduce-overhead"}

# The paper's settings for 3C1F, but a rate at which the weights hardly move: all steps do the same work.
SETTINGS: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 1e-3}
PARTS = ("forward", "backward", "update")
Step = Callable[[Tensor, Tensor], Any]


def within(max_bytes: int) -> str:
    """Return the part of a case's name that says its budget for J; empty for the default budget."""
    return "" if max_bytes == MAX_BYTES else f", J within {max_bytes >> 20} MiB"


@dataclass(frozen=True)
class TimedInterval(Growing):
    """A short interval for timing, with the representations that are best at the paper's interval, ``most``."""

    most: int = 100
    steps: int = 2

    @override
    def __call__(self, step: int) -> int:
        """Return the number of steps from one refresh to the next."""
        return self.steps


def tengrad(model: nn.Module, refresh_every: int, max_bytes: int = MAX_BYTES, verify: Verify = "change") -> TENGraD:
    """Return TENGraD with the paper's settings, except for the interval between refreshes."""
    interval = TimedInterval(steps=refresh_every)
    return TENGraD.paper(model, refresh_every=interval, seed=0, max_bytes=max_bytes, verify=verify, **SETTINGS)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Return torch's own SGD with the same settings."""
    return torch.optim.SGD(model.parameters(), **SETTINGS)


def paper(model: nn.Module, refresh_every: int) -> PaperNGD:
    """Return the authors' formulation with the same settings."""
    return PaperNGD(model, damping=0.1, refresh_every=refresh_every, seed=0, **SETTINGS)


def sgd_step(model: nn.Module, mode: Mode) -> Step:
    """Return a whole step of SGD. It is compiled as `compile_train_step` does it: one graph, with the update."""
    if mode == "plain":
        return plain_step(model, sgd(model))
    momenta = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    device = next(model.parameters()).device
    numbers = torch.tensor([SETTINGS["lr"], SETTINGS["momentum"], SETTINGS["weight_decay"], 0.0], device=device)

    def step(state: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
        parameters, buffers = state["parameters"], state["buffers"]

        def loss_of(trained: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            copies = {name: buffer.clone() for name, buffer in buffers.items()}
            return cross_entropy(functional_call(model, {**trained, **copies}, (x,)), y), copies

        detached = {name: p.detach() for name, p in parameters.items()}
        grads, (loss, copies) = grad_and_value(loss_of, has_aux=True)(detached)
        for name, buffer in buffers.items():
            buffer.copy_(copies[name])
        for name, parameter in parameters.items():
            update_(parameter, state["momenta"][name], grads[name], numbers, False)
        return loss

    compiled = torch.compile(step, fullgraph=True, dynamic=False, mode=TORCH_MODES[mode])
    state = {"parameters": dict(model.named_parameters()), "buffers": dict(model.named_buffers()), "momenta": momenta}
    mark_static((state, numbers))  # otherwise no CUDA graph is captured, because its inputs change

    def run(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(state, x, y)

    return run


def tengrad_step(model: nn.Module, optimizer: TENGraD, mode: Mode) -> Step:
    """Return a whole step of TENGraD."""
    if mode == "plain":
        return plain_step(model, optimizer)
    return compile_train_step(model, cross_entropy, optimizer, mode=TORCH_MODES[mode])


def plain_step(model: nn.Module, optimizer: Any) -> Step:
    """Return a step of the usual training loop, which returns the loss."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def timed_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> dict[str, float]:
    """Take a plain step; return the seconds of forward, backward and update. A capture is part of the forward."""
    times = [now(x.device)]
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    times.append(now(x.device))
    loss.backward()
    times.append(now(x.device))
    optimizer.step()
    times.append(now(x.device))
    return {name: end - start for name, (start, end) in zip(PARTS, pairwise(times), strict=True)}

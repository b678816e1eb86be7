"""The cases of each kind of machine, and the cases that do not fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch

from perf.budget import BudgetCase
from perf.host.case import HostCase
from perf.layers import LAYERS, LayerCase
from perf.loops import Mode
from perf.memory import MemoryCase
from perf.optimizers import OptimizerCase
from perf.processes import ProcessesCase
from perf.proof import ProofCase
from perf.scaling import ScalingCase
from perf.sizes import Scale
from perf.steps import StepCase


class Case(Protocol):
    """One measurement; its `str` is its name."""

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the result, as JSON values."""


@dataclass(frozen=True)
class Selection:
    """The cases of every suite, the most important first, because the last ones run only if there is time.

    ``skipped`` has the reasons why other cases of a suite are not in the selection.
    """

    scale: Scale
    kernel_rounds: int
    compiled: bool
    suites: Mapping[str, Sequence[Case]]
    skipped: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def in_modes(self, modes: Sequence[Mode]) -> Self:
        """Return the same cases except for steps in other kinds of loops."""
        steps = [case for case in self.suites["steps"] if case.mode in modes]
        return replace(self, suites={**self.suites, "steps": steps})


SUITES = ("kernels", "optimizers", "memory", "scaling", "layers", "host", "proof", "budget", "processes", "steps")
BUDGET = 600 * 2**20
"""Bytes for J of WRN-28-4 at N = 128: about the least with which its steps are exact."""
_MEMORY = [MemoryCase("3C1F", 128), MemoryCase("WRN-28-4", 128), MemoryCase("WRN-28-4", 128, BUDGET)]
_HOST = [HostCase(model, 300) for model in ("3C1F", "MLP", "WRN-28-4", "ResNet-18")]
_PROOF = [ProofCase("3C1F", 128, 9), ProofCase("ResNet-18", 32, 9)]
_BUDGET = [
    *(BudgetCase("MLP", 128, 30, share) for share in (None, 1.0)),
    *(BudgetCase("transformer", 32, 7, share) for share in (None, 0.2)),
    *(BudgetCase("3C1F", 128, 3, share) for share in (None, 0.2)),
    BudgetCase("MLP 2048", 128, 9, mode="compiled"),
]
_BASE = {"samples": 32, "width": 32, "depth": 3}

QUICK = Selection(
    scale="small",
    kernel_rounds=2,
    compiled=False,
    suites={
        "steps": [StepCase("tiny 3C1F", 8, 3), StepCase("tiny transformer", 8, 3)],
        "optimizers": [OptimizerCase("tiny 3C1F", 8, 3)],
        "scaling": [
            ScalingCase(quantity, (2, 4, 8), {"samples": 8, "width": 4, "depth": 2}, 2)
            for quantity in ("samples", "width", "depth")
        ],
        "memory": [MemoryCase("tiny 3C1F", 8)],
        "layers": [LayerCase("Conv2d, depthwise", 4, 2), LayerCase("tied embedding and head", 4, 2)],
        "host": [HostCase("MLP", 10)],
        "proof": [ProofCase("tiny 3C1F", 8, 3)],
        "processes": [ProcessesCase("tiny 3C1F", 8, 2, 3), ProcessesCase("tiny 3C1F", 8, 2, 3, "FSDP2")],
        "budget": [BudgetCase("tiny 3C1F", 8, 3), BudgetCase("tiny 3C1F", 8, 3, 0.5)],
    },
)

_MINUTES = "more than a minute a step on two cores"
CPU = Selection(
    scale="cpu",
    kernel_rounds=7,
    compiled=True,
    suites={
        "steps": [
            StepCase("3C1F", 128, 5),
            StepCase("ResNet-18", 128, 5),
            StepCase("WRN-28-4", 128, 5),
            StepCase("3C1F", 128, 5, "compiled"),
            StepCase("WRN-28-4", 128, 2, max_bytes=BUDGET),
            *(StepCase("MLP", samples, 30) for samples in (32, 128, 512)),
            StepCase("transformer", 32, 10),
            StepCase("transformer", 128, 5),
            StepCase("3C1F", 32, 7),
            StepCase("ResNet-18", 32, 3),
            StepCase("WRN-28-4", 32, 3),
            StepCase("transformer", 512, 3),
            StepCase("3C1F", 512, 2),
        ],
        "optimizers": [
            OptimizerCase("small 3C1F", 128, 3),
            OptimizerCase("3C1F", 16, 3),
            OptimizerCase("small 3C1F", 32, 15),
        ],
        "scaling": [
            ScalingCase("samples", (16, 32, 64, 128, 256), _BASE, 7),
            ScalingCase("width", (16, 32, 64, 128), _BASE, 7),
            ScalingCase("depth", (2, 4, 8, 16), _BASE, 7),
        ],
        "memory": _MEMORY,
        "layers": [LayerCase(layer, 128, 9) for layer in LAYERS],
        "host": _HOST,
        "proof": _PROOF,
        "processes": [ProcessesCase("3C1F", 64, 2, 9), ProcessesCase("3C1F", 64, 2, 9, "FSDP2")],
        "budget": _BUDGET,
    },
    skipped={
        "steps": {f"{model}, N = 512": _MINUTES for model in ("ResNet-18", "WRN-28-4")}
        | {f"{model}, compiled": "minutes to compile on two cores" for model in ("ResNet-18", "WRN-28-4")},
        "optimizers": {"3C1F, N = 128": "the authors' formulation would take 40 GB for one matrix"},
    },
)

TARGETED = ("3C1F", "ResNet-18", "WRN-28-4")
"""The models whose steps have targets on a GPU, plain and as CUDA graphs."""
_MODELS = (*TARGETED, "MLP", "transformer")
GPU = Selection(
    scale="gpu",
    kernel_rounds=9,
    compiled=True,
    suites={
        "steps": [
            *(StepCase(model, 128, 7, mode) for model in TARGETED for mode in ("plain", "cuda graphs")),
            StepCase("MLP", 128, 7),
            StepCase("MLP 2048", 128, 7),
            *(StepCase(model, 128, 5, tf32=False) for model in TARGETED),
            StepCase("transformer", 128, 7),
            StepCase("MLP 2048", 128, 7, "cuda graphs"),
            StepCase("3C1F", 128, 7, "compiled"),
            StepCase("WRN-28-4", 128, 5, max_bytes=BUDGET),
            *(StepCase(model, samples, 5) for samples in (32, 512) for model in _MODELS),
            StepCase("MLP", 128, 7, "cuda graphs"),
        ],
        "optimizers": [OptimizerCase("small 3C1F", 32, 15), OptimizerCase("3C1F", 32, 7)],
        "scaling": [
            ScalingCase("samples", (32, 64, 128, 256, 512), _BASE | {"width": 128}, 7),
            ScalingCase("width", (32, 64, 128, 256), _BASE | {"samples": 128}, 7),
            ScalingCase("depth", (2, 4, 8, 16), _BASE | {"samples": 128, "width": 128}, 7),
        ],
        "memory": _MEMORY,
        "layers": [LayerCase(layer, 128, 9) for layer in LAYERS],
        "host": _HOST,
        "proof": _PROOF,
        "processes": [],  # a machine with one GPU has none for a second process
        "budget": _BUDGET,
    },
    skipped={"optimizers": {"3C1F, N = 128": "the authors' formulation would take 40 GB for one matrix, of three"}},
)

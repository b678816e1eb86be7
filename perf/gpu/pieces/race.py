"""A race by training time: 3C1F on Fashion-MNIST with TENGraD, SGD, AdamW and Muon. Evaluations do not count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from perf.gpu.data import random_images, unpack
from perf.loops import Step, plain_step
from perf.models import CLASSES
from tengrad_triton import TENGraD
from tengrad_triton.recipes.data.images import Data, Split
from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.recipes.models import conv_3c1f
from tengrad_triton.recipes.optimizers.muon_with_adamw import MuonWithAdamW

BATCH, EVALUATION_BATCH = 128, 2000


def _tengrad_paper(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    return TENGraD.paper(model, seed=seed)


def _tengrad_default(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    return TENGraD(model, seed=seed)


def _sgd(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=0.001, fused=True)


def _adamw(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def _muon(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    return MuonWithAdamW(model)


# TENGraD (paper) and SGD have the settings that the paper tuned for this model; the others have their defaults.
OPTIMIZERS: Mapping[str, Callable[[nn.Module, int], torch.optim.Optimizer]] = {
    "SGD": _sgd,
    "TENGraD, paper": _tengrad_paper,
    "TENGraD, default": _tengrad_default,
    "AdamW": _adamw,
    "Muon with AdamW": _muon,
}


@dataclass(frozen=True)
class RaceCase:
    """One optimizer with one seed. The test accuracy is taken ``checks`` times in each epoch."""

    optimizer: str
    seed: int
    epochs: int
    checks: int
    width: int
    data: Data

    def __str__(self) -> str:
        return f"{self.optimizer}, seed {self.seed}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return steps, seconds of training, accuracy and loss on the test images, at every check."""
        few = _first(self.data, 3 * BATCH)
        replace(self, epochs=1, data=few, checks=1)._train(device)  # compiles kernels and loads libraries
        curve = self._train(device)
        case = {"optimizer": self.optimizer, "seed": self.seed, "epochs": self.epochs}
        return {**case, "batch": BATCH, "curve": curve}

    def _train(self, device: torch.device) -> list[dict[str, float]]:
        torch.manual_seed(self.seed)
        model = conv_3c1f(tuple(self.data.train.images.shape[1:]), CLASSES, self.width).to(device)
        step = plain_step(model, OPTIMIZERS[self.optimizer](model, self.seed))
        curve: list[dict[str, float]] = []
        for epoch in range(self.epochs):
            self._epoch(epoch, model, step, device, curve)
        return curve

    def _epoch(
        self, epoch: int, model: nn.Module, step: Step, device: torch.device, curve: list[dict[str, float]]
    ) -> None:
        """Train for an epoch, and append to the curve. Batches are taken from the images within the measured time."""
        steps = -(-len(self.data.train) // BATCH)
        until = {round(steps * (check + 1) / self.checks) for check in range(self.checks)}
        seconds = curve[-1]["seconds"] if curve else 0.0
        start = now(device)
        for done, (x, y) in enumerate(self.data.batches("train", BATCH, 1000 * self.seed + epoch), 1):
            step(x, y)
            if done in until:
                seconds += now(device) - start
                curve.append({"steps": epoch * steps + done, "seconds": seconds, **evaluate(model, self.data)})
                start = now(device)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> dict[str, float]:
    """Return the accuracy in percent and the mean loss on the test images."""
    hits, loss, count = 0.0, 0.0, len(data.test)
    for x, y in data.batches("test", EVALUATION_BATCH):
        output = model(x)
        hits += (output.argmax(1) == y).sum().item()
        loss += cross_entropy(output, y, reduction="sum").item()
    return {"accuracy": 100 * hits / count, "loss": loss / count}


def _first(data: Data, images: int) -> Data:
    train, test = (Split(split.images[:images], split.labels[:images]) for split in (data.train, data.test))
    return replace(data, train=train, test=test)


def cases(quick: bool, path: Path | None, device: torch.device) -> Iterator[RaceCase]:
    """Yield all optimizers with the first seed, then with the second one."""
    data = (random_images(512, 128) if path is None else unpack(path)).to(device)
    if quick:
        data = _first(data, 512)
    epochs, checks, width = (1, 2, 4) if quick else (8, 4, 128)
    for seed in range(2):
        for optimizer in OPTIMIZERS:
            yield RaceCase(optimizer, seed, epochs, checks, width, data)

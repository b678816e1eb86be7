"""3C1F on Fashion-MNIST with the paper's settings, over several seeds: `python -m perf.training --help`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from perf.images import load
from perf.loops import plain_step
from perf.models import CLASSES
from perf.record import Suite
from tengrad_triton import TENGraD
from tengrad_triton.recipes.data.images import Data
from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.recipes.models import conv_3c1f

BATCH, EVALUATION_BATCH = 128, 1000


def _tengrad(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    return TENGraD.paper(model, seed=seed)


def _sgd(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=0.001)


# The settings that the paper tuned for this model and these images.
OPTIMIZERS: Mapping[str, Callable[[nn.Module, int], torch.optim.Optimizer]] = {"tengrad": _tengrad, "sgd": _sgd}
Run = list[dict[str, float]]


def train(name: str, seed: int, epochs: int, width: int, data: Data) -> Run:
    """Return the test accuracy in percent, the test loss and the seconds of training, after each epoch."""
    device = data.train.images.device
    torch.manual_seed(seed)
    model = conv_3c1f(tuple(data.train.images.shape[1:]), CLASSES, width).to(device)
    step = plain_step(model, OPTIMIZERS[name](model, seed))
    run: Run = []
    seconds = 0.0
    for epoch in range(epochs):
        start = now(device)
        for x, y in data.batches("train", BATCH, shuffle_seed=1000 * seed + epoch):
            step(x, y)
        seconds += now(device) - start
        run.append({**evaluate(model, data), "seconds": seconds})
    return run


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> dict[str, float]:
    """Return the accuracy in percent and the mean loss on the test images."""
    hits, loss, count = 0.0, 0.0, len(data.test)
    for x, y in data.batches("test", EVALUATION_BATCH):
        output = model(x)
        hits += (output.argmax(1) == y).sum().item()
        loss += cross_entropy(output, y, reduction="sum").item()
    return {"accuracy": 100 * hits / count, "loss": loss / count}


def summarized(name: str, runs: list[Run]) -> dict[str, Any]:
    """Return the spread of the last epoch's numbers over the seeds, and all runs."""
    ends = {key: [run[-1][key] for run in runs] for key in ("accuracy", "loss", "seconds")}
    spreads = {
        key: {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
        for key, values in ends.items()
    }
    return {"optimizer": name, "seeds": len(runs), "epochs": len(runs[0]), **spreads, "runs": runs}


def run_all(options: argparse.Namespace) -> None:
    """Train with both optimizers, seed by seed, until there is no seed or no time left."""
    start = time.monotonic()
    data = load(options.data, options.limit).to(options.device)
    runs: dict[str, list[Run]] = {name: [] for name in OPTIMIZERS}
    for name in OPTIMIZERS:  # compiles kernels and loads libraries, outside of the measured times
        train(name, 0, 1, options.width, _first(data, 3 * BATCH))
    slowest = 0.0
    for seed in range(options.seeds):
        begun = time.monotonic()
        if begun + slowest > start + options.seconds:
            print(f"training: out of time before seed {seed}", flush=True)
            break
        for name in OPTIMIZERS:
            runs[name].append(train(name, seed, options.epochs, options.width, data))
            end = runs[name][-1][-1]
            print(f"training: {name}, seed {seed}: {end['accuracy']:.2f} % in {end['seconds']:.1f} s", flush=True)
        slowest = max(slowest, time.monotonic() - begun)
        suite = Suite("training", options.device, options.out)
        for name, finished in runs.items():
            suite.add(summarized(name, finished))


def _first(data: Data, images: int) -> Data:
    few = [type(split)(split.images[:images], split.labels[:images]) for split in (data.train, data.test)]
    return Data(*few, data.normalize, data.classes)


def main() -> None:
    """Train, and write training.json."""
    parser = argparse.ArgumentParser(prog="python -m perf.training", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's Parquet files")
    parser.add_argument("--out", type=Path, required=True, help="folder of training.json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10, help="the paper's number by default")
    parser.add_argument("--width", type=int, default=128, help="channels of 3C1F")
    parser.add_argument("--limit", type=int, help="number of images, from the first")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no seed that would end later than this"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    run_all(parser.parse_args())


if __name__ == "__main__":
    main()

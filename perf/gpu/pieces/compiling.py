"""Takes a model's first compiled steps. Torch and Triton keep on the disk what they compile, for the steps' suite."""

from __future__ import annotations

import argparse

import torch

from perf.loops import Mode, sgd_step, tengrad, tengrad_step
from perf.models import MODELS
from perf.steps import WARM_UP
from tengrad_triton.recipes.measuring.machine import now

GRAPHS: Mode = "cuda graphs"


def seconds_of_compiling(model: str, samples: int, mode: Mode, device: torch.device) -> float:
    """Return the seconds in which SGD's step, and TENGraD's refresh and reuse steps, are compiled."""
    made = MODELS[model]
    x, y = made.batch(samples, device)
    start = now(device)
    trained = made.on(device)
    ours = tengrad_step(trained, tengrad(trained, refresh_every=2), mode)
    for step in (sgd_step(made.on(device), mode), ours):
        for _ in range(2 * WARM_UP[mode]):  # rounds of a refresh and a reuse step
            step(x, y)
    return now(device) - start


def main() -> None:
    """Compile one model, and print how long that took; with --quick take plain steps, which are compiled nowhere."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu.pieces.compiling", description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("samples", type=int)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seconds = seconds_of_compiling(options.model, options.samples, "plain" if options.quick else GRAPHS, options.device)
    print(f"compiled in {seconds:.0f} s")


if __name__ == "__main__":
    main()

"""A small GPT on the help topics that ship with Python, against AdamW: per-token cross-entropy, a tied head.

Dimensions: N samples, T tokens.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cyclopts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import guide
from examples.race import Runner, best_of, race
from examples.text import VOCABULARY, Text, batch, prose
from examples.transformer import GPT
from tengrad_triton import Categorical, TENGraD
from tengrad_triton.recipes.reports.markdown import block, bullets

SAMPLES, LENGTH = 64, 32
SIZES: Mapping[str, int] = {"features": 64, "heads": 4, "blocks": 2}
ADAMW_LR = (2e-3, 4e-3, 8e-3)


def loss_of(model: nn.Module, x_NT: Tensor, y_NT: Tensor) -> Tensor:
    """Return the mean cross-entropy of a token, in nats."""
    return F.cross_entropy(model(x_NT).flatten(0, 1), y_NT.flatten())


def loss_on_test(model: nn.Module, text: Text, pieces: int = 128) -> float:
    """Return the loss on pieces of the test text, the same pieces for every call."""
    with torch.no_grad():
        return float(loss_of(model, *batch(text.test, pieces, LENGTH, torch.Generator().manual_seed(0))))


def tengrad(model: nn.Module, **settings: Any) -> TENGraD:
    """Return TENGraD. A language model has its classes in the last dimension of its output."""
    return TENGraD(model, likelihood=Categorical(dim=-1), **settings)


def runner(name: str, setting: str, model: nn.Module, optimizer: torch.optim.Optimizer, text: Text) -> Runner:
    """Return a runner. The learning rate falls to 0 along a cosine, and all runners see the same batches."""
    drawn, lr = torch.Generator().manual_seed(1), optimizer.param_groups[0]["lr"]

    def step(share: float) -> None:
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        loss_of(model, *batch(text.train, SAMPLES, LENGTH, drawn)).backward()
        optimizer.step()

    return Runner(name, setting, step, lambda: loss_on_test(model, text))


def untrained(seed: int) -> GPT:
    """Return the model with random weights."""
    torch.manual_seed(seed)
    return GPT(VOCABULARY, LENGTH, **SIZES)


def runners(text: Text, start: nn.Module) -> list[Runner]:
    """Return a runner for each setting, all with the weights of ``start``."""

    def of(name: str, setting: str, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> Runner:
        model = copy.deepcopy(start)
        return runner(name, setting, model, optimizer(model), text)

    ours = of("TENGraD", "its defaults, cosine", tengrad)
    adamw = [
        of("AdamW", f"lr {lr:g}, cosine", partial(lambda lr, model: torch.optim.AdamW(model.parameters(), lr), lr))
        for lr in ADAMW_LR
    ]
    return [ours, *adamw]


INTRODUCTION = """# A small GPT

A transformer of torch's own layers (`nn.MultiheadAttention`, `nn.LayerNorm`, `nn.Embedding`, a head tied to the
embedding) learns text that ships with Python: the help topics of `pydoc`, character by character. Every parameter has
its exact block. The tied table has one block, with the gradients of embedding and head. A sample has a label for every
token, which is `Categorical(dim=-1)` ([M9](../math.md))."""


def verdict(runners: Sequence[Runner]) -> str:
    """Return the comparison in a sentence."""
    ours, adamw = best_of(runners)
    return (
        f"**In the same wall-clock time TENGraD comes to a test loss of {ours.best:.3f} nats a character, and AdamW at "
        f"its best learning rate to {adamw.best:.3f}**, in {ours.steps} and {adamw.steps} steps."
    )


def settings(seconds: float, seed: int, text: Text) -> dict[str, object]:
    """Return the settings of the run, for the page."""
    count = sum(parameter.numel() for parameter in untrained(seed).parameters())
    return {
        "model": ", ".join(f"{size} {name}" for name, size in SIZES.items()) + f", {count} parameters, float32",
        "text": f"{len(text.train)} characters to train with and {len(text.test)} of other pages to test",
        "a step": f"{SAMPLES} pieces of {LENGTH} characters",
        "TENGraD": "its defaults",
        "time": f"{seconds:g} s of steps for each setting",
        "seed": seed,
    }


def main(*, out: Path = Path("docs/guides"), seconds: float = 30.0, seed: int = 0, threads: int = 1) -> None:
    """Compare the optimizers, and write gpt.md and its figure into the folder `out`.

    Parameters
    ----------
    out
        Folder of the page.
    seconds
        Wall-clock time of each setting.
    seed
        Seed of the first weights.
    threads
        CPU threads of torch.
    """
    torch.set_num_threads(threads)
    began, text = time.perf_counter(), prose()
    entered = runners(text, untrained(seed))
    with guide.display() as progress:
        race(entered, seconds, 30, progress)
    guide.curves(
        out / "gpt.png", entered, "test loss (nats a character)", "A small GPT on Python's help topics", "linear"
    )
    sections = [
        INTRODUCTION, verdict(entered), guide.outcome(entered, "test loss", "AdamW"), guide.clock(),
        "![Test loss by time and by step, of each optimizer's best setting.](gpt.png)",
        "## The optimizer", block(inspect.getsource(tengrad).rstrip(), "python"),
        "## What was run", bullets(settings(seconds, seed, text)),
    ]  # fmt: skip
    command = f"python -m examples.gpt --out docs/guides --seconds {seconds:g} --seed {seed} --threads {threads}"
    guide.write(out / "gpt.md", command, sections, time.perf_counter() - began)
    print(verdict(entered))


if __name__ == "__main__":
    cyclopts.run(main)

"""Fine-tuning of a transformer, all parameters with exact blocks: from Python's help topics to its source code.

The script pre-trains the model of `examples.gpt` on prose, and fine-tunes copies of it on code.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import cyclopts
import torch
from torch import nn

from examples import gpt, guide
from examples.race import Runner, best_of, race
from examples.text import batch, code, prose
from tengrad_triton.optim.summary import Summary
from tengrad_triton.recipes.reports.markdown import block, bullets

PRETRAINING_LR = 3e-3

INTRODUCTION = """# Fine-tuning, with nothing left out

A small transformer is trained on prose, the help topics that ship with Python, and then fine-tuned on source code of
the standard library. Its layers are torch's own: LayerNorm, attention with its packed projection, embeddings, and a
head that shares the table of the embedding."""
COVERAGE = """## What the optimizer does with each parameter

This is `summary()` after a refresh, layer by layer; each layer is a block of the Fisher matrix. A parameter left to SGD
would be called so, with the reason."""


def pretrained(seconds: float, seed: int) -> nn.Module:
    """Return the model after ``seconds`` of AdamW on prose."""
    model, text = gpt.untrained(seed), prose()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR)
    runner = gpt.runner("AdamW", "pre-training", model, optimizer, text)
    with guide.display() as progress:
        race([runner], seconds, 10, progress)
    return model


def summary(model: nn.Module) -> Summary:
    """Return the optimizer's summary after a refresh on one batch of code; the learning rate is 0."""
    optimizer = gpt.tengrad(model, lr=0.0)
    gpt.loss_of(model, *batch(code().train, gpt.SAMPLES, gpt.LENGTH, torch.Generator().manual_seed(0))).backward()
    optimizer.step()
    return optimizer.summary()


def verdict(runners: Sequence[Runner], covered: Summary) -> str:
    """Return the outcome in two sentences."""
    ours, adamw = best_of(runners)
    blocks = sum(parameter.block != "-" for parameter in covered.parameters)
    return (
        f"**{blocks} of {len(covered.parameters)} parameters have an exact block.** The pre-trained model's loss on "
        f"code is {ours.curve[0].value:.3f} nats a character; TENGraD brings it to {ours.best:.3f}, and AdamW at its "
        f"best learning rate to {adamw.best:.3f}, in the same wall-clock time."
    )


def main(*, out: Path = Path("docs/guides"), seconds: float = 20.0, seed: int = 0, threads: int = 1) -> None:
    """Pre-train, fine-tune, then write finetune.md and its figure into the folder `out`.

    Parameters
    ----------
    out
        Folder of the page.
    seconds
        Wall-clock time of the pre-training, and of each setting.
    seed
        Seed of the first weights.
    threads
        CPU threads of torch.
    """
    torch.set_num_threads(threads)
    began, text = time.perf_counter(), code()
    start = pretrained(seconds, seed)
    covered = summary(start)
    entered = gpt.runners(text, start)
    with guide.display() as progress:
        race(entered, seconds, 30, progress)
    title = "From help topics to source code"
    guide.curves(out / "finetune.png", entered, "test loss on code (nats a character)", title, "linear")
    what: dict[str, object] = {
        "pre-training": f"{seconds:g} s of AdamW, lr {PRETRAINING_LR:g}, on the help topics",
        "fine-tuning": f"{len(text.train)} characters of code to train with and {len(text.test)} to test; {seconds:g} "
        "s of steps for each setting",
        "TENGraD": "its defaults",
        "model and batches": "as in [A small GPT](gpt.md)",
        "seed": seed,
    }
    sections = [
        INTRODUCTION, verdict(entered, covered), guide.outcome(entered, "test loss", "AdamW"), guide.clock(),
        "![Test loss on code by time and by step, of each optimizer's best setting.](finetune.png)",
        COVERAGE, block(str(covered), "text"), "## What was run", bullets(what),
    ]  # fmt: skip
    command = f"python -m examples.finetune --out docs/guides --seconds {seconds:g} --seed {seed} --threads {threads}"
    guide.write(out / "finetune.md", command, sections, time.perf_counter() - began)
    print(verdict(entered, covered))


if __name__ == "__main__":
    cyclopts.run(main)

"""Fine-tuning of a transformer, with every parameter covered: from Python's help topics to Python's source code.

The script pre-trains the model of `examples.gpt` by itself, on prose, and fine-tunes copies of it on code.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch import nn

from examples import gpt, guide
from examples.race import Runner, best_of, race
from examples.text import batch, code, prose
from tengrad_triton.optim.summary import Summary
from tengrad_triton.recipes.page import block, bullets

SETTINGS: dict[str, Any] = {"damping": 0.03}
PRETRAINING_LR = 3e-3

INTRODUCTION = """# Fine-tuning, with nothing left out

A small transformer is trained on prose, the help topics that ship with Python, and then fine-tuned on other text,
source code of the standard library. Its layers are torch's own: LayerNorm, attention with its packed projection,
embeddings, and a head that is the embedding again."""
COVERAGE = """## What the optimizer does with each parameter

`summary()` after a refresh: a row a parameter, each with its block. One left to SGD would have a dash."""


def pretrained(seconds: float, seed: int) -> nn.Module:
    """Return the model after so many seconds of AdamW on prose."""
    model, text = gpt.untrained(seed), prose()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR)
    runner = gpt.runner("AdamW", "pre-training", model, optimizer, text)
    with guide.display() as progress:
        race([runner], seconds, 10, progress)
    return model


def summary(model: nn.Module) -> Summary:
    """Return what the optimizer says of every parameter, after a refresh on one batch of code that changes nothing."""
    optimizer = gpt.tengrad(model, **{**gpt.SETTINGS, "lr": 0.0})
    gpt.loss_of(model, *batch(code().train, gpt.SAMPLES, gpt.LENGTH, torch.Generator().manual_seed(0))).backward()
    optimizer.step()
    return optimizer.summary()


def verdict(runners: Sequence[Runner], covered: Summary) -> str:
    """Return the outcome in two sentences."""
    ours, adamw = best_of(runners)
    blocks = sum(row.block != "-" for row in covered.parameters)
    return (
        f"**{blocks} of {len(covered.parameters)} parameters have an exact block.** The pre-trained model's loss on code is "
        f"{ours.curve[0].value:.3f} nats a character; TENGraD brings it to {ours.best:.3f}, and AdamW at its best "
        f"learning rate to {adamw.best:.3f}, in the same wall-clock time."
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
        Of the first weights.
    threads
        Of torch.
    """
    torch.set_num_threads(threads)
    began, text = time.perf_counter(), code()
    start = pretrained(seconds, seed)
    covered = summary(start)
    entered = gpt.runners(text, start, **SETTINGS)
    with guide.display() as progress:
        race(entered, seconds, 30, progress)
    title = "From help topics to source code"
    guide.curves(out / "finetune.png", entered, "test loss on code (nats a character)", title, "linear")
    what: dict[str, object] = {
        "pre-training": f"{seconds:g} s of AdamW, lr {PRETRAINING_LR:g}, on the help topics",
        "fine-tuning": f"{len(text.train)} characters of code to train with and {len(text.test)} to test; {seconds:g} "
        "s of stepping a setting",
        "TENGraD": ", ".join(f"{name} {value}" for name, value in {**gpt.SETTINGS, **SETTINGS}.items()),
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

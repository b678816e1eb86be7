"""The page of the study, docs/defaults.md: a pure function of the results."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from studies.optimizers import FACTORS
from studies.problems import PROBLEMS
from studies.results import Curve, Results
from studies.runs import ABLATIONS, SEEDS
from tengrad_triton import TENGraD
from tengrad_triton.recipes.reports.markdown import table

GENERATED = "<!-- Written by `python -m studies.defaults`: changes by hand are lost. -->"
SETTINGS = (
    *("lr", "damping", "relative_damping", "trust_region", "momentum", "nesterov", "refresh_every", "history"),
    *("fisher", "blocks"),
)
INTRODUCTION = """
This study trains five models with `TENGraD(model)`, whose settings are all defaults, over {seeds} seeds each: with the
default learning rate, a third of it and three times it. Beside it are `torch.optim.AdamW`, and `torch.optim.Muon` for
the hidden matrices with AdamW for the rest. Both have their own defaults, or the best learning rate of {grid} times the
default, by the last loss of the first seed. That choice is made on the test loss, which favours AdamW and Muon.
TENGraD's defaults were found on the same models and test images, in shorter runs of one seed, which favours TENGraD.
The PINN trains by a mean square, and has `likelihood="gaussian"`; this is the only setting given.
"""
TIMES = """
All runs had one thread of a machine that other programs used at the same time. The time of a step is a median over
rounds in which the optimizers take ten steps each in turn, so that other load affects all alike. The time axes are
computed from these times and the numbers of refresh and reuse steps. Evaluations do not count.
"""


def markdown(results: Results, machine: dict[str, Any], texts: dict[str, str]) -> str:
    """Return the page; ``texts`` has a section that is written by hand from the numbers, ``summary``."""
    tried = ", ".join(f"{factor:.2g}" for factor in FACTORS["adamw"])
    sections = [
        f"{GENERATED}\n\n# Defaults that train",
        " ".join(INTRODUCTION.format(seeds=len(SEEDS), grid=tried).split()),
        table(("setting", "default"), [(f"`{name}`", f"{value}") for name, value in _defaults().items()]),
        *_race(results),
        *_safety(results),
        *(section for name in results.problems for section in _problem(results, name)),
        *_ablations(results),
        "## Where and how\n\n" + " ".join(TIMES.split()),
        table(("", ""), [(key, str(value)) for key, value in machine.items() if value is not None]),
        f"The steps were timed on this machine. The commits of the runs are {', '.join(results.commits)}.",
        "To repeat the study; a run that has its file in `studies/results` is not repeated:",
        "```bash\npython -m studies.defaults --data DIR --out docs\n```",
    ]
    return "\n\n".join([*sections[:2], *filter(None, [texts.get("summary")]), *sections[2:]]) + "\n"


def _defaults() -> dict[str, Any]:
    known = inspect.signature(TENGraD).parameters
    defaults = {name: known[name].default for name in SETTINGS}
    return defaults | {"nesterov": "where there is momentum"}  # the meaning of None


def _race(results: Results) -> Iterable[str]:
    """Yield the section that compares TENGraD with AdamW: at the end of AdamW's run, and at AdamW's last loss."""
    yield "## By wall-clock time"
    yield _verdict(results)
    head = (
        *("model", "AdamW's lr", "its time", "its loss then", "TENGraD's loss then", "TENGraD's time to that loss"),
        *("ahead by", "fewer steps", "a step costs"),
    )
    yield table(head, [(name, *_against(ours, adamw)) for name, ours, adamw in _pairs(results)])
    yield (
        "Times end with AdamW's run. Losses are means over the seeds, on test data. *Ahead by* is AdamW's time over "
        "TENGraD's; above 1, TENGraD is ahead. It is the ratio of the steps (*fewer steps*) over the ratio of the mean "
        "time of a step (*a step costs*), which includes refreshes."
    )


def _verdict(results: Results) -> str:
    """Return a sentence: where TENGraD is ahead of AdamW with its default and with a tuned learning rate."""
    parts = []
    for is_tuned, words in ((False, "its own learning rate"), (True, "a tuned one")):
        leads = {name: _lead(ours, adamw) for name, ours, adamw in _pairs(results) if adamw.tuned == is_tuned}
        won = [name for name, lead in leads.items() if lead is not None and lead > 1]
        behind = [name for name in leads if name not in won]
        text = f"it is ahead on {len(won)} of {len(leads)} ({', '.join(won) or 'none'})"
        parts.append(f"of AdamW with {words} {text}" + (f", behind on {', '.join(behind)}" if behind else ""))
    return f"By wall-clock time, {'; '.join(parts)}."


def _pairs(results: Results) -> Iterator[tuple[str, Curve, Curve]]:
    for name in results.problems:
        ours, *others = _named(results, name, "tengrad") + _named(results, name, "adamw")
        yield from ((name, ours, adamw) for adamw in others)


def _lead(ours: Curve, adamw: Curve) -> float | None:
    reached = ours.seconds_to(adamw.losses[-1])
    return None if reached is None else adamw.times[len(adamw.losses) - 1] / reached


def _named(results: Results, problem: str, optimizer: str) -> list[Curve]:
    curves = [curve for curve in results.curves(problem) if curve.optimizer == optimizer]
    return curves[:1] if optimizer == "tengrad" else curves


def _against(ours: Curve, adamw: Curve) -> tuple[str, ...]:
    last = len(adamw.losses) - 1
    end, loss = adamw.times[last], adamw.losses[last]
    then, reached, steps = ours.loss_at(end), ours.seconds_to(loss), ours.steps_to(loss)
    compared = ("not reached", "-", "-", "-")
    if reached is not None and steps is not None:
        fewer, lead = adamw.runs[0].steps[last] / steps, end / reached
        compared = (f"{reached:.2f} s", f"{lead:.2f} ×", f"{fewer:.2f} ×", f"{fewer / lead:.2f} ×")
    return (
        f"{adamw.runs[0].lr:.2g}{' (tuned)' if adamw.tuned else ''}",
        f"{end:.2f} s",
        f"{loss:.3g}",
        "-" if then is None else f"{then:.3g}",
        *compared,
    )


def _safety(results: Results) -> Iterable[str]:
    yield "## A factor of three in the learning rate either way"
    head = ("model", *(f"lr {_lr(results, factor):.2g}" for factor in FACTORS["tengrad"]), "diverged")
    lines = []
    for name in results.problems:
        ends = [results.ends(name, "tengrad", factor) for factor in FACTORS["tengrad"]]
        missing = sum(results.diverged(name, "tengrad", factor) for factor in FACTORS["tengrad"])
        cells = [f"{statistics.mean(e):.3g} ({min(e):.3g} to {max(e):.3g})" if e else "-" for e in ends]
        lines.append((name, *cells, f"{missing} of {sum(map(len, ends)) + missing}"))
    yield table(head, lines)
    yield (
        f"Loss at the end: the mean of {len(SEEDS)} seeds, and their range. A run diverged if a loss was not finite, "
        "or if the mean of its last training losses was above its first loss."
    )
    yield "![The worst seed's loss at the end by learning rate over the default](figures/defaults-lr.png)"


def _lr(results: Results, factor: float) -> float:
    return float(_defaults()["lr"]) * factor


def _problem(results: Results, name: str) -> Iterable[str]:
    quality = results.quality(name)
    yield f"## {PROBLEMS[name].title}"
    head = ("optimizer", "lr", "train loss", "test loss", f"test {quality}", "a step", "a refreshing step", "the run")
    yield table(head, [_line(curve, quality) for curve in results.curves(name)])
    yield f"![Loss and {quality} by step and by time](figures/defaults-{name}.png)"


def _line(curve: Curve, quality: str) -> tuple[str, ...]:
    value = curve.end("quality")
    return (
        curve.optimizer,
        f"{curve.runs[0].lr:.2g}{' (tuned)' if curve.tuned else ''}",
        f"{curve.end('train_loss'):.3g}",
        f"{curve.end('loss'):.3g}",
        f"{value:.1%}" if quality == "accuracy" else f"{value:.2g}",
        f"{1e3 * curve.seconds['reuse']:.1f} ms",
        f"{1e3 * curve.seconds['refresh']:.1f} ms" if curve.optimizer == "tengrad" else "",
        f"{curve.times[-1]:.1f} s",
    )


def _ablations(results: Results) -> Iterable[str]:
    found = {change: {name: results.ablation(name, change) for name in results.problems} for change in ("", *ABLATIONS)}
    if not any(run for change, runs in found.items() if change for run in runs.values()):
        return
    yield "## What each default is there for"
    lines = [(change or "the defaults", *map(_ending, runs.values())) for change, runs in found.items()]
    yield table(("test loss at the end, first seed", *results.problems), lines)


def _ending(run: Any) -> str:
    if run is None:
        return "-"
    return "diverged" if run.diverged else f"{run.loss[-1]:.3g}"

"""The page of the study, docs/defaults.md: a pure function of the results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from studies import optimizers, stages
from studies.comparison import race
from studies.optimizers import OURS, RIVALS
from studies.problems import PROBLEMS
from studies.results import Curve, Results
from studies.runs import ABLATIONS, SEEDS, Run
from tengrad_triton.recipes.reports.markdown import table

GENERATED = "<!-- Written by `python -m studies.defaults`: changes by hand are lost. -->"
SETTINGS = (
    *("lr", "damping", "relative_damping", "scaling", "clip_threshold", "trust_region", "momentum", "nesterov"),
    *("refresh_every", "history", "fisher", "fisher_rows", "blocks"),
)
INTRODUCTION = """
This study trains {count} models, all but the PINN on real data, with `TENGraD(model)`, whose settings are all
defaults, over {seeds} seeds each: with the default learning rate, a third of it and three times it. The only setting
given is the likelihood, where the output is not one row of logits for each sample.
"""
HALVES = """
**Two halves.** TENGraD's defaults may be chosen on {choose}. They are only judged on {judge}. The five problems that
earlier versions found their defaults on are all in the first half. So is the autoencoder: with it, the half that
chooses has each of the three likelihoods, and not classification alone. The half that judges has what the first half
lacks: a deep network that fits a photograph, a recurrent one, a label for each token and for each pixel, weights that
were trained before, and a graph. Both halves have convolutions, attention, and a mean square. On the half that judges
no default is changed, one at a time or otherwise. But the form of scaled damping was found in trials that had, beside
problems of the first half, a network for this photograph and a recurrent one like that of the second.
"""
TUNING = """
**Rivals.** {titles}. All other settings are as published. Each has its best learning rate of at least {grid} values,
each about three times the one before: {factors} times the default, and further ones for as long as the best is at an
edge. The best is that with the lowest test loss at the end of the first seed. So each rival is tuned on each problem,
and on test data, which favours the rivals. Then it trains with every seed. All have the same seeds, batches and first
weights, and no learning-rate schedule. In the recurrent network Muon has one matrix: those of the LSTM are AdamW's.
"""
TIMES = """
All runs had one thread of a machine that other programs used at the same time. Times are from rounds in which the
optimizers take ten steps each in turn, so that other load affects all alike: each of the ten steps by its median over
the rounds, which are of three passes over all problems. *A step* is the mean of the ten, or for TENGraD of the nine
that reuse; SOAP updates its basis in one of its ten. The time axes are computed from these times and the numbers of
refresh and reuse steps. Evaluations do not count.
"""
FAILURES = """
A run has failed if its loss was not finite, if the mean of its last training losses was above its first loss (*above
its start*), or if the optimizer raised an error (*crashed*). A failed run is not repeated, and stays here.
"""


def markdown(results: Results, texts: dict[str, str]) -> str:
    """Return the page; ``texts`` has a section that is written by hand from the numbers, ``summary``."""
    sections = [
        f"{GENERATED}\n\n# Defaults that train",
        *_introduction(),
        *filter(None, [texts.get("summary")]),
        table(("setting", "default"), [(f"`{name}`", f"{value}") for name, value in _defaults().items()]),
        *race(results),
        *_safety(results),
        *_tuning(results),
        *_failures(results),
        *_ablations(results),
        *(section for name in results.problems for section in _problem(results, name)),
        *_where(results),
    ]
    return "\n\n".join(sections) + "\n"


def _introduction() -> Iterable[str]:
    titles = "; ".join(rival.title for rival in RIVALS.values())
    factors = ", ".join(f"{factor:g}" for factor in stages.GRID)
    yield " ".join(INTRODUCTION.format(count=len(PROBLEMS), seeds=len(SEEDS)).split())
    yield " ".join(HALVES.format(choose=_half("choose"), judge=_half("judge")).split())
    yield " ".join(TUNING.format(titles=titles, grid=len(stages.GRID), factors=factors).split())


def _half(role: str) -> str:
    names = [name for name, problem in PROBLEMS.items() if problem.role == role]
    return f"{len(names)} problems ({', '.join(names)})"


def _defaults() -> dict[str, Any]:
    known = {"lr": optimizers.default_lr(OURS), **optimizers.defaults()}
    return {name: known[name] for name in SETTINGS} | {"nesterov": "where there is momentum"}  # the meaning of None


def _safety(results: Results) -> Iterable[str]:
    yield "## A factor of three in the learning rate either way"
    head = ("problem", *(f"lr {optimizers.default_lr(OURS) * factor:.2g}" for factor in stages.FACTORS), "failed")
    lines = []
    for name in results.problems:
        ends = [results.ends(name, OURS, factor) for factor in stages.FACTORS]
        failed = sum(results.failed(name, OURS, factor) for factor in stages.FACTORS)
        cells = [f"{statistics.mean(e):.3g} ({min(e):.3g} to {max(e):.3g})" if e else "-" for e in ends]
        lines.append((name, *cells, f"{failed} of {sum(map(len, ends)) + failed}"))
    yield table(head, lines)
    yield f"TENGraD's test loss at the end: the mean of {len(SEEDS)} seeds, and their range."
    yield "![The worst seed's loss at the end by learning rate over the default](figures/defaults-lr.png)"


def _tuning(results: Results) -> Iterable[str]:
    yield "## The rivals' learning rates"
    lines = []
    for name in results.problems:
        best = results.tuned(name)
        lines.append((name, *(_tried(results, name, rival, best[rival]) if rival in best else "-" for rival in RIVALS)))
    yield table(("problem", *RIVALS), lines)
    yield "The best learning rate, of the values from the smallest to the largest that were tried."


def _tried(results: Results, problem: str, rival: str, best: float) -> str:
    rates = [RIVALS[rival].lr * factor for factor in stages.grid(problem, rival, results.store)]
    return f"{RIVALS[rival].lr * best:.2g}, of {len(rates)} from {rates[0]:.2g} to {rates[-1]:.2g}"


def _failures(results: Results) -> Iterable[str]:
    yield "## Runs that failed"
    yield " ".join(FAILURES.split())
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in results.runs:
        if run.failure:
            case = run.case
            key = (case.problem, case.optimizer + (f", {case.change}" if case.change else ""), run.failure)
            found.setdefault(key, []).append(run)
    lines = []
    for (problem, optimizer, failure), runs in found.items():
        rates = ", ".join(f"{lr:.2g}" for lr in sorted({run.lr for run in runs}))
        lines.append((problem, optimizer, failure, rates, str(len(runs))))
    yield table(("problem", "optimizer", "what happened", "lr", "runs"), lines) if lines else "None."


def _problem(results: Results, name: str) -> Iterable[str]:
    problem = PROBLEMS[name]
    yield f"## {name}: {problem.title}"
    head = ("optimizer", "lr", "train loss", "test loss", f"test {problem.quality}", "a step", "a refresh", "the run")
    yield table(head, [_line(curve, problem.is_share) for curve in results.curves(name)])
    yield f"![Loss by step and by time, {problem.quality} by time](figures/defaults-{name}.png)"


def _line(curve: Curve, is_share: bool) -> tuple[str, ...]:
    failed = f"{len(curve.failures)} failed" if curve.failures else ""
    if not curve.runs:
        return (curve.optimizer, "", failed, *[""] * 5)
    value = curve.end("quality")
    return (
        curve.optimizer,
        f"{curve.runs[0].lr:.2g}{' (tuned)' if curve.tuned else ''}",
        f"{curve.end('train_loss'):.3g}",
        f"{curve.end('loss'):.3g}{f' ({failed})' if failed else ''}",
        f"{value:.1%}" if is_share else f"{value:.2g}",
        f"{1e3 * curve.seconds['reuse']:.1f} ms",
        f"{1e3 * curve.seconds['refresh']:.1f} ms" if curve.optimizer == OURS else "",
        f"{curve.times[-1]:.1f} s",
    )


def _ablations(results: Results) -> Iterable[str]:
    names = [name for name in results.problems if PROBLEMS[name].role == "choose"]
    found = {change: {name: results.ablation(name, change) for name in names} for change in ("", *ABLATIONS)}
    if not any(run for change, runs in found.items() if change for run in runs.values()):
        return
    yield "## What each default is there for"
    lines = [(change or "the defaults", *map(_ending, runs.values())) for change, runs in found.items()]
    yield table(("test loss at the end, first seed", *names), lines)


def _ending(run: Run | None) -> str:
    if run is None:
        return "-"
    return run.failure.split(":")[0] or f"{run.loss[-1]:.3g}"


def _where(results: Results) -> Iterable[str]:
    yield "## Where and how"
    yield " ".join(TIMES.split())
    if results.machine:
        yield table(("", ""), [(key, str(value)) for key, value in results.machine.items() if value is not None])
        yield "The steps were timed on this machine."
    yield f"The commits of the runs are {', '.join(sorted({run.commit for run in results.runs}))}."
    yield (
        "To repeat the study; a run that has its file in `studies/results`, with the settings of today, is not "
        "repeated (`--only` and `--only-optimizer` choose a part of it):"
    )
    yield "```bash\npython -m studies.defaults --data DIR --out docs\n```"

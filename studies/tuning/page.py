"""The page of the study, docs/tuning.md: `page.md`, in which each ``{{…}}`` stands for what the results say."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from studies import results as study_of_defaults
from studies import runs as default_runs
from studies import stages as default_stages
from studies.optimizers import RIVALS
from studies.tuning import losses
from studies.tuning.grid import BASE, PROBLEMS, SEEDS, SETTINGS, Setting
from studies.tuning.runs import Case, Run, Store
from tengrad_triton.recipes.reports.markdown import table

TEMPLATE = Path(__file__).with_name("page.md")
GENERATED = "<!-- Written by `python -m studies.tuning` from studies/tuning/page.md: changes by hand are lost. -->"
CONSTANT = "constant: "
"""Begins the name of a run of the study of the defaults, which have a constant rate: `constant: OPTIMIZER FACTOR`."""
LEVEL = 1.1  # a ratio of losses that is nearer to 1 is called level, if the seeds do not decide


class Results:
    """The runs of this study, and those of the study of the defaults, by their names."""

    def __init__(self, store: Store, defaults: default_runs.Store) -> None:
        self.store, self.defaults = store, study_of_defaults.Results(defaults)
        self._settings = {setting.key: setting for setting in SETTINGS}

    def setting(self, key: str) -> Setting:
        """Return the setting of a name."""
        return self._settings[key]

    def runs(self, key: str, problem: str) -> list[Run]:
        """Return the runs of a setting on a problem, by their seeds."""
        setting = self.setting(key)
        found = (self.store.run(Case(problem, setting, seed)) for seed in setting.seeds)
        return [run for run in found if run is not None]

    def ends(self, key: str, problem: str) -> dict[int, float | str]:
        """Return the last test loss of each seed, or how the run failed."""
        if not key.startswith(CONSTANT):
            return {run.seed: run.failure or run.loss[-1] for run in self.runs(key, problem)}
        name, factor = key.removeprefix(CONSTANT).split()
        rates = {f"{one:.3g}": one for one in default_stages.grid(problem, name, self.defaults.store)}
        tried = self.defaults.tuned(problem)[name] if factor == "tuned" else rates[factor]
        found = default_runs.of(self.defaults.store, problem, name, tried, default_runs.SEEDS)
        return {run.case.seed: run.failure or run.loss[-1] for run in found}

    def lowest(self, key: str, problem: str) -> float:
        """Return the mean of the last losses; infinite where a seed failed."""
        values = list(self.ends(key, problem).values())
        return statistics.mean(v if isinstance(v, float) else math.inf for v in values) if values else math.inf

    def verdict(self, key: str, base: str, problem: str) -> str:
        """Return ↓ if every seed ended below every seed of ``base``, ↑ if above; nothing if the seeds do not decide."""
        one, other = (list(self.ends(k, problem).values()) for k in (key, base))
        numbers = [[v if isinstance(v, float) else math.inf for v in values] for values in (one, other)]
        if key == base or min(map(len, numbers)) < len(SEEDS):
            return ""
        return "↓" if max(numbers[0]) < min(numbers[1]) else "↑" if min(numbers[0]) > max(numbers[1]) else ""

    @property
    def commits(self) -> list[str]:
        """The commits of the code of all runs."""
        kept = (run for s in SETTINGS for problem in PROBLEMS for run in self.runs(s.key, problem))
        return sorted({run.commit[:12] for run in kept})


def markdown(results: Results, template: str) -> str:
    """Return the page."""
    writers: dict[str, Callable[..., str]] = {
        "cells": lambda key: " | ".join(cell(results, key, problem) for problem in PROBLEMS),
        "effect": lambda keys: effect(results, *keys.split(" against ")),
        "region": lambda words: _region(results, *words.split(" on ")),
        "damping": lambda key: _damping(results, key),
        "clipped": lambda key: _clipped(results, key),
        "losses": lambda _: losses.losses(),
        "rivals": lambda _: rivals(results.defaults),
        "refresh": lambda _: _refresh(results.defaults),
        "commits": lambda _: ", ".join(results.commits),
        "runs": lambda _: str(sum(len(results.runs(s.key, p)) for s in SETTINGS for p in PROBLEMS)),
    }

    def written(match: re.Match[str]) -> str:
        name, _, words = match[1].partition(" ")
        return writers[name](words)

    return f"{GENERATED}\n\n{re.sub(r'{{(.+?)}}', written, template)}"


def cell(results: Results, key: str, problem: str) -> str:
    """Return the last test losses of a setting's seeds, and how they compare with `BASE`."""
    ends = results.ends(key, problem)
    values = " / ".join(f"{v:.3g}" if isinstance(v, float) else v.split(":")[0] for v in dict.fromkeys(ends.values()))
    return f"{values} {results.verdict(key, BASE.key, problem)}".strip() or "-"


def effect(results: Results, key: str, base: str = BASE.key) -> str:
    """Return in words by how much a setting's last losses differ from those of another one, on each problem."""
    return ", ".join(f"{problem} {_ratio(results, key, base, problem)}" for problem in PROBLEMS)


def _ratio(results: Results, key: str, base: str, problem: str) -> str:
    ends = results.ends(key, problem)
    failed = [value for value in ends.values() if isinstance(value, str)]
    if not ends or failed:
        return failed[0].split(":")[0] if failed else "-"
    ratio = results.lowest(key, problem) / results.lowest(base, problem)
    if results.verdict(key, base, problem):
        return f"× {ratio:.2f}" if 0.1 < ratio < 10 else f"× {float(f'{ratio:.2g}'):g}"
    return "level" if 1 / LEVEL < ratio < LEVEL else "undecided"


def rivals(results: study_of_defaults.Results) -> str:
    """Return on how many problems of docs/defaults.md TENGraD untouched is ahead of each rival with its best rate."""
    lines = []
    for name in RIVALS:
        pairs = [(results.ours(problem), results.rival(problem, name)) for problem in results.problems]
        known = [(ours, rival) for ours, rival in pairs if ours and rival and ours.runs and rival.runs]
        ratios = [study_of_defaults.ratio(ours, rival) for ours, rival in known]
        sooner = sum(isinstance(ratio, float) and ratio < 1 for ratio in ratios)
        lower = sum(ours.end() < rival.end() for ours, rival in known)
        dearer = sorted(ours.seconds["reuse"] / rival.seconds["reuse"] for ours, rival in known)
        costs = f"{dearer[0]:.2g} to {dearer[-1]:.2g}" if dearer else "-"
        lines.append((name, f"{sooner} of {len(known)}", f"{lower} of {len(known)}", costs))
    head = ("rival, its rate tuned", "TENGraD reaches its last loss sooner", "TENGraD ends lower")
    return table((*head, "a step of TENGraD that reuses, over the rival's"), lines)


def _refresh(results: study_of_defaults.Results) -> str:
    """Return what a step that refreshes costs on the problems of docs/defaults.md, over one that reuses."""
    curves = [results.ours(problem) for problem in results.problems]
    costs = sorted(curve.seconds["refresh"] / curve.seconds["reuse"] for curve in curves if curve)
    return f"{costs[0]:.1f} to {costs[-1]:.1f}"


def _region(results: Results, key: str, problem: str) -> str:
    """Return what the trust region multiplied steps by, in the first and in the last eighth of a run."""
    (run, *_) = results.runs(key, problem)
    return f"{run.region[0]:.2g} at first and {run.region[-1]:.2g} in the last eighth"


def _clipped(results: Results, key: str) -> str:
    """Return the largest share of blocks and steps that were shortened in an eighth of a run after the first one."""
    shares = {p: [max(run.clipped[1:]) for run in results.runs(key, p) if run.clipped] for p in PROBLEMS}
    return ", ".join(f"{problem} {max(found):.0%}" for problem, found in shares.items() if found)


def _damping(results: Results, key: str) -> str:
    """Return the damping at the end on each problem."""
    ends = {problem: [run.damping for run in results.runs(key, problem) if run.damping] for problem in PROBLEMS}
    return ", ".join(f"{problem} {' / '.join(f'{d:.2g}' for d in found)}" for problem, found in ends.items())

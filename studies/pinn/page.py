"""The page of the study, docs/pinn.md: a pure function of the kept runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from studies.pinn import robustness, timing
from studies.pinn.frameworks.build import FRAMEWORKS
from studies.pinn.problems import PROBLEMS
from studies.pinn.problems.base import inputs_of, start
from studies.pinn.problems.sampling import generator
from studies.pinn.registry import FAMILIES
from studies.pinn.rivals.build import TITLES
from studies.pinn.runs import Case, Run, Store, best
from tengrad_triton.recipes.reports.markdown import block, table

COMMAND = "python -m studies.pinn"
GENERATED = f"<!-- Written by `{COMMAND} --report-only`: changes by hand are lost. -->"
INTRODUCTION = """
Each optimizer solves each problem for the same time: CPU seconds of its steps, on one thread, compilation included.
Measuring the error and drawing points do not count; whatever a step does counts, so also a line search, and steps
that are taken back. All have the same networks in float64, first weights and points, which depend on the seed alone.
An optimizer with several settings runs with all of them for the first seed; the one with the lowest last error, which
favours it, runs with every seed. Numbers are medians over the seeds, *range* is the least and the largest one at the
end. A run that ends with an error that is not finite, above its first one, or with an exception has failed: it stays
here, and counts as an infinite error.
"""
PUBLISHED = """
**Poisson's and the heat equation** are those of Dangel, Müller and Zeinhofer (2024): equations, networks, numbers of
points, and how often these are new. They publish absolute errors, which are the relative ones times the root mean
square of u; they draw points and compute right-hand sides in float32, here all is float64. Their loss is half of ours,
and their times are of a GPU.
"""
NOT_RUN = """
A dash was not run: KFAC takes linear equations only, and scipy's solver no J of more than 4 million numbers; with all
pairs of parameters a step of ENGD takes longer than a run at the 7851 of convection, and memory has no room for those
of poisson10d; optimizers that keep their points have none that are new at every step; and `GaussNewton` has some of
the rows (`max_rows`) only where a step with all of them takes most of a run.
"""
FRAMEWORKS_RUN = """
**PINA and DeepXDE** solve the problems as their users do: with their own losses, derivatives and training loops, Adam
first, then L-BFGS. Networks, first weights, points and weights of terms are those of all others; the points stay the
same throughout. What their loops do besides the steps counts, and so does building their problem from the points, but
not importing them. Progress bars, logs to files and checkpoints are off. A step is one of Adam's or an iteration of
L-BFGS.
"""


@dataclass(frozen=True)
class Line:
    """The runs of an optimizer with its best setting on a problem, one for each seed."""

    family: str
    variant: str
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The optimizer."""
        return TITLES.get(self.family, self.runs[0].name)

    def errors_at(self, seconds: float) -> list[float]:
        """Return the error of each seed at a time."""
        return [run.error_at(seconds) for run in self.runs]

    @property
    def ends(self) -> list[float]:
        """The last error of each seed; infinite for one that failed."""
        return [run.end for run in self.runs]

    @property
    def failures(self) -> list[str]:
        """How the runs that failed did."""
        return [run.failure for run in self.runs if run.failure]


@dataclass(frozen=True)
class Results:
    """All valid runs in the store. Each problem is shown with its longest time."""

    store: Store

    @cached_property
    def cases(self) -> list[Case]:
        """The cases of today's problems and settings that have valid runs."""
        known = [c for c in self.store.cases() if c.problem in PROBLEMS and c.variant in FAMILIES.get(c.family, {})]
        return [case for case in known if self.store.run(case)]

    @property
    def problems(self) -> list[str]:
        """The problems that have lines, in the order of the study."""
        return [name for name in PROBLEMS if self.lines(name)]

    def seconds(self, problem: str) -> float:
        """Return the longest time that a problem was run for."""
        return max(case.seconds for case in self.cases if case.problem == problem)

    def lines(self, problem: str) -> list[Line]:
        """Return the line of each family whose settings were all run with the first seed."""
        return self._lines[problem]

    @cached_property
    def _lines(self) -> dict[str, list[Line]]:
        return {problem: self._read(problem) for problem in PROBLEMS}

    def _read(self, problem: str) -> list[Line]:
        own = [case for case in self.cases if case.problem == problem]
        if not own:
            return []
        seconds, lines = self.seconds(problem), []
        seeds = sorted({case.seed for case in own if case.seconds == seconds})
        for family in FAMILIES:
            variant = best(self.store, problem, family, seconds, seeds[0])
            found = [self.store.run(Case(problem, family, variant, seconds, seed)) for seed in seeds if variant]
            runs = tuple(run for run in found if run is not None)
            if variant and runs:
                lines.append(Line(family, variant, runs))
        return lines

    def tried(self, problem: str, family: str) -> list[Run]:
        """Return the runs of all settings of a family with the first seed."""
        seeds = [run.case.seed for line in self.lines(problem) for run in line.runs]
        cases = [Case(problem, family, name, self.seconds(problem), min(seeds)) for name in FAMILIES[family]]
        return [run for run in map(self.store.run, cases) if run is not None]


def markdown(results: Results) -> str:
    """Return the page."""
    sections = [
        f"{GENERATED}\n\n# Least squares on differential equations",
        " ".join(INTRODUCTION.split()),
        " ".join(PUBLISHED.split()),
        *_frameworks(results),
        *_summary(results),
        *(section for name in results.problems for section in _problem(results, name)),
        *_tuning(results),
        *timing.sections(results.store),
        *robustness.sections(results.store),
        *_where(results),
    ]
    return "\n\n".join(sections) + "\n"


def number(value: float) -> str:
    """Return an error with two significant digits."""
    return f"{value:.1e}" if math.isfinite(value) else "failed"


def _frameworks(results: Results) -> Iterator[str]:
    """Yield how frameworks are run, if any was."""
    if any(line.family in FRAMEWORKS for problem in results.problems for line in results.lines(problem)):
        yield " ".join(FRAMEWORKS_RUN.split())


def _summary(results: Results) -> Iterator[str]:
    problems = results.problems
    if not problems:
        yield "Nothing was run yet."
        return
    ends = {
        (problem, line.family): statistics.median(line.ends) for problem in problems for line in results.lines(problem)
    }
    names = {line.family: line.name for problem in problems for line in results.lines(problem)}
    least = {problem: min(end for (of, _), end in ends.items() if of == problem) for problem in problems}

    def cell(problem: str, family: str) -> str:
        end = ends.get((problem, family))
        if end is None:
            return "-"
        return f"**{number(end)}**" if end == least[problem] < math.inf else number(end)

    lines = [
        (names[family], *(cell(problem, family) for problem in problems)) for family in FAMILIES if family in names
    ]
    times = ", ".join(f"{problem} {results.seconds(problem):g}" for problem in problems)
    yield f"The error at the end, lowest in bold. CPU seconds of a run: {times}."
    yield table(("optimizer", *problems), lines)
    if any("-" in line for line in lines):
        yield " ".join(NOT_RUN.split())
    yield from _race(results, names)


def _race(results: Results, names: dict[str, str]) -> Iterator[str]:
    """Yield a table of the times to the error that the first family ends with."""
    targets = {problem: results.lines(problem)[0] for problem in results.problems}
    first = next(iter(FAMILIES))
    own = {problem: statistics.median(line.ends) for problem, line in targets.items() if line.family == first}
    ends = {problem: end for problem, end in own.items() if math.isfinite(end)}
    if not ends or len(names) < 2:
        return
    yield (
        f"CPU seconds to the error that {names[first]} ends with: the median over the seeds of the time of the first "
        "measurement that is as low. Errors are measured at 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1 seconds, and so on."
    )
    yield table(
        ("optimizer", *ends),
        [
            (names[family], *(_seconds_to(results, p, family, ends[p]) for p in ends))
            for family in names
            if family != first
        ],
    )


def _seconds_to(results: Results, problem: str, family: str, error: float) -> str:
    runs = next((line.runs for line in results.lines(problem) if line.family == family), ())
    if not runs:
        return "-"
    seconds = statistics.median(run.seconds_to(error) for run in runs)
    return f"{seconds:.2g}" if math.isfinite(seconds) else "never"


def _problem(results: Results, name: str) -> Iterator[str]:
    problem, lines, seconds = PROBLEMS[name], results.lines(name), results.seconds(name)
    points = problem.points(generator(0))
    counts = ", ".join(f"{len(inputs_of(given)[0])} {term}" for term, given in points.items())
    parameters = sum(parameter.numel() for parameter in start(problem, 0).parameters())
    drawn = {0: "drawn once", 1: "new ones at every step"}.get(
        problem.fresh_every, f"new ones every {problem.fresh_every} steps"
    )
    weights = ", ".join(f"{term} × {weight:g}" for term, weight in problem.weights.items())
    yield f"## {problem.title[0].upper()}{problem.title[1:]}"
    facts = [f"`{name}`", f"{parameters} parameters", f"points: {counts}, {drawn}", f"source: {problem.source}"]
    facts += [f"weights of terms: {weights}"] if weights else []
    measured = f"Measured: the {problem.measured}; the root mean square of u is {_rms(name)}."
    yield f"{'; '.join(facts)}. {measured} {problem.note()}".rstrip()
    yield f"![{problem.measured} by CPU time](figures/pinn-{name}.png)"
    times = _times(seconds)
    head = ("optimizer", *(f"{at:g} s" for at in times), "range", "steps", "ms a step", "failed")
    yield table(head, [_row(line, times) for line in lines])
    yield "\n".join(f"- {line.name}: {line.runs[0].setting}" for line in lines if line.runs[0].setting)


def _rms(name: str) -> str:
    return f"{PROBLEMS[name].root_mean_square():.3g}"


def _times(seconds: float) -> list[float]:
    powers = range(-1, math.ceil(math.log10(seconds)) + 1)
    rising = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    return [*[at for at in rising if at < 0.99 * seconds][-4:], seconds]


def _row(line: Line, times: Sequence[float]) -> tuple[str, ...]:
    medians = [number(statistics.median(line.errors_at(at))) for at in times[:-1]]
    spread = f"{number(min(line.ends))} to {number(max(line.ends))}"
    steps = statistics.median(run.points[-1].step for run in line.runs)
    cost = [1e3 * run.points[-1].seconds / run.points[-1].step for run in line.runs if run.points[-1].step]
    failed = f"{len(line.failures)} of {len(line.runs)}" + (f": {line.failures[0]}" if line.failures else "")
    end = number(statistics.median(line.ends))
    return line.name, *medians, end, spread, f"{steps:.0f}", f"{statistics.median(cost):.3g}" if cost else "-", failed


def _tuning(results: Results) -> Iterable[str]:
    """Return a table for each family that was tuned: the last error of each setting with the first seed."""
    problems, sections = results.problems, []
    for family, variants in FAMILIES.items():
        tried = {problem: results.tried(problem, family) for problem in problems}
        ends = {(run.case.problem, run.case.variant): number(run.end) for runs in tried.values() for run in runs}
        if len(variants) > 1 and ends:
            name = TITLES.get(family) or next(runs[0].name for runs in tried.values() if runs)
            lines = [(variant, *(ends.get((problem, variant), "-") for problem in problems)) for variant in variants]
            sections += [f"### {name}", table(("setting", *problems), lines)]
    return ["## What was tuned", "The error at the end with the first seed.", *sections] if sections else []


def _where(results: Results) -> Iterator[str]:
    runs = [run for case in results.cases if (run := results.store.run(case))]
    if runs:
        loads = [load for run in runs for load in run.load]
        yield "## Where"
        yield (
            f"{len(runs)} runs. The load average of the machine was {min(loads):.1f} to {max(loads):.1f}, "
            f"{statistics.median(loads):.1f} as a rule; steps take more CPU time on a machine that is busy."
        )
        keys = runs[0].machine
        yield table(("", "runs"), [(key, ", ".join(sorted({run.machine[key] for run in runs}))) for key in keys])
    yield "## To run it again"
    commands = ("", " --problem burgers --seconds 30", ".timing", ".robustness", " --report-only")
    yield block("\n".join(f"{COMMAND}{command}" for command in commands), "bash")

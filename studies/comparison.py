"""The part of the page that compares TENGraD with its rivals by the clock, and with the targets."""

from __future__ import annotations

from collections.abc import Iterable

from studies.optimizers import RIVALS
from studies.problems import PROBLEMS
from studies.problems.base import Role
from studies.results import TARGETS, Curve, Missing, Results, Score, Target, ratio
from tengrad_triton.recipes.reports.markdown import table

SHARES = {(2, 3): "two thirds", (1, 2): "half"}
ROLES: tuple[Role, ...] = ("judge", "choose")
MEANING = """
Each number is TENGraD's time over the rival's, where the rival's runs end: TENGraD's time to the rival's last test
loss, by linear interpolation between evaluations, over the time of the rival's whole run. Below 1, TENGraD is ahead.
*Not reached*: TENGraD's run, of as many steps, never had that loss, or one of its seeds failed. Losses are means over
the seeds; of a rival, over those that did not fail.
"""


def race(results: Results) -> Iterable[str]:
    """Yield the sections that compare TENGraD with each rival at the rival's end, and in detail with AdamW."""
    yield "## By the clock"
    head = ("problem", "role", "AdamW, its own lr", *(f"{name}, tuned" for name in RIVALS))
    yield table(head, [_ratios(results, name) for role in ROLES for name in _of(results, role)])
    yield " ".join(MEANING.split())
    yield (
        "![TENGraD's time over each tuned rival's, on a logarithmic axis: to the left of 1 TENGraD is ahead]"
        "(figures/defaults-clock.png)"
    )
    yield "An asterisk marks the problems that only judge the defaults. Against the targets:"
    scores = [(role, results.score(target, role)) for role in ROLES for target in TARGETS]
    head = ("half", "rival, tuned", "target", "met on", "not reached or too late", "target met")
    yield table(head, [(role, score.target.rival, *_counted(score)) for role, score in scores])
    yield "Of AdamW with its tuned learning rate, in detail:"
    head = (
        *("problem", "AdamW's lr", "its time", "its loss then", "TENGraD's loss then", "TENGraD's time to that loss"),
        *("fewer steps", "a step costs"),
    )
    pairs = ((name, results.ours(name), results.rival(name, "adamw")) for name in results.problems)
    yield table(head, [(name, *_against(ours, adamw)) for name, ours, adamw in pairs if ours and adamw and adamw.runs])
    yield (
        "*Fewer steps* is AdamW's number of steps over TENGraD's to the same loss. *A step costs* is the ratio of the "
        "mean times of a step, refreshes included. The ratio above is the second over the first."
    )


def _of(results: Results, role: Role) -> list[str]:
    return [name for name in results.problems if PROBLEMS[name].role == role]


def _ratios(results: Results, name: str) -> tuple[str, ...]:
    ours = results.ours(name)
    rivals = (results.curve(name, "adamw", 1), *(results.rival(name, rival) for rival in RIVALS))
    return (name, PROBLEMS[name].role, *(_cell(ratio(ours, rival), ours) for rival in rivals))


def _cell(value: float | Missing, ours: Curve | None) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if value == "not reached" and ours is not None and ours.failures:
        return f"not reached ({len(ours.failures)} failed)"
    return {"not measured": "-", "no end": "the rival failed"}.get(value, value)


def _counted(score: Score) -> tuple[str, ...]:
    verdict = ("yes" if score.is_met else "no") if score.of else "-"
    return (_words(score.target), f"{score.met} of {score.of}", ", ".join(score.behind) or "none", verdict)


def _words(target: Target) -> str:
    never = "" if target.worst is None else f", never above {target.worst:g}"
    return f"at most {target.goal:g} on {SHARES[target.share]}{never}"


def _against(ours: Curve, adamw: Curve) -> tuple[str, ...]:
    end, loss = adamw.times[-1], adamw.losses[-1]
    compared = ("-", "not reached", "-", "-")
    if ours.runs and not ours.failures:
        then, reached, steps = ours.loss_at(end), ours.seconds_to(loss), ours.steps_to(loss)
        compared = ("-" if then is None else f"{then:.3g}", *compared[1:])
        if reached is not None and steps is not None:
            fewer = adamw.runs[0].steps[-1] / steps
            compared = (compared[0], f"{reached:.2f} s", f"{fewer:.2f} ×", f"{fewer * reached / end:.2f} ×")
    return (f"{adamw.runs[0].lr:.2g}", f"{end:.2f} s", f"{loss:.3g}", *compared)

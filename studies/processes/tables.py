"""The tables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from studies.processes.answers import (
    COUNTS,
    FEW_ROWS,
    INTERVALS,
    SAMPLES,
    Answers,
    fits_memory,
    plans_of,
    powers,
    sent_by,
)
from studies.processes.hardware import MEASURED_SAMPLES, MEMORY, measured_steps
from studies.processes.measured import cases
from studies.processes.model import WAYS, Held, Way, held, sent
from studies.processes.sizes import GPT, sizes_of
from studies.processes.times import TIMED, plain, refresh_seconds, step_seconds
from tengrad_triton.recipes.reports.markdown import table

MODELS = (*TIMED, GPT)
NAMES: dict[Way, str] = {"DDP, global": "global", "DDP, local": "local", "FSDP2, global": "`fully_shard`, global"}
SHOWN = (8, 512)
ROW_COUNTS = (8, 16, 32, 64, 128)
STEP_OF_ROWS = 32


def sent_table(samples: int) -> str:
    """Return the megabytes that a process sends, by model and R."""
    head = (
        *("model", "R", "DDP, every step", "global, refresh (GB)", "local, every step"),
        *("`fully_shard`, every step", "refresh (GB)", "other step"),
    )
    lines = []
    for name in MODELS:
        for count in SHOWN:
            ours, local, sharded = (sent_by(name, samples, count, way) for way in WAYS)
            first = (megabytes(ours.wrapper), gigabytes(ours.refresh), megabytes(local.reuse))
            last = (megabytes(sharded.wrapper), gigabytes(sharded.refresh), megabytes(sharded.reuse))
            lines.append((name, str(count), *first, *last))
    return table(head, lines)


def megabytes(number: float) -> str:
    """Return bytes in MB, with three digits."""
    return f"{number / 1e6:,.0f}" if number >= 1e8 else f"{number / 1e6:.3g}"


def held_table(samples: int) -> str:
    """Return the rows and the gigabytes that a process holds, by model and R."""
    head = ("model", "R", "global: rows", "J and K⁻¹", "peak", "`fully_shard`: rows", "J and K⁻¹", "peak", "local")
    lines = []
    for name in MODELS:
        for count in SHOWN:
            cells = []
            for way in ("DDP, global", "FSDP2, global"):
                plans = plans_of(name, samples, count, way)
                own = held(sizes_of(name, samples), count, way, plans)
                cells += [f"{plans.rows:,}", gigabytes(own.curvature), _peak(own)]
            alone = held(sizes_of(name, samples), count, "DDP, local", plans_of(name, samples, count, "DDP, local"))
            lines.append((name, str(count), *cells, gigabytes(alone.curvature)))
    return table(head, lines)


def gigabytes(number: float) -> str:
    """Return bytes in GB, with three digits."""
    return f"{number / 1e9:,.0f}" if number >= 1e11 else f"{number / 1e9:.3g}"


def _peak(own: Held) -> str:
    text = gigabytes(own.peak)
    return f"**{text}**" if own.peak > MEMORY else text


def times_table(answers: Answers, samples: int) -> str:
    """Return the mean step over SGD's for both intervals, by model and way."""
    lines = []
    for name in TIMED:
        for way in WAYS:
            cells = [_over_sgd(answers, name, samples, count, way) for count in (1, *COUNTS)]
            lines.append((f"{name}, {NAMES[way]}", *cells))
    return table(("", *(f"R = {count}" for count in (1, *COUNTS))), lines)


def _over_sgd(answers: Answers, name: str, samples: int, count: int, way: Way) -> str:
    if not fits_memory(name, samples, count, way):
        return "-"
    values = (answers.over_sgd(name, samples, count, way, every) for every in INTERVALS)
    return ", ".join(f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in values)


def refresh_table(answers: Answers, samples: int) -> str:
    """Return the milliseconds that a refresh adds, and those of its messages."""
    lines = []
    for name in TIMED:
        for count in COUNTS:
            if fits_memory(name, samples, count, "DDP, global"):
                found = answers.times(name, samples, count, "DDP, global", FEW_ROWS)
                parts = (found.refresh, found.exchange)
                lines.append((name, str(count), *(f"{1e3 * seconds:,.0f}" for seconds in parts)))
    return table(("model", "R", "a refresh adds", "of which the exchange"), lines)


def rows_table(answers: Answers) -> str:
    """Return up to which R all rows are within the limit, and how many rows are, by R."""
    head = (
        *("", "alone", "all rows: up to R", *(f"rows, R = {count}" for count in ROW_COUNTS)),
        *("`fully_shard`, all rows: up to R", "local: up to R"),
    )
    lines = []
    for name in TIMED:
        for samples in SAMPLES:
            for every in INTERVALS:
                most = [answers.most_rows(name, samples, count, every) for count in ROW_COUNTS]
                alone = answers.over_sgd(name, samples, 1, "DDP, global", every)
                last = {way: str(answers.last(name, samples, way, every)) for way in WAYS}
                rows = (str(number) if number else "-" for number in most)
                ends = (last["FSDP2, global"], last["DDP, local"])
                title = f"{name}, N_r = {samples}, T = {every}"
                lines.append((title, f"{alone:.2f}", last["DDP, global"], *rows, *ends))
    return table(head, lines)


def last_with_rows(answers: Answers, every: int, samples: int) -> tuple[int, int]:
    """Return the range over models of the largest R for which some number of rows is within the limit."""
    found = [
        max(count for count in powers() if count == 1 or answers.most_rows(name, samples, count, every))
        for name in TIMED
    ]
    return min(found), max(found)


def advice(answers: Answers) -> int:
    """Return how many rows are within the limit for all models where any number is, T being long: a multiple of 32."""
    every = INTERVALS[-1]
    found = [
        most
        for name in TIMED
        for samples in SAMPLES
        for count in ROW_COUNTS
        if (most := answers.most_rows(name, samples, count, every))
    ]
    return min(found) // STEP_OF_ROWS * STEP_OF_ROWS


Pairs = tuple[tuple[float, float], ...]
"""Bytes that were counted and those of the model: of the wrapper, of a refresh, and of another step."""


def pairs_of(one: dict[str, Any]) -> Pairs:
    """Return counted bytes and those of the model for a case; the wrapper's in a step that does not refresh."""
    expected = sent(sizes_of(one["network"], one["samples"]), one["count"], one["way"], one["rows"], scatters=False)
    refresh, reuse = one["refresh"], one["reuse"]
    return (reuse["wrapper"], expected.wrapper), (refresh["own"], expected.refresh), (reuse["own"], expected.reuse)


def counted_ratios(counted: Sequence[dict[str, Any]]) -> list[float]:
    """Return counted bytes over those of the model, where it says that there are any."""
    return [found / expected for one in counted for found, expected in pairs_of(one) if expected]


def counted_table(counted: Sequence[dict[str, Any]]) -> str:
    """Return the megabytes that were counted of the most processes, and their ratios to the model's."""
    most = max(one["count"] for one in counted)
    shown = [one for one in counted if one["count"] == most or one["fisher_rows"]]
    parts = ("wrapper", "refresh", "other step")
    head = ("", "R", *(title for part in parts for title in (f"{part}: MB", "over the model")))
    lines = []
    for one in shown:
        cells = [
            text
            for found, expected in pairs_of(one)
            for text in (megabytes(found), f"{found / expected:.4f}" if expected else "-")
        ]
        title = f"{one['network']}, N_r = {one['samples']}, {NAMES[one['way']]}"
        title += f", `fisher_rows={one['fisher_rows']}`" if one["fisher_rows"] else ""
        lines.append((title, str(one["count"]), *cells))
    return table(head, lines)


def uncounted(counted: Sequence[dict[str, Any]]) -> str:
    """Return which ways were not counted, in a sentence; nothing if all were."""
    known = {one["way"] for one in counted} & {case.way for case in cases()}
    missing = [NAMES[way] for way in WAYS if way not in known]
    return f"Not counted: {' and '.join(missing)}, whose bytes are those of the equations above." if missing else ""


def alone_table() -> str:
    """Return the model's milliseconds on one GPU beside the measured ones."""
    head = ("", "a step that reuses: measured", "model", "a refresh adds: measured", "model")
    lines = []
    for name in TIMED:
        for samples in MEASURED_SAMPLES:
            step, plans = measured_steps()[name, samples], plain(name, samples)
            reuse, refresh = step_seconds(name, samples, plans), refresh_seconds(name, samples, plans)
            seconds = (step.sgd + step.reuse, reuse, step.refresh, refresh)
            lines.append((f"{name}, N = {samples}", *(f"{1e3 * x:.3g}" for x in seconds)))
    return table(head, lines)

"""The lines that a call prints about a box: how its tasks ended, and a line for each case."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from perf.results import kernel_of
from perf.timing import microseconds as _us

LONGEST = 160  # characters of a line
Document = Mapping[str, Any]


def of_tasks(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield how tasks ended, with the last lines of what failed; tests that passed are one line."""
    good = [task for task in tasks if task["task"].startswith("tests") and task["ended"] == "finished"]
    if good:
        passed = sum(int(found[1]) for task in good if (found := re.search(r"(\d+) passed", task["said last"])))
        longest = max(task["seconds"] for task in good)
        yield f"tests, processes that finished: {len(good)}, the last after {longest} s; {passed} passed"
    for task in tasks:
        if task in good:
            continue
        time = f" after {task['seconds']} s" if "seconds" in task else ""
        yield f"{task['task']}: {task['ended']}{time}; {task.get('said last', '')}"[:LONGEST].rstrip("; ")
        yield from (f"  {line[:LONGEST]}" for line in task.get("lines", [])[-4:])


def of_suite(suite: str, document: Document) -> list[str]:
    """Return the lines about a suite's results."""
    skipped = [f"{suite}: {entry['case']}: {entry['why']}" for entry in document.get("skipped", [])]
    return [line[:LONGEST] for line in (*SUITES[suite](document), *skipped)]


def _smoke(document: Document) -> Iterator[str]:
    for case in document["cases"]:
        plain = f", plain: {case['why_plain'][:60]}" if case["why_plain"] else ""
        yield (
            f"{case['case']}: differs by {case['error']:.1e} of the way, rounding {case['rounding']:.1e}"
            f"{'' if case['is_rounding'] else ': WRONG?'}, "
            f"loss {case['losses'][-1]:.4f} / {case['expected'][-1]:.4f}{plain}"
        )


def _trace(document: Document) -> Iterator[str]:
    for case in document["cases"]:
        for kind, step in case["steps"].items():
            top = ", ".join(f"{k['name'][:28]} ×{k['count']:g} {_us(k['seconds'])}" for k in step["kernels"][:3])
            yield f"{case['case']} {kind}: {_us(step['seconds'])} µs: {top}"


def _steps(document: Document) -> Iterator[str]:
    for case in document["cases"]:
        ratios = (f"{case[name]:.2f}" for name in ("refresh_over_sgd", "reuse_over_sgd", "mean_over_sgd"))
        sgd = 1e3 * case["seconds"]["sgd"]["median"]
        yield f"{case['case']}: SGD {sgd:.2f} ms; refresh, reuse and mean over it {', '.join(ratios)}"


def _kernels(document: Document) -> Iterator[str]:
    for benchmark in document["benchmarks"]:
        kernel = kernel_of(benchmark, document["machine_info"]["device_type"])
        torchs = f", torch {_us(kernel.alternative_seconds)}" if kernel.alternative else ""
        if kernel.tf32_seconds is not None:
            torchs += f", TF32 {_us(kernel.tf32_seconds)}"
        launched = "" if benchmark["extra_info"]["captured"] else ", launched"
        yield f"{kernel.name} {kernel.size}: {_us(kernel.seconds)} µs{torchs}, limit {_us(kernel.limit)}{launched}"


def _variants(document: Document) -> Iterator[str]:
    for case in document["cases"]:
        found = (
            f"{name} {_us(x['seconds']['median'])} ({x['error_over_torch']:.2g})"
            if "seconds" in x
            else f"{name} failed"
            for name, x in case["implementations"].items()
        )
        yield f"{case['case']}: µs (error over torch's) {', '.join(found)}"


def _race(document: Document) -> Iterator[str]:
    for case in document["cases"]:
        end = case["curve"][-1]
        best = max(point["accuracy"] for point in case["curve"])
        yield (
            f"{case['case']}: {end['accuracy']:.2f} % (best {best:.2f} %) after {end['seconds']:.1f} s, "
            f"{1e3 * end['seconds'] / end['steps']:.2f} ms a step"
        )


def _memory(document: Document) -> Iterator[str]:
    for case in document["cases"]:
        yield f"{case['case']}: {case['over_sgd']:.2f} of SGD's"


SUITES: Mapping[str, Callable[[Document], Iterator[str]]] = {
    "smoke": _smoke,
    "trace": _trace,
    "steps": _steps,
    "kernels": _kernels,
    "variants": _variants,
    "race": _race,
    "memory": _memory,
}

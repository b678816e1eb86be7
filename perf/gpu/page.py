"""What the two calls add to docs/performance.md: sections about each GPU, and predictions beside measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from perf.gpu.calls import CALLS
from perf.gpu.outcomes import LIMITS, best_accuracy, by_optimizer, lowest_after_best, time_to, times_to_sgds_best
from perf.gpu.pieces.variants import TORCH
from perf.gpu.predictions import GPUS, STEPS
from perf.machine_code.roofline import predicted_seconds
from perf.results import Device
from perf.sizes import sized
from perf.timing import microseconds, milliseconds
from tengrad_triton.kernels import SPECS
from tengrad_triton.tuning.plan import MAX_BYTES

Lines = Iterator[Sequence[str]]


@dataclass(frozen=True)
class Part:
    """A table of the page: its title, what it says, the heads of its columns, and its lines."""

    title: str
    note: str
    titles: Sequence[str]
    lines: Sequence[Sequence[str]]


BOXES_NOTE = "Each box ran its tasks in parallel. `python -m perf.gpu first --out DIR` and `second` run them."
SMOKE_NOTE = """A few steps of training with the kernels and, beside it, with torch's definitions on the same device.
The difference and the effect of rounding are relative to the distance that the parameters moved. Rounding is the
difference that one unit of rounding in the inputs makes to the definitions: a right implementation differs by some such
units. `differs` marks those whose difference is more than a hundred times that of rounding, or as large as the
way."""
VARIANTS_NOTE = """Each cell has µs and, in brackets, the error over that of torch in IEEE float32, both against
float64. `autotune` chooses among the configurations whose error is at most twice torch's."""
TRACE_NOTE = """The kernels of a step by time, from `torch.profiler`: µs and calls in each step. `busy` is the sum over
all kernels, without the gaps between them. On a CPU these are torch's operations."""
RACE_NOTE = """3C1F on Fashion-MNIST, batches of 128; test accuracy, and seconds of training without evaluations, as
means over seeds. SGD and TENGraD (paper) have the settings that the paper tuned, the others their defaults. `last` is
the accuracy after the last epoch, and `lowest after` the lowest that followed a run's best: it shows whether a run came
down again. `ms a step` is the mean of all steps, refreshes and the making of batches included. `SGD's best` is the time
to the highest accuracy that SGD reached with the same seed. – means never. On a GPU the convolutions of all models
round to TF32, which is torch's default. A single seed says nothing about the spread."""


def parts(device: Device) -> Iterator[Part]:
    """Yield the tables about one machine; those of suites that have not run have no lines."""
    for title, note, titles, lines in (
        ("Boxes", BOXES_NOTE + _drivers(device), ("call", "box", "seconds", "of", "how its tasks ended"), _boxes),
        ("Training against the definitions", SMOKE_NOTE, _SMOKE, _smoke),
        ("Launch configurations", VARIANTS_NOTE, ("kernel", "size", "default", "others", "torch", "TF32"), _variants),
        ("Kernels of a step", TRACE_NOTE, ("model", "step", "busy, ms", "most of it"), _trace),
        ("A race by training time", RACE_NOTE, _RACE, _race),
    ):
        yield Part(title, note, titles, list(lines(device)))


def _drivers(device: Device) -> str:
    """Return a sentence about the versions of the GPU's driver; empty without one."""
    machines = (device.documents.get(f"{call} call", {}).get("machine_info", {}) for call in CALLS)
    versions = sorted({machine["driver"] for machine in machines if machine.get("driver")})
    return f" NVIDIA's driver: {', '.join(versions)}." if versions else ""


def _boxes(device: Device) -> Lines:
    for call in CALLS:
        for box in device.documents.get(f"{call} call", {}).get("boxes", []):
            endings: dict[str, int] = {}
            for task in box["tasks"]:
                name = "tests" if task["task"].startswith("tests") else task["task"]
                ending = f"{name}: {task['ended']}"
                endings[ending] = endings.get(ending, 0) + 1
            said = (ending if count == 1 else f"{ending} ({count} processes)" for ending, count in endings.items())
            yield call, box["box"], f"{box['seconds']:.0f}", f"{box['limit']:.0f}", "; ".join(said)


_SMOKE = (
    "training",
    "difference",
    "rounding",
    "last loss",
    "by the definitions",
    "first step, s",
    "reuse step, ms",
    "",
)


def _smoke(device: Device) -> Lines:
    for case in device.cases("smoke"):
        losses = (f"{case[name][-1]:.4f}" for name in ("losses", "expected"))
        times = f"{case['first_seconds']:.1f}", milliseconds(case["last_seconds"])
        remarks = ["" if case["is_rounding"] else "differs", case["why_plain"] and f"plain: {case['why_plain']}"]
        said = "; ".join(remark for remark in remarks if remark)
        yield case["case"], f"{case['error']:.1e}", f"{case['rounding']:.1e}", *losses, *times, said


def _variants(device: Device) -> Lines:
    for case in device.cases("variants"):
        cells = {name: _variant(found) for name, found in case["implementations"].items()}
        torchs, rounded = cells.pop(TORCH), cells.pop(f"{TORCH}, TF32")
        default = cells.pop("default")
        others = ", ".join(f"{name} {cell}" for name, cell in cells.items())
        yield f"`{case['kernel']}`", case["size"], default, others, torchs, rounded


def _variant(found: dict[str, Any]) -> str:
    if "failed" in found:
        return "failed"
    return f"{microseconds(found['seconds']['median'])} ({found['error_over_torch']:.2g})"


def _trace(device: Device) -> Lines:
    for case in device.cases("trace"):
        for kind, step in case["steps"].items():
            top = (
                f"`{k['name'].replace('|', '/')}` {microseconds(k['seconds'])} in {k['count']:g}"
                for k in step["kernels"][:6]
            )
            yield case["model"], kind, milliseconds(step["seconds"]), "; ".join(top)


_RACE = (
    *("optimizer", "seeds", "epochs", "best, %", "lowest after, %", "last, %", "seconds", "ms a step"),
    *(f"s to {limit:g} %" for limit in LIMITS), "s to SGD's best",
)  # fmt: skip


def _race(device: Device) -> Lines:
    runs = by_optimizer(device)
    for optimizer, cases in runs.items():
        ends = [case["curve"][-1] for case in cases]
        best, lowest = (fmean(map(accuracy, cases)) for accuracy in (best_accuracy, lowest_after_best))
        last, seconds, steps = (fmean(end[name] for end in ends) for name in ("accuracy", "seconds", "steps"))
        times = (_mean([time_to(limit, case) for case in cases]) for limit in LIMITS)
        of_sgd = _mean([time for _, time in times_to_sgds_best(device, optimizer)])
        head = optimizer, str(len(cases)), str(cases[0]["epochs"])
        percents = (f"{accuracy:.2f}" for accuracy in (best, lowest, last))
        yield *head, *percents, f"{seconds:.1f}", milliseconds(seconds / steps), *times, of_sgd


def _mean(times: Sequence[float | None]) -> str:
    """Return the mean of times in seconds, if every seed has one."""
    known = [time for time in times if time is not None]
    return f"{fmean(known):.1f}" if known and len(known) == len(times) else "–"


PREDICTIONS_NOTE = """The times of kernels are the least that an H100 and an H200 can take for the work of the compiled
kernel, at the rates of their data sheets; no kernel comes down to them. The times of steps are expected on an H100:
`added` is what the kernels of a reuse step add to those of SGD's step, and `must` is the least time of what such a step
has to read and compute."""
NEVER = "No kernel of this project has run on a GPU yet: every time in this section is a prediction."
MEASURED_NOTE = """Measurements stand beside the predictions: `traced` is the sum over the kernels, and `graphs` the
difference between steps that are CUDA graphs."""


def predictions(devices: Sequence[Device]) -> Iterator[Part | str]:
    """Yield what was predicted for GPUs, and what each of them needed: sentences and tables."""
    gpus = [device for device in devices if device.kind == "cuda"]
    yield f"{MEASURED_NOTE if gpus else NEVER}\n\n{PREDICTIONS_NOTE}"
    names = [str(device.info["device"]) for device in gpus]
    heads = [f"{name}, {what}" for name in names for what in ("SGD, ms", "added, traced, ms", "added, graphs, ms")]
    titles = ("model, N = 128", "what every reuse step must do", "must, ms", "added, ms", "SGD, ms", *heads)
    yield Part("Steps, as predicted", "", titles, list(_predicted_steps(gpus)))
    titles = ("kernel", "size", *(f"{gpu} at least, µs" for gpu in GPUS), *(f"{name}, µs" for name in names))
    yield Part("Kernels, as predicted", "", titles, list(_predicted_kernels(gpus)))


def _predicted_steps(gpus: Sequence[Device]) -> Lines:
    for step in STEPS:
        sgd = "–" if step.sgd is None else _range(step.sgd)
        measured = (measure(gpu, step.model) for gpu in gpus for measure in (_sgd, _traced, _graphs))
        yield step.model, step.why, f"{step.least:.3g}", _range(step.added), sgd, *measured


def _range(bounds: tuple[float, float]) -> str:
    least, most = bounds
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def _seconds(device: Device, model: str, mode: str) -> dict[str, Any] | None:
    """Return the spreads of the steps of a model at N = 128, in the precision and with the budget that are usual."""
    wanted = {"model": model, "samples": 128, "mode": mode, "max_bytes": MAX_BYTES}
    found = (case for case in device.cases("steps") if wanted.items() <= case.items() and case.get("tf32", True))
    return next((case["seconds"] for case in found), None)


def _sgd(device: Device, model: str) -> str:
    seconds = _seconds(device, model, "plain")
    return "–" if seconds is None else milliseconds(seconds["sgd"]["median"])


def _graphs(device: Device, model: str) -> str:
    seconds = _seconds(device, model, "cuda graphs")
    return "–" if seconds is None else milliseconds(seconds["reuse"]["median"] - seconds["sgd"]["median"])


def _traced(device: Device, model: str) -> str:
    steps = next((case["steps"] for case in device.cases("trace") if case["model"] == model), None)
    return "–" if steps is None else milliseconds(steps["reuse"]["seconds"] - steps["sgd"]["seconds"])


def _predicted_kernels(gpus: Sequence[Device]) -> Lines:
    measured = [{(k.name, k.size): k.seconds for k in gpu.kernels()} for gpu in gpus]
    for case in sized(SPECS, "gpu"):
        key = case.spec.name, case.size
        times = [predicted_seconds(*key, gpu) for gpu in GPUS] + [times.get(key) for times in measured]
        yield f"`{case.spec.name}`", case.size, *("–" if t is None else microseconds(t) for t in times)

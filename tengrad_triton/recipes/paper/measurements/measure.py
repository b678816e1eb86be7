"""Runs the measurements that are missing, and keeps the result of each as a JSON file."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.measuring.machine import describe
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.paper.measurements import complexity, inverses, phases
from tengrad_triton.recipes.paper.published import EXPERIMENTS
from tengrad_triton.recipes.paper.report import figures
from tengrad_triton.recipes.paper.request import INVERSES, MEASURED, Request
from tengrad_triton.recipes.paper.runs import settings_of
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.run_folder import RunFolder
from tengrad_triton.recipes.training.settings import Settings

JobOf = Callable[[Settings], Job]
EXPERIMENT = EXPERIMENTS[0]  # 3C1F on Fashion-MNIST, which all measurements are of


def measure(targets: tuple[str, ...], job_of: JobOf, request: Request, console: Console) -> None:
    """Measure the targets that have no result yet; raises `UsageError` if one has a result of another scale."""
    results = request.out / "results"
    results.mkdir(exist_ok=True)
    folder = RunFolder(results)
    missing = [name for name in targets if (name in INVERSES or name in MEASURED) and _is_missing(name, request)]
    blocks = tuple(target for target in missing if target in INVERSES)
    if blocks:
        _measure_inverses(blocks, job_of, request, folder, console)
    for target in (name for name in missing if name in MEASURED):
        console.print(f"{target}: {MEASURED[target]}", highlight=False)
        job = job_of(_settings(request, "sgd"))
        found = MEASUREMENTS[target](job_of, request, job, console)
        scale = request.scale.description()
        folder.write_json(f"{target}.json", {"machine": describe(job.device), "scale": scale, **found})


def _is_missing(target: str, request: Request) -> bool:
    file = request.out / "results" / f"{target}.json"
    if not file.exists():
        return True
    measured = RunFolder(file.parent).read_json(file.name)
    scale = measured.get("scale") if isinstance(measured, dict) else None
    if scale != request.scale.description():
        raise UsageError(f"{file}: was measured at another scale ({scale}): name another --out, or ask for the same")
    return False


def _settings(request: Request, name: OptimizerName) -> Settings:
    return settings_of(EXPERIMENT, name, 0, request, EXPERIMENT.of(name))


def _measure_inverses(
    targets: tuple[str, ...], job_of: JobOf, request: Request, folder: RunFolder, console: Console
) -> None:
    damping = EXPERIMENT.tuned["tengrad_paper"][-1]
    job = job_of(replace(_settings(request, "sgd"), epochs=1))
    console.print(f"{', '.join(targets)}: one epoch of SGD, then the blocks of the inverse", highlight=False)
    model = inverses.trained(job)
    batch = next(job.data.batches("train", job.settings.batch_size))
    for target in targets:
        layer = inverses.LAYERS[target]
        blocks = {
            name: inverses.inverse_block(make, model, layer, batch, damping) for name, make in inverses.METHODS.items()
        }
        figures.blocks(blocks, INVERSES[target], request, target)
        shape = list(model.get_parameter(f"{layer}.weight").shape)
        folder.write_json(
            f"{target}.json",
            {
                "machine": describe(job.device),
                "scale": request.scale.description(),
                "layer": INVERSES[target],
                "weight": shape,
                "shown": len(next(iter(blocks.values()))),
                "damping": damping,
                "samples": len(batch[1]),
                "distances": inverses.distances(blocks),
            },
        )


def _table1(job_of: JobOf, request: Request, job: Job, console: Console) -> dict[str, Any]:
    names = [name for name in request.optimizer if OPTIMIZERS[name]().interval]
    cases = complexity.measure_costs(
        names, complexity.VALUES, job.device, lambda line: console.print(line, highlight=False)
    )
    return {"cases": cases, "base": dict(complexity.BASE), "rounds": complexity.ROUNDS}


def _phases(job_of: JobOf, request: Request, job: Job, console: Console) -> dict[str, Any]:
    # Those with an interval that varies have both kinds of steps among the first.
    names = [name for name in request.optimizer if not OPTIMIZERS[name].interval_varies]
    by_name = {name: phases.measure_phases(job_of(_settings(request, name)), name) for name in names}
    return {"seconds": by_name, "title": job.settings.title(len(job.data.train)), "batch_size": job.settings.batch_size}


def _memory(job_of: JobOf, request: Request, job: Job, console: Console) -> dict[str, Any]:
    settings = job.settings
    common = {
        "device": job.device.type,
        "model": settings.model,
        "width": settings.channels,
        "batch_size": settings.batch_size,
        "shape": list(job.data.train.images.shape[1:]),
        "classes": job.data.classes,
    }
    peaks = {name: _peak({**common, "optimizer": name}) for name in request.optimizer}
    parameters = sum(p.numel() for p in job.model().parameters())
    return {"bytes": peaks, "parameters": parameters, **{key: common[key] for key in ("model", "width", "batch_size")}}


def _peak(case: Mapping[str, Any]) -> int:
    """Return the peak memory of an optimizer's steps in bytes, measured in a new process."""
    command = [sys.executable, "-m", "tengrad_triton.recipes.training.peak_memory"]
    done = subprocess.run(command, input=json.dumps(case), check=True, stdout=subprocess.PIPE, text=True)
    peak: int = json.loads(done.stdout)["bytes"]
    return peak


MEASUREMENTS: Mapping[str, Callable[[JobOf, Request, Job, Console], dict[str, Any]]] = {
    "table1": _table1,
    "phases": _phases,
    "memory": _memory,
}

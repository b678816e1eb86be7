"""The measurements beside the runs: figures 6 to 8, table 1, phases and memory, each kept as a JSON file."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.measuring.machine import describe
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.paper.measurements import complexity, inverses, phases
from tengrad_triton.recipes.paper.published import ROWS
from tengrad_triton.recipes.paper.report import figures as drawings
from tengrad_triton.recipes.paper.request import INVERSES, MEASURED, Asked
from tengrad_triton.recipes.paper.runs import settings_of
from tengrad_triton.recipes.training.loop import Job
from tengrad_triton.recipes.training.run_folder import RunFolder
from tengrad_triton.recipes.training.settings import Settings

JobOf = Callable[[Settings], Job]


def measure(targets: tuple[str, ...], job_of: JobOf, asked: Asked, console: Console) -> None:
    """Measure what is asked for and not there yet."""
    results = asked.out / "results"
    results.mkdir(exist_ok=True)
    folder = RunFolder(results)
    missing = [name for name in targets if (name in INVERSES or name in MEASURED) and _is_missing(name, asked)]
    blocks = tuple(target for target in missing if target in INVERSES)
    if blocks:
        _measure_inverses(blocks, job_of, asked, folder, console)
    for target in (name for name in missing if name in MEASURED):
        console.print(f"{target}: {MEASURED[target]}", highlight=False)
        job = job_of(_small(asked, "sgd"))
        found = WAYS[target](job_of, asked, job, console)
        folder.write_json(f"{target}.json", {"machine": describe(job.device), "scale": asked.scale.said(), **found})


def _is_missing(target: str, asked: Asked) -> bool:
    """Tell whether a target has to be measured; raises `UsageError` if it was, at another scale."""
    file = asked.out / "results" / f"{target}.json"
    if not file.exists():
        return True
    scale = RunFolder(file.parent).read_json(file.name)["scale"]
    if scale != asked.scale.said():
        raise UsageError(f"{file}: was measured at another scale ({scale}): name another --out, or ask for the same")
    return False


def _small(asked: Asked, name: OptimizerName) -> Settings:
    """Return the settings of an optimizer on the paper's 3C1F at the scale asked for."""
    row = ROWS[0]
    return settings_of(row, name, 0, asked, row.of(name))


def _measure_inverses(
    targets: tuple[str, ...], job_of: JobOf, asked: Asked, folder: RunFolder, console: Console
) -> None:
    row = ROWS[0]
    damping = row.tuned["tengrad"][-1]
    job = job_of(replace(_small(asked, "sgd"), epochs=1))
    console.print(f"{', '.join(targets)}: one epoch of SGD, then the blocks of the inverse", highlight=False)
    model = inverses.trained(job)
    batch = next(job.data.batches("train", job.settings.batch_size))
    for target in targets:
        layer = inverses.LAYERS[target]
        blocks = {
            name: inverses.inverse_block(make, model, layer, batch, damping) for name, make in inverses.METHODS.items()
        }
        drawings.blocks(blocks, INVERSES[target], asked, target)
        shape = list(model.get_parameter(f"{layer}.weight").shape)
        folder.write_json(
            f"{target}.json",
            {
                "machine": describe(job.device),
                "scale": asked.scale.said(),
                "layer": INVERSES[target],
                "weight": shape,
                "shown": len(next(iter(blocks.values()))),
                "damping": damping,
                "samples": len(batch[1]),
                "distances": inverses.distances(blocks),
            },
        )


def _table1(job_of: JobOf, asked: Asked, job: Job, console: Console) -> dict[str, Any]:
    names = [name for name in asked.optimizer if hasattr(Settings().of(name), "refresh_every")]
    cases = complexity.measured(names, complexity.VALUES, job.device, lambda line: console.print(line, highlight=False))
    return {"cases": cases, "base": dict(complexity.BASE), "rounds": complexity.ROUNDS}


def _phases(job_of: JobOf, asked: Asked, job: Job, console: Console) -> dict[str, Any]:
    names = [name for name in asked.optimizer if name != "tengrad_defaults"]  # whose steps are tengrad's two kinds
    by_name = {name: phases.measured(job_of(_small(asked, name)), name) for name in names}
    return {"seconds": by_name, "title": job.settings.title(len(job.data.train)), "batch_size": job.settings.batch_size}


def _memory(job_of: JobOf, asked: Asked, job: Job, console: Console) -> dict[str, Any]:
    settings = job.settings
    common = {
        "device": job.device.type,
        "model": settings.model,
        "width": settings.channels,
        "batch_size": settings.batch_size,
        "shape": list(job.data.train.images.shape[1:]),
        "classes": job.data.classes,
    }
    peaks = {name: _peak({**common, "optimizer": name}) for name in asked.optimizer}
    parameters = sum(p.numel() for p in job.model().parameters())
    return {"bytes": peaks, "parameters": parameters, **{key: common[key] for key in ("model", "width", "batch_size")}}


def _peak(what: Mapping[str, Any]) -> int:
    command = [sys.executable, "-m", "tengrad_triton.recipes.training.peak_memory"]
    done = subprocess.run(command, input=json.dumps(what), check=True, stdout=subprocess.PIPE, text=True)
    peak: int = json.loads(done.stdout)["bytes"]
    return peak


WAYS: Mapping[str, Callable[[JobOf, Asked, Job, Console], dict[str, Any]]] = {
    "table1": _table1,
    "phases": _phases,
    "memory": _memory,
}

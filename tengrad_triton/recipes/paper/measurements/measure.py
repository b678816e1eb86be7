"""Runs the measurements that are missing, and keeps the result of each as a JSON file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.measuring.machine import describe
from tengrad_triton.recipes.paper.measurements import complexity, inverses, phases
from tengrad_triton.recipes.paper.measurements.peaks import peak
from tengrad_triton.recipes.paper.measurements.subject import DAMPING, job_for, names_of
from tengrad_triton.recipes.paper.report import figures
from tengrad_triton.recipes.paper.request import INVERSES, MEASURED, Request
from tengrad_triton.recipes.paper.shared import Shared
from tengrad_triton.recipes.training.run_folder import RunFolder


def unmeasured(targets: tuple[str, ...], request: Request) -> tuple[str, ...]:
    """Return the targets that are to be measured and have no result yet.

    Raises `UsageError` if one has a result of another scale.
    """
    return tuple(name for name in targets if (name in INVERSES or name in MEASURED) and _is_missing(name, request))


def _is_missing(target: str, request: Request) -> bool:
    file = request.out / "results" / f"{target}.json"
    if not file.exists():
        return True
    measured = RunFolder(file.parent).read_json(file.name)
    scale = measured.get("scale") if isinstance(measured, dict) else None
    if scale != request.scale.description():
        raise UsageError(f"{file}: was measured at another scale ({scale}): name another --out, or ask for the same")
    return False


def measure(targets: Sequence[str], shared: Shared) -> None:
    """Measure the targets, and keep the results."""
    results = shared.request.out / "results"
    results.mkdir(exist_ok=True)
    folder = RunFolder(results)
    if blocks := [target for target in targets if target in INVERSES]:
        _measure_inverses(blocks, shared, folder)
    for target in (name for name in targets if name in MEASURED):
        shared.say(f"{target}: {MEASURED[target]}")
        _keep(folder, target, shared, MEASUREMENTS[target](shared))


def _keep(folder: RunFolder, target: str, shared: Shared, found: Mapping[str, Any]) -> None:
    head = {"machine": describe(shared.device), "scale": shared.request.scale.description()}
    folder.write_json(f"{target}.json", {**head, **found})


def _measure_inverses(targets: Sequence[str], shared: Shared, folder: RunFolder) -> None:
    job = job_for(shared, "sgd", epochs=1)
    shared.say(f"{', '.join(targets)}: one epoch of SGD, then the blocks of the inverse")
    with shared.telling("measuring", 1 + len(targets) * len(inverses.METHODS)) as tell:
        tell("one epoch of SGD")
        model = inverses.trained(job)
        batch = next(job.data.batches("train", job.settings.batch_size))
        for target in targets:
            layer, blocks = inverses.LAYERS[target], {}
            for name, make in inverses.METHODS.items():
                tell(f"{target}, {name}")
                blocks[name] = inverses.inverse_block(make, model, layer, batch, DAMPING)
            figures.blocks(blocks, INVERSES[target], shared.request, target)
            found = {
                "layer": INVERSES[target],
                "weight": list(model.get_parameter(f"{layer}.weight").shape),
                "shown": len(next(iter(blocks.values()))),
                "damping": DAMPING,
                "samples": len(batch[1]),
                "distances": inverses.distances(blocks),
            }
            _keep(folder, target, shared, found)


def _table1(shared: Shared) -> dict[str, Any]:
    names = names_of("table1", shared.request)
    with shared.telling("measuring", len(complexity.cells())) as tell:
        cases = complexity.measure_costs(names, complexity.VALUES, shared.device, tell)
    return {"cases": cases, "base": dict(complexity.BASE), "rounds": complexity.ROUNDS}


def _phases(shared: Shared) -> dict[str, Any]:
    names, by_name = names_of("phases", shared.request), {}
    with shared.telling("measuring", len(names)) as tell:
        for name in names:
            tell(f"phases of {name}")
            by_name[name] = phases.measure_phases(job_for(shared, name), name)
    job = job_for(shared, "sgd")
    return {"seconds": by_name, "title": job.settings.title(len(job.data.train)), "batch_size": job.settings.batch_size}


def _memory(shared: Shared) -> dict[str, Any]:
    job = job_for(shared, "sgd")
    settings = job.settings
    common = {
        "device": job.device.type,
        "model": settings.model,
        "width": settings.channels,
        "batch_size": settings.batch_size,
        "shape": list(job.data.train.images.shape[1:]),
        "classes": job.data.classes,
    }
    peaks = {}
    with shared.telling("measuring", len(shared.request.optimizer)) as tell:
        for name in names_of("memory", shared.request):
            tell(f"memory of {name}")
            peaks[name] = peak({**common, "optimizer": name})
    parameters = sum(p.numel() for p in job.model().parameters())
    return {"bytes": peaks, "parameters": parameters, **{key: common[key] for key in ("model", "width", "batch_size")}}


MEASUREMENTS: Mapping[str, Callable[[Shared], dict[str, Any]]] = {
    "table1": _table1,
    "phases": _phases,
    "memory": _memory,
}

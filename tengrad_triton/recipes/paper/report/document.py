"""The document of the report, paper.json: every finished run and every measurement in the output folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tengrad_triton import files
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.registry import place
from tengrad_triton.recipes.paper.published import EXPERIMENTS, TUNED, Experiment
from tengrad_triton.recipes.paper.report.seeds import Finished
from tengrad_triton.recipes.paper.request import INVERSES, MEASURED, Request
from tengrad_triton.recipes.paper.runs import read_json, read_outcome
from tengrad_triton.recipes.training.run_folder import RunFolder

Document = Mapping[str, Any]


ASKED = "asked.json"


def check_folder(out: Path) -> None:
    """Raise `UsageError` if a report cannot be written into a folder: it is new, empty, or has another report's files.

    asked.json tells a report's folder from others.
    """
    try:
        files.check_writable(out / ASKED)
        has_others = out.is_dir() and not all(files.is_own(entry.name) for entry in out.iterdir())
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({files.reason(error)}): name another folder") from error
    if has_others:
        _asked(out)


def note_command(request: Request, targets: tuple[str, ...], command: Sequence[str]) -> None:
    """Append the command to asked.json unless it is there, so that the report can say how to repeat the runs."""
    before = _asked(request.out) if (request.out / ASKED).exists() else []
    entry = {"command": _portable(command), "scale": request.scale.description(), "targets": list(targets)}
    if entry not in before:
        RunFolder(request.out).write_json(ASKED, [*before, entry])


def _asked(out: Path) -> list[dict[str, Any]]:
    """Return the commands of a report's folder; raises `UsageError` if it is the folder of something else."""
    file = out / ASKED
    asked = read_json(file) if file.exists() else None
    if not isinstance(asked, list) or not all(map(_is_command, asked)):
        raise UsageError(f"--out {out}: has files, but no {ASKED} with the commands of a report: name another folder")
    return asked


def _is_command(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() >= {"command", "scale", "targets"}


def _portable(command: Sequence[str]) -> list[str]:
    """Return a command line without the folders of this machine."""
    placeholders = {"--data": "DIR", "--out": "OUT"}
    return [placeholders.get(before, word) for before, word in zip(["", *command], command, strict=False)]


def read_document(out: Path) -> dict[str, Any]:
    """Return the document; raises `UsageError` if a file of the folder is damaged."""
    measured = {
        name: read_json(out / "results" / f"{name}.json")
        for name in (*INVERSES, *MEASURED)
        if (out / "results" / f"{name}.json").exists()
    }
    runs = [_run(file.parent, kind) for kind in ("runs", "grid") for file in sorted((out / kind).rglob("outcome.json"))]
    return {"asked": _asked(out), "runs": runs, "measured": measured}


def _run(folder: Path, kind: str) -> dict[str, Any]:
    """Return a finished run: its settings without those of the other optimizers, its machine and its outcome."""
    settings = RunFolder(folder).settings()
    shared = {key: value for key, value in settings.items() if not isinstance(value, dict) and key != "data"}
    try:
        (name,) = settings["optimizer"]
        return {
            "row": next(experiment.title for experiment in EXPERIMENTS if experiment.key == folder.parent.name),
            "optimizer": name,
            "kind": kind,
            "settings": {**shared, "optimizer": name},
            "own": settings[name],
            "machine": read_json(folder / "machine.json")[-1],
            **read_outcome(folder),
        }
    except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        raise UsageError(f"{folder}: holds no finished run ({error}): delete it, or move it elsewhere") from error


def finished(document: Document, kind: str) -> dict[str, list[Finished]]:
    """Return the runs of each experiment, by its title; ``kind`` is "runs" for table 2 or "grid" for searches."""
    by_title: dict[str, list[Finished]] = {}
    clock = clock_of(document)
    for run in document["runs"]:
        if run["kind"] == kind:
            tuned = {key: run["own"][key] for key in TUNED if key in run["own"]}
            entry = Finished(run["optimizer"], run["settings"]["seed"], run["rows"], run["diverged"], tuned, clock)
            by_title.setdefault(run["row"], []).append(entry)
    return {title: sorted(runs, key=lambda run: (place(run.optimizer), run.seed)) for title, runs in by_title.items()}


def clock_of(document: Document) -> str:
    """Return the column of the metrics that measures time: CPU seconds if all runs had one thread of a CPU."""
    machines = [run["machine"] for run in document["runs"]]
    alone = all(machine["device_type"] == "cpu" and machine["threads"] == 1 for machine in machines)
    return "cpu_seconds" if alone else "train_seconds"


def experiment_of(title: str) -> Experiment:
    """Return the experiment with a title."""
    return next(experiment for experiment in EXPERIMENTS if experiment.title == title)


def scale_of(document: Document, title: str, kind: str = "runs") -> str:
    """Return how the scale of an experiment's runs differs from the paper's, as a phrase."""
    scale = experiment_of(title).scale_of
    scales = (scale(run["settings"]) for run in document["runs"] if (run["row"], run["kind"]) == (title, kind))
    return "; ".join(dict.fromkeys(scales))

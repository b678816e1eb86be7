"""`tengrad-triton autotune` and `plan show`: measure the plan of a model, and show a plan file."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import Progress

from tengrad_triton.curvature.choices import Representation, implementation_names
from tengrad_triton.files import reason
from tengrad_triton.recipes.data.registry import DATASETS, DatasetName
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.measuring import machine
from tengrad_triton.recipes.models import image_model
from tengrad_triton.recipes.terminal import FittedTable
from tengrad_triton.recipes.training.settings import ModelName
from tengrad_triton.tables import Column
from tengrad_triton.tuning import plan_file
from tengrad_triton.tuning.autotune import DAMPING, EXACT, TOL, measured_plan
from tengrad_triton.tuning.plan import Measured, Plan

COLUMNS = (
    Column("weight", wraps=True),
    Column("choice"),
    Column("kernels"),
    Column("µs", right=True),
    Column("MiB", right=True),
    Column("runner-up"),
    Column("its µs", right=True),
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AutotuneSettings:
    """What `tengrad-triton autotune` measures, and the file that keeps the plan."""

    model: ModelName = "3c1f"
    "The model, as in tengrad-triton train."
    width: PositiveInt | None = None
    "Width of the model, as in tengrad-triton train."
    dataset: DatasetName = "digits"
    "The data set that gives the image size and the number of classes; no data is read."
    batch_size: PositiveInt = 128
    "Images per step."
    bf16: Annotated[bool, Parameter(negative=())] = False
    "Also try per-sample gradients rounded to bfloat16."
    tol: Annotated[float, Parameter(validator=Number(gt=0, lt=1))] | None = None
    "Also try J compressed to this tolerance, which is that of TENGraD(tol=...)."
    damping: PositiveFloat = DAMPING
    "The damping of the training; a compressed J depends on it."
    seconds: PositiveFloat = 0.2
    "Seconds to measure each kernel of each candidate."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Device to measure on; auto takes the GPU if there is one."
    refresh_every: PositiveInt = 100
    "Steps between two refreshes, for the times and choices in the table."
    plan: Path | None = None
    "The plan file; that of the device in the user's cache folder if not given."


def tune(settings: AutotuneSettings, console: Console) -> None:
    """Measure a plan, write its file and show it.

    Raises `UsageError` if there is no place for the file, before anything is measured, or if it cannot be written.
    """
    device = machine.chosen_device(settings.device)
    with _usage_errors("--plan "):
        path = settings.plan or plan_file.default_path(device)
        plan_file.check_target(path, device)
    dataset = DATASETS[settings.dataset]
    torch.manual_seed(0)
    model = image_model(settings.model).build(dataset.shape, dataset.classes, settings.width).to(device)
    rounded: tuple[Representation, ...] = ("per_sample_bf16",) if settings.bf16 else ()
    fewer: tuple[Representation, ...] = () if settings.tol is None else ("compressed",)
    with _warnings_as_lines(console), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=None)
        measured = measured_plan(
            model,
            torch.randn(settings.batch_size, *dataset.shape, device=device),
            None,
            (*EXACT, *rounded, *fewer),
            (settings.tol or TOL, settings.damping),
            settings.seconds,
            lambda done, total, name: progress.update(task, completed=done, total=total, description=name),
        )
    try:
        with _warnings_as_lines(console):
            measured = plan_file.save(measured, path, device)
    except (OSError, ValueError) as error:
        console.print(table_of(measured, settings.refresh_every))
        raise UsageError(f"--plan {path}: measured, but not kept ({reason(error)}): name another file") from error
    console.print(table_of(measured, settings.refresh_every))
    console.print(f"kept in {path}", soft_wrap=True, highlight=False)


def show(path: Path | None, refresh_every: int, console: Console) -> None:
    """Show a plan file, and leave it as it is; raises `UsageError` if it is not a plan that is valid on this device."""
    device = machine.chosen_device("auto")
    with warnings.catch_warnings(record=True) as caught, _usage_errors(""):
        warnings.simplefilter("always")
        file = path or plan_file.default_path(device)
        plan = plan_file.load(file, device)
    if caught:
        raise UsageError(str(caught[0].message))
    console.print(table_of(plan, refresh_every))
    console.print(f"from {file}", soft_wrap=True, highlight=False)


@contextmanager
def _usage_errors(flag: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{flag}{error}") from error


def table_of(plan: Plan, refresh_every: int) -> FittedTable:
    """Return a line for each geometry: the choice, its kernels other than Triton's defaults, and the second best."""
    rows = []
    for key, entry in plan.entries.items():
        ranked = sorted(entry, key=lambda name, entry=entry: entry[name].per_step(refresh_every))  # type: ignore[misc]
        first, second = entry[ranked[0]], entry[ranked[1]] if len(ranked) > 1 else None
        rows.append(
            (
                key,
                ranked[0],
                "\n".join(implementation_names(first.kernel_overrides).values())
                or ("torch" if _only_torch(first) else "triton"),
                f"{first.per_step(refresh_every) * 1e6:.0f}",
                f"{first.bytes / 2**20:.1f}",
                ranked[1] if second else "-",
                f"{second.per_step(refresh_every) * 1e6:.0f}" if second else "-",
            )
        )
    return FittedTable(COLUMNS, rows, f"µs a step, a refresh shared by {refresh_every} steps")


def _only_torch(measured: Measured) -> bool:
    return all(set(times) == {"torch"} for times in measured.seconds.values())


@contextmanager
def _warnings_as_lines(console: Console) -> Iterator[None]:
    """Print the tuner's warnings as lines, each once: a configuration may fail for many weights."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        console.print(message, style="yellow", soft_wrap=True, highlight=False)

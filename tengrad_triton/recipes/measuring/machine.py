"""The machine of a run: device, clocks, versions, and the commit if the package runs from a git checkout."""

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tengrad_triton import __version__
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.tuning.plan_file import processor_name


def chosen_device(name: str) -> torch.device:
    """Return the device that --device names; raises `UsageError` if it is a GPU and torch finds none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here: use --device cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, str | int | None]:
    """Return the device, the versions and the commit, as JSON values; None for what is not known."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "device_type": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "tengrad-triton": __version__,
        "commit": _commit(),
    }


def now(device: torch.device) -> float:
    """Return the host's wall-clock time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def clock(device: torch.device) -> float:
    """Return the process's CPU time in seconds on one CPU thread, which other programs do not disturb; else `now`."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else now(device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit, with -dirty if files differ from it; None if git does not track this file."""
    here = Path(__file__).resolve()
    try:
        for command in (
            ["ls-files", "--error-unmatch", here.name],
            ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

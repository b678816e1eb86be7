"""The plan file of a device: written atomically, merged under a lock, and used only on the same kind of device."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import warnings
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tengrad_triton import kernels
from tengrad_triton.tuning.plan import Measured, Plan

logger = logging.getLogger(__name__)
SCHEMA = 3


def header_of(device: torch.device) -> dict[str, Any]:
    """Return what must be equal when a plan is measured and when it is used: schema, kernels, versions and device."""
    sources = sorted(Path(kernels.__file__).parent.glob("*.py"))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "kernels": code,
        "torch": torch.__version__,
        "triton": _triton_version(),
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        arch = f"{about.major}.{about.minor}"
        return header | {"device": about.name, "processors": about.multi_processor_count, "arch": arch}
    threads = torch.get_num_threads()
    return header | {"device": processor_name(), "processors": threads, "arch": torch.backends.cpu.get_cpu_capability()}


def processor_name() -> str:
    """Return the CPU's model. On Linux it comes from /proc/cpuinfo, because `platform` does not report it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def default_path(device: torch.device) -> Path:
    """Return the path of this device's plan, in ``~/.cache/tengrad-triton``."""
    header = header_of(device)
    name = "-".join(str(header[part]) for part in ("device", "processors", "arch"))
    safe = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
    return Path.home() / ".cache" / "tengrad-triton" / f"{safe}.json"


def load(path: Path, device: torch.device) -> Plan:
    """Return the plan in a file. If it cannot be used here, return an empty plan, with one warning that says why.

    A damaged file is renamed to ``*.damaged``; a file for another device, version or kernels stays as it is.
    """
    if not path.exists():
        return Plan({})
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, expected = content["header"], header_of(device)
        entries = {
            key: {name: Measured(**measured) for name, measured in candidates.items()}
            for key, candidates in content["entries"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _set_aside(path, error)
        return Plan({})
    differing = [
        f"{name} {found.get(name)!r}, here {value!r}" for name, value in expected.items() if found.get(name) != value
    ]
    if differing:
        warnings.warn(f"{path} is not used: it was measured with {'; '.join(differing)}", stacklevel=2)
        return Plan({})
    return Plan(entries)


def save(plan: Plan, path: Path, device: torch.device) -> Plan:
    """Merge a plan into a file, in which its measurements replace older ones; return the merged plan.

    If the file cannot be written, return the plan itself, with one warning.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            merged = Plan({**load(path, device).entries, **plan.entries})
            entries = {
                key: {name: asdict(m) for name, m in measured.items()} for key, measured in merged.entries.items()
            }
            content = {"header": header_of(device), "driver": _driver(device), "entries": entries}
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
            logger.info("saved %d geometries in %s", len(entries), path)
    except OSError as error:
        warnings.warn(f"the plan is not saved in {path}: {error}", stacklevel=2)
        return plan
    return merged


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_suffix(".damaged")
    try:
        os.replace(path, aside)
        renamed = f"renamed to {aside.name}"
    except OSError:
        renamed = "could not be renamed"
    warnings.warn(f"{path} is ignored, because it is damaged ({error}); {renamed}", stacklevel=3)


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _driver(device: torch.device) -> str | None:
    return torch.version.cuda if device.type == "cuda" else None

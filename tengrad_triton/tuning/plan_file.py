"""The plan file of a device: known by a mark, written whole under a lock, and used on the same kind of device only.

Only a file with the mark is ever replaced. Nothing but `save` changes a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import platform
import warnings
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from tengrad_triton import files, kernels
from tengrad_triton.curvature.choices import REPRESENTATIONS, Representation
from tengrad_triton.misspellings import did_you_mean
from tengrad_triton.tuning.plan import Measured, Plan

logger = logging.getLogger(__name__)
SCHEMA = 4
MARK = "tengrad-triton plan"
HEAD = f'{{\n "file": "{MARK}",'  # how the file begins: the mark is found in a file that is cut off, too
LIMIT = 1 << 26  # bytes; a plan of a thousand weights has less than one million
LOCK_SECONDS = 30.0  # a plan is written in milliseconds
OF_DEVICE = ("device", "processors", "arch")


class DamagedError(ValueError):
    """A file with the mark of a plan, whose entries cannot be read."""


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
    """Return the path of this device's plan, in ``~/.cache/tengrad-triton``; `ValueError` if the user has no home."""
    header = header_of(device)
    name = "-".join(str(header[part]) for part in OF_DEVICE)
    safe = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
    try:
        home = Path.home()
    except RuntimeError as error:
        raise ValueError(f"the plan has no default place ({error}): name a file for it") from error
    return home / ".cache" / "tengrad-triton" / f"{safe}.json"


def load(path: Path, device: torch.device) -> Plan:
    """Return the plan in a file, which stays as it is.

    A plan that was measured on another kind of device, with other versions or other kernels is not used: the result is
    an empty plan, with one warning that says what differs.

    Raises:
        ValueError: the file is missing, cannot be read, is damaged, or was not written by `save`.
    """
    try:
        header, plan = _read(path)
    except FileNotFoundError as error:
        there = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(
            f"{path}: no such plan{did_you_mean(path.name, there)}: make one with tengrad-triton autotune or autotune()"
        ) from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({files.reason(error)}): expected the file of a plan") from error
    except DamagedError as error:
        raise ValueError(f"{path}: {error}: measure again into this file, or delete it") from error
    differing = _differing(header, header_of(device))
    if differing:
        warnings.warn(f"{path} is not used: it was measured with {differing}", stacklevel=2)
        return Plan({})
    return plan


def check_target(path: Path, device: torch.device) -> None:
    """Raise `ValueError` if `save` may not write to a path, or cannot: before anything is measured.

    It may replace a plan of the same kind of device, also a damaged one, and nothing else.
    """
    advice = "name another file for the plan"
    try:
        target = _target(path)
        files.check_writable(target)
        files.check_lock(target.parent, "plan")
        header = _read(path)[0] if path.exists() else {}
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({files.reason(error)}): {advice}") from error
    except DamagedError:  # `save` copies it
        return
    differing = _differing(header, {name: value for name, value in header_of(device).items() if name in OF_DEVICE})
    if header and differing:
        raise ValueError(f"{path}: holds the plan of another device ({differing}): {advice}")


def save(plan: Plan, path: Path, device: torch.device) -> Plan:
    """Merge a plan into a file, in which its measurements replace older ones; return what the file then holds.

    A plan of other versions or kernels is replaced as a whole. A damaged plan is first copied to NAME.damaged, or to
    NAME.damaged-1 and so on, which never replaces a file.

    Raises:
        ValueError: `check_target` refuses the path.
        OSError: the file cannot be written, or does not hold what was written.
    """
    target = _target(path)
    check_target(path, device)
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(target.parent, "plan", LOCK_SECONDS):
        check_target(path, device)  # another process may have written the file meanwhile
        merged = Plan({**_before(target, device).entries, **plan.entries})
        entries = {key: {name: asdict(m) for name, m in measured.items()} for key, measured in merged.entries.items()}
        content = {"file": MARK, "header": header_of(device), "driver": _driver(device), "entries": entries}
        with files.replacing(target) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if _read(target)[1] != merged:
            raise OSError(errno.EIO, "it holds something else than what was written", str(path))
    logger.info("saved %d geometries in %s", len(entries), path)
    return merged


def _target(path: Path) -> Path:
    """Return the file that is replaced: a link stays, and so does one that leads nowhere, because it is refused."""
    return path.resolve() if path.is_symlink() and path.exists() else path


def _before(path: Path, device: torch.device) -> Plan:
    """Return the entries that a file keeps, and copy the file if it is damaged."""
    if not path.exists():
        return Plan({})
    try:
        header, plan = _read(path)
    except DamagedError as error:
        aside = _copied_aside(path)
        warnings.warn(f"{path}: {error}; its content is now in {aside.name}", stacklevel=3)
        return Plan({})
    differing = _differing(header, header_of(device))
    if differing:
        warnings.warn(f"{path} is replaced: it was measured with {differing}", stacklevel=3)
    return Plan({}) if differing else plan


def _copied_aside(path: Path) -> Path:
    content = files.read_bytes(path, LIMIT)
    for number in count():
        aside = path.with_name(f"{path.name}.damaged{f'-{number}' if number else ''}")
        try:
            with aside.open("xb") as file:
                file.write(content)
        except FileExistsError:
            continue
        return aside
    raise AssertionError  # count() has no end


def _read(path: Path) -> tuple[dict[str, Any], Plan]:
    """Return the header and the plan of a file.

    Raises `OSError` if it cannot be read, `DamagedError` if it has the mark and is damaged, and `ValueError` otherwise.
    """
    raw = files.read_bytes(path, LIMIT)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        if raw.startswith(HEAD.encode()):
            raise DamagedError(f"a damaged plan ({error})") from error
        content = None
    if not isinstance(content, dict) or content.get("file") != MARK:
        raise ValueError(f'{path}: no plan (it has no "file": "{MARK}"): name another file')
    try:
        header = dict(content["header"])
        entries = _entries(content["entries"]) if header["schema"] == SCHEMA else {}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DamagedError(f"a damaged plan ({type(error).__name__}: {error})") from error
    return header, Plan(entries)


def _entries(stored: Any) -> dict[str, dict[Representation, Measured]]:
    """Return the entries of a plan from their JSON values; raises `ValueError` and others if they are anything else."""
    entries = {key: {name: _measured(m) for name, m in candidates.items()} for key, candidates in stored.items()}
    for key, candidates in entries.items():
        if not candidates or not candidates.keys() <= set(REPRESENTATIONS):
            raise ValueError(f"{key} has {', '.join(candidates) or 'nothing'}: expected {', '.join(REPRESENTATIONS)}")
    return entries


def _measured(stored: dict[str, Any]) -> Measured:
    measured = Measured(**stored)
    times = [time for by_name in measured.seconds.values() for time in by_name.values() or (None,)]
    if not times or not all(
        isinstance(number, int | float) and float(number) >= 0 for number in (*times, measured.bytes)
    ):
        raise ValueError(f"got {stored}, expected bytes, and the seconds of every kernel")
    return measured


def _differing(found: dict[str, Any], here: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} {found.get(name)!r}, here {value!r}" for name, value in here.items() if found.get(name) != value
    )


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _driver(device: torch.device) -> str | None:
    return torch.version.cuda if device.type == "cuda" else None

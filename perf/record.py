"""Results as JSON: what was measured, and where. Everything that is written goes through `described` and `write`."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tengrad_triton.recipes.measuring.machine import describe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf" / "results"
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(10**11), "MALLOC_TRIM_THRESHOLD_": str(10**11)}
"""Settings with which glibc keeps the memory of freed tensors, as a GPU's allocator does."""


def described(device: torch.device) -> dict[str, Any]:
    """Return device, versions, commit and time, as every result file has them."""
    kept = {name: value for name, value in describe(device).items() if name != "platform"}
    pages = KEEP_PAGES.keys() <= os.environ.keys()
    return kept | {"system": platform.system(), "commit": _commit(), "keeps_pages": pages}


def keep_pages() -> None:
    """Begin this process again with `KEEP_PAGES`, unless it has that.

    Otherwise every step of either optimizer faults in anew what the step before has freed, as luck will have it: a
    refresh of WRN-28-4 took 8 s with it, and 13 to 15 s without.
    """
    if not KEEP_PAGES.keys() <= os.environ.keys():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP_PAGES})


def _commit() -> str | None:
    """Return the commit of this very tree, from which the package may be a copy; -dirty where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def slug(meta: Mapping[str, Any]) -> str:
    """Return the name of the folder that holds a device's results."""
    return re.sub(r"[^a-z0-9]+", "-", str(meta["device"]).lower()).strip("-")


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file in one piece: who reads it, and whoever interrupts, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class Suite:
    """The result file of one suite, written anew after every case: an interrupted run keeps what it has."""

    def __init__(self, name: str, device: torch.device, folder: Path) -> None:
        self._path = folder / f"{name}.json"
        self._document = {"suite": name, "machine_info": described(device), "cases": [], "skipped": []}

    def add(self, case: Mapping[str, Any]) -> None:
        """Append what was measured."""
        self._document["cases"].append(case)
        write(self._path, self._document)

    def skip(self, case: str, why: str) -> None:
        """Note what was not measured."""
        self._document["skipped"].append({"case": case, "why": why})
        write(self._path, self._document)

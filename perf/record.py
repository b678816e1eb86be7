"""Result files: JSON with what was measured, and on which machine."""

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

from tengrad_triton.files import replacing
from tengrad_triton.recipes.measuring.machine import describe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf" / "results"
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(10**11), "MALLOC_TRIM_THRESHOLD_": str(10**11)}
"""Environment variables with which glibc keeps the memory of freed tensors, as the allocator of a GPU does."""


def described(device: torch.device) -> dict[str, Any]:
    """Return the device, versions, commit and time: the head of every result file."""
    kept = {name: value for name, value in describe(device).items() if name != "platform"}
    pages = KEEP_PAGES.keys() <= os.environ.keys()
    return kept | {"system": platform.system(), "commit": _commit(), "keeps_pages": pages}


def keep_pages() -> None:
    """Restart this process with `KEEP_PAGES`, unless it has them.

    Otherwise glibc returns freed memory to the system now and then, and the next step has to map it again: a refresh of
    WRN-28-4 took 8 s with `KEEP_PAGES`, and 13 to 15 s without.
    """
    if not KEEP_PAGES.keys() <= os.environ.keys():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP_PAGES})


def _commit() -> str | None:
    """Return the commit of the tree that holds this file, with -dirty if files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def slug(meta: Mapping[str, Any]) -> str:
    """Return the name of the folder with the results of a device."""
    return re.sub(r"[^a-z0-9]+", "-", str(meta["device"]).lower()).strip("-")


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file whole, so that an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def without_places(text: str) -> str:
    """Return a text with ``.`` for this repository's folder and ``~`` for the user's home: results are published."""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")


class Suite:
    """The result file of one suite. It is written after every case, so that an interrupted run keeps its results.

    With ``resume`` it continues the file that is there: `done` has the names of the cases that it holds.
    """

    def __init__(self, name: str, device: torch.device, folder: Path, resume: bool = False) -> None:
        self._path = folder / f"{name}.json"
        self._document: dict[str, Any] = {
            "suite": name, "machine_info": described(device), "cases": [], "skipped": []
        }  # fmt: skip
        if resume and self._path.exists():
            self._document |= {key: read(self._path)[key] for key in ("cases", "skipped")}

    @property
    def done(self) -> set[str]:
        """The names of the cases that were measured or skipped."""
        return {entry["case"] for key in ("cases", "skipped") for entry in self._document[key]}

    def add(self, case: str, result: Mapping[str, Any]) -> None:
        """Append the result of a case."""
        self._document["cases"].append({"case": case, **result})
        write(self._path, self._document)

    def skip(self, case: str, why: str) -> None:
        """Note a case that was not measured, and the reason."""
        self._document["skipped"].append({"case": case, "why": why})
        write(self._path, self._document)

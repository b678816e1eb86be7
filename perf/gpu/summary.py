"""The summary of a call: the machine, and how every task of every box ended. It is written after each box."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from perf import record
from perf.gpu import digest
from perf.gpu.boxes import Box

MOST = 2200  # characters that a box prints: whoever reads only the end of the output sees all boxes


class Summary:
    """summary-CALL.json in the folder of the results."""

    def __init__(self, call: str, device: torch.device, out: Path, commit: str | None, boxes: Sequence[Box]) -> None:
        machine = record.described(device) | driver(device)
        machine["commit"] = commit or machine["commit"]
        self._out, self._commit = out, machine["commit"]
        self._start, self._began = time.monotonic(), time.time()
        self._path = out / f"summary-{call}.json"
        self._document: dict[str, Any] = {"suite": f"{call} call", "machine_info": machine, "boxes": []}
        self._document["planned"] = [box.name for box in boxes]
        record.write(self._path, self._document)

    def head(self) -> str:
        """Return the machine in one line."""
        names = ("device", "driver", "cores", "python", "torch", "triton", "commit")
        return ", ".join(f"{name} {self._document['machine_info'][name]}" for name in names)

    def add(self, box: Box, limit: float, seconds: float, tasks: Sequence[dict[str, Any]]) -> None:
        """Note how a box ended, and the commit in its results."""
        entry = {"box": box.name, "limit": round(limit, 1), "seconds": round(seconds, 1), "tasks": list(tasks)}
        self._document["boxes"].append(entry)
        record.write(self._path, self._document)
        for suite in box.suites:
            stamp(self._out / f"{suite}.json", self._commit)

    def lines(self, box: Box) -> Iterator[str]:
        """Yield what is printed about the last box: its time, how its tasks ended, and what was measured."""
        entry = self._document["boxes"][-1]
        yield f"== {box.name}: {entry['seconds']} of {entry['limit']} s, {time.monotonic() - self._start:.0f} s in all"
        said = list(digest.of_tasks(entry["tasks"]))
        for suite in box.suites:
            said += self._said(suite)
        yield from shortened(said)

    def _said(self, suite: str) -> list[str]:
        """Return the lines about a result file. Whatever is wrong with it must not end the call."""
        path = self._out / f"{suite}.json"
        try:
            written = path.exists() and path.stat().st_mtime >= self._began
            return digest.of_suite(suite, record.read(path)) if written and path.stat().st_size else []
        except Exception as error:
            return [f"{path.name} cannot be read: {type(error).__name__}: {error}"]

    @property
    def has_failures(self) -> bool:
        """Whether a task failed: stopping it, or leaving it out, is no failure."""
        return any(task["ended"].startswith("failed") for box in self._document["boxes"] for task in box["tasks"])


def shortened(lines: Sequence[str]) -> Iterator[str]:
    """Yield lines until they have `MOST` characters, and how many more there are."""
    left = MOST
    for index, line in enumerate(lines):
        left -= len(line) + 1
        if left < 0:
            yield f"... {len(lines) - index} more lines: see the result files"
            return
        yield line


def driver(device: torch.device) -> dict[str, str | None]:
    """Return the version of NVIDIA's driver; None without one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if device.type == "cpu" or shutil.which(query[0]) is None:
        return {"driver": None}
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return {"driver": done.stdout.strip().partition("\n")[0] or None}


def stamp(path: Path, commit: str | None) -> None:
    """Write a commit into a result file: its process may have had no git, or a copy of the tree with another commit."""
    try:
        document = record.read(path)
        had = document["machine_info"]["commit"]
    except (OSError, ValueError, LookupError):  # there is none, or an interruption has left a part of it
        return
    if commit not in (None, had):
        document["machine_info"]["commit"] = commit
        record.write(path, document)

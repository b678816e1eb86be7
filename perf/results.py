"""The result files, read back: one `Device` a folder, with what each suite found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kernel:
    """One kernel at one size, against torch's expressions and the machine's limit. Times are of one call, seconds.

    It is beaten where three quarters of the best rival's calls are faster than three quarters of its own.
    """

    name: str
    size: str
    large: bool
    seconds: float
    rounds: int
    limit: float
    rival: str | None
    rival_seconds: float
    beaten: bool

    @property
    def speedup(self) -> float | None:
        """The best torch expression's time over the kernel's; None where nothing but the kernel's own code ran."""
        return self.rival_seconds / self.seconds if self.rival else None

    @property
    def share(self) -> float:
        """Of what the machine can do at best."""
        return self.limit / self.seconds


@dataclass(frozen=True)
class Device:
    """The results of one machine, by suite."""

    folder: str
    documents: dict[str, dict[str, Any]]

    @property
    def info(self) -> dict[str, Any]:
        """Where the newest of the suites ran."""
        return max((d["machine_info"] for d in self.documents.values()), key=lambda info: info["started"])

    @property
    def kind(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self.info["device_type"]

    def cases(self, suite: str) -> list[dict[str, Any]]:
        """Return what a suite measured; nothing if it has not run."""
        return self.documents.get(suite, {}).get("cases", [])

    def skipped(self) -> Iterator[tuple[str, str]]:
        """Yield what was not measured, and why."""
        for suite, document in self.documents.items():
            for entry in document.get("skipped", []):
                yield f"{suite}: {entry['case']}", entry["why"]

    def kernels(self) -> list[Kernel]:
        """Return what pytest-benchmark measured."""
        benchmarks = self.documents.get("kernels", {}).get("benchmarks", [])
        return [_kernel(benchmark, self.kind) for benchmark in benchmarks]


def _kernel(benchmark: dict[str, Any], kind: str) -> Kernel:
    info, stats = benchmark["extra_info"], benchmark["stats"]
    medians = {name: times["median"] for name, times in info["rivals"].items()}
    if kind == "cpu":
        medians.pop("definition", None)  # it is what the op itself runs there
    best = min(medians, key=lambda name: medians[name], default=None)
    return Kernel(
        name=info["kernel"],
        size=info["size"],
        large=info["large"],
        seconds=stats["median"] / info["calls"],
        rounds=stats["rounds"],
        limit=info["limit_seconds"],
        rival=best,
        rival_seconds=medians.get(best, 0.0),
        beaten=best is not None and info["rivals"][best]["q3"] < stats["q1"] / info["calls"],
    )


def load(folder: Path) -> list[Device]:
    """Return every machine of which there are results, CPUs first."""
    places = sorted(path for path in folder.glob("*") if path.is_dir())
    devices = [Device(place.name, documents) for place in places if (documents := _documents(place))]
    return sorted(devices, key=lambda device: (device.kind, device.folder))


def _documents(place: Path) -> dict[str, dict[str, Any]]:
    """Return the files of one machine by suite. Where git could not be asked, a summary may know the commit."""
    files = [file for file in sorted(place.glob("*.json")) if file.stat().st_size]  # an interrupted suite's is empty
    read = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    commit = read.pop("summary", {}).get("commit")
    for document in read.values():
        document["machine_info"]["commit"] = document["machine_info"]["commit"] or commit
    return {document["suite"]: document for document in read.values()}

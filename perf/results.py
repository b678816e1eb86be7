"""The result files: a `Device` for each folder, with the results of each suite."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.alternatives import TF32


@dataclass(frozen=True)
class Kernel:
    """One kernel at one size, with torch's fastest expression and the machine's limit. Times are seconds of one call.

    Attributes:
        large: whether the size is one of those that fill the machine.
        limit: the least seconds that the operations and bytes can take.
        alternative: the name of torch's fastest expression in IEEE float32, if one was measured.
        tf32_seconds: the time of torch's fastest expression that may round to TF32; None if none was measured.
        beaten: whether the upper quartile of the alternative's times is below the lower quartile of the kernel's.
    """

    name: str
    size: str
    large: bool
    seconds: float
    rounds: int
    limit: float
    alternative: str | None
    alternative_seconds: float
    tf32_seconds: float | None
    beaten: bool

    @property
    def speedup(self) -> float | None:
        """The time of the alternative over the kernel's; None without an alternative."""
        return self.alternative_seconds / self.seconds if self.alternative else None

    @property
    def share(self) -> float:
        """The limit over the time: the share of what the machine can do."""
        return self.limit / self.seconds


@dataclass(frozen=True)
class Device:
    """The results of one machine, by suite."""

    folder: str
    documents: dict[str, dict[str, Any]]

    @property
    def info(self) -> dict[str, Any]:
        """The machine of the newest suite."""
        return max((d["machine_info"] for d in self.documents.values()), key=lambda info: info["started"])

    @property
    def kind(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self.info["device_type"]

    def cases(self, suite: str) -> list[dict[str, Any]]:
        """Return the results of a suite; none if it has not run."""
        return self.documents.get(suite, {}).get("cases", [])

    def skipped(self) -> Iterator[tuple[str, str]]:
        """Yield the cases that were not measured, and the reasons."""
        for suite, document in self.documents.items():
            for entry in document.get("skipped", []):
                yield f"{suite}: {entry['case']}", entry["why"]

    def kernels(self) -> list[Kernel]:
        """Return the results of the kernels' suite."""
        benchmarks = self.documents.get("kernels", {}).get("benchmarks", [])
        return [kernel_of(benchmark, self.kind) for benchmark in benchmarks]


def kernel_of(benchmark: Mapping[str, Any], kind: str) -> Kernel:
    """Return the result of one of pytest-benchmark's benchmarks, on a kind of machine."""
    info, stats = benchmark["extra_info"], benchmark["stats"]
    medians = {name: times["median"] for name, times in info["rivals"].items()}
    if kind == "cpu":
        medians.pop("definition", None)  # the op itself runs this code on a CPU
    rounded = [medians.pop(name) for name in list(medians) if TF32 in name]
    best = min(medians, key=lambda name: medians[name], default=None)
    return Kernel(
        name=info["kernel"],
        size=info["size"],
        large=info["large"],
        seconds=stats["median"] / info["calls"],
        rounds=stats["rounds"],
        limit=info["limit_seconds"],
        alternative=best,
        alternative_seconds=medians.get(best, 0.0),
        tf32_seconds=min(rounded, default=None),
        beaten=best is not None and info["rivals"][best]["q3"] < stats["q1"] / info["calls"],
    )


def load(folder: Path) -> list[Device]:
    """Return every machine that has results, CPUs first."""
    places = sorted(path for path in folder.glob("*") if path.is_dir())
    devices = [Device(place.name, documents) for place in places if (documents := _documents(place))]
    return sorted(devices, key=lambda device: (device.kind, device.folder))


def _documents(place: Path) -> dict[str, dict[str, Any]]:
    """Return the result files of one machine, by suite; none for a folder of other files, such as machine code."""
    files = [file for file in sorted(place.glob("*.json")) if file.stat().st_size]  # an interrupted suite's is empty
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {document["suite"]: document for document in read if "machine_info" in document}

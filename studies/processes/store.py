"""The measurements that the page is written from, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from studies.processes.measured import Case, cases
from studies.processes.times import Host
from tengrad_triton.files import replacing
from tengrad_triton.recipes.measuring.machine import describe

COUNTED, HOST = "counted.json", "host.json"
MACHINE_KEYS = ("device", "cores", "python", "torch", "commit")


class Store:
    """A folder with the bytes that were counted, and the host's seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def counted(self) -> list[dict[str, Any]]:
        """Return what was counted of the cases of today, in their order."""
        kept = {_key(one): one for one in self._read(COUNTED).get("cases", [])}
        return [kept[key] for key in map(_key, map(asdict, cases())) if key in kept]

    def missing(self) -> list[Case]:
        """Return the cases that were not counted."""
        known = {_key(one) for one in self.counted()}
        return [case for case in cases() if _key(asdict(case)) not in known]

    def keep_counted(self, found: dict[str, Any], machine: dict[str, Any]) -> None:
        """Add what was counted of a case; ``machine`` says where."""
        self._write(COUNTED, {"machine": machine, "cases": [*self.counted(), found]})

    @property
    def host(self) -> Host | None:
        """The host's seconds, if they were measured."""
        kept = self._read(HOST)
        return Host(kept["exchange"]) if kept else None

    def keep_host(self, host: Host, machine: dict[str, Any]) -> None:
        """Write the host's seconds; ``machine`` says where they were measured."""
        self._write(HOST, {"machine": machine, **asdict(host)})

    def machine_of(self, name: str) -> dict[str, Any]:
        """Return where a file's numbers were measured."""
        found: dict[str, Any] = self._read(name)["machine"]
        return found

    def _read(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Return the processor, the versions and the commit."""
    known = describe(torch.device("cpu"))
    return {key: known[key] for key in MACHINE_KEYS}


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("network", "samples", "count", "way", "fisher_rows"))

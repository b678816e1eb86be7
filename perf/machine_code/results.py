"""The files that keep what kernels compile to, one for each version of Triton."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from perf.machine_code.resources import Matrix, Resources
from perf.record import RESULTS

FOLDER = RESULTS / "machine-code"
_ABSENT = {"spilled": 0, "shared": 0, "dots": []}  # what an entry has if its line does not say


def write(folder: Path, version: str, matrix: Matrix) -> None:
    """Write the file of a version; each configuration and architecture has a line, so that a change shows."""
    blocks = []
    for target, by_name in matrix.items():
        lines = (f"{json.dumps(name)}: {json.dumps(_nonzero(found))}" for name, found in sorted(by_name.items()))
        blocks.append(f"{json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n}")
    folder.mkdir(parents=True, exist_ok=True)
    text = f'{{"triton": {json.dumps(version)}, "targets": {{\n' + ",\n".join(blocks) + "\n}}\n"
    (folder / f"{version}.json").write_text(text, encoding="utf-8")


def _nonzero(found: Resources) -> dict[str, object]:
    return {field: value for field, value in asdict(found).items() if value}


def read(path: Path) -> tuple[str, Matrix]:
    """Return the version of Triton and the resources of a file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return document["triton"], {
        target: {name: Resources(**_ABSENT | entry) for name, entry in by_name.items()}
        for target, by_name in document["targets"].items()
    }


def kept() -> dict[str, Matrix]:
    """Return what is kept in `FOLDER`, by the version of Triton, the oldest first."""
    found = dict(read(path) for path in FOLDER.glob("*.json"))
    return dict(sorted(found.items(), key=lambda item: [int(part) for part in item[0].split(".")]))

"""The most memory that something took: `python -m tengrad_triton.recipes.training.peak_memory` measures an optimizer's first steps.

It reads what to measure as JSON from its input, and is a process of its own, because a process's peak never falls.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

STEPS = 3  # refresh, reuse, refresh: an old and a new curvature meet


def peak_pages() -> int:
    """Return the most memory that this process has had, in bytes.

    Linux's own count is of this program; what `resource` tells includes the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def peak_of_steps(asked: dict[str, Any]) -> int:
    """Return the most bytes in use beyond those before the model was there, on random images of the shape asked for.

    On a CPU these are the process's pages, without what the libraries take; on a GPU what torch has allocated.
    """
    from dataclasses import replace  # noqa: PLC0415

    from tengrad_triton.recipes.data.images import Data, Normalizer, Split  # noqa: PLC0415
    from tengrad_triton.recipes.training.loop import Job, seconds_of_steps  # noqa: PLC0415
    from tengrad_triton.recipes.training.settings import Settings  # noqa: PLC0415

    device, name, batch = torch.device(asked["device"]), asked["optimizer"], asked["batch_size"]
    images = torch.randint(256, (batch, *asked["shape"]), dtype=torch.uint8)
    split = Split(images, torch.randint(asked["classes"], (batch,)))
    data = Data(split, split, Normalizer.of(split), asked["classes"]).to(device)
    own = Settings().of(name)
    if hasattr(own, "refresh_every"):
        own = replace(own, refresh_every=2)  # type: ignore[type-var]
    settings = Settings(
        optimizer=(name,),
        model=asked["model"],
        width=asked["width"],
        batch_size=batch,
        **{name: own},  # type: ignore[arg-type]
    )
    before = peak_pages() if device.type == "cpu" else 0
    seconds_of_steps(Job(settings, data, device), name, STEPS)
    return peak_pages() - before if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


if __name__ == "__main__":
    print(json.dumps({"bytes": peak_of_steps(json.load(sys.stdin))}))

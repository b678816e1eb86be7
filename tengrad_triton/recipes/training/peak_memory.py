"""The peak memory of an optimizer's first steps: `python -m tengrad_triton.recipes.training.peak_memory`.

It reads what to measure as JSON from its standard input. It is a process of its own, because a process's peak never
falls.
"""

import json
import sys
from typing import Any

import torch

from tengrad_triton.recipes.data.images import Data, Normalizer, Split
from tengrad_triton.recipes.measuring.memory import peak_process_bytes
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.settings import Settings
from tengrad_triton.recipes.training.warm_up import seconds_of_steps, warm_up

STEPS = 3  # refresh, reuse, refresh: the old and the new curvature are in memory together


def peak_of_steps(case: dict[str, Any]) -> int:
    """Return the peak in bytes, minus what was in use before the model was built.

    ``case`` has the device, the optimizer, the model, its width, the batch size, an image's shape and the number of
    classes; the images are random. On a CPU the peak is that of the process; on a GPU, what torch has allocated.
    """
    device, name, batch = torch.device(case["device"]), case["optimizer"], case["batch_size"]
    images = torch.randint(256, (batch, *case["shape"]), dtype=torch.uint8)
    split = Split(images, torch.randint(case["classes"], (batch,)))
    data = Data(split, split, Normalizer.of(split), case["classes"]).to(device)
    own = OPTIMIZERS[name]().changed(refresh_every=2)
    settings = Settings(
        optimizer=(name,),
        model=case["model"],
        width=case["width"],
        batch_size=batch,
        **{name: own},  # type: ignore[arg-type]
    )
    before = peak_process_bytes() if device.type == "cpu" else 0
    job = Job(settings, data, device)
    warm_up(job, name)
    seconds_of_steps(job, name, STEPS)
    return peak_process_bytes() - before if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


if __name__ == "__main__":
    print(json.dumps({"bytes": peak_of_steps(json.load(sys.stdin))}))

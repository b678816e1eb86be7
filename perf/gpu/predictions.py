"""What was predicted for a GPU before any kernel had run on one; the measurements stand beside it on the page.

`perf.machine_code.roofline` predicts the time of every kernel. The times of whole steps here were derived by hand from
the bytes and operations of each layer, for an H100: a bandwidth of 3 TB/s and 40 to 50 TFLOP/s in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GPUS = ("H100", "H200")


@dataclass(frozen=True)
class StepPrediction:
    """A model at N = 128. Times are milliseconds, ranges from the least to the most.

    Attributes:
        why: what every reuse step must read and compute.
        least: the time of that at the machine's rates.
        added: the time that the kernels of a reuse step add to those of SGD's step.
        sgd: the time of SGD's step; None if it was not predicted.
    """

    model: str
    why: str
    least: float
    added: tuple[float, float]
    sgd: tuple[float, float] | None


STEPS: Sequence[StepPrediction] = (
    StepPrediction("3C1F", "152 MB of J twice; 1.3 GFLOP twice", 0.101, (0.27, 0.30), (1.5, 2.0)),
    StepPrediction("ResNet-18", "1486 MB of J twice; 33.8 GFLOP twice", 1.0, (4.0, 4.0), (4.0, 5.0)),
    StepPrediction("WRN-28-4", "2990 MB of J twice", 2.0, (2.4, 2.8), (6.0, 8.0)),
    StepPrediction("MLP 2048", "115 MB of parameters and state; 1.5 GFLOP twice", 0.038, (0.15, 0.15), None),
)

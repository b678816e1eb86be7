"""The rates that times are predicted from: those measured on an H200, and those of its makers for what joins them.

Measured: perf/results has the steps of one H200, and how fast it copies. Nothing here was measured between GPUs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from perf.limits import Limits
from studies.processes.model import gathered, reduced

RESULTS = Path(__file__).parents[2] / "perf" / "results"
STEPS, KERNELS = RESULTS / "nvidia-h200" / "steps.json", RESULTS / "nvidia-h200-second" / "kernels.json"

MEMORY = 141e9
"""Bytes of an H200. Source: NVIDIA's system description for MLPerf Inference 4.1, "141 GB"."""
NODE = 8
"""GPUs of a node. Source: DGX BasePOD reference architecture of NVIDIA, core components, DGX H200."""
NVLINK = 450e9
"""Bytes a second that a GPU sends within a node: half of 900 GB/s, which counts both directions.

Source: NVIDIA's system description for MLPerf Inference 4.1 (H200-SXM-141GBx8), "18x 4th Gen NVLink, 900GB/s".
"""
NETWORK = NODE * 400e9 / 8
"""Bytes a second that a node sends: one ConnectX-7 of 400 Gb/s for each GPU.

Source: DGX BasePOD reference architecture of NVIDIA, "eight single-port NVIDIA ConnectX-7 VPI", "up to 400 Gb/s".

NCCL joins nodes by as many rings as there are adapters, and each ring visits all GPUs of a node, so that every byte
enters a node once. A ring is thus as fast as all adapters of a node together.
"""


@dataclass(frozen=True)
class Latency:
    """Seconds that NCCL's cost model adds to a collective for an algorithm and protocol.

    Source: `baseLat` and `hwLat` in src/graph/tuning.cc of NVIDIA's nccl, commit 01afd20.

    Attributes:
        base: of each collective.
        inside: of each hop within a node, by NVLink.
        between: of each hop between nodes.
    """

    base: float
    inside: float
    between: float


RING = Latency(8.4e-6, 3.4e-6, 9.6e-6)
TREE = Latency(0.0, 28e-6, 50e-6)
SHORT_TREE = Latency(4.4e-6, 0.52e-6, 5.0e-6)
"""The tree with NCCL's protocol for short messages (LL), whose bandwidth is 1/3.8."""
TREE_SHARE, SHORT_SHARE = 0.9, 0.9 / 3.8
"""The share of the bandwidth that trees reach in the same cost model."""


def nodes_of(count: int) -> int:
    """Return the number of nodes for R processes."""
    return math.ceil(count / NODE)


def bandwidth(count: int) -> float:
    """Return the bytes a second that a process of a ring sends."""
    return NVLINK if count <= NODE else min(NVLINK, NETWORK)


def gather_seconds(part: float, count: int) -> float:
    """Return the seconds of an all-gather of parts, or of a reduce-scatter into them: R − 1 hops around a ring."""
    between = nodes_of(count) - 1
    latency = RING.base + (count - 1 - between) * RING.inside + between * RING.between
    return latency + gathered(part, count) / bandwidth(count) if count > 1 else 0.0


def reduce_seconds(whole: float, count: int) -> float:
    """Return the seconds of an all-reduce: by a ring or by a tree, whichever is sooner, as NCCL chooses."""
    if count == 1:
        return 0.0
    nodes, rate = nodes_of(count), bandwidth(count)
    inside = min(count, NODE) - 1
    ring = RING.base + 2 * ((count - nodes) * RING.inside + (nodes - 1) * RING.between) + reduced(whole, count) / rate

    def tree(latency: Latency, share: float) -> float:
        hops = 2 * (inside * latency.inside + math.log2(nodes) * latency.between)
        return latency.base + hops + 2 * whole / (share * rate)

    return min(ring, tree(TREE, TREE_SHARE), tree(SHORT_TREE, SHORT_SHARE))


@cache
def limits() -> Limits:
    """Return how fast an H200 copied, reads and writes together, and multiplied large matrices in float32."""
    benchmarks = json.loads(KERNELS.read_text(encoding="utf-8"))["benchmarks"]
    return Limits(**benchmarks[0]["extra_info"]["limits"])


@dataclass(frozen=True)
class Step:
    """Seconds that were measured on one H200, in a plain loop, with the paper's settings: without D.

    Attributes:
        sgd: SGD's step.
        reuse: what a step of TENGraD that reuses the curvature adds to that.
        refresh: what a refresh, and the first step after it, add to two such steps.
        kept: the bytes of J.
    """

    sgd: float
    reuse: float
    refresh: float
    kept: int


@cache
def measured_steps() -> Mapping[tuple[str, int], Step]:
    """Return the measured steps by model and samples."""
    cases = json.loads(STEPS.read_text(encoding="utf-8"))["cases"]
    return {(case["model"], case["samples"]): _step_of(case) for case in cases if _is_plain(case)}


MEASURED_SAMPLES = (32, 128, 512)


def _is_plain(case: Mapping[str, Any]) -> bool:
    return case["case"] == f"{case['model']}, N = {case['samples']}, plain"


def _step_of(case: Mapping[str, Any]) -> Step:
    sgd, refresh, first, reuse = (case["seconds"][name]["median"] for name in ("sgd", "refresh", "first", "reuse"))
    return Step(sgd, reuse - sgd, refresh + first - 2 * reuse, case["kept_bytes"])

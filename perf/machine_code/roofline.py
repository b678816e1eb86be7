"""The least time that a GPU can take for an op: the roofline of its arithmetic and of its memory.

The least time is the longer of three:

    arithmetic  the operations that the mathematics needs, at the rate of the instructions that the compiled code has. A
                product in three parts (tf32x3, bf16x3) counts thrice, tiles above the diagonal of a Gram matrix do not
                count. A program runs on one core: with fewer programs than cores, or with a few more, some cores have
                nothing to do.
    memory      the bytes that must be read or written once, at the memory's rate
    chain       only for `cholesky`: a column waits for the one before it

Rates are those of the data sheets (see `gpus`). No kernel reaches them: Triton's matrix products usually come to 50 to
75 % of the arithmetic, streaming kernels to 80 to 90 % of the memory. Launches are not counted, and data that stay in
the L2 cache can be faster than the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from perf.machine_code.configurations import kernel_of, name_of
from perf.machine_code.environments import pinned
from perf.machine_code.gpus import RATES
from perf.machine_code.launches import Launch, Work, work_of
from perf.machine_code.resources import Matrix, Resources
from perf.machine_code.results import kept
from perf.sizes import Sized, sized
from tengrad_triton.kernels import SPECS
from tengrad_triton.kernels.spec import TF32X3

COLUMN_SECONDS = 0.44e-6
"""The time of a column of `cholesky`: a model of the latencies of its reductions, barriers and division, ± 40 %."""


@dataclass(frozen=True)
class Prediction:
    """The least time of one op at one size on one GPU, in seconds.

    Attributes:
        kernel: the op.
        size: the size, as in `perf.sizes`.
        device: the GPU, a key of `RATES`.
        config: the launch configuration.
        launches: how many kernels the op launches, without those that write tables.
        programs: how many programs of the main kernel compute something.
        arithmetic_kind: the instructions that do the arithmetic, and in how many parts.
        flops: arithmetic operations.
        bytes: bytes of memory traffic.
        arithmetic: seconds of the arithmetic.
        memory: seconds of the memory traffic.
        chain: seconds of operations that wait for one another; zero if there is no model.
    """

    kernel: str
    size: str
    device: str
    config: str
    launches: int
    programs: int
    arithmetic_kind: str
    flops: int
    bytes: int
    arithmetic: float
    memory: float
    chain: float

    @property
    def seconds(self) -> float:
        """The least time."""
        return max(self.arithmetic, self.memory, self.chain)

    @property
    def bound(self) -> str:
        """What takes the least time: arithmetic, memory or chain."""
        return max(("arithmetic", "memory", "chain"), key=lambda part: getattr(self, part))


def predicted_seconds(kernel: str, size: str, device: str, config: str = "default") -> float | None:
    """Return the least seconds of an op; None if nothing is known about it.

    Args:
        kernel: the op's name, as in the benchmarks' ``extra_info["kernel"]``.
        size: the name of the size, as in ``extra_info["size"]``.
        device: "H100" or "H200".
        config: the launch configuration, "default" or "tf32x3".
    """
    wanted = (kernel, size, device, config)
    found = (p for p in predictions() if (p.kernel, p.size, p.device, p.config) == wanted)
    return next((prediction.seconds for prediction in found), None)


@functools.cache
def predictions() -> tuple[Prediction, ...]:
    """Return a prediction for every op at every size of the GPU benchmarks, for every device.

    Each has one for its default configuration, and another for TF32 in three products where that has other code. There
    is none without results of the kernels that are launched.
    """
    matrix = kept().get(pinned(), {"sm_90": {}})
    return tuple(
        _prediction(case, config, work, device, matrix)
        for case in sized(SPECS, "gpu")
        for config, work in _works(case)
        if all(name_of(launch.config) in matrix["sm_90"] for launch in work.launches)
        for device in RATES
    )


def _works(case: Sized) -> Iterator[tuple[str, Work]]:
    default = work_of(case.spec, case.make, "default")
    yield "default", default
    if TF32X3 in case.spec.config_names:
        work = work_of(case.spec, case.make, TF32X3)
        if work.launches != default.launches:
            yield TF32X3, work


def _prediction(case: Sized, config: str, work: Work, device: str, matrix: Matrix) -> Prediction:
    rates = RATES[device]
    main = max(work.launches, key=lambda launch: _weight(launch, matrix))
    kind, parts = arithmetic_of(_code(main, matrix))
    share = _share_at_work(main)
    programs = round(share * prod(main.grid))
    busy = programs / (-(-programs // rates.cores) * rates.cores)
    return Prediction(
        kernel=case.spec.name,
        size=case.size,
        device=device,
        config=config,
        launches=len(work.launches),
        programs=programs,
        arithmetic_kind=kind if parts == 1 else f"{parts} × {kind}",
        flops=work.flops,
        bytes=work.bytes,
        arithmetic=share * parts * work.flops / (busy * rates.flops_per_second[kind]),
        memory=work.bytes / rates.bytes_per_second,
        chain=COLUMN_SECONDS * work.arguments[0].shape[1] if case.spec.name == "cholesky" else 0.0,
    )


def _code(launch: Launch, matrix: Matrix) -> Resources:
    return matrix["sm_90"][name_of(launch.config)]


def _weight(launch: Launch, matrix: Matrix) -> tuple[bool, int]:
    """Return what orders launches by their arithmetic: those with matrix products, then those with many programs."""
    return bool(_code(launch, matrix).dots), prod(launch.grid)


def _share_at_work(launch: Launch) -> float:
    """Return which share of its programs computes something: those of a Gram matrix's upper tiles do not."""
    if kernel_of(launch.config) != "range_gram":
        return 1.0
    tiles = launch.grid[1]
    return (tiles + 1) / (2 * tiles)


def arithmetic_of(code: Resources) -> tuple[str, int]:
    """Return the kind of instructions that do a kernel's arithmetic, and in how many products they split one."""
    tensor = [kind.partition(".")[2] for kind in code.instructions if kind.startswith(("HGMMA.", "HMMA."))]
    split = any(dot.endswith("x3") for dot in code.dots)
    return (tensor[0], 3 if split else 1) if tensor else ("FFMA", 1)

"""Time every op at its sizes, against other expressions in torch and against the machine's limit.

pytest-benchmark times the op; the setup of each of its rounds times the alternatives, so that all interleave.
"""

from __future__ import annotations

import gc
from collections import deque

import pytest
import torch

from perf.alternatives import alternatives
from perf.launches import Repeated
from perf.limits import allowing_tf32
from perf.sizes import sized
from perf.timing import spread
from tengrad_triton.curvature.choices import ops_for
from tengrad_triton.kernels import SPECS


def pytest_generate_tests(metafunc):
    cases = sized(SPECS, metafunc.config.getoption("scale"))
    metafunc.parametrize("case", cases, ids=[f"{case.spec.name}: {case.size}" for case in cases])


@pytest.fixture
def room(device):
    """Keep torch from TF32 except where an alternative allows it; free memory and compiled code after each case."""
    with allowing_tf32(convolutions=False, products=False):
        yield
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.usefixtures("room")
def test_kernel(benchmark, request, case, device, limits):
    option, spec, on_gpu = request.config.getoption, case.spec, device.type == "cuda"
    arguments = case.make(device)
    # The implementation that the optimizer calls on this device.
    ours = getattr(ops_for("auto" if on_gpu else "torch"), spec.name)
    op = Repeated(ours, arguments, device)
    others, failed = {}, {}
    for name, work in alternatives(spec, option("compiled"), tf32=on_gpu).items():
        try:
            other = Repeated(work, arguments, device)
            others[name if other.captured == op.captured else f"{name}, launched"] = other
        except Exception as error:  # it needs more memory than the device has, or cannot be compiled
            failed[name] = type(error).__name__
    times = {name: [] for name in others}
    turns = deque(others)

    def time_alternatives():
        for name in turns:
            times[name].append(others[name].seconds())
        turns.rotate()  # so that no alternative always follows the same one, whose data fill the caches
        op.warm_up()

    benchmark.pedantic(op, setup=time_alternatives, rounds=option("rounds"), iterations=1, warmup_rounds=1)
    flops, moved = spec.flops(*arguments), spec.bytes(*arguments)
    benchmark.extra_info.update(
        kernel=spec.name,
        size=case.size,
        large=case.large,
        calls=op.times,
        captured=op.captured,
        flops=flops,
        bytes=moved,
        limits=limits.as_dict(),
        limit_seconds=limits.seconds(flops, moved),
        rivals={name: spread(seconds) for name, seconds in times.items()},
        failed=failed,
    )

"""Every launch configuration of the ops that have several: its error over torch's own, and its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from perf.alternatives import with_tf32
from perf.launches import Repeated
from perf.limits import allowing_tf32
from perf.record import without_places
from perf.sizes import Sized, sized
from perf.suites import works
from perf.timing import interleaved
from tengrad_triton import kernels
from tengrad_triton.tuning.measure import error_of

TORCH = "torch"
Work = Callable[..., Any]


@dataclass(frozen=True)
class VariantCase:
    """An op at one size."""

    sized: Sized
    rounds: int

    def __str__(self) -> str:
        return f"{self.sized.spec.name}, {self.sized.size}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return each implementation's error over that of torch in IEEE float32, and its seconds.

        Errors are against torch in float64. What does not compile, or needs more than the device has, is noted.
        """
        spec, arguments = self.sized.spec, self.sized.make(device)
        error = error_of(spec, arguments)
        with allowing_tf32(convolutions=False, products=False):
            own = max(error(spec.torch_impl), torch.finfo(torch.float32).tiny)
            calls = self._implementations()
            found = {name: outcome(lambda call=call: error(call) / own, device) for name, call in calls.items()}
            # All errors first: the repeated calls of an op that updates its arguments change them.
            right = [name for name, result in found.items() if "failed" not in result]
            repeated = {name: Repeated(calls[name], arguments, device) for name in right}
            timers = {name: lambda name=name, call=call: {name: call.seconds()} for name, call in repeated.items()}
            times = interleaved(timers, self.rounds)
        for name, seconds in times.items():
            found[name] |= {"seconds": seconds, "captured": repeated[name].captured}
        return {"kernel": spec.name, "size": self.sized.size, "implementations": found}

    def _implementations(self) -> dict[str, Work]:
        spec = self.sized.spec
        op = getattr(kernels, spec.name)
        configured = {name: partial(op, config=name) for name in spec.config_names}
        return {"default": op, **configured, TORCH: spec.torch_impl, f"{TORCH}, TF32": with_tf32(spec.torch_impl)}


def outcome(error_over_torch: Callable[[], float], device: torch.device) -> dict[str, Any]:
    """Return the error of an implementation over torch's, or how it failed; raise if that cost the device."""
    try:
        return {"error_over_torch": error_over_torch()}
    except Exception as failure:  # the errors of a compiler have no common base class
        if not works(device):
            raise
        return {"failed": without_places(f"{type(failure).__name__}: {failure}").partition("\n")[0][:200]}


def cases(quick: bool) -> Iterator[VariantCase]:
    """Yield one size of each op first, a large one where there is one."""
    configured = tuple(spec for spec in kernels.SPECS if spec.config_names)
    for case in sized(configured, "small" if quick else "gpu"):
        yield VariantCase(case, 2 if quick else 5)

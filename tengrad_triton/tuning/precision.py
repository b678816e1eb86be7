"""Where kernels may multiply float32 matrices on tensor cores, in three products of TF32 parts (`TF32X3`).

Such a product errs by at most `TF32X3_ERROR` of the norms of its factors, and so K by that share of trace(K). Then
K + N α I stays positive definite, and the step close to the exact one, if N α ≥ 8 `TF32X3_ERROR` trace(K). A relative
damping α = ε max(1, trace(K) / N) fulfils this for every K if ε ≥ `LEAST_DAMPING`. So the bound is a comparison of two
numbers on the host: no step and no refresh waits for the device.

Some products of a weight may be of this kind while others are of float32. Coarser arithmetic would have to round J to
the same numbers in all products, so that the step belongs to some Fisher matrix. This one errs no more than float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tengrad_triton.curvature.choices import Choice
from tengrad_triton.curvature.woodbury import MARGIN
from tengrad_triton.kernels.spec import TF32X3, TF32X3_ERROR

LEAST_DAMPING = MARGIN * TF32X3_ERROR


def within_damping(choices: Mapping[str, Choice], damping: float, relative: bool) -> dict[str, Choice]:
    """Return the choices, with float32 kernels in place of `TF32X3` ones where the damping is too small for them.

    Args:
        choices: of every weight, by its name.
        damping: the least ε of the weights.
        relative: whether ε is relative to trace(K) / N. If not, no kernel of this kind is used: whether α is large
            enough depends on K, which is on the device.

    Warns:
        UserWarning: a choice has changed.
    """
    if relative and damping >= LEAST_DAMPING:
        return dict(choices)
    return {name: _in_float32(name, choice) for name, choice in choices.items()}


def uses_tf32x3(choice: Choice) -> bool:
    """Whether some kernel of a weight multiplies in `TF32X3`."""
    return any(map(_is_tf32x3, choice.kernel_overrides))


def without_tf32x3(kernel_overrides: Iterable[str]) -> tuple[str, ...]:
    """Return the overrides of kernels that multiply in float32."""
    return tuple(kernel for kernel in kernel_overrides if not _is_tf32x3(kernel))


def _is_tf32x3(kernel: str) -> bool:
    return kernel.endswith(f":{TF32X3}")


def _in_float32(name: str, choice: Choice) -> Choice:
    dropped = list(filter(_is_tf32x3, choice.kernel_overrides))
    if not dropped:
        return choice
    warnings.warn(
        f"the plan's {', '.join(dropped)} for {name!r} is not used: it needs relative_damping=True and a damping of at "
        f"least {LEAST_DAMPING:g}; float32 kernels run instead. Set both, or remove the plan",
        stacklevel=2,
    )
    return replace(choice, kernel_overrides=without_tf32x3(choice.kernel_overrides))

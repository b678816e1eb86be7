"""What both frameworks do with torch's L-BFGS: it goes through all iterations of a step without a word."""

from __future__ import annotations

from collections.abc import Callable

import torch


def pause_in(optimizer: torch.optim.Optimizer, pause: Callable[[], object]) -> None:
    """Have L-BFGS with strong Wolfe conditions pause before each iteration; any other optimizer stays as it is.

    torch has no hook there. But each line search begins with a copy of the weights, which are then those that the
    iteration before it has accepted; in between they are those that the search tries.
    """
    if not isinstance(optimizer, torch.optim.LBFGS):
        return
    copied = optimizer._clone_param

    def paused() -> list[torch.Tensor]:
        pause()
        return copied()

    optimizer._clone_param = paused  # type: ignore[method-assign]

"""A network and the unknowns of its equation, as one module whose parameters are trained together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Trained(nn.Module):
    """Holds a network, and tensors beside it that are trained, too.

    Args:
        network: the network.
        unknowns: further trained tensors by name, such as the conductivity in an inverse problem. They are held
            themselves, not copied, because the equation refers to them.
    """

    def __init__(self, network: nn.Module, unknowns: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        for name, unknown in unknowns.items():
            # A module registers what is a Parameter by this mark of torch's; a new Parameter would be another tensor.
            if not isinstance(unknown, nn.Parameter):
                unknown._is_param = True
            self.register_parameter(name, unknown)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return what the network returns."""
        return self.network(x)

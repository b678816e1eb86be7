"""What a residual function uses beside parameters and points, and may change: random numbers and buffers.

Two evaluations are those of one function only if both begin with the same of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Surroundings:
    """The states of random number generators, and a model's buffers, at one moment.

    Attributes:
        generators: the state of the CPU's generator, and of a GPU's where the model is on one.
        buffers: each buffer with the module that holds it, its name there, and its entries; a module may put another
            tensor in its place.
    """

    generators: dict[torch.device, Tensor]
    buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]]

    @classmethod
    def now(cls, model: nn.Module) -> Surroundings:
        """Return the present ones of a model that has a parameter."""
        device = next(model.parameters()).device
        devices = [torch.device("cpu"), *([device] if device.type == "cuda" else [])]
        generators = {each: _generator_state(each) for each in devices}
        held = [(module, name, b) for module in model.modules() for name, b in module._buffers.items()]
        return cls(generators, [(m, name, b, None if b is None else b.detach().clone()) for m, name, b in held])

    def restore(self) -> None:
        """Set generators and buffers back."""
        for device, state in self.generators.items():
            torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)
        for module, name, buffer, entries in self.buffers:
            module._buffers[name] = buffer
            if buffer is not None and entries is not None:
                buffer.detach().copy_(entries)

    def are_left(self) -> bool:
        """Whether generators or buffers have changed since."""
        if any(not torch.equal(state, _generator_state(device)) for device, state in self.generators.items()):
            return True
        for module, name, buffer, entries in self.buffers:
            if module._buffers[name] is not buffer:
                return True
            if buffer is not None and entries is not None and not torch.equal(buffer, entries):
                return True
        return False


def _generator_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)

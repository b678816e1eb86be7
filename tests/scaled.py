"""The oracle of scaled damping: D from its definition, and the step with dense D and F (docs/math.md, M17)."""

import math
from dataclasses import dataclass, field

import torch

KEEP, FLOOR, LEAST = 0.8, 0.01, 1e-4


def dense_d(scale, parameter):
    """Return D [K, K] of a parameter, in the order of its flat entries."""
    by = scale.itself()
    units = torch.eye(parameter.numel(), dtype=by.left.dtype).view(-1, *parameter.shape)
    return torch.stack([by.of_parameter(unit).flatten() for unit in units])


def unit(parameter):
    return math.sqrt(parameter[0].numel()) / 8 if parameter.dim() > 1 else 1.0


@dataclass
class Settings:
    """What the oracle needs of an optimizer's settings."""

    lr: float = 0.05
    damping: float = 0.03
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    shrink: float = 0.0
    spring: float = 0.0
    clip_threshold: float | None = 1.0
    trust_region: float | None = None


@dataclass
class DenseScaled:
    """m ← μ m + (1 − μ) V; d = ν α (F + α D)⁻¹ V̂ + λ θ; θ ← θ − η d, for every block by a dense solve."""

    settings: dict  # of each parameter, by name
    blocks: list
    means: dict = field(default_factory=dict)
    directions: dict = field(default_factory=dict)
    fisher: dict = field(default_factory=dict)
    steps: int = 0

    def refresh(self, rows, weights=None):
        for block in self.blocks:
            j_NK = torch.cat([rows[name].flatten(1) for name in block], 1)
            self.fisher[tuple(block)] = j_NK.mT @ j_NK / len(j_NK)

    def averaged(self, name, grad, d):
        own = self.settings[name]
        if own.spring:
            return grad + own.spring * (d @ self.directions.get(name, torch.zeros_like(grad)).flatten()).view_as(grad)
        mean = own.momentum * self.means.get(name, 0) + (1 - own.momentum) * grad
        self.means[name] = mean
        if not own.nesterov:
            return mean / (1 - own.momentum ** (self.steps + 1))
        return (own.momentum * mean + (1 - own.momentum) * grad) / (1 - own.momentum ** (self.steps + 2))

    def step(self, params, grads, d_of):
        """Return the parameters after a step; ``d_of`` has the dense D of each by name."""
        naturals, squares = {}, 0.0
        for block in self.blocks:
            own = self.settings[block[0]]
            v = torch.cat([self.averaged(name, grads[name], d_of[name]).flatten() for name in block])
            d, fisher = torch.block_diag(*[d_of[name] for name in block]), self.fisher[tuple(block)]
            sizes = [params[name].numel() for name in block]
            direction = own.damping * torch.linalg.solve(fisher + own.damping * d, v)
            if own.clip_threshold is not None:
                units = torch.cat([v.new_full((params[name].numel(),), unit(params[name])) for name in block])
                rms = (units * torch.linalg.solve(d, v)).square().mean().sqrt()
                direction = direction * min(1.0, own.clip_threshold / rms.item())
            rates = torch.cat([v.new_full((n,), self.settings[name].lr) for name, n in zip(block, sizes, strict=True)])
            delta = rates * direction
            squares = squares + delta @ (fisher + own.damping * d) @ delta
            naturals |= zip(block, direction.split(sizes), strict=True)
        bound = next(iter(self.settings.values())).trust_region
        scale = 1.0 if bound is None else min(1.0, math.sqrt(bound / squares.item()))
        self.steps += 1
        after = {}
        for name, theta in params.items():
            own, natural = self.settings[name], scale * naturals[name].view_as(theta)
            self.directions[name] = natural
            after[name] = (1 - own.lr * own.shrink) * theta - own.lr * (natural + own.weight_decay * theta)
        return after

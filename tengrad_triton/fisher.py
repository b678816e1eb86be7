"""Which rows J has: the likelihoods whose labels are drawn, and the names the optimizer takes.

F is the Gauss-Newton matrix of the loss that the likelihood names, with torch's ``reduction="mean"``: with damping and
learning rate going to 0 and 1 a step is the Gauss-Newton step of that very loss.

Dimensions: N samples, C classes, D outputs of a sample.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Fisher = Literal["sampled", "empirical"]
FISHERS: tuple[Fisher, ...] = ("sampled", "empirical")


@runtime_checkable
class Likelihood(Protocol):
    """What the model's output says about its targets."""

    def sample(self, output: Any, generator: torch.Generator) -> Any:
        """Draw a target for every sample from the model's own distribution."""

    def nll(self, output: Any, target: Any) -> Tensor:
        """Return the negative log-likelihood, summed over the samples: a scalar whose gradients are J's rows."""


class Noisy:
    """A likelihood that draws in two parts, so that a compiled step can take the random one from outside."""

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Return random numbers shaped like ``output``."""
        raise NotImplementedError

    def pick(self, output: Tensor, noise: Tensor) -> Tensor:
        """Return the target that ``noise`` stands for."""
        raise NotImplementedError

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return what `Likelihood.nll` does."""
        raise NotImplementedError

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a target for every sample."""
        return self.pick(output, self.noise(output, generator))


class Categorical(Noisy):
    """Logits [N, C] of one label a sample: the loss is `torch.nn.functional.cross_entropy`."""

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        _expect(output, "categorical", "logits of shape [N, C], one label a sample", dims=(2,))
        return torch.empty_like(output, dtype=torch.float32).exponential_(generator=generator)

    def pick(self, output: Tensor, noise: Tensor) -> Tensor:
        """Return the winners of a race in which class c arrives after Exp(1) / p_c: c wins with probability p_c."""
        return (output.float().softmax(1) / noise).argmax(1)

    def nll(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        return F.cross_entropy(output, target, reduction="sum")


class Gaussian(Noisy):
    """Means [N, …] of D outputs a sample: the loss is `torch.nn.functional.mse_loss`, so each variance is D / 2."""

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        _expect(output, "gaussian", "means of shape [N, ...]")
        return torch.empty_like(output).normal_(generator=generator)

    def pick(self, output: Tensor, noise: Tensor) -> Tensor:  # noqa: D102
        return output + noise * (_outputs(output) / 2) ** 0.5

    def nll(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        return (output - target).square().sum() / _outputs(output)


class Bernoulli(Noisy):
    """Logits [N, …] of D yes-or-no outputs a sample: `torch.nn.functional.binary_cross_entropy_with_logits`.

    That loss averages over the D outputs, so the derivatives are scaled by D^-½: the mean of their outer products is
    then the Gauss-Newton matrix of the loss.
    """

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        _expect(output, "bernoulli", "logits of shape [N, ...]")
        return torch.empty_like(output, dtype=torch.float32).uniform_(generator=generator)

    def pick(self, output: Tensor, noise: Tensor) -> Tensor:  # noqa: D102
        return (noise < output.sigmoid()).to(output.dtype)

    def nll(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        return F.binary_cross_entropy_with_logits(output, target, reduction="sum") * _outputs(output) ** -0.5


LIKELIHOODS: dict[str, Likelihood] = {"categorical": Categorical(), "gaussian": Gaussian(), "bernoulli": Bernoulli()}


def likelihood_of(choice: str | Likelihood) -> Likelihood:
    """Return the likelihood of that name, or the object itself."""
    if isinstance(choice, str):
        if choice not in LIKELIHOODS:
            raise ValueError(
                f"likelihood must be one of {', '.join(LIKELIHOODS)} or an object with sample and nll, got {choice!r}"
            )
        return LIKELIHOODS[choice]
    if not isinstance(choice, Likelihood):
        raise TypeError(
            f"likelihood must have sample(output, generator) and nll(output, target), got {type(choice).__name__}"
        )
    return choice


def _outputs(output: Tensor) -> int:
    return max(1, output[0].numel())


def _expect(output: Any, name: str, expected: str, dims: Container[int] = range(1, 64)) -> None:
    way_out = "choose the likelihood of your loss, or pass an object with sample and nll"
    if not isinstance(output, Tensor):
        raise TypeError(
            f"likelihood={name!r} expects {expected}; the model returned {type(output).__name__}: {way_out}"
        )
    if output.dim() not in dims:
        raise ValueError(f"likelihood={name!r} expects {expected}; the model returned {tuple(output.shape)}: {way_out}")

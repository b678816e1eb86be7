"""Which rows J has: the likelihoods whose labels are drawn, and the names the optimizer takes.

F is the Gauss-Newton matrix of the loss that the likelihood names, with torch's ``reduction="mean"``: with damping and
learning rate going to 0 and 1 a step is the Gauss-Newton step of that very loss (docs/math.md, M2 and M9).

Dimensions: N samples, C classes, D outputs of a sample, T tokens, R rows of a sample.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Fisher = Literal["sampled", "empirical", "exact"]
FISHERS: tuple[Fisher, ...] = ("sampled", "empirical", "exact")


@runtime_checkable
class Likelihood(Protocol):
    """What the model's output says about its targets."""

    def sample(self, output: Any, generator: torch.Generator) -> Any:
        """Draw a target for every sample from the model's own distribution."""

    def nll(self, output: Any, target: Any) -> Tensor:
        """Return the negative log-likelihood, summed over the samples: a scalar whose gradients are J's rows."""


@runtime_checkable
class HasHessianFactor(Protocol):
    """A likelihood that the exact Fisher matrix can be made of."""

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return s_RN…, shaped like ``output`` behind R: Σ_r s_r s_rᵀ is the Hessian of each sample's loss (M9)."""


class Reparametrized:
    """A likelihood that draws in two parts, so that a compiled step can take the random one from outside."""

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Return random numbers shaped like ``output``."""
        raise NotImplementedError

    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:
        """Return the target that ``noise`` stands for."""
        raise NotImplementedError

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return what `Likelihood.nll` does."""
        raise NotImplementedError

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a target for every sample."""
        return self.from_noise(output, self.noise(output, generator))


class Categorical(Reparametrized):
    """Logits [N, C] of one label a sample, or of a label a token: the loss is `torch.nn.functional.cross_entropy`.

    With tokens that loss is a mean over the M of them that count. A sample's own loss is then N / M times the sum over
    its tokens, whose draws are independent: derivatives scaled by (N / M)^½ have its Hessian on average (M9).

    Args:
        dim: of the classes, needed where there are tokens: 1 as in `cross_entropy` ([N, C, T, …]), or -1 for a
            language model's [N, T, C].
        ignore_index: the label of tokens that do not count.

    Attributes:
        target: the batch's labels; needed before the forward where some of them are to be ignored.
    """

    def __init__(self, dim: int | None = None, ignore_index: int = -100) -> None:
        self.dim, self.ignore_index, self.target = 1 if dim is None else dim, ignore_index, None
        self._dims = (2,) if dim is None else range(2, 64)

    target: Tensor | None

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        expected = (
            "logits of shape [N, C] (with a label a token: Categorical(dim=-1) for [N, T, C], dim=1 for [N, C, T])"
        )
        _expect(output, "categorical", expected, dims=self._dims)
        return torch.empty_like(output, dtype=torch.float32).exponential_(generator=generator)

    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:
        """Return the winners of a race in which class c arrives after Exp(1) / p_c: c wins with probability p_c."""
        return (output.float().softmax(self.dim) / noise).argmax(self.dim)

    def nll(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        # A drawn label may be the number that marks the data's ignored ones: which tokens count is in the roots.
        losses = F.cross_entropy(output.movedim(self.dim, 1), target, reduction="none")
        return (losses * self._roots(losses)).sum()

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return √p_c (e_c - p) for every token and class: diag(p) - p pᵀ is the sum of their outer products."""
        p_NCT = output.detach().movedim(self.dim, 1).softmax(1)
        shape = p_NCT.shape
        p_NCT = p_NCT.flatten(2) if p_NCT.dim() > 2 else p_NCT[..., None]
        eye_CC, eye_TT = (torch.eye(size, dtype=p_NCT.dtype, device=p_NCT.device) for size in p_NCT.shape[1:])
        root_NT = self._roots(p_NCT[:, 0]) * torch.ones_like(p_NCT[:, 0])
        s_CNCT = (p_NCT.movedim(1, 0)[:, :, None].sqrt() * (eye_CC[:, None, :, None] - p_NCT)) * root_NT[:, None]
        s_RNCT = (s_CNCT * eye_TT[:, None, None, None]).flatten(0, 1)
        return s_RNCT.reshape(-1, *shape).movedim(2, self.dim + 1 if self.dim > 0 else self.dim)

    def _roots(self, like: Tensor) -> Tensor | float:
        """Return (N / M)^½ for the tokens that count and 0 for the others; a number where all do."""
        if self.target is None:
            return float(like.shape[0] / like.numel()) ** 0.5
        counts = (self.target != self.ignore_index).view_as(like).to(like)
        return counts * (like.shape[0] / counts.sum().clamp(min=1)).sqrt()


class Gaussian(Reparametrized):
    """Means [N, …] of D outputs a sample: the loss is `torch.nn.functional.mse_loss`, so each variance is D / 2."""

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        _expect(output, "gaussian", "means of shape [N, ...]")
        return torch.empty_like(output).normal_(generator=generator)

    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:  # noqa: D102
        return output + noise * (_outputs(output) / 2) ** 0.5

    def nll(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        return (output - target).square().sum() / _outputs(output)

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return √(2 / D) e_d for every output."""
        return _one_by_one(output) * (2 / _outputs(output)) ** 0.5


class Bernoulli(Reparametrized):
    """Logits [N, …] of D yes-or-no outputs a sample: `torch.nn.functional.binary_cross_entropy_with_logits`.

    That loss averages over the D outputs, so the derivatives are scaled by D^-½: the mean of their outer products is
    then the Gauss-Newton matrix of the loss.
    """

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:  # noqa: D102
        _expect(output, "bernoulli", "logits of shape [N, ...]")
        return torch.empty_like(output, dtype=torch.float32).uniform_(generator=generator)

    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:  # noqa: D102
        return (noise < output.sigmoid()).to(output.dtype)

    def nll(self, output: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        return F.binary_cross_entropy_with_logits(output, target, reduction="sum") * _outputs(output) ** -0.5

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return √(p (1 - p) / D) e_d for every output."""
        p = output.detach().sigmoid()
        return _one_by_one(output) * (p * (1 - p) / _outputs(output)).sqrt()


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


def _one_by_one(output: Tensor) -> Tensor:
    """Return e_DN…: ones at one output of each sample at a time."""
    outputs = _outputs(output)
    eye_DD = torch.eye(outputs, dtype=output.dtype, device=output.device)
    return eye_DD.view(outputs, 1, *output.shape[1:]).expand(-1, *output.shape)


def _expect(output: Any, name: str, expected: str, dims: Container[int] = range(1, 64)) -> None:
    way_out = "choose the likelihood of your loss, or pass an object with sample and nll"
    if not isinstance(output, Tensor):
        raise TypeError(
            f"likelihood={name!r} expects {expected}; the model returned {type(output).__name__}: {way_out}"
        )
    if output.dim() not in dims:
        raise ValueError(f"likelihood={name!r} expects {expected}; the model returned {tuple(output.shape)}: {way_out}")

"""Likelihoods: from the model's output to the rows of J, for the Fisher matrix of the loss in use.

Each likelihood here belongs to one loss of torch with ``reduction="mean"``, and is scaled so that the Fisher matrix
F = Jᵀ J / N is, on average over the drawn labels, the Gauss-Newton matrix of that loss (docs/math.md, M2 and M9). As
the damping goes to 0, a step with learning rate 1 becomes the Gauss-Newton step. `why_loss_differs` says where the
caller's loss is another one.

Dimensions: N samples, C classes, D outputs of a sample, T tokens, R rows of a sample.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tengrad_triton.likelihoods.base import FISHERS, Fisher, HasHessianFactor, Likelihood, Reparametrized
from tengrad_triton.likelihoods.bernoulli import Bernoulli
from tengrad_triton.likelihoods.categorical import Categorical
from tengrad_triton.likelihoods.gaussian import Gaussian

__all__ = [
    "FISHERS",
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Fisher",
    "Gaussian",
    "HasHessianFactor",
    "Likelihood",
    "Reparametrized",
    "holds_a_batch",
    "likelihood_of",
    "why_loss_differs",
]

LIKELIHOODS: dict[str, Likelihood] = {"categorical": Categorical(), "gaussian": Gaussian(), "bernoulli": Bernoulli()}
"""The likelihoods that `TENGraD` takes by name."""


def likelihood_of(choice: str | Likelihood) -> Likelihood:
    """Return the likelihood with the name ``choice``, or ``choice`` itself.

    Args:
        choice: a key of `LIKELIHOODS`, or an object with ``sample`` and ``nll``.

    Raises:
        ValueError: there is no likelihood of that name.
        TypeError: the object lacks ``sample`` or ``nll``.
    """
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


def why_loss_differs(likelihood: Any, output: Any, grad: Any) -> str | None:
    """Return why the caller's loss is not the likelihood's, or None where that is not seen.

    It reads all of the output several times, so it is for the first refresh and not for each step. For an object
    without a method of this name, and for an output that is no tensor, it returns None.

    Args:
        likelihood: one of the likelihoods here, or your own object, which may have the method
            ``why_loss_differs(output, grad)``.
        output: what the model returned, a tensor [N, …].
        grad: the derivative of the caller's whole loss with respect to it, times the number of samples of all forwards
            of the step: where the loss is the mean over these samples of their own losses, ``grad[n]`` is the
            derivative of sample n's own loss.

    Raises:
        ValueError: the output, or a tensor that was set for this batch, has a shape that does not fit.
    """
    method = getattr(likelihood, "why_loss_differs", None)
    if method is None or not isinstance(output, Tensor) or not isinstance(grad, Tensor):
        return None
    return method(output.detach(), grad.detach())


def holds_a_batch(likelihood: Any) -> bool:
    """Return whether labels or weights of one batch are set, which would become constants of a compiled refresh.

    Args:
        likelihood: one of the likelihoods here, or your own object.
    """
    return any(getattr(likelihood, name, None) is not None for name in ("target", "sample_weight"))

"""What a likelihood is, and what those of torch's losses share: attributes of one batch, and checks of shapes."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Fisher = Literal["sampled", "empirical", "exact"]
"""Which rows J has: at drawn labels, at the data's labels, or for every output of the model (docs/math.md, M2)."""
FISHERS: tuple[Fisher, ...] = ("sampled", "empirical", "exact")
"""All values of `Fisher`."""


@runtime_checkable
class Likelihood(Protocol):
    """The distribution of the targets, whose parameters are the model's output, such as logits or means.

    The rows of J of the sampled Fisher are the derivatives of `nll` at targets from `sample`.
    """

    def sample(self, output: Any, generator: torch.Generator) -> Any:
        """Draw a target for every sample from the model's own distribution.

        Args:
            output: what the model returned, detached: for the likelihoods here a tensor [N, …].
            generator: the random number generator that draws the targets, on the device of the model's parameters.

        Returns:
            Targets in the form that `nll` expects.

        Raises:
            TypeError: the output is not a tensor. The likelihoods here raise this; your own need not.
            ValueError: the output has a shape that does not fit the likelihood. Again, your own need not raise this.
        """

    def nll(self, output: Any, target: Any) -> Tensor:
        """Return the negative log-likelihood (natural logarithm) as a scalar: the sum over the samples, not their mean.

        Row n of J is the derivative of sample n's term with respect to the parameters. That term must depend on the
        output for sample n only.

        Args:
            output: what the model returned, with its graph.
            target: what `sample` returned for this output.
        """


@runtime_checkable
class HasHessianFactor(Protocol):
    """A likelihood for ``fisher="exact"``, which computes rows without drawing labels."""

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return a factor of the Hessian of each sample's own loss with respect to its output (docs/math.md, M9).

        Args:
            output: what the model returned: a tensor [N, …].

        Returns:
            s_RN… [R, N, …], shaped like R outputs, with H_n = Σ_r s_rn s_rnᵀ for every sample n.
        """


class Reparametrized:
    """A likelihood that draws targets in two parts: random numbers first, then a function of them and the output.

    A compiled step needs this, because it receives the random numbers as an input of its graph.
    """

    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Return random numbers whose distribution does not depend on the values of ``output``.

        Args:
            output: what the model returned, detached [N, …].
            generator: the random number generator that draws them, on the device of the model's parameters.

        Returns:
            a tensor of the output's shape.
        """
        raise NotImplementedError

    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:
        """Return the targets that random numbers give for an output, in the form that `nll` expects.

        Args:
            output: what the model returned, detached [N, …].
            noise: what `noise` returned for an output of this shape.
        """
        raise NotImplementedError

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood, summed over the samples: see `Likelihood.nll`.

        Args:
            output: what the model returned, with its graph [N, …].
            target: what `sample` returned for this output.
        """
        raise NotImplementedError

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a target for every sample: see `Likelihood.sample`.

        Args:
            output: what the model returned, detached [N, …].
            generator: the random number generator that draws the targets.

        Returns:
            targets in the form that `nll` expects.
        """
        return self.from_noise(output, self.noise(output, generator))


class OfTorch(Reparametrized):
    """The likelihood of one of torch's losses, with what may be said of one batch. Set it before each forward.

    Attributes:
        target: the targets of the batch, or None. Each likelihood says what it needs them for.
        sample_weight: a number ≥ 0 for each sample [N], or None. The loss is then the mean over the samples of
            ``sample_weight[n]`` times sample n's own loss. For a loss that divides by the sum of the weights instead of
            N, set N times the weights over their sum.
    """

    def __init__(self) -> None:
        self.target: Tensor | None = None
        self.sample_weight: Tensor | None = None

    def target_shape(self, output: Tensor) -> tuple[int, ...]:
        """Return the shape of the targets for ``output``."""
        return tuple(output.shape)

    def target_for(self, output: Tensor) -> Tensor | None:
        """Return the targets, on the output's device.

        Raises:
            ValueError: they have not the shape that belongs to the output: they are probably those of another batch.
        """
        if self.target is None:
            return None
        _check_shape("target", self.target, self.target_shape(output), output)
        return self.target.to(output.device)

    def needed_target_for(self, output: Tensor, setting: str) -> Tensor:
        """Return the targets, which ``setting`` needs.

        Raises:
            ValueError: there are none, or they have another shape.
        """
        target = self.target_for(output)
        if target is None:
            name = type(self).__name__
            raise ValueError(
                f"{name}({setting}=...) needs the targets of the batch, because {setting} makes the loss's Hessian "
                f"depend on them; its target is None: set likelihood.target to a tensor of shape "
                f"{self.target_shape(output)} before the forward"
            )
        return target

    def sample_weight_for(self, output: Tensor) -> Tensor | None:
        """Return the weights of the samples in the output's dtype, at least float32: [N, 1, …], or None.

        Raises:
            ValueError: their shape is not [N], or one is below 0.
        """
        weight = self.sample_weight
        if weight is None:
            return None
        _check_shape("sample_weight", weight, (len(output),), output)
        _check_not_negative("sample_weight", weight)
        return weight.to(output.device, wide(output.dtype)).view(-1, *[1] * (output.dim() - 1))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype``, or float32 for a shorter one: sums of many weights overflow in float16."""
    return torch.promote_types(dtype, torch.float32)


def outputs_of(output: Tensor) -> int:
    """Return D, the number of outputs of a sample."""
    return max(1, output[0].numel())


def unit_vectors(output: Tensor) -> Tensor:
    """Return e_DN… [D, N, …]: a 1 at output d of every sample, for each d, and zeros elsewhere."""
    outputs = outputs_of(output)
    eye_DD = torch.eye(outputs, dtype=output.dtype, device=output.device)
    return eye_DD.view(outputs, 1, *output.shape[1:]).expand(-1, *output.shape)


def check_output(output: Any, name: str, expected: str, dims: Container[int] = range(1, 64)) -> None:
    """Raise unless the output is a tensor with a fitting number of dimensions."""
    remedy = "choose the likelihood of your loss, or pass an object with sample and nll"
    if not isinstance(output, Tensor):
        raise TypeError(f"likelihood={name!r} expects {expected}; the model returned {type(output).__name__}: {remedy}")
    if output.dim() not in dims:
        raise ValueError(f"likelihood={name!r} expects {expected}; the model returned {tuple(output.shape)}: {remedy}")


def weights_of(name: str, values: Any) -> Tensor | None:
    """Return a setting's weights as a tensor.

    Raises:
        ValueError: one is below 0, which makes no curvature.
        TypeError: they are no numbers.
    """
    if values is None:
        return None
    try:
        weight = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers of at least 0, got {values!r}") from error
    _check_not_negative(name, weight)
    return weight if weight.is_floating_point() else weight.float()


def _check_not_negative(name: str, weight: Tensor) -> None:
    if not bool((weight >= 0).all()):
        raise ValueError(f"{name} must be numbers of at least 0, got {float(weight.min())}: such a loss has no minimum")


def _check_shape(name: str, value: Tensor, expected: tuple[int, ...], output: Tensor) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(
            f"likelihood.{name} has shape {tuple(value.shape)}, but the model returned {tuple(output.shape)}, to which "
            f"{name} of shape {expected} belong: set {name} of this batch before its forward, or None"
        )

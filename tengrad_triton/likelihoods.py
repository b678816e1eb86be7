"""Likelihoods: from the model's output to the rows of J, for the Fisher matrix of the loss in use.

Each likelihood here belongs to one loss of torch with ``reduction="mean"``, and is scaled so that the Fisher matrix
F = Jᵀ J / N is, on average over the drawn labels, the Gauss-Newton matrix of that loss (docs/math.md, M2 and M9). As
the damping goes to 0, a step with learning rate 1 becomes the Gauss-Newton step.

Dimensions: N samples, C classes, D outputs of a sample, T tokens, R rows of a sample.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

Fisher = Literal["sampled", "empirical", "exact"]
"""Which rows J has: at drawn labels, at the data's labels, or for every output of the model (docs/math.md, M2)."""
FISHERS: tuple[Fisher, ...] = ("sampled", "empirical", "exact")


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
        """Return random numbers, shaped like ``output``, whose distribution does not depend on its values."""
        raise NotImplementedError

    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:
        """Return the target that ``noise`` gives for ``output``."""
        raise NotImplementedError

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood, summed over the samples: see `Likelihood.nll`."""
        raise NotImplementedError

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a target for every sample: see `Likelihood.sample`."""
        return self.from_noise(output, self.noise(output, generator))


class Categorical(Reparametrized):
    """One label for each sample, or one for each token; the loss is `torch.nn.functional.cross_entropy`.

    The output is logits: [N, C], or with tokens [N, C, T, …] or [N, T, C]. With tokens the loss is a mean over the M
    tokens that count, so a sample's own loss is N / M times the sum over its tokens. The labels of the tokens are drawn
    independently. So if the derivatives are multiplied by (N / M)^½, the mean of their outer products over the draws is
    the Hessian of the sample's own loss (docs/math.md, M9).

    Args:
        dim: the dimension of the classes if there are tokens: 1 as in `cross_entropy` ([N, C, T, …]), or -1 for the
            output of a language model ([N, T, C]). None for one label for each sample.
        ignore_index: the label that marks tokens which do not count.

    Attributes:
        target: the labels of the batch, [N] or [N, T, …]. Set it before each forward if some of them are to be
            ignored. While it is None, all tokens count.

    Raises:
        TypeError: on sampling, if the output is not a tensor.
        ValueError: on sampling, if the output does not have the shape above.
    """

    def __init__(self, dim: int | None = None, ignore_index: int = -100) -> None:
        self.dim, self.ignore_index = 1 if dim is None else dim, ignore_index
        self.target: Tensor | None = None
        self._dims = (2,) if dim is None else range(2, 64)

    @override
    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        expected = (
            "logits of shape [N, C] (with one label for each token use Categorical(dim=-1) for [N, T, C], or dim=1 for "
            "[N, C, T])"
        )
        _check_output(output, "categorical", expected, dims=self._dims)
        return torch.empty_like(output, dtype=torch.float32).exponential_(generator=generator)

    @override
    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:
        """Return the class c with the smallest noise_c / p_c, which is class c with probability p_c."""
        return (output.float().softmax(self.dim) / noise).argmax(self.dim)

    @override
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        # Without ignore_index, which a drawn label may equal: the weights ω are 0 for tokens that do not count.
        losses = F.cross_entropy(output.movedim(self.dim, 1), target, reduction="none")
        return (losses * self._root_weights(losses)).sum()

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return √(ω_t p_tc) (e_c − p_t) for every class c and token t: [C·T, N, …] (docs/math.md, M9).

        The sum of their outer products over c is ω_t (diag(p_t) − p_t p_tᵀ), with ω_t = N / M for tokens that count and
        0 for the others. See `HasHessianFactor.hessian_factor`.
        """
        p_NCT = output.detach().movedim(self.dim, 1).softmax(1)
        shape = p_NCT.shape
        p_NCT = p_NCT.flatten(2) if p_NCT.dim() > 2 else p_NCT[..., None]
        eye_CC, eye_TT = (torch.eye(size, dtype=p_NCT.dtype, device=p_NCT.device) for size in p_NCT.shape[1:])
        root_NT = self._root_weights(p_NCT[:, 0]) * torch.ones_like(p_NCT[:, 0])
        s_CNCT = (p_NCT.movedim(1, 0)[:, :, None].sqrt() * (eye_CC[:, None, :, None] - p_NCT)) * root_NT[:, None]
        s_RNCT = (s_CNCT * eye_TT[:, None, None, None]).flatten(0, 1)
        return s_RNCT.reshape(-1, *shape).movedim(2, self.dim + 1 if self.dim > 0 else self.dim)

    def _root_weights(self, like: Tensor) -> Tensor | float:
        """Return √ω: (N / M)^½ for tokens that count and 0 for the others; a single number if all tokens count."""
        if self.target is None:
            return float(like.shape[0] / like.numel()) ** 0.5
        counts = (self.target != self.ignore_index).view_as(like).to(like)
        return counts * (like.shape[0] / counts.sum().clamp(min=1)).sqrt()


class Gaussian(Reparametrized):
    """Real outputs [N, …], D of them for each sample; the loss is `torch.nn.functional.mse_loss`.

    The output is the mean. Each variance is D / 2, in squared units of the output, so that the negative log-likelihood
    is the squared error divided by D, plus a constant that `nll` leaves out (docs/math.md, M2).

    Raises:
        TypeError: on sampling, if the output is not a tensor.
        ValueError: on sampling, if the output is a scalar.
    """

    @override
    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        _check_output(output, "gaussian", "means of shape [N, ...]")
        return torch.empty_like(output).normal_(generator=generator)

    @override
    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:
        return output + noise * (_outputs(output) / 2) ** 0.5

    @override
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum() / _outputs(output)

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return √(2 / D) e_d for every output d: [D, N, …]. See `HasHessianFactor.hessian_factor` and M9."""
        return _unit_vectors(output) * (2 / _outputs(output)) ** 0.5


class Bernoulli(Reparametrized):
    """Yes-or-no outputs, D for each sample; the loss is `torch.nn.functional.binary_cross_entropy_with_logits`.

    The output is logits [N, …]. The loss is a mean over the D outputs, so the derivatives are multiplied by D^-½. The
    mean of their outer products over the draws is then the Gauss-Newton matrix of the loss (docs/math.md, M2).

    Raises:
        TypeError: on sampling, if the output is not a tensor.
        ValueError: on sampling, if the output is a scalar.
    """

    @override
    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        _check_output(output, "bernoulli", "logits of shape [N, ...]")
        return torch.empty_like(output, dtype=torch.float32).uniform_(generator=generator)

    @override
    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:
        return (noise < output.sigmoid()).to(output.dtype)

    @override
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, target, reduction="sum") * _outputs(output) ** -0.5

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return √(p_d (1 − p_d) / D) e_d for every d: [D, N, …]. See `HasHessianFactor.hessian_factor` and M9."""
        p = output.detach().sigmoid()
        return _unit_vectors(output) * (p * (1 - p) / _outputs(output)).sqrt()


LIKELIHOODS: dict[str, Likelihood] = {"categorical": Categorical(), "gaussian": Gaussian(), "bernoulli": Bernoulli()}
"""The likelihoods that `TENGraD` takes by name."""


def likelihood_of(choice: str | Likelihood) -> Likelihood:
    """Return the likelihood with the name ``choice``, or ``choice`` itself.

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


def _outputs(output: Tensor) -> int:
    """Return D, the number of outputs of a sample."""
    return max(1, output[0].numel())


def _unit_vectors(output: Tensor) -> Tensor:
    """Return e_DN… [D, N, …]: a 1 at output d of every sample, for each d, and zeros elsewhere."""
    outputs = _outputs(output)
    eye_DD = torch.eye(outputs, dtype=output.dtype, device=output.device)
    return eye_DD.view(outputs, 1, *output.shape[1:]).expand(-1, *output.shape)


def _check_output(output: Any, name: str, expected: str, dims: Container[int] = range(1, 64)) -> None:
    remedy = "choose the likelihood of your loss, or pass an object with sample and nll"
    if not isinstance(output, Tensor):
        raise TypeError(f"likelihood={name!r} expects {expected}; the model returned {type(output).__name__}: {remedy}")
    if output.dim() not in dims:
        raise ValueError(f"likelihood={name!r} expects {expected}; the model returned {tuple(output.shape)}: {remedy}")


def why_loss_differs(likelihood: Any, output: Tensor, grad: Tensor) -> str | None:
    method = getattr(likelihood, "why_loss_differs", None)
    return None if method is None else method(output, grad)

"""Real outputs with squared errors: `Gaussian`."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from tengrad_triton.likelihoods.base import OfTorch, check_output, outputs_of, unit_vectors, wide
from tengrad_triton.likelihoods.contract import why_not_squares, why_not_this


class Gaussian(OfTorch):
    """Real outputs [N, …], D of them for each sample; the loss is `torch.nn.functional.mse_loss`.

    The output is the mean. Each variance is D / 2, in squared units of the output, so that the negative log-likelihood
    is the squared error divided by D, plus a constant that `nll` leaves out (docs/math.md, M2).

    Attributes:
        target: the targets of the batch [N, …], or None. They are for `why_loss_differs` only.
        sample_weight: the weights of the samples: see `OfTorch`.

    Raises:
        TypeError: on sampling, if the output is not a tensor.
        ValueError: on sampling and for exact rows, if the output is a scalar, or `target` or `sample_weight` do not
            fit.
    """

    @override
    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        self._check(output)
        return torch.empty_like(output).normal_(generator=generator)

    @override
    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:
        return output + noise * (outputs_of(output) / 2) ** 0.5

    @override
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        squares = (output - target).square()
        weight = self.sample_weight_for(output)
        # The root, because a row is squared in F: the draws do not depend on the weights.
        squares = squares if weight is None else squares * weight.sqrt().to(squares.dtype)
        return squares.sum() / outputs_of(output)

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return √(2 / D) e_d for every output d: [D, N, …]. See `HasHessianFactor.hessian_factor` and M9.

        Args:
            output: the model's output [N, …].

        Raises:
            ValueError: the output is a scalar, or `target` or `sample_weight` have a shape that does not fit.
            TypeError: the output is not a tensor.
        """
        self._check(output)
        factor_DN = unit_vectors(output) * (2 / outputs_of(output)) ** 0.5
        weight = self.sample_weight_for(output)
        return factor_DN if weight is None else factor_DN * weight.sqrt().to(output.dtype)

    def why_loss_differs(self, output: Tensor, grad: Tensor) -> str | None:
        """Return why a loss with this derivative is not the mean squared error, or None where none is seen.

        With `target` everything is seen. Without it nearly nothing: for any derivative g, the targets o − D g / 2 make
        it that of the mean squared error. Only absolute and Huber errors and cross entropies are seen then
        (docs/math.md, M16).

        Args:
            output: the model's output [N, …].
            grad: the derivative of each sample's own loss with respect to it: see `why_loss_differs`.

        Raises:
            ValueError: `target` or `sample_weight` have a shape that does not fit.
        """
        self._check(output)
        target, weight = self.target_for(output), self.sample_weight_for(output)
        if target is None:
            return why_not_squares(output, grad)
        mean, target = output.to(wide(output.dtype)), target.to(wide(output.dtype))
        scale = (1 if weight is None else weight) * (2 / outputs_of(output))
        size = (mean.abs() + target.abs()) * scale
        return why_not_this(output, grad, (mean - target) * scale, size, "the mean squared error of target")

    def _check(self, output: Tensor) -> None:
        check_output(output, "gaussian", "means of shape [N, ...]")
        self.target_for(output)

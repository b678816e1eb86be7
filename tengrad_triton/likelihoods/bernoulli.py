"""Yes-or-no outputs under the logistic function: `Bernoulli`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from tengrad_triton.likelihoods.base import OfTorch, check_output, outputs_of, unit_vectors, weights_of, wide
from tengrad_triton.likelihoods.contract import why_not_bernoulli, why_not_this


class Bernoulli(OfTorch):
    """Yes-or-no outputs, D for each sample; the loss is `torch.nn.functional.binary_cross_entropy_with_logits`.

    The output is logits [N, …]. The loss is a mean over the D outputs, so the derivatives are multiplied by D^-½. The
    mean of their outer products over the draws is then the Gauss-Newton matrix of the loss (docs/math.md, M2).

    Args:
        pos_weight: that of the loss: numbers of at least 0 that broadcast to the output, such as one number or [D].
            The Hessian of output d is then multiplied by 1 + (pos_weight_d − 1) y_d, so it needs `target`.

    Attributes:
        target: the targets y of the batch in [0, 1], shaped like the output. They are for ``pos_weight`` only.
        sample_weight: the weights of the samples: see `OfTorch`.

    Raises:
        TypeError: ``pos_weight`` holds no numbers; on sampling, if the output is not a tensor.
        ValueError: ``pos_weight`` is below 0. On sampling and for exact rows: the output is a scalar, or `target` or
            `sample_weight` do not fit.
    """

    def __init__(self, pos_weight: Tensor | Sequence[float] | float | None = None) -> None:
        super().__init__()
        self.pos_weight = weights_of("pos_weight", pos_weight)

    @override
    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        self._check(output)
        return torch.empty_like(output, dtype=torch.float32).uniform_(generator=generator)

    @override
    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:
        return (noise < output.sigmoid()).to(output.dtype)

    @override
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        weights = self._weights(output)
        root = None if weights is None else weights.sqrt().to(output.dtype)
        scale = outputs_of(output) ** -0.5
        return F.binary_cross_entropy_with_logits(output, target, weight=root, reduction="sum") * scale

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return √(p_d (1 − p_d) / D) e_d for every d: [D, N, …]. See `HasHessianFactor.hessian_factor` and M9.

        Args:
            output: the logits [N, …].

        Raises:
            ValueError: the output is a scalar, or `target` or `sample_weight` have a shape that does not fit.
            TypeError: the output is not a tensor.
        """
        self._check(output)
        p, weights = output.detach().sigmoid(), self._weights(output)
        variance = p * (1 - p) if weights is None else p * (1 - p) * weights.to(p.dtype)
        return unit_vectors(output) * (variance / outputs_of(output)).sqrt()

    def why_loss_differs(self, output: Tensor, grad: Tensor) -> str | None:
        """Return why a loss with this derivative g is not the binary cross entropy of these logits, or None.

        Without ``pos_weight``, the targets would be p − D g, which must be in [0, 1]. docs/math.md, M16, says what else
        is seen, and what is not.

        Args:
            output: the logits [N, …].
            grad: the derivative of each sample's own loss with respect to them: see `why_loss_differs`.

        Raises:
            ValueError: `target` or `sample_weight` have a shape that does not fit.
        """
        self._check(output)
        weights, outputs = self._weights(output), outputs_of(output)
        if self.pos_weight is None:
            omega = torch.ones((), device=output.device) if weights is None else weights
            return why_not_bernoulli(output, grad, omega.to(wide(output.dtype)).expand_as(output) / outputs)
        y = self.needed_target_for(output, "pos_weight").to(wide(output.dtype))
        positive, own = y * self.pos_weight.to(y), self.sample_weight_for(output)
        scale = (1 if own is None else own) / outputs
        expected, size = output.to(y.dtype).sigmoid() * (1 - y + positive) - positive, 1 + positive
        name = "the binary cross entropy of target with pos_weight"
        return why_not_this(output, grad, expected * scale, size * scale, name)

    def _check(self, output: Tensor) -> None:
        check_output(output, "bernoulli", "logits of shape [N, ...]")
        self.target_for(output)

    def _weights(self, output: Tensor) -> Tensor | None:
        """Return what multiplies the Hessian of each output, shaped like the output; None for 1 everywhere."""
        own = self.sample_weight_for(output)
        if self.pos_weight is None:
            return None if own is None else own.expand_as(output)
        y = self.needed_target_for(output, "pos_weight").to(wide(output.dtype))
        weights = 1 + (self.pos_weight.to(y) - 1) * y
        return weights if own is None else weights * own

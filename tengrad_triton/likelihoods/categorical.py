"""Labels under softmax: `Categorical`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from tengrad_triton.likelihoods.base import OfTorch, check_output, weights_of, wide
from tengrad_triton.likelihoods.contract import why_not_categorical, why_not_this


class Categorical(OfTorch):
    """One label for each sample, or one for each token; the loss is `torch.nn.functional.cross_entropy`.

    The output is logits: [N, C], or with tokens [N, C, T, …] or [N, T, C]. With tokens the loss is a mean over the M
    tokens that count, so a sample's own loss is N / M times the sum over its tokens. The labels of the tokens are drawn
    independently. So if the derivatives are multiplied by (N / M)^½, the mean of their outer products over the draws is
    the Hessian of the sample's own loss (docs/math.md, M9).

    That Hessian does not depend on the labels, as long as they sum to 1. So smoothed labels, mixed labels and those of
    a teacher need no setting. With class weights it does depend on them.

    Args:
        dim: the dimension of the classes if there are tokens: 1 as in `cross_entropy` ([N, C, T, …]), or -1 for the
            output of a language model ([N, T, C]). None for one label for each sample.
        ignore_index: the label that marks tokens which do not count.
        weight: the class weights of `cross_entropy`, [C] numbers of at least 0. They need `target`.
        label_smoothing: that of `cross_entropy`, as a number in [0, 1]. It matters only together with ``weight``.

    Attributes:
        target: the labels of the batch, [N] or [N, T, …], integers. Set it before each forward if some of them are to
            be ignored, or if there are class weights. While it is None, all tokens count.
        sample_weight: the weights of the samples: see `OfTorch`.

    Raises:
        TypeError: ``weight`` holds no numbers; on sampling, if the output is not a tensor.
        ValueError: a weight is below 0, or ``label_smoothing`` is not in [0, 1]. On sampling and for exact rows: the
            output does not have the shape above, it has a single class, or `target` or `sample_weight` do not fit.
    """

    def __init__(
        self,
        dim: int | None = None,
        ignore_index: int = -100,
        weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be a number in [0, 1], got {label_smoothing}")
        self.dim, self.ignore_index = 1 if dim is None else dim, ignore_index
        self.weight, self.label_smoothing = weights_of("weight", weight), label_smoothing
        self._dims = (2,) if dim is None else range(2, 64)

    @override
    def noise(self, output: Tensor, generator: torch.Generator) -> Tensor:
        self._check(output)
        return torch.empty_like(output, dtype=torch.float32).exponential_(generator=generator)

    @override
    def from_noise(self, output: Tensor, noise: Tensor) -> Tensor:
        """Return the class c with the smallest noise_c / p_c, which is class c with probability p_c."""
        return (output.float().softmax(self.dim) / noise).argmax(self.dim)

    @override
    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        # Without ignore_index, which a drawn label may equal: the weights ω are 0 for tokens that do not count.
        losses = F.cross_entropy(output.movedim(self.dim, 1), target, reduction="none")
        return (losses * self._root_weights(output)).sum()

    def hessian_factor(self, output: Tensor) -> Tensor:
        """Return √(ω_t p_tc) (e_c − p_t) for every class c and token t: [C·T, N, …] (docs/math.md, M9).

        The sum of their outer products over c is ω_t (diag(p_t) − p_t p_tᵀ), with ω_t = N / M for tokens that count and
        0 for the others, or what the weights make of it. See `HasHessianFactor.hessian_factor`.

        Args:
            output: the logits, with their shape as above.

        Raises:
            ValueError: the output, `target` or `sample_weight` have a shape that does not fit.
            TypeError: the output is not a tensor.
        """
        self._check(output)
        p_NCT = output.detach().movedim(self.dim, 1).softmax(1)
        shape = p_NCT.shape
        p_NCT = p_NCT.flatten(2) if p_NCT.dim() > 2 else p_NCT[..., None]
        eye_CC, eye_TT = (torch.eye(size, dtype=p_NCT.dtype, device=p_NCT.device) for size in p_NCT.shape[1:])
        root = self._root_weights(output)
        root_NT = torch.as_tensor(root, dtype=p_NCT.dtype, device=p_NCT.device).expand(self.target_shape(output))
        root_NT = root_NT.reshape(len(p_NCT), -1)
        s_CNCT = (p_NCT.movedim(1, 0)[:, :, None].sqrt() * (eye_CC[:, None, :, None] - p_NCT)) * root_NT[:, None]
        s_RNCT = (s_CNCT * eye_TT[:, None, None, None]).flatten(0, 1)
        return s_RNCT.reshape(-1, *shape).movedim(2, self.dim + 1 if self.dim > 0 else self.dim)

    @override
    def target_shape(self, output: Tensor) -> tuple[int, ...]:
        """Return the shape of the labels: that of the output without its classes."""
        return tuple(output.movedim(self.dim, 1)[:, 0].shape)

    def why_loss_differs(self, output: Tensor, grad: Tensor) -> str | None:
        """Return why a loss with this derivative is no cross entropy of these logits, or None where none is seen.

        Class weights, weights of the samples, a factor, a focal loss, and losses of other kinds are seen; any labels
        that sum to 1 fit. docs/math.md, M16, says how, and what is not seen.

        Args:
            output: the logits, with their shape as above.
            grad: the derivative of each sample's own loss with respect to them: see `why_loss_differs`.

        Raises:
            ValueError: the output, `target` or `sample_weight` have a shape that does not fit.
        """
        self._check(output)
        weights = torch.as_tensor(self._weights(output), dtype=wide(output.dtype), device=output.device)
        omega_NT = weights.expand(self.target_shape(output))
        last, grad = output.movedim(self.dim, -1), grad.movedim(self.dim, -1)
        if self.weight is None:
            return why_not_categorical(last, grad, omega_NT, self.target is not None)
        expected, size = self._derivative(output, omega_NT), 2 * omega_NT[..., None]
        return why_not_this(last, grad, expected, size, "the weighted cross entropy of target")

    def _check(self, output: Tensor) -> None:
        expected = (
            "logits of shape [N, C] (with one label for each token use Categorical(dim=-1) for [N, T, C], or dim=1 for "
            "[N, C, T])"
        )
        check_output(output, "categorical", expected, dims=self._dims)
        if output.shape[self.dim] == 1:
            raise ValueError(
                f"likelihood='categorical' expects several classes, but the model returned {tuple(output.shape)}, with "
                f"one class along dimension {self.dim}: its probability is always 1, so all rows would be 0: use "
                "likelihood='gaussian' for mse_loss, or 'bernoulli' for binary_cross_entropy_with_logits"
            )

    def _root_weights(self, output: Tensor) -> Tensor | float:
        """Return √ω in the output's dtype, shaped for the tokens' losses; a number if all are equal."""
        weights = self._weights(output)
        return weights**0.5 if isinstance(weights, float) else weights.sqrt().to(output.dtype)

    def _weights(self, output: Tensor) -> Tensor | float:
        """Return ω for each label [N, T, …]: N times what the loss multiplies this label's Hessian by."""
        shape = self.target_shape(output)
        weights = self._label_weights(output)
        own = self.sample_weight_for(output)
        return weights if own is None else (weights * own.view(-1, *[1] * (len(shape) - 1))).expand(shape)

    def _label_weights(self, output: Tensor) -> Tensor | float:
        """Return ω without the weights of the samples: N / M, or N w / Σ w with class weights; 0 for ignored ones."""
        if self.weight is not None:
            weight_C, labels, counts = self._of_labels(output)
            weights = weight_C[labels] * counts
            total = weights.sum()
            smoothing = self.label_smoothing
            weights = (1 - smoothing) * weights + smoothing * weight_C.mean() * counts
            return weights * len(output) / torch.where(total > 0, total, 1)
        target = self.target_for(output)
        if target is None:
            return len(output) * output.shape[self.dim] / output.numel()
        counts = (target != self.ignore_index).to(wide(output.dtype))
        return counts * (len(output) / counts.sum().clamp(min=1))

    def _of_labels(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the class weights [C], the labels (0 for ignored ones), and 1 for each label that counts."""
        target, classes = self.needed_target_for(output, "weight"), output.shape[self.dim]
        weight_C = torch.as_tensor(self.weight).to(output.device, wide(output.dtype))
        if weight_C.shape != (classes,) or target.is_floating_point():
            raise ValueError(
                f"Categorical(weight=...) needs a weight for each of the {classes} classes and integer labels, got "
                f"weights of shape {tuple(weight_C.shape)} and a target of {target.dtype}: for other targets leave "
                "weight out and set likelihood.sample_weight"
            )
        counts = target != self.ignore_index
        return weight_C, target.where(counts, 0).long(), counts.to(weight_C.dtype)

    def _derivative(self, output: Tensor, omega_NT: Tensor) -> Tensor:
        """Return the derivative of each sample's own loss with class weights; the classes are last."""
        weight_C, labels, _ = self._of_labels(output)
        smoothing, classes = self.label_smoothing, len(weight_C)
        target_NTC = (1 - smoothing) * F.one_hot(labels, classes) + smoothing / classes
        target_NTC = weight_C * target_NTC
        target_NTC = target_NTC / target_NTC.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_C.dtype).tiny)
        return (output.movedim(self.dim, -1).to(weight_C.dtype).softmax(-1) - target_NTC) * omega_NT[..., None]

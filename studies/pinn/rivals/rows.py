"""Residuals of all terms and their Jacobian, formed or as factors of each layer.

Key: N rows, P parameters, C channels, I inputs, O outputs, Q some columns, K columns of y.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from studies.pinn.rivals.taylor import LayerTape

BLOCK = 2**25
"The most numbers of J that are formed at once: 256 MB."


class Rows(ABC):
    """Residuals and their Jacobian at one point of the parameters.

    Attributes:
        residual_N: r.
    """

    residual_N: Tensor

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return J, ``[N, P]``, with the parameters in the order of ``model.parameters()``."""

    @abstractmethod
    def gram(self) -> Tensor:
        """Return J Jᵀ, ``[N, N]``."""

    @abstractmethod
    def times(self, v_P: Tensor) -> Tensor:
        """Return J v, ``[N]``."""

    @abstractmethod
    def transposed(self, y_N: Tensor) -> Tensor:
        """Return Jᵀ y, ``[P]``."""

    @abstractmethod
    def gram_times(self, y_NK: Tensor) -> Tensor:
        """Return J Jᵀ y, ``[N, K]``."""


class DenseRows(Rows):
    """Rows of any residual functions, formed."""

    def __init__(self, residual_N: Tensor, jacobian_NP: Tensor) -> None:
        self.residual_N = residual_N
        self.jacobian_NP = jacobian_NP

    @override
    def matrix(self) -> Tensor:
        return self.jacobian_NP

    @override
    def gram(self) -> Tensor:
        return self.jacobian_NP @ self.jacobian_NP.T

    @override
    def times(self, v_P: Tensor) -> Tensor:
        return self.jacobian_NP @ v_P

    @override
    def transposed(self, y_N: Tensor) -> Tensor:
        return self.jacobian_NP.T @ y_N

    @override
    def gram_times(self, y_NK: Tensor) -> Tensor:
        return self.jacobian_NP @ (self.jacobian_NP.T @ y_NK)


class FactoredRows(Rows):
    """Rows as sums of outer products: the row of a weight is Σ_c grad_c ⊗ input_c, and that of its bias is grad_0.

    Attributes:
        tapes: for each term, the tape of each layer, with the term's √(w / N) in the gradients.
    """

    def __init__(self, residual_N: Tensor, tapes: list[list[LayerTape]]) -> None:
        self.residual_N = residual_N
        self.tapes = tapes
        self.counts = [layers[0].input_CNI.shape[1] for layers in tapes]

    @override
    def matrix(self) -> Tensor:
        blocks = [self._block(layer, slice(None)) for layer in range(len(self.tapes[0]))]
        parts = [part for block_NOI in blocks for part in (block_NOI[..., :-1].flatten(1), block_NOI[..., -1])]
        return torch.cat(parts, 1)

    @override
    def gram(self) -> Tensor:
        rows = sum(self.counts)
        gram_NN = self.residual_N.new_zeros(rows, rows)
        for block_NQ in self._blocks():
            gram_NN.addmm_(block_NQ, block_NQ.T)
        return gram_NN

    @override
    def times(self, v_P: Tensor) -> Tensor:
        results = []
        for layers in self.tapes:
            total_N, rest_P = torch.zeros_like(layers[0].grad_CNO[0, :, 0]), v_P
            for tape in layers:
                weight_OI, bias_O, rest_P = _split(rest_P, tape)
                total_N = total_N + (tape.grad_CNO * (tape.input_CNI @ weight_OI.T)).sum((0, 2))
                total_N = total_N + tape.grad_CNO[0] @ bias_O
            results.append(total_N)
        return torch.cat(results)

    @override
    def transposed(self, y_N: Tensor) -> Tensor:
        total_P: Tensor | None = None
        for layers, y_n in zip(self.tapes, y_N.split(self.counts), strict=True):
            parts = []
            for tape in layers:
                scaled_CNO = tape.grad_CNO * y_n[:, None]
                parts.append((scaled_CNO.flatten(0, 1).T @ tape.input_CNI.flatten(0, 1)).flatten())
                parts.append(scaled_CNO[0].sum(0))
            total_P = torch.cat(parts) if total_P is None else total_P + torch.cat(parts)
        assert total_P is not None
        return total_P

    @override
    def gram_times(self, y_NK: Tensor) -> Tensor:
        total_NK = torch.zeros_like(y_NK)
        for block_NQ in self._blocks():
            total_NK.addmm_(block_NQ, block_NQ.T @ y_NK)
        return total_NK

    def _blocks(self) -> Iterator[Tensor]:
        """Yield J in blocks of columns, ``[N, Q]``: some outputs of one layer."""
        rows = sum(self.counts)
        for layer, tape in enumerate(self.tapes[0]):
            inputs, outputs = tape.input_CNI.shape[2] + 1, tape.grad_CNO.shape[2]
            step = max(1, BLOCK // (rows * inputs))
            for start in range(0, outputs, step):
                yield self._block(layer, slice(start, start + step)).flatten(1)

    def _block(self, layer: int, outputs: slice) -> Tensor:
        """Return the rows of some outputs of a layer, ``[N, O, I + 1]``, the bias last."""
        terms = [layers[layer] for layers in self.tapes]
        wanted = range(terms[0].grad_CNO.shape[2])[outputs]
        shape = (sum(self.counts), len(wanted), terms[0].input_CNI.shape[2] + 1)
        block_NOI = self.residual_N.new_empty(shape)
        for tape, part_NOI in zip(terms, block_NOI.split(self.counts), strict=True):
            grad_CNO = tape.grad_CNO[..., outputs]
            part_NOI[..., -1] = grad_CNO[0]
            weight_NOI = part_NOI[..., :-1]
            if len(grad_CNO) == 1:
                torch.mul(grad_CNO[0, :, :, None], tape.input_CNI[0, :, None], out=weight_NOI)
            else:
                weight_NOI.copy_(torch.bmm(grad_CNO.permute(1, 2, 0), tape.input_CNI.transpose(0, 1)))
        return block_NOI


def _split(v_P: Tensor, tape: LayerTape) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's weight ``[O, I]`` and bias ``[O]`` at the front of a vector, and the rest of the vector."""
    inputs, outputs = tape.input_CNI.shape[2], tape.grad_CNO.shape[2]
    weight_Q, bias_O, rest_P = v_P.split([inputs * outputs, outputs, len(v_P) - (inputs + 1) * outputs])
    return weight_Q.view(outputs, inputs), bias_O, rest_P

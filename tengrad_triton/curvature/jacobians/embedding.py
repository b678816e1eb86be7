"""The per-sample gradients of an embedding, stored as the ids looked up and the gradients of the embedded vectors.

Dimensions: N samples, P positions, V rows of the embedding's weight, D entries of a row, K entries of a flat gradient.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from tengrad_triton.curvature.choices import FACTORED_KERNELS, Ops, ProductKernels, Representation
from tengrad_triton.curvature.concat import concat_embedding, concat_outer, take_embedding_rows, take_outer_rows
from tengrad_triton.curvature.jacobians.base import Jacobian, Operands, UpdateState
from tengrad_triton.curvature.jacobians.factored import Factored
from tengrad_triton.curvature.jacobians.per_sample import CHUNK_BYTES, PerSample
from tengrad_triton.curvature.scaling import Multiplier, Scale
from tengrad_triton.curvature.target import Target
from tengrad_triton.layers import EmbeddingGrads, OuterProducts


class _SingleJacobian(Jacobian):
    """A `Jacobian` that shares no launch: it defines gram, project and expand for itself."""

    @override
    def _layout(self) -> Hashable:
        return id(self)

    @override
    def view(self, x: Tensor) -> Tensor:
        return x

    @staticmethod
    @override
    def gram_grouped(jacobians: Sequence[_SingleJacobian], blocks: list[int], count: int) -> Tensor:
        return _placed(jacobians[0].gram(), blocks[0], count)

    @staticmethod
    @override
    def operands_of(jacobians: Sequence[_SingleJacobian]) -> Operands:
        return ()

    @override
    def project_grouped(self, operands: Operands, v: list[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
        y_N, (count, rows) = self.project(v[0]), shape
        return _placed(torch.nn.functional.pad(y_N, (0, rows - len(y_N))), blocks[0], count)

    @override
    def expand_update_grouped_(self, operands: Operands, state: UpdateState) -> None:
        grad, momentum = state.grads[0], state.momenta[0]
        momentum = torch.zeros_like(momentum) if momentum is grad else momentum  # scaled damping has no momentum
        tensors = (state.params[0], momentum, state.settings[0])
        target = Target("", "", *tensors, nesterov=state.nesterov, spring=0.0, rate=0, group=0)
        self.expand_update_(target, state.grads[0], state.w[0], state.dampings[0])


def _placed(one: Tensor, block: int, count: int) -> Tensor:
    whole = one.new_zeros(count, *one.shape)
    whole[block] = one
    return whole


@dataclass(frozen=True)
class EmbeddingJacobian(_SingleJacobian):
    """The J of an embedding's weight V × D, which a linear layer may share (a tied embedding and head).

    Neither one-hot vectors nor N rows of V × D entries are kept.

    Attributes:
        embedding: what the calls of the embedding contribute.
        linear: what the calls of the linear layer contribute, if one shares the weight.
        ops: the kernels.
    """

    embedding: EmbeddingGrads
    linear: OuterProducts | None
    ops: Ops
    scale: Scale | None = None

    @property
    @override
    def rows(self) -> int:
        """Return N."""
        return len(self.embedding.g_NPD)

    @property
    @override
    def product_kernels(self) -> ProductKernels:
        """Return the kernels of the linear layer's part."""
        return FACTORED_KERNELS

    @override
    def gram(self) -> Tensor:
        """Return k_NN from explicit rows, for some of the ids that were looked up at a time."""
        embedding = self.embedding
        if self.linear is None and not torch.compiler.is_compiling():
            known, ids_NP = torch.unique(embedding.ids_NP, return_inverse=True)
            embedding = EmbeddingGrads(ids_NP, embedding.g_NPD, len(known))
        n, _, entries = embedding.g_NPD.shape
        step = max(1, CHUNK_BYTES // (n * entries * embedding.g_NPD.itemsize))
        k_NN = embedding.g_NPD.new_zeros(n, n)
        for first in range(0, embedding.num_embeddings, step):
            end = min(embedding.num_embeddings, first + step)
            j_NK = _explicit_rows(embedding, self.linear, first, end, self.ops)
            k_NN = k_NN + self.ops.gram_rows([j_NK], [0], 1)[0]
        return k_NN

    @override
    def project(self, v: Tensor) -> Tensor:
        """Return y_N with y_n = ⟨J_n, v⟩ = Σ_p ⟨v[id_np], g_np⟩, and the linear layer's part."""
        embedding = self.embedding
        y_N = (v[embedding.ids_NP].to(embedding.g_NPD.dtype) * embedding.g_NPD).sum((1, 2))
        return y_N if self.linear is None else y_N + Factored(self.linear, self.ops).project(v)

    @override
    def expand_update_(self, target: Target, grad: Tensor, w_N: Tensor, damping: Tensor) -> None:
        """Step without the embedding's part of Jᵀ w, then add its effect at the ids: the update is linear in d."""
        if self.linear is None:
            _update_along_gradient_(target, grad, damping)
        else:
            Factored(self.linear, self.ops).expand_update_(target, grad, w_N, damping)
        lr, momentum = target.settings[:2].unbind()
        change_NPD = self.embedding.g_NPD * (w_N[: len(self.embedding.g_NPD)] / -damping)[:, None, None]
        change, ids = change_NPD.flatten(0, 1), self.embedding.ids_NP.flatten()
        target.momentum.index_add_(0, ids, change.to(target.momentum.dtype))
        share = lr * (1 + momentum) if target.nesterov else lr
        target.parameter.index_add_(0, ids, change.to(target.parameter.dtype) * -share)

    @override
    def explicit_rows(self) -> Tensor:
        return _explicit_rows(self.embedding, self.linear, 0, self.embedding.num_embeddings, self.ops)

    @override
    def combine(self, directions_RN: Tensor) -> PerSample:
        """Return R linear combinations of the rows, as explicit rows."""
        return PerSample(directions_RN @ self.explicit_rows(), self.ops, "directions", self.scale)

    @override
    def _times(self, by: Multiplier) -> EmbeddingJacobian:
        linear = None if self.linear is None else by.of_outer_products(self.linear)
        return replace(self, embedding=by.of_embedding(self.embedding), linear=linear)

    @override
    def _append(self, older: Jacobian, rows: int) -> EmbeddingJacobian | None:
        """Return these rows, followed by the first ``rows`` rows of ``older``, if both have the same parts."""
        if not isinstance(older, EmbeddingJacobian) or (older.linear is None) != (self.linear is None):
            return None
        if older.embedding.num_embeddings != self.embedding.num_embeddings:
            return None
        first = torch.arange(rows, device=self.embedding.g_NPD.device)
        embedding = concat_embedding([[self.embedding], [take_embedding_rows(older.embedding, first)]])
        if self.linear is None or older.linear is None:
            return replace(self, embedding=embedding)
        linear = concat_outer([[self.linear], [take_outer_rows(older.linear, first)]])
        return replace(self, embedding=embedding, linear=linear)

    @property
    @override
    def representation(self) -> Representation:
        """Return the name of this representation."""
        return "factored"

    @override
    def pack(self) -> dict[str, Any]:
        """Return tensors and plain numbers."""
        own = self.embedding
        embedding = {"ids_NP": own.ids_NP, "g_NPD": own.g_NPD, "num_embeddings": own.num_embeddings}
        linear = {} if self.linear is None else Factored(self.linear, self.ops).pack()
        return {**linear, **self._packed(), "embedding": embedding}

    @property
    @override
    def nbytes(self) -> int:
        """Return the bytes stored."""
        own = self.embedding.ids_NP.nbytes + self.embedding.g_NPD.nbytes
        return own if self.linear is None else own + Factored(self.linear, self.ops).nbytes


def _explicit_rows(embedding: EmbeddingGrads, linear: OuterProducts | None, first: int, end: int, ops: Ops) -> Tensor:
    """Return j_NK for the ids from ``first`` up to, and without, ``end``."""
    j_NK = embedding.sample_grads_between(first, end).flatten(1)
    return j_NK if linear is None else j_NK + OuterProducts(linear.a, linear.g_NGPO[..., first:end]).sample_grads(ops)


def _update_along_gradient_(target: Target, grad: Tensor, damping: Tensor) -> None:
    """Apply `kernels.update_` along grad / damping, without a tensor of the weight's size for the direction."""
    param, momentum_buffer = target.parameter, target.momentum
    lr, momentum, weight_decay, shrink = target.settings.unbind()
    damping = damping.to(grad.dtype)
    momentum_buffer.mul_(momentum).addcdiv_(grad, damping).addcmul_(param, weight_decay)
    if target.nesterov:
        param.mul_(1 - lr * (shrink + weight_decay)).addcdiv_(grad, -damping / lr)
        param.addcmul_(momentum_buffer, -lr * momentum)
    else:
        param.mul_(1 - lr * shrink).addcmul_(momentum_buffer, -lr)

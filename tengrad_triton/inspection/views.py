"""The methods of `TENGraD` that show its curvature as dense tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.curvature.woodbury import Curvature, FisherBlocks
from tengrad_triton.inspection.held_block import HeldBlock, find_block

_MAX_BYTES = 2**30


@dataclass(frozen=True)
class FisherBlock:
    """What belongs to the matrices of one Fisher block.

    Attributes:
        parameters: for each parameter, by name, its place among the K rows and columns of the matrices: a slice. Its
            entries there are in the order of the flat parameter, as in ``parameter.flatten()``.
        rows: N in F = Jᵀ J / N: the rows of all refreshes that are kept (M10), before M7 and M12 replace them by fewer.
        damping: α as it was factored (M5): the setting ε, times max(1, trace F) with ``relative_damping`` (trace(K) / N
            in place of trace F with scaling), with ``damping="lm"`` the ε of the last refresh (M8), and ten times that
            for each earlier failure of the block. If ``failed``, α + trace(K) / N.
        failed: whether rounding made the factorization impossible. Then the step is along V / (α + trace(K) / N), or
            α D⁻¹ V / (α + trace(K) / N) with scaling, until the next refresh.
    """

    parameters: dict[str, slice]
    rows: int
    damping: float
    failed: bool


class CurvatureViews:
    """The curvature that an optimizer holds at present, as dense tensors: for small blocks.

    ``name`` is the name of a Fisher block in the column ``block`` of `TENGraD.summary`, ``"."`` for that of the model
    itself. All methods raise:

    - `ValueError`: no block has this name, its parameters take the SGD step, the result is larger than ``max_bytes``,
      or, except for `block`, each process has a part of J (`fully_shard`);
    - `TypeError`: ``max_bytes`` is no number;
    - `RuntimeError`: no refresh was made yet, or the memory was freed for the one that is due.

    Tensors are computed in float64, and returned in float64 for a model in float64, and otherwise in float32. They are
    copies. ``max_bytes`` bounds the result together with the rows of J, both in float64; computing them takes about
    three times that.
    """

    _layers: list[LayerParams]
    _curvature: Curvature | None

    @abstractmethod
    def _blocks_of(self, layers: Sequence[LayerParams]) -> FisherBlocks:
        """Return the Fisher blocks that the layers with rows among these form."""

    def block(self, name: str) -> FisherBlock:
        """Return the order of the parameters, the number of rows and the damping of a block."""
        held = self._held(name)
        damping = float(held.curvature.damping_L[held.index])
        return FisherBlock(held.places(), held.curvature.rows, damping, held.has_failed)

    @torch.no_grad()
    def fisher_block(self, name: str, *, max_bytes: float = _MAX_BYTES) -> Tensor:
        """Return F = Jᵀ J / N of a block (M2), [K, K], without damping.

        J has the rows of the last refreshes as ``fisher``, ``fisher_samples``, ``fisher_rows`` and ``history`` say (M9,
        M10): F belongs to their batches, at the parameters of each. It is exact for a J that is ``factored`` or
        ``per_sample``; in bfloat16 it is the F of the rounded rows; of a ``compressed`` J it lacks the directions that
        were dropped (M7). `block` has the order of the K parameters.
        """
        held = self._small(name, max_bytes)
        return held.fisher().to(held.dtype)

    @torch.no_grad()
    def inverse_block(self, name: str, *, max_bytes: float = _MAX_BYTES) -> Tensor:
        """Return the matrix [K, K] that a step multiplies the block's gradient by, at present.

        With ``scaling="none"`` it is (F + α I)⁻¹ (M5), and the step is along (F + α I)⁻¹ V. With ``"diagonal"`` and
        ``"kronecker"`` it is α (F + α D)⁻¹ (M17), and V̂, the mean of gradients, takes the place of V. α is
        `FisherBlock.damping`, and D is that of `scale_block`. It is formed from the factors that the step uses, so it
        also is what the step does where a factorization failed. Not part of it are what comes before (averages of
        gradients, SPRING's μ φ, M13) and after: ``clip_threshold`` (M17), the trust region (M14), momentum, learning
        rate and weight decay.
        """
        held = self._small(name, max_bytes)
        return held.inverse().to(held.dtype)

    @torch.no_grad()
    def scale_block(self, name: str, *, max_bytes: float = _MAX_BYTES) -> Tensor:
        """Return D of F + α D (M17), [K, K], with a block on the diagonal for each parameter; I without scaling."""
        held = self._small(name, max_bytes)
        return held.scale().to(held.dtype)

    @torch.no_grad()
    def rows(self, name: str, *, max_bytes: float = _MAX_BYTES) -> dict[str, Tensor]:
        """Return the rows of J, for each parameter of a block by name: [R, *parameter.shape].

        Row n is the gradient of one sample's own loss (M1). The rows of the newest refresh come first (M10); within
        one, the samples of each micro-batch, in order, for the first row of each sample, then for the second row (M9).
        With them F = Jᵀ J / N, where N is `FisherBlock.rows`. R = N, except where J holds fewer rows of the same F:

        - ``compressed``: one for each direction that was kept, of the length of its eigenvalue's root; F is that of all
          rows up to ``tol`` (M7);
        - a block with fewer parameters than rows, all of them explicit: the rows of R in J = Q R (M12), with the same F
          but for rounding. `TENGraD.summary` says "as many rows as parameters".

        In bfloat16 they are the rounded rows.
        """
        held = self._whole(name)
        instead = "have fewer rows by fisher_rows="
        held.check_size(held.stored_rows * held.entries, "its rows", max_bytes, instead)
        return {one.name: one.rows().to(held.dtype) for one in held.parameters}

    def _small(self, name: str, max_bytes: float) -> HeldBlock:
        held = self._whole(name)
        numbers = held.entries * (held.entries + held.stored_rows)
        instead = "multiply by the rows instead, F v = Jᵀ (J v) / N with J of optimizer.rows(name)"
        held.check_size(numbers, "a matrix of all pairs and the rows", max_bytes, instead)
        return held

    def _whole(self, name: str) -> HeldBlock:
        held = self._held(name)
        if held.curvature.shards.is_cut:
            raise ValueError(
                f"of block {name!r} each process has a part, as of the model's parameters (fully_shard): look at it in "
                "one process, or with DistributedDataParallel"
            )
        return held

    def _held(self, name: str) -> HeldBlock:
        return find_block(name, self._layers, self._curvature, self._blocks_of(self._layers))

"""From recorded batches to every block's J: the canonical form of each use, and a representation for each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from tengrad_triton.backend import KernelsFor
from tengrad_triton.blocks import Block, full_name
from tengrad_triton.capture import Capture
from tengrad_triton.jacobian import Jacobian, Uses, geometry_of, jacobian_of, taken
from tengrad_triton.layers import Canonical, Explicit, Outer, canonical
from tengrad_triton.plan import Choice, Chosen, Geometry
from tengrad_triton.woodbury import BlockJacobian, Curvature

BlockUses = Mapping[str, Uses]
"""What the recorded batches contribute to each parameter of a block."""


def gather(blocks: Sequence[Block], capture: Capture) -> tuple[dict[str, BlockUses], dict[str, str]]:
    """Return the uses of every covered block, and why the others have none.

    Raises:
        RuntimeError: nothing was recorded.
        ValueError: a rule returned rows of another size than its parameter.
    """
    covered = {block.name: block for block in blocks if block.why_sgd is None and block.trained()}
    if covered and not capture.records:
        raise RuntimeError(
            "the curvature is due for a refresh, and no forward and backward of the model was seen since the last "
            "step: call model(inputs) itself, with gradients, before loss.backward() and optimizer.step()"
        )
    gathered: dict[str, BlockUses] = {}
    missing: dict[str, str] = {}
    rows = dict(capture.rows())
    for name, block in covered.items():
        if name not in rows:
            missing[name] = capture.why_missing(name)
            continue
        try:
            gathered[name] = uses_of(block, rows[name])
        except KeyError as unknown:
            missing[name] = f"the rule for {type(block.layer).__name__} says nothing of {unknown.args[0]}"
    return gathered, missing


def uses_of(block: Block, forwards: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> BlockUses:
    """Return what a block's calls, (x, grad_y) in each forward, contribute to each of its parameters.

    Raises:
        KeyError: the layer's rule says nothing of that parameter.
        ValueError: it returned rows of another size than the parameter.
    """
    forms = [[_canonical(block, x, grad_y) for x, grad_y in forward] for forward in forwards]
    return {label: [[form[label] for form in forward] for forward in forms] for label in block.trained()}


def _canonical(block: Block, x: Tensor, grad_y: Tensor) -> Canonical:
    form = canonical(block.layer, _widened(x), _widened(grad_y))
    for label, parameter in block.parameters.items():
        if label in form and _entries(form[label]) != parameter.numel():
            raise ValueError(
                f"the rule for {type(block.layer).__name__} returned rows of {_entries(form[label])} entries for "
                f"{block.label(label)!r}, which has {parameter.numel()}"
            )
    return form


def _widened(tensor: Tensor) -> Tensor:
    """Return half precision as float32: a Gram matrix needs its digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def _entries(use: Outer | Explicit) -> int:
    if isinstance(use, Explicit):
        return use.j_NK[0].numel()
    geometry = geometry_of(use)
    return geometry.groups * geometry.inputs * geometry.outputs


def sampled_rows(gathered: Mapping[str, BlockUses], most: int, generator: torch.Generator) -> dict[str, BlockUses]:
    """Return ``most`` of the rows, the same ones of every block: any row as likely as any other, so F is unbiased."""
    uses = next((use for block in gathered.values() for use in block.values()), [])
    sizes = [_rows(batch[0]) for batch in uses]
    if sum(sizes) <= most:
        return dict(gathered)
    drawn, _ = torch.randperm(sum(sizes), generator=generator)[:most].sort()
    ends = torch.tensor(sizes).cumsum(0)
    parts = [drawn[(drawn >= end - size) & (drawn < end)] - (end - size) for size, end in zip(sizes, ends, strict=True)]

    def some(uses: Uses) -> Uses:
        return [[taken(use, part) for use in batch] for batch, part in zip(uses, parts, strict=True) if len(part)]

    return {name: {label: some(uses) for label, uses in block.items()} for name, block in gathered.items()}


def _rows(use: Outer | Explicit) -> int:
    return len(use.j_NK if isinstance(use, Explicit) else use.g_NGPO)


def geometries_of(gathered: Mapping[str, BlockUses]) -> dict[str, Geometry]:
    """Return the sizes of every weight that multiplies what its layer sees, by its full name."""
    geometries = {}
    for name, block in gathered.items():
        for label, uses in block.items():
            first = uses[0][0]
            if isinstance(first, Outer):
                geometry = geometry_of(first)
                rows = sum(_rows(batch[0]) for batch in uses)
                stored = geometry.factored_bytes * rows // geometry.samples
                geometries[full_name(name, label)] = replace(geometry, samples=rows, factored_bytes=stored)
    return geometries


def jacobians_of(gathered: dict[str, BlockUses], chosen: Chosen, kernels_for: KernelsFor) -> dict[str, BlockJacobian]:
    """Return every block's J, each parameter in the representation and with the kernels chosen for it.

    ``gathered`` is used up: a block's canonical form (padded inputs) goes when its J is there.
    """

    def one(name: str, use: Uses) -> Jacobian:
        choice = chosen.get(name, Choice("per_sample"))
        return jacobian_of(use, choice.representation, kernels_for(choice.torch_for))

    def of_block(name: str, block: BlockUses) -> BlockJacobian:
        return {label: one(full_name(name, label), use) for label, use in block.items()}

    return {name: of_block(name, gathered.pop(name)) for name in list(gathered)}


def rows_of(gathered: Mapping[str, BlockUses]) -> int:
    """Return how many rows J will have."""
    uses = next((use for block in gathered.values() for use in block.values()), [])
    return sum(_rows(batch[0]) for batch in uses)


def extended(
    blocks: Mapping[str, BlockJacobian], rows: int, before: Curvature | None, history: int
) -> tuple[Mapping[str, BlockJacobian], tuple[int, ...]]:
    """Return J with the rows of the refreshes before this one behind its own, and how many rows are of which.

    Where something has changed (a layer, a size, a representation) the history begins anew.
    """
    older = () if before is None else before.window[: history - 1]
    if (
        before is None
        or not older
        or {n: set(b) for n, b in blocks.items()} != {n: set(b) for n, b in before.blocks.items()}
    ):
        return blocks, (rows,)
    joined = {
        name: {label: own.extended(before.blocks[name][label], sum(older)) for label, own in block.items()}
        for name, block in blocks.items()
    }
    if any(rows is None for block in joined.values() for rows in block.values()):
        return blocks, (rows,)
    return cast("Mapping[str, BlockJacobian]", joined), (rows, *older)


def compressed_blocks(gathered: Mapping[str, BlockUses], chosen: Chosen) -> list[str]:
    """Return the blocks with a weight that is to be compressed; all of a block has the same directions."""
    compressed = {name for name, choice in chosen.items() if choice.representation == "compressed"}
    return [name for name, block in gathered.items() if any(full_name(name, label) in compressed for label in block)]

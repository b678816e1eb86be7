"""From recorded batches to every block's J: the canonical form of each use, and a representation for each parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tengrad_triton.capture.blocks import LayerParams, CapturedLayer, full_name
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.capture.record import Record
from tengrad_triton.curvature.build import jacobian_of
from tengrad_triton.curvature.choices import Choice, Choices, OpsFor
from tengrad_triton.curvature.contributions import Contributions, geometry_of_uses, rows_in, take_rows
from tengrad_triton.curvature.geometry import Geometry
from tengrad_triton.curvature.jacobian import BlockJacobian, Jacobian
from tengrad_triton.curvature.woodbury import Curvature
from tengrad_triton.layers import Call, Contribution, Inputs, PerSampleGrads, canonical

BlockUses = Mapping[str, Contributions]
"""What the recorded batches contribute to each parameter of a block."""


def gather(
    blocks: Sequence[LayerParams], capture: Capture, frugal: bool = False
) -> tuple[dict[str, BlockUses], dict[str, str]]:
    """Return the uses of every covered block, and why the others have none.

    ``frugal`` uses up what was captured, so that its memory goes layer by layer as J comes in its place. The price on a
    CPU is that glibc hands the pages back, and later steps fault them in again: a fifth of a step of WRN-28-4.

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
    capture.complete()
    found = [_forms_of_record(capture.layers, record, capture.scale, frugal) for record in capture.records]
    gathered: dict[str, BlockUses] = {}
    missing: dict[str, str] = {}
    for name, block in covered.items():
        trained = {label: block.parameters[label] for label in block.trained()}
        absent = [p for p in trained.values() if not all(id(p) in forms for forms in found)]
        if absent:
            missing[name] = _why_missing(absent[0], capture)
        else:
            gathered[name] = {label: [forms.pop(id(p)) for forms in found] for label, p in trained.items()}
    if frugal:
        capture.forget()
    return gathered, missing


def _forms_of_record(
    sources: Mapping[str, CapturedLayer], record: Record, scale: int, frugal: bool
) -> dict[int, list[Contribution]]:
    """Return what a forward contributes to each parameter, by the parameter's id."""
    forms: dict[int, list[Contribution]] = {
        key: [PerSampleGrads(scale * rows if scale != 1 else rows)] for key, rows in record.per_sample_grads.items()
    }
    given = tree_leaves((record.call.args, record.call.kwargs))
    lent = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
    for name, source in sources.items():
        uses = record.calls.pop(name, []) if frugal else record.calls.get(name, [])
        calls = [use for use in uses if use.has_grads]
        if calls:
            record.layers_with_grads.add(name)
        wanted = {id(p) for p in source.parameters.values() if p.requires_grad} - record.unattributed.keys()
        if source.rerun or not wanted or name in record.unbatched:
            continue
        pairs = [(_own(use.inputs(name), lent), use.scaled_grads(scale)) for use in calls]
        of_source = forms_of(name, source, pairs, record.samples)
        for key in wanted & of_source.keys():
            forms.setdefault(key, []).extend(of_source[key])
    return forms


def _own(x: Inputs, lent: Collection[int]) -> Inputs:
    """Return a layer's input, with a copy of what the training loop lent the model: its next batch may go there."""
    if isinstance(x, Call):
        args, kwargs = tree_map_only(Tensor, partial(_own, lent=lent), (x.args, x.kwargs))
        return replace(x, args=args, kwargs=kwargs)
    return x.clone() if x.untyped_storage().data_ptr() in lent else x


def forms_of(
    name: str, source: CapturedLayer, calls: Sequence[tuple[Any, Any]], samples: int
) -> dict[int, list[Contribution]]:
    """Return what the calls of a layer, (input, derivatives), contribute to its parameters, by the parameter's id.

    Raises:
        ValueError: the layer's rule returned rows of another size than the parameter, or of other samples.
    """
    forms: dict[int, list[Contribution]] = {}
    for x, grad_y in calls:
        form = canonical(source.layer, _widened(x), _widened(grad_y))
        for label, parameter in source.parameters.items():
            if label in form:
                use = _checked(form[label], parameter, samples, source.layer, full_name(name, label))
                forms.setdefault(id(parameter), []).append(use)
    return forms


def _checked(use: Contribution, parameter: Tensor, samples: int, layer: nn.Module, name: str) -> Contribution:
    if use.entries != parameter.numel():
        raise ValueError(
            f"the rule for {type(layer).__name__} returned rows of {use.entries} entries for {name!r}, which has "
            f"{parameter.numel()}"
        )
    if rows_in(use) != samples:
        raise ValueError(
            f"the rule for {type(layer).__name__} returned {rows_in(use)} rows for {name!r}, where the batch has "
            f"{samples} samples"
        )
    return PerSampleGrads(use.j_NK.reshape(-1, *parameter.shape)) if isinstance(use, PerSampleGrads) else use


def _why_missing(parameter: Tensor, capture: Capture) -> str:
    """Return why a parameter has no rows."""
    for record in capture.records:
        if id(parameter) in record.unattributed:
            return record.unattributed[id(parameter)]
        for name, source in capture.layers.items():
            labels = [label for label, p in source.parameters.items() if p is parameter]
            if labels and name in record.layers_with_grads:
                return f"the rule for {type(source.layer).__name__} says nothing of {labels[0]}"
    return "not called by the model's forward"


def _widened(value: Any) -> Any:
    """Return half precision as float32, in whatever it stands: a Gram matrix needs its digits."""
    if isinstance(value, Call):
        return replace(value, args=_widened(value.args), kwargs=_widened(dict(value.kwargs)))
    return tree_map_only(Tensor, _wide, value)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def sampled_rows(gathered: Mapping[str, BlockUses], most: int, generator: torch.Generator) -> dict[str, BlockUses]:
    """Return ``most`` of the rows, the same of every block: each as likely as any other, so F is unbiased (M10)."""
    uses = next((use for block in gathered.values() for use in block.values()), [])
    sizes = [rows_in(batch[0]) for batch in uses]
    if sum(sizes) <= most:
        return dict(gathered)
    drawn, _ = torch.randperm(sum(sizes), generator=generator)[:most].sort()
    ends = torch.tensor(sizes).cumsum(0)
    parts = [drawn[(drawn >= end - size) & (drawn < end)] - (end - size) for size, end in zip(sizes, ends, strict=True)]

    def some(uses: Contributions) -> Contributions:
        return [[take_rows(use, part) for use in batch] for batch, part in zip(uses, parts, strict=True) if len(part)]

    return {name: {label: some(uses) for label, uses in block.items()} for name, block in gathered.items()}


def geometries_of(gathered: Mapping[str, BlockUses]) -> dict[str, Geometry]:
    """Return the sizes of every weight that multiplies what its layer sees, by its full name."""
    geometries = {}
    for name, block in gathered.items():
        for label, uses in block.items():
            geometry = geometry_of_uses(uses[0])
            if geometry is not None:
                rows = sum(rows_in(batch[0]) for batch in uses)
                stored = geometry.factored_bytes * rows // geometry.samples
                geometries[full_name(name, label)] = replace(geometry, samples=rows, factored_bytes=stored)
    return geometries


def jacobians_of(gathered: dict[str, BlockUses], chosen: Choices, ops_for: OpsFor) -> dict[str, BlockJacobian]:
    """Return every block's J, each parameter in the representation and with the kernels chosen for it.

    ``gathered`` is used up: a block's canonical form (padded inputs) goes when its J is there.
    """

    def one(name: str, use: Contributions) -> Jacobian:
        choice = chosen.get(name, Choice("per_sample"))
        return jacobian_of(use, choice.representation, ops_for(choice.kernel_overrides))

    def of_block(name: str, block: BlockUses) -> BlockJacobian:
        return {label: one(full_name(name, label), use) for label, use in block.items()}

    return {name: of_block(name, gathered.pop(name)) for name in list(gathered)}


def rows_of(gathered: Mapping[str, BlockUses]) -> int:
    """Return how many rows J will have."""
    uses = next((use for block in gathered.values() for use in block.values()), [])
    return sum(rows_in(batch[0]) for batch in uses)


def append_history(
    blocks: Mapping[str, BlockJacobian], rows: int, before: Curvature | None, history: int
) -> tuple[Mapping[str, BlockJacobian], tuple[int, ...]]:
    """Return J with the rows of the refreshes before this one behind its own (M10), and how many rows are of which.

    Where something has changed (a layer, a size, a representation) the history begins anew.
    """
    older = () if before is None else before.window[: history - 1]
    if (
        before is None
        or not older
        or {n: set(b) for n, b in blocks.items()} != {n: set(b) for n, b in before.blocks.items()}
    ):
        return blocks, (rows,)
    concat = {
        name: {label: own.append_history(before.blocks[name][label], sum(older)) for label, own in block.items()}
        for name, block in blocks.items()
    }
    if any(rows is None for block in concat.values() for rows in block.values()):
        return blocks, (rows,)
    return cast("Mapping[str, BlockJacobian]", concat), (rows, *older)


def compressed_blocks(gathered: Mapping[str, BlockUses], chosen: Choices) -> list[str]:
    """Return the blocks with a weight that is to be compressed; all of a block has the same directions."""
    compressed = {name for name, choice in chosen.items() if choice.representation == "compressed"}
    return [name for name, block in gathered.items() if any(full_name(name, label) in compressed for label in block)]
